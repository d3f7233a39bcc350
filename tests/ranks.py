"""Run by torchrun, on every rank, for test_fsdp.py: `ranks.py JOB.json` does many checks in one launch, since a launch
costs seconds. Findings go to OUT.json (rank 0); test_fsdp.py asserts on them."""

import gc
import json
import sys
import weakref
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import tgdpo
from conftest import eight_pairs

PROMPTS, RESPONSES = [[7, 9], [7, 9], [8]], [[11, 13, 8, 3], [14, 3], [15, 16, 17, 18, 19, 20, 3]]


def sequences(shift=0):
    """Fixed sequences as a batch; another shift makes other tokens."""
    other = lambda rows: [[(i + shift) % 21 for i in row] for row in rows]
    return tgdpo.collate({"prompt_ids": other(PROMPTS), "chosen_ids": other(RESPONSES)}, "cpu")


def logps_and_gradients(model):
    """Token log-probs of the sequences, and the gradient of a weighted sum of them, by weight."""
    logps = model.token_logps(sequences())
    (logps * torch.linspace(-1, 2, logps.numel()).reshape(logps.shape)).sum().backward()
    whole = lambda g: g.full_tensor() if isinstance(g, DTensor) else g
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), grads


def compare_with_plain(path, folder, **changes):
    """A sharded model against the same one as plain transformers loads it -> findings."""
    options = tgdpo.Options(device="cpu", dtype="float32", **changes)
    model = tgdpo.load_model(path, options)
    plain = tgdpo.prepare_model(tgdpo.read_model(path), options)
    plain.token_logps = partial(tgdpo.token_logps, plain)
    logps, grads = logps_and_gradients(model)
    want, want_grads = logps_and_gradients(plain)
    local = sum(p.to_local().numel() for p in model.parameters())
    everywhere = tgdpo.gather(local)
    tgdpo.save_model(model, tgdpo.load_tokenizer(path), folder)
    found = {
        "logps": (logps - want).abs().max().item(),
        "gradients": max((grads[name] - want_grads[name]).abs().max().item() for name in want_grads),
        "gradient size": max(g.abs().max().item() for g in want_grads.values()),
        "same weights have gradients": grads.keys() == want_grads.keys(),
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "layers": model.config.get_text_config().num_hidden_layers,
        "weights": sum(p.numel() for p in plain.parameters()),
        "weights of all ranks": sum(everywhere),
        "largest share": max(everywhere),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()} | {str(p.grad.dtype) for p in model.parameters()}),
        "buffers": all(torch.equal(b, dict(plain.named_buffers())[name]) for name, b in model.named_buffers()),
        "training": sorted({type(m).__name__ for m in model.modules() if m.training}),
        "checkpointed": sorted({type(m).__name__ for m in model.modules() if hasattr(m, "gradient_checkpointing")}),
    }
    return found


def totals(path):
    """What run_pairs says of seven pairs, from passes of one pair."""
    options = tgdpo.Options(loss="simpo", device="cpu", dtype="float32", per_device_train_batch_size=1)
    pairs, _ = tgdpo.tokenize(eight_pairs()[:7], tgdpo.load_tokenizer(path), 64, "pairs")
    return tgdpo.run_pairs(tgdpo.load_model(path, options), pairs, options, learn=False)


def bfloat16(path):
    """A gradient that ranks make of different sequences, computed in bfloat16 -> the share of its numbers that bfloat16
    cannot hold, which are there only if float32 numbers were averaged; and how far the log-probs are from float32's."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = tgdpo.load_model(path, tgdpo.Options(device="cpu", dtype=dtype))
        found[dtype] = model.token_logps(sequences(tgdpo.rank()))
        found[dtype].sum().backward()
    grad = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    away = (found["bfloat16"] - found["float32"]).abs().max().item()
    return {"away": away, "beyond bfloat16": (grad != grad.bfloat16().float()).float().mean().item()}


def loading(path):
    """Bytes that each rank takes at most while a model is loaded, beyond what it held before (Linux)."""
    status = Path("/proc/self/status")
    held = lambda what: next(1024 * int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith(what))
    gc.collect()  # small models have been loaded before, so that all libraries are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    model = tgdpo.load_model(path, tgdpo.Options(device="cpu", dtype="float32"))
    taken = tgdpo.gather(held("VmHWM") - before)
    alive = weakref.ref(model)
    del model
    gc.collect()
    return {"taken": taken, "freed": alive() is None}


def unfinish(out):
    """Leave a run as a kill after its fourth step would: unfinished, no model, half a row, no later checkpoint."""
    run, metrics = Path(out) / "run.json", Path(out) / "metrics.jsonl"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"finished": False}))
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:6]) + '\n{"st')
    (Path(out) / "model.safetensors").unlink()


def main(job):
    assert tgdpo.start_processes()
    found = {"world": tgdpo.world(), "models": {}, "statuses": []}
    for name, (path, out, changes) in job["models"].items():
        tgdpo.LOGITS_BYTES = changes.pop("logits_bytes", 2**27)
        found["models"][name] = compare_with_plain(path, Path(out), **changes)
    tgdpo.LOGITS_BYTES = 2**27
    if "large" in job:
        found["loading"] = loading(job["large"])
        found["totals"] = totals(job["models"]["llama, untied"][0])
        found["bfloat16"] = bfloat16(job["models"]["llama, untied"][0])
    for run in job["runs"]:
        for name, value in run.get("set", {}).items():
            setattr(tgdpo, name, value)
        if "unfinish" in run:
            tgdpo.once(unfinish, run["unfinish"])
        if "damage" in run:
            tgdpo.once(Path(run["damage"]).write_bytes, b"half a file")
        argv = run["argv"] + ([f"--seed={tgdpo.os.environ['RANK']}"] if run.get("own seed") else [])
        found["statuses"].append(tgdpo.main(argv))
    dist.barrier()
    dist.destroy_process_group()
    if tgdpo.os.environ["RANK"] == "0":
        Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
