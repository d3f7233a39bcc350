#!/usr/bin/env python3
"""What a run takes, measured: the peak of memory beside plan.py's estimate, tokens a second, use of the peak.

    torchrun --nproc_per_node 1 scripts/measure.py run.yaml --gradient_checkpointing true
    torchrun --nproc_per_node 2 scripts/measure.py run.yaml --device cpu --length 512

Weights are random, so the model's directory needs no more than config.json; sequences are random tokens, all of
--length (half of it prompt). One pass of an annotation and a few optimizer steps run through tgdpo.py's own functions.
On CUDA the memory is what torch has allocated at most; on the CPU it is what the process holds at most (Linux), less
what it held before.
"""
import argparse
import gc
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import datasets
import torch
import transformers

import plan
import tgdpo
from common import command


def held(what):
    """Bytes of this process: VmRSS, what it holds now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def forget_peak(device):
    """Begin a new measurement of the peak -> what is held now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmRSS")


def peak(device):
    """Bytes at most since forget_peak."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else held("VmHWM")


def random_model(name, folder):
    """Write a model of name's configuration with random weights, and no tokenizer."""
    torch.manual_seed(0)
    with tgdpo.reading(f"the configuration of model {name}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def random_pairs(n, length, vocabulary):
    """Pairs of random tokens with all columns that a loss may ask for."""
    rng = random.Random(0)
    ids = lambda m: [rng.randrange(vocabulary) for _ in range(m)]
    response = length - length // 2
    rows = {"index": [*range(n)], "prompt_ids": [ids(length // 2) for _ in range(n)]}
    for side in ("chosen", "rejected"):
        rows[f"{side}_ids"] = [ids(response) for _ in range(n)]
        rows[f"{side}_ref_logps"] = [[-8.0] * response] * n
        rows[f"{side}_rewards"] = [[0.1] * response] * n
    return datasets.Dataset.from_dict(rows)


def measure(options, length, steps):
    """-> {"annotate": bytes, "train": bytes, "seconds": of a step}; the peaks are this rank's."""
    cuda = options.device == "cuda"
    vocabulary = tgdpo.once(tgdpo.load_config, options.model_name_or_path).vocab_size
    pairs = random_pairs(tgdpo.batch_size(options), length, vocabulary)
    before = forget_peak(options.device)
    model = tgdpo.load_model(options.model_name_or_path, options)
    # Before any forward, after which FSDP would show gathered weights; AdamW's state comes with the first step.
    optimizer, scheduler, _ = tgdpo.make_optimizer(model, len(pairs), options)
    forget_peak(options.device)   # loading is another matter: rank 0 has held all the weights
    one_pass = range(options.per_device_train_batch_size * tgdpo.world())
    tgdpo.run_pairs(model, pairs.select(one_pass), options, learn=False)
    found = {"annotate": peak(options.device) - before}
    forget_peak(options.device)
    for step in range(steps + 1):
        if step == 1:   # the first one allocates AdamW's state
            torch.cuda.synchronize() if cuda else None
            began = time.perf_counter()
        tgdpo.run_pairs(model, pairs, options, learn=True)
        tgdpo.clip_gradients(model, options.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    torch.cuda.synchronize() if cuda else None
    if len(optimizer.state) != len([*model.parameters()]):
        raise RuntimeError("the optimizer does not hold all weights; what was measured is not training")
    seconds = (time.perf_counter() - began) / steps
    return found | {"train": peak(options.device) - before, "seconds": seconds}


def main(argv):
    """Measure and print -> exit status."""
    parser = argparse.ArgumentParser(prog="measure.py", usage="measure.py CONFIG.yaml [--OPTION VALUE ...]",
                                     allow_abbrev=False, epilog="All other options are tgdpo.py's.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps")
    parser.add_argument("--peak", type=float, default=989, help="as in plan.py")
    own, rest = parser.parse_known_args(argv)
    transformers.logging.disable_progress_bar()
    return command(lambda: report(own, tgdpo.once(tgdpo.read_options, rest)), torchrun=True)


def report(own, options):
    """Measure, and print it beside the estimate."""
    if not options.model_name_or_path:
        raise tgdpo.InputError("no --model_name_or_path; expected a model whose configuration is to be measured")
    name = options.model_name_or_path
    longest = tgdpo.once(plan.longest, name)
    if own.steps < 1 or not 2 <= own.length <= longest:
        raise tgdpo.InputError(f"--steps {own.steps}, --length {own.length}; expected at least 1, and 2 to {longest}")
    folder = tgdpo.once(tempfile.mkdtemp)
    try:
        tgdpo.once(random_model, name, folder)
        found = tgdpo.gather(measure(tgdpo.replace(options, model_name_or_path=folder), own.length, own.steps))
    finally:
        if not tgdpo.rank():
            tgdpo.shutil.rmtree(folder)
    if tgdpo.rank():
        return
    shards = int(tgdpo.os.environ.get("LOCAL_WORLD_SIZE", 1)) if options.hsdp else tgdpo.world()
    pairs = options.per_device_train_batch_size
    about, cost = plan.costs(options, 2 * pairs, own.length)
    responses = 2 * pairs * (own.length - own.length // 2)
    estimate = plan.memory(options, about, cost, responses, shards)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    recompute = "on" if options.gradient_checkpointing else "off"
    print(f"{name}: {about.weights / 1e9:.3f} billion weights; {tgdpo.world()} processes on {where}, {options.dtype}, "
          f"gradient checkpointing {recompute}, {pairs} pairs in a pass, each of 2 x {own.length} tokens")
    for stage in ("annotate", "train"):
        values = " ".join(f"{rank[stage] / plan.GIB:.2f}" for rank in found)
        print(f"{stage:9} estimated {plan.total(estimate[stage]) / plan.GIB:6.2f} GiB, measured on each rank: {values}")
    seconds, batch = max(rank["seconds"] for rank in found), tgdpo.batch_size(options)
    # Model operations: without what gradient checkpointing computes again.
    plain, response = tgdpo.replace(options, gradient_checkpointing=False), own.length - own.length // 2
    body = plan.costs(plain, 2, own.length)[1].both
    operations = batch * (body + 3 * 2 * 2 * response * about.hidden * about.vocabulary)
    print(f"{seconds:.2f} s a step of {batch} pairs, {batch * 2 * own.length / seconds:.0f} tokens a second; "
          f"{operations / seconds / 1e12:.3g} x 10^12 operations a second"
          + f", {operations / seconds / (tgdpo.world() * own.peak * 1e12):.1%} of peak" * (options.device == "cuda"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
