"""scripts/fast.py: shared prompts, attention in two calls and the block-wise softmax give the numbers of tgdpo.py."""

import json
import time
from unittest.mock import patch

import datasets
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import tgdpo
from conftest import ROOT, Bench, make_model, rows_of, write_rows
from test_fsdp import finish, torchrun
from test_logps import FAMILIES, brute
from test_microbatches import PAIRS, build as build_of, gradients, ids

WINDOWS = ("mistral", "gemma2", "gemma3_text")


def build(family, **changes):
    window = dict(sliding_window=64) if family in WINDOWS else {}
    return build_of(family, fast, **{**window, **changes})


def batch_of(rows, shared):
    with patch.object(fast.RUN, "shared", shared):
        return fast.collate(rows, "cpu")


def take(rows, which):
    return {name: [column[i] for i in which] for name, column in rows.items()}


# ------------------------------------------------------------------------------------------------------ shared prompts
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_models_own_log_probs_and_the_plain_gradient(family, attention):
    """Against the model's full logits of one sequence at a time, and against the plain layout's gradient."""
    model = build(family)
    if attention != model.config._attn_implementation:
        if attention == "sdpa":
            pytest.skip(f"{family} computes its own attention")
        model.set_attn_implementation("eager")
    plain, shared = [batch_of(PAIRS, layout) for layout in (False, True)]
    assert shared["input_ids"].shape == (5, 11) and plain["input_ids"].shape == (10, 7)
    got, other = fast.token_logps(model, shared), fast.token_logps(model, plain)
    for row, values in zip(got, brute(model, PAIRS)):
        torch.testing.assert_close(row[: len(values)], torch.stack(values), atol=1e-5, rtol=0)
        assert not row[len(values) :].any()
    for a, b in zip(gradients(model, got), gradients(model, other), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1, b.abs().max().item()), rtol=0)


def test_the_rejected_response_does_not_see_the_chosen_one():
    model, other = build("llama"), {**PAIRS, "chosen_ids": [[i + 1 for i in row] for row in PAIRS["chosen_ids"]]}
    logps = [fast.token_logps(model, batch_of(rows, True)).chunk(2) for rows in (PAIRS, other)]
    assert torch.equal(logps[0][1], logps[1][1])
    assert not torch.equal(logps[0][0], logps[1][0])


def test_the_layout_of_shared_rows_by_hand(monkeypatch):
    """Rows of 8 tokens; a state lies one place before its token, the prompt's last one before both first tokens."""
    batch = batch_of(take(PAIRS, [0, 2]), True)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11, 12, 3, 18], [11, 12, 3, 20, 0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4], [0, 1, 2, 2, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 2, 0, 0, 0, 0]]
    assert batch["parts"].tolist() == [[4, 3, 1], [2, 1, 1]]
    assert batch["labels"].tolist() == [11, 12, 3, 3, 18, 20]
    assert batch["states"].tolist() == [3, 4, 5, 8 + 1, 3, 8 + 1]
    longer = batch_of({"prompt_ids": [[7]], "chosen_ids": [[8]], "rejected_ids": [[9, 10, 11]]}, True)
    assert longer["states"].tolist() == [0, 0, 2, 3]
    seen = fast.attention_mask(batch["segments"], "sdpa")[0, 0].int().tolist()
    assert seen[6] == [1, 1, 1, 1, 1, 1, 1, 0] and seen[7] == [1, 1, 1, 1, 0, 0, 0, 1]
    assert seen[2] == [1, 1, 1] + [0] * 5
    added = fast.attention_mask(batch["segments"], "eager")
    monkeypatch.setattr(fast.RUN, "dtype", torch.bfloat16)
    assert fast.attention_mask(batch["segments"], "eager").dtype == torch.bfloat16
    assert torch.equal(added == 0, fast.attention_mask(batch["segments"], "sdpa")) and added.min() < -1e38


def test_rows_without_a_rejected_side_stay_plain():
    rows = {name: PAIRS[name] for name in ("prompt_ids", "chosen_ids")}
    batch, own = batch_of(rows, True), tgdpo.collate(rows, "cpu")
    assert batch.keys() == own.keys() and all(torch.equal(batch[name], own[name]) for name in own)
    with patch.object(fast.RUN, "shared", True):
        assert fast.microbatches(datasets.Dataset.from_dict(rows), tgdpo.Options(device="cpu"))


@pytest.mark.parametrize("family", [name for name in FAMILIES if build(name).config._attn_implementation == "sdpa"])
def test_attention_of_shared_rows_computes_what_is_seen(family, monkeypatch):
    """Prompt and chosen response without a mask, then the rejected response with the keys of prompt and itself."""
    calls, own = [], fast.sdpa_attention_forward

    def watch(module, query, key, value, mask, **kwargs):
        calls.append((query.shape[2], key.shape[2], mask is None))
        return own(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(fast, "sdpa_attention_forward", watch)
    fast.token_logps(build(family), batch_of(PAIRS, True))
    lengths = [[len(ids) for ids in pair] for pair in zip(*PAIRS.values())]
    want = [call for p, c, r in lengths for call in ((p + c, p + c, True), (r, p + r, False))]
    assert calls == want * 2  # of two layers


def test_shared_rows_go_together_by_their_own_length(monkeypatch):
    """A prompt of 10 tokens, responses of 5: 30 tokens as two sequences, 20 as one row. 60 tokens in a pass."""
    pairs = datasets.Dataset.from_dict({"prompt_ids": [[7] * 10] * 6} | {name: [[8] * 5] * 6 for name in tgdpo.IDS})
    options = tgdpo.Options(device="cpu", per_device_train_batch_size=6)
    monkeypatch.setattr(tgdpo, "CPU_TOKENS", 60)
    for shared, sizes in ((False, [2, 2, 2]), (True, [3, 3])):
        with patch.object(fast.RUN, "shared", shared):
            assert [len(rows) for rows, _ in fast.microbatches(pairs, options)] == sizes


# --------------------------------------------------------------------------------------------------- who can share them
LONG = {"prompt_ids": [ids(range(4, 20), k=9), [5, 6]], "chosen_ids": [ids(range(4, 20), k=8), [7, 8, 9, 3]],
        "rejected_ids": [ids(range(4, 20), k=7), [8, 5, 3]]}  # fmt: skip
HYBRID, LEAKS = dict(num_hidden_layers=4), "what the chosen response says changes log-probs of the rejected one, by "
REFUSED = {
    "mistral": (dict(sliding_window=16), "sliding window is 16 tokens, a sequence 17"),
    "gemma2": (dict(sliding_window=4), "sliding window is 4 tokens"),
    "gemma3_text": (dict(sliding_window=4), "sliding window is 4 tokens"),
    "gpt_neo": (
        dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=15, num_heads=4),
        "log-probs would differ by ",  # attention to the last 15 tokens only, under another name than sliding_window
    ),
    "mpt": (dict(d_model=32, n_heads=4, n_layers=2), "log-probs would differ by "),  # distances instead of positions
    "recurrent_gemma": (dict(lru_width=32), LEAKS),
    "bloom": (dict(n_head=4, n_layer=2), "with a mask it raises ValueError"),
    "jamba": (HYBRID | dict(mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, attn_layer_offset=1,
                            attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, num_experts=4), LEAKS),
    "lfm2": (HYBRID | dict(layer_types=["conv", "full_attention"] * 2), LEAKS),
    "lfm2_moe": (HYBRID | dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1, num_experts=4,
                               num_experts_per_tok=2, moe_intermediate_size=16), LEAKS),
    "falcon_h1": (dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
                       mamba_chunk_size=16), LEAKS),
    "doge": ({}, "self_attn.A would get no gradient"),  # its attention adds what it learns to the mask
}  # fmt: skip


def choice(model, pairs, monkeypatch, capsys, **options):
    """-> (whether prompts are shared, what is printed)."""
    monkeypatch.setattr(fast.PLAIN, "load_model", lambda name, options: model)
    options = fast.Options(model_name_or_path="MODEL", output_dir="none", **{"device": "cpu", **options})
    for name in ("shared", "trial", "tried"):
        monkeypatch.setattr(fast.RUN, name, getattr(fast.RUN, name))
    fast.choose(datasets.Dataset.from_dict(pairs), options)
    return fast.RUN.shared, capsys.readouterr().out


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_share_prompts_is_found_out(family, monkeypatch, capsys):
    changes, why = REFUSED[family]
    shared, out = choice(build(family, **changes), LONG, monkeypatch, capsys, dtype="bfloat16")
    assert shared is False
    assert out.startswith("MODEL gets each prompt twice, once for each response: ") and why in out
    assert out.count("\n") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_can_share_prompts_does(family, monkeypatch, capsys):
    changes = dict(sliding_window=17) if family in WINDOWS else {}
    model = build(family, **changes)
    assert choice(model, LONG, monkeypatch, capsys) == (True, "")
    assert all(p.grad is None for p in model.parameters())
    assert choice(model, LONG, monkeypatch, capsys, shared_prompt=False) == (False, "")


def test_one_token_that_differs_is_enough(monkeypatch, capsys):
    """By 2e-3 in the last token of 8: the mean is below what the largest may be."""
    model, own = build("llama"), fast.token_logps

    def off(batch):
        logps = own(model, batch)
        with torch.no_grad():
            logps[0, 7] += 2e-3 * ("segments" in batch)
        return logps

    model.token_logps = off
    shared, out = choice(model, LONG, monkeypatch, capsys)
    assert not shared and "log-probs would differ by 0.002" in out


@pytest.mark.parametrize("shared, faster", [(0.0, True), (0.02, False)])
def test_on_cuda_the_faster_layout_is_taken(shared, faster, monkeypatch, capsys):
    """No GPU here: the clock sees a model whose shared rows take 20 ms longer, or whose plain ones do."""
    model, calls = build("llama"), []

    def slow(batch):
        calls.append("segments" in batch)
        time.sleep(shared if "segments" in batch else 0.02 - shared)

    model.token_logps = slow
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(fast, "refusal", lambda *args, **kwargs: "")
    took, out = choice(model, LONG, monkeypatch, capsys, device="cuda")
    assert took is faster and calls == [False, True] * 3
    assert ("that is faster here" in out) is not faster


def test_the_longest_sequence_decides_wherever_it_is(tmp_path, capsys):
    """It may be in a pair with fewer tokens in all than another, and it may be held out."""
    words = "yes no one two three cat dog sun".split()
    rows = [dict(prompt="red", chosen=" ".join(words), rejected=" ".join(words[1:]))] * 7  # 1 + 9 tokens, 18 in all
    rows.append(dict(prompt="red", chosen=" ".join(words + words[:5]), rejected="no"))  # 1 + 14 tokens, 17 in all
    bench = Bench(tmp_path, fast)
    bench.model = make_model(tmp_path / "own", "mistral", scale=4.0, sliding_window=12)
    bench.data = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(40):  # one that holds the last pair out
        if tgdpo.split_rows(8, tgdpo.Options(eval_size=1, seed=seed))[1] == [7]:
            break
    bench.train(loss="simpo", max_steps=1, eval_size=1, seed=seed)
    assert "its sliding window is 12 tokens, a sequence 15" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- whole runs
def facts(out):
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("loss", ["tgdpo", "dpo", "simpo"])
def test_runs_are_those_of_tgdpo_py(tmp_path, loss):
    """With shared prompts and without, in bits and pieces of rounding; afterwards tgdpo.py is what it was."""
    before, bench = dict(vars(tgdpo)), Bench(tmp_path, fast)
    judge = bench.reward_model if loss == "tgdpo" else None
    same = dict(loss=loss, reward_model=judge, max_steps=6, eval_size=2)
    runs = [bench.train(**same, shared_prompt=layout) for layout in (True, False)]
    bench.script = tgdpo
    runs.append(bench.train(**same))
    assert [facts(out).get("prompts_shared") for _, out in runs] == [True, False, None]
    assert runs[0][0] != runs[1][0] != runs[2][0], "rounding differs, so both layouts were run"
    for rows, _ in runs[:2]:
        for row, other in zip(rows, runs[2][0], strict=True):
            for name in row.keys() - {"tokens_per_second"}:
                assert row[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
    assert dict(vars(tgdpo)) == before


@pytest.mark.parametrize("family", ["mistral", "bloom"])
def test_a_run_falls_back_to_the_plain_layout(tmp_path, family, capsys):
    """Where the model cannot take it, all numbers are those of --shared_prompt false, to the bit; one line a run."""
    changes = dict(sliding_window=4) if family == "mistral" else dict(n_head=4, n_layer=2)
    bench = Bench(tmp_path, fast)
    bench.model = make_model(tmp_path / "own", family, scale=4.0, **changes)
    rows = []
    for shared in (True, False):
        capsys.readouterr()
        found, out = bench.train(loss="dpo", max_steps=3, shared_prompt=shared, cache_dir=tmp_path / f"cache {shared}")
        rows.append([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found])
        assert capsys.readouterr().out.count("gets each prompt twice") == shared
        assert facts(out)["prompts_shared"] is False and facts(out)["options"]["shared_prompt"] is shared
    assert rows[0] == rows[1]


def test_annotations_of_each_layout_are_kept_apart(tmp_path):
    """From each other's and from tgdpo.py's."""
    bench, names = Bench(tmp_path, fast), []
    for dtype in ("float32", "bfloat16"):
        for script, layouts in ((fast, (True, False)), (tgdpo, (None,))):
            bench.script = script
            for shared in layouts:
                bench.train(loss="dpo", max_steps=1, dtype=dtype, shared_prompt=shared)
                names.append({path.name for path in (tmp_path / "cache").iterdir()})
    assert [len(found) for found in names] == [1, 2, 3, 4, 5, 6]
    assert "bfloat16-fast-shared" in str(names[-1])


def test_a_later_model_that_cannot_share_prompts_ends_the_run(tmp_path, capsys):
    bench = Bench(tmp_path, fast)
    bench.reward_model = make_model(tmp_path / "own", "mistral", scale=4.0, sliding_window=4)
    rows, _ = bench.train(reward_model=bench.reward_model, max_steps=1, status=2)
    error = capsys.readouterr().err
    assert rows == [] and error.count("\n") == 1
    assert f"{bench.reward_model} cannot share prompts" in error and "sliding window" in error
    assert "--shared_prompt false, or tgdpo.py" in error
    bench.train(reward_model=bench.reward_model, max_steps=1, shared_prompt=False)


def test_a_run_resumes_in_its_own_layout_only(tmp_path, capsys):
    bench = Bench(tmp_path, fast)
    same = dict(loss="dpo", max_steps=4, save_steps=2, out=tmp_path / "run")
    whole, out = bench.train(**same)
    tgdpo.record(out, finished=False)
    bench.train("--resume", **same, shared_prompt=False, status=2)
    assert "--resume: shared_prompt was True and is False now" in capsys.readouterr().err
    rows, _ = bench.train("--resume", **same)
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole] and facts(out)["finished"]


def test_a_run_resumes_in_the_layout_that_was_measured_to_be_faster(tmp_path, monkeypatch):
    """It is not measured again: it might come out otherwise."""
    bench, same = Bench(tmp_path, fast), dict(loss="dpo", max_steps=4, save_steps=2, out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as faster:
        faster.setattr(fast, "refusal", lambda *args, **kwargs: "that is faster here")
        whole, out = bench.train(**same)
    tgdpo.record(out, finished=False)
    monkeypatch.setattr(fast, "refusal", None)
    rows, _ = bench.train("--resume", **same)
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert facts(out)["prompts_shared"] is False and facts(out)["finished"]


def test_two_processes_are_one(tmp_path):
    """Under torchrun: shared prompts with gradient checkpointing against one process, and a hybrid that is found out in
    bfloat16, too."""
    bench = Bench(tmp_path, fast)
    same = dict(reward_model=bench.reward_model, max_steps=4, eval_size=2)
    whole, _ = bench.train(**same, per_device_train_batch_size=4)
    hybrid = make_model(tmp_path / "hybrid", "lfm2", **REFUSED["lfm2"][0])
    eager = make_model(tmp_path / "eager", "gemma2", sliding_window=64)  # a mask of floats, in bfloat16 here
    jobs = [bench.argv(**same, per_device_train_batch_size=2, gradient_checkpointing=True, cache_dir=tmp_path / "two",
                       out=tmp_path / "both"),
            bench.argv(loss="simpo", max_steps=1, dtype="bfloat16", model_name_or_path=hybrid, out=tmp_path / "lfm2"),
            bench.argv(loss="simpo", max_steps=1, dtype="bfloat16", out=tmp_path / "gpt2"),
            *[bench.argv(loss="simpo", max_steps=1, dtype="bfloat16", model_name_or_path=eager, learning_rate=0,
                         gradient_checkpointing=True, shared_prompt=shared, out=tmp_path / f"eager_{shared}")
              for shared in (True, False)]]  # fmt: skip
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'scripts')]}\n"
        "import fast, tgdpo\n"
        "tgdpo.start_processes()\n"
        f"print('statuses', [fast.main(argv) for argv in {[[str(x) for x in job] for job in jobs]}])\n"
        "tgdpo.dist.barrier()\n"
        "tgdpo.dist.destroy_process_group()\n"
    )
    status, text = finish(torchrun("--standalone", script))
    assert status == 0 and "statuses [0, 0, 0, 0, 0]" in text, text[-3000:]
    assert [facts(tmp_path / name)["prompts_shared"] for name in ("both", "lfm2", "gpt2")] == [True, False, True]
    shared, plain = [facts(tmp_path / f"eager_{x}") for x in (True, False)]
    assert [shared["prompts_shared"], plain["prompts_shared"]] == [True, False]
    (row,), (other,) = [rows_of(tmp_path / f"eager_{x}") for x in (True, False)]
    assert row["loss"] == pytest.approx(other["loss"], abs=0.01)
    assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    rows = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    for row, other in zip(rows, whole, strict=True):
        for name in row.keys() - {"tokens_per_second"}:
            assert row[name] == pytest.approx(other[name], abs=2e-5, rel=2e-5), name


# ------------------------------------------------------------------------------------------------- block-wise softmax
@pytest.mark.parametrize("block", [1, 3, 100])
def test_log_probs_of_labels_and_their_gradient_by_autograd(block, monkeypatch):
    """(1a): LabelLogps against log_softmax, in blocks of 1, 3 and all 7 rows, with logits far from 0."""
    monkeypatch.setattr(fast, "BLOCK_BYTES", 4 * 11 * block)
    torch.manual_seed(0)
    logits, labels, weights = 30 * torch.randn(7, 11) + 50, torch.randint(11, (7,)), torch.randn(7)
    found = []
    for mine in (True, False):
        x = logits.clone().requires_grad_()
        copy = x * 1.0  # the backward pass overwrites it, but not what it was made of
        y = fast.LabelLogps.apply(copy, labels) if mine else copy.double().log_softmax(-1)[range(7), labels]
        (y * weights).sum().backward()
        found.append((y.detach().double(), x.grad.double()))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-5)
    assert torch.equal(x.detach(), logits)


@pytest.mark.parametrize("p", [0.5, 0.97, 0.99])
def test_the_gradient_of_a_likely_label_in_bfloat16(p):
    """1 - p, to bfloat16's resolution of 2^-8, times weights whose sum with -p would be rounded before."""
    size, labels, weights = 4000, torch.tensor([5, 7, 9]), torch.tensor([1.0, -0.7, 0.3])
    z = torch.tensor(p / (1 - p) * (size - 1)).log().item()
    logits = torch.zeros(3, size).scatter(-1, labels[:, None], z).bfloat16().requires_grad_()
    (fast.LabelLogps.apply(logits * 1, labels) * weights).sum().backward()
    exact = logits.detach().double().softmax(-1)
    want = weights.double()[:, None] * (torch.nn.functional.one_hot(labels, size) - exact)
    assert logits.grad.dtype == torch.bfloat16 and exact[0, 5].item() == pytest.approx(p, abs=0.02)
    torch.testing.assert_close(logits.grad.double(), want, rtol=2**-8, atol=0)


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4000).bfloat16(), torch.randint(4000, (5,))
    x = logits.clone().requires_grad_()
    y = fast.LabelLogps.apply(x * 1, labels)
    want = logits.float().requires_grad_()
    exact = want.log_softmax(-1)[range(5), labels]
    torch.testing.assert_close(y, exact, atol=1e-5, rtol=1e-5)
    y.sum().backward(), exact.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.float(), want.grad, atol=1e-6, rtol=2**-8)


def test_one_tensor_of_logits_is_kept_and_it_is_used_once():
    kept, logits = {}, torch.randn(6, 50, requires_grad=True)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = fast.LabelLogps.apply(logits * 2, torch.zeros(6, dtype=torch.long))
    assert sorted(kept.values()) == [6, 300]
    logps = fast.LabelLogps.apply(logits * 2, torch.zeros(6, dtype=torch.long))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        logps.sum().backward()


def test_forward_and_backward_make_one_tensor_of_logits(monkeypatch):
    """Not a second one for their gradient either, nor one of zeros to put it into."""
    model, made = build("gpt2"), []
    batch = batch_of(PAIRS, True)
    size = int(batch["mask"].sum()) * model.config.vocab_size
    monkeypatch.setattr(fast, "BLOCK_BYTES", 4 * model.config.vocab_size)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out, inputs = op(*args, **(kwargs or {})), [x for x in args if isinstance(x, torch.Tensor)]
            if isinstance(out, torch.Tensor) and out.numel() == size:
                if all(x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for x in inputs):
                    made.append(str(op))
            return out

    with Watch():
        fast.token_logps(model, batch).sum().backward()
    assert made == ["aten.mm.default"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
def test_chunks_give_the_full_gradient(family, shared, monkeypatch):
    model = build(family)
    found = []
    for size in (2**28, 4 * model.config.vocab_size * 3):  # all at once; three tokens at a time
        monkeypatch.setattr(tgdpo, "LOGITS_BYTES", size)
        logps = fast.token_logps(model, batch_of(PAIRS, shared))
        found.append((logps.detach(), gradients(model, logps)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
def test_bfloat16_is_near_float32_in_both_layouts(family):
    """8 bits: each layout within a few hundredths of float32, and of the other."""
    model = build(family)
    exact = fast.token_logps(model, batch_of(PAIRS, False))
    plain, shared = [fast.token_logps(model, batch_of(PAIRS, layout), "bfloat16") for layout in (False, True)]
    for one, other in ((plain, exact), (shared, exact), (plain, shared)):
        assert (one - other).abs().max() < 0.15 and (one - other).abs().mean() < 0.02
    assert (shared - exact).abs().max() > 1e-4


def test_gelu_in_one_kernel_is_the_same_function():
    model = build("gpt2")
    kinds = {type(module).__name__ for module in model.modules()}
    assert "GELUTanh" in kinds and "NewGELUActivation" not in kinds
    x = torch.linspace(-6, 6, 999)
    one, eight = transformers.activations.GELUTanh(), transformers.activations.NewGELUActivation()
    torch.testing.assert_close(one(x), eight(x), atol=1e-6, rtol=1e-5)
