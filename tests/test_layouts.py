"""The same log-probs and gradients from every layout: shared prompts, chunks of logits, batches by length, bfloat16."""

import random
import time

import datasets
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import tgdpo
from conftest import Bench, make_model, small_config, write_rows
from test_logps import FAMILIES, brute

ids = random.Random(0).choices
PAIRS = {
    # Padding on both sides; one-token responses, both and one; a prompt of one token; responses that differ at the end.
    "prompt_ids": [[7, 8, 9, 10], [10], [11, 12], [13, 14, 15], [7, 9]],
    "chosen_ids": [[11, 12, 3], [13, 14, 15, 16, 17, 3], [3], [18, 19, 20, 3], [9]],
    "rejected_ids": [[18], [7, 7, 3], [20], [18, 19, 20, 21], [8, 12, 13, 3]],
}
WINDOWS = {
    "mistral": dict(sliding_window=64),
    "gemma2": dict(sliding_window=64),
    "gemma3_text": dict(sliding_window=64),
}


def build(family, **changes):
    torch.manual_seed(0)
    config = small_config(family, **{**FAMILIES.get(family, {}), **WINDOWS.get(family, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)  # far from uniform
    model = tgdpo.prepare_model(model, tgdpo.Options(device="cpu"))
    model.token_logps = lambda batch: tgdpo.token_logps(model, batch)
    return model


def gradients(model, logps):
    """Of a sum with another weight for each token."""
    weights = torch.linspace(-1, 2, logps.numel()).reshape(logps.shape)
    found = torch.autograd.grad((logps * weights).sum(), list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


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
    plain, shared = [tgdpo.collate(PAIRS, "cpu", layout) for layout in (False, True)]
    assert shared["input_ids"].shape == (5, 11) and plain["input_ids"].shape == (10, 7)
    got, other = tgdpo.token_logps(model, shared), tgdpo.token_logps(model, plain)
    for row, values in zip(got, brute(model, PAIRS)):
        torch.testing.assert_close(row[: len(values)], torch.stack(values), atol=1e-5, rtol=0)
        assert not row[len(values) :].any()
    for a, b in zip(gradients(model, got), gradients(model, other), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1, b.abs().max().item()), rtol=0)


def test_the_rejected_response_does_not_see_the_chosen_one():
    model, other = build("llama"), {**PAIRS, "chosen_ids": [[i + 1 for i in row] for row in PAIRS["chosen_ids"]]}
    logps = [tgdpo.token_logps(model, tgdpo.collate(rows, "cpu", True)).chunk(2) for rows in (PAIRS, other)]
    assert torch.equal(logps[0][1], logps[1][1])
    assert not torch.equal(logps[0][0], logps[1][0])


def test_the_layout_of_a_shared_row_by_hand():
    batch = tgdpo.collate(take(PAIRS, [0]), "cpu", True)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11, 12, 3, 18]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4]]
    assert batch["segments"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2]]
    assert batch["states"][0].tolist() == [3, 4, 5] and batch["states"][1, 0] == 3
    seen = (tgdpo.attention_mask(batch["segments"])[0, 0] == 0).int().tolist()
    assert (
        seen[6] == [1, 1, 1, 1, 1, 1, 1, 0] and seen[7] == [1, 1, 1, 1, 0, 0, 0, 1] and seen[2] == [1, 1, 1] + [0] * 5
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if build(name).config._attn_implementation == "sdpa"])
def test_attention_of_shared_rows_computes_what_is_seen(family, monkeypatch):
    """Prompt and chosen response without a mask, then the rejected response with the keys of prompt and itself."""
    place = transformers.integrations.sdpa_attention
    calls, own = [], place.sdpa_attention_forward

    def watch(module, query, key, value, mask, **kwargs):
        calls.append((query.shape[2], key.shape[2], mask is None))
        return own(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(place, "sdpa_attention_forward", watch)
    tgdpo.token_logps(build(family), tgdpo.collate(PAIRS, "cpu", True))
    lengths = [[len(ids) for ids in pair] for pair in zip(*PAIRS.values())]
    want = [call for p, c, r in lengths for call in ((p + c, p + c, True), (r, p + r, False))]
    assert calls == want * 2  # of two layers


LONG = {"prompt_ids": [ids(range(4, 20), k=9), [5, 6]], "chosen_ids": [ids(range(4, 20), k=8), [7, 8, 9, 3]],
        "rejected_ids": [ids(range(4, 20), k=7), [8, 5, 3]]}  # fmt: skip
REFUSED = {
    "mistral": (dict(sliding_window=16), "sliding window is 16 tokens, a sequence 17"),
    "gemma2": (dict(sliding_window=4), "sliding window is 4 tokens"),
    "gemma3_text": (dict(sliding_window=4), "sliding window is 4 tokens"),
    "gpt_neo": (
        dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=15, num_heads=4),
        "does not honour the mask",  # attention to the last 15 tokens only, under another name than sliding_window
    ),
    "mpt": (dict(d_model=32, n_heads=4, n_layers=2), "does not honour the mask"),  # distances instead of positions
    "recurrent_gemma": (dict(lru_width=32), "does not honour the mask"),
    "bloom": (dict(n_head=4, n_layer=2), "with a mask it raises ValueError"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_share_prompts_is_found_out(family, capsys):
    changes, why = REFUSED[family]
    pairs = datasets.Dataset.from_dict(LONG)
    assert tgdpo.share_prompts(build(family, **changes), pairs, tgdpo.Options(device="cpu")) is False
    out = capsys.readouterr().out
    assert " gets each prompt twice, once for each response: " in out and why in out
    assert out.count("\n") == 1


def test_the_longest_sequence_decides_wherever_it_is(tmp_path, capsys):
    """It may be in a pair with fewer tokens in all than another, and it may be held out."""
    words = "yes no one two three cat dog sun".split()
    rows = [dict(prompt="red", chosen=" ".join(words), rejected=" ".join(words[1:]))] * 7  # 1 + 9 tokens, 18 in all
    rows.append(dict(prompt="red", chosen=" ".join(words + words[:5]), rejected="no"))  # 1 + 14 tokens, 17 in all
    bench = Bench(tmp_path)
    bench.model = make_model(tmp_path / "own", "mistral", scale=4.0, sliding_window=12)
    bench.data = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(40):  # one that holds the last pair out
        if tgdpo.split_rows(8, tgdpo.Options(eval_size=1, seed=seed))[1] == [7]:
            break
    bench.train(loss="simpo", max_steps=1, eval_size=1, seed=seed)
    assert "its sliding window is 12 tokens, a sequence 15" in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_can_share_prompts_does(family, capsys):
    changes = dict(sliding_window=17) if family in WINDOWS else {}
    pairs = datasets.Dataset.from_dict(LONG)
    assert tgdpo.share_prompts(build(family, **changes), pairs, tgdpo.Options(device="cpu", dtype="bfloat16")) is True
    assert tgdpo.share_prompts(build(family, **changes), pairs, tgdpo.Options(shared_prompt=False)) is False
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shared, faster", [(0.0, True), (0.02, False)])
def test_on_cuda_the_faster_layout_is_taken(shared, faster, monkeypatch, capsys):
    """No GPU here: the clock sees a model whose shared rows take 20 ms longer, or whose plain ones do."""
    model, calls = build("llama"), []

    def slow(batch):
        calls.append("segments" in batch)
        time.sleep(shared if "segments" in batch else 0.02 - shared)

    model.token_logps = slow
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tgdpo.share_prompts(model, datasets.Dataset.from_dict(LONG), tgdpo.Options(device="cuda")) is faster
    assert calls == [False, True] * 3
    assert ("that is faster here" in capsys.readouterr().out) is not faster


@pytest.mark.parametrize("loss", ["tgdpo", "dpo", "simpo"])
def test_runs_with_shared_and_plain_prompts_are_the_same(tmp_path, loss):
    bench = Bench(tmp_path)
    judge = bench.reward_model if loss == "tgdpo" else None
    same = dict(loss=loss, reward_model=judge, max_steps=6, eval_size=2)
    runs = [bench.train(**same, shared_prompt=layout, cache_dir=tmp_path / str(layout)) for layout in (True, False)]
    assert runs[0][0] != runs[1][0], "rounding differs, so both layouts were run"
    for row, other in zip(*[rows for rows, _ in runs], strict=True):
        for name in row.keys() - {"tokens_per_second"}:
            assert row[name] == pytest.approx(other[name], abs=2e-5, rel=2e-5), name


@pytest.mark.parametrize("family", ["mistral", "bloom"])
def test_a_run_falls_back_to_the_plain_layout(tmp_path, family, capsys):
    """Where the model cannot take it, all numbers are those of --shared_prompt false, to the bit; one line a model."""
    changes = dict(sliding_window=4) if family == "mistral" else dict(n_head=4, n_layer=2)
    bench = Bench(tmp_path)
    bench.model = make_model(tmp_path / "own", family, scale=4.0, **changes)
    rows = []
    for shared in (True, False):
        capsys.readouterr()
        found, _ = bench.train(loss="dpo", max_steps=3, shared_prompt=shared, cache_dir=tmp_path / f"cache {shared}")
        rows.append([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in found])
        assert capsys.readouterr().out.count("gets each prompt twice") == (2 if shared else 0)  # annotated, trained
    assert rows[0] == rows[1]


def test_bfloat16_annotations_of_the_two_layouts_are_kept_apart(tmp_path):
    bench = Bench(tmp_path)
    for dtype, files in (("float32", 1), ("bfloat16", 3)):
        for shared in (True, False):
            bench.train(loss="dpo", max_steps=1, dtype=dtype, shared_prompt=shared)
        assert len([*(tmp_path / "cache").iterdir()]) == files


def test_a_run_resumes_in_the_other_layout(tmp_path):
    bench = Bench(tmp_path)
    whole, _ = bench.train(loss="dpo", max_steps=4, save_steps=2)
    rows, out = bench.train(loss="dpo", max_steps=4, save_steps=2, out=tmp_path / "part")
    run = tgdpo.json.loads((out / "run.json").read_text())
    tgdpo.record(out, finished=False)
    rows, _ = bench.train("--resume", out=out, loss="dpo", max_steps=4, save_steps=2, shared_prompt=False)
    assert run["finished"] and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], abs=1e-5)


# ------------------------------------------------------------------------------------------------- log-probs in chunks
@pytest.mark.parametrize("block", [1, 3, 100])
def test_log_probs_of_labels_and_their_gradient_by_autograd(block, monkeypatch):
    """(1a): LabelLogps against log_softmax, in blocks of 1, 3 and all 7 rows, with logits far from 0."""
    monkeypatch.setattr(tgdpo, "BLOCK_BYTES", 4 * 11 * block)
    torch.manual_seed(0)
    logits, labels, weights = 30 * torch.randn(7, 11) + 50, torch.randint(11, (7,)), torch.randn(7)
    found = []
    for mine in (True, False):
        x = logits.clone().requires_grad_()
        copy = x * 1.0  # the backward pass overwrites it, but not what it was made of
        y = tgdpo.LabelLogps.apply(copy, labels) if mine else copy.double().log_softmax(-1)[range(7), labels]
        (y * weights).sum().backward()
        found.append((y.detach().double(), x.grad.double()))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-5)
    assert torch.equal(x.detach(), logits)


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4000).bfloat16(), torch.randint(4000, (5,))
    x = logits.clone().requires_grad_()
    y = tgdpo.LabelLogps.apply(x * 1, labels)
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
        logps = tgdpo.LabelLogps.apply(logits * 2, torch.zeros(6, dtype=torch.long))
    assert sorted(kept.values()) == [6, 300]
    logps = tgdpo.LabelLogps.apply(logits * 2, torch.zeros(6, dtype=torch.long))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        logps.sum().backward()


def test_forward_and_backward_make_one_tensor_of_logits(monkeypatch):
    """Not a second one for their gradient either, nor one of zeros to put it into."""
    model, made = build("gpt2"), []
    batch = tgdpo.collate(PAIRS, "cpu", True)
    size = int(batch["mask"].sum()) * model.config.vocab_size
    monkeypatch.setattr(tgdpo, "BLOCK_BYTES", 4 * model.config.vocab_size)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out, inputs = op(*args, **(kwargs or {})), [x for x in args if isinstance(x, torch.Tensor)]
            if isinstance(out, torch.Tensor) and out.numel() == size:
                if all(x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr() for x in inputs):
                    made.append(str(op))
            return out

    with Watch():
        tgdpo.token_logps(model, batch).sum().backward()
    assert made == ["aten.mm.default"]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
def test_chunks_give_the_full_gradient(family, shared, monkeypatch):
    model = build(family)
    found = []
    for size in (2**28, 4 * model.config.vocab_size * 3):  # all at once; three tokens at a time
        monkeypatch.setattr(tgdpo, "LOGITS_BYTES", size)
        logps = tgdpo.token_logps(model, tgdpo.collate(PAIRS, "cpu", shared))
        found.append((logps.detach(), gradients(model, logps)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, b.abs().max().item()), rtol=0)


# -------------------------------------------------------------------------------------------------- batches by length
def random_pairs(n, longest=12):
    rng = random.Random(1)
    rows = {name: [ids(range(4, 20), k=rng.randint(1, longest)) for _ in range(n)] for name in PAIRS}
    for name in ("chosen", "rejected"):
        rows[f"{name}_ref_logps"] = [[rng.gauss(-3, 1) for _ in row] for row in rows[f"{name}_ids"]]
        rows[f"{name}_rewards"] = [[rng.gauss(0, 1) for _ in row] for row in rows[f"{name}_ids"]]
    return datasets.Dataset.from_dict({"index": [*range(n)], **rows})


@pytest.mark.parametrize("loss", ["tgdpo", "simpo"])
def test_how_a_step_is_cut_into_passes_does_not_matter(loss, monkeypatch):
    """One pass of all 13 pairs, passes of one, passes by tokens, another order: the same gradient, metrics in place."""
    pairs = random_pairs(13)
    options = tgdpo.Options(device="cpu", dtype="float32", loss=loss, per_device_train_batch_size=13)
    layouts = {
        "one pass": (options, 10**6, range(13)),
        "single pairs": (options, 1, range(13)),
        "by tokens": (options, 60, range(13)),
        "by pairs": (tgdpo.replace(options, per_device_train_batch_size=5), 10**6, range(13)),
        "another order": (options, 60, random.Random(2).sample(range(13), 13)),
        "plain": (tgdpo.replace(options, shared_prompt=False), 60, range(13)),
    }
    found = {}
    for name, (options, tokens, order) in layouts.items():
        monkeypatch.setattr(tgdpo, "CPU_TOKENS", tokens)
        model, calls = build("llama"), []
        original = model.token_logps
        model.token_logps = lambda batch: calls.append(len(batch["mask"])) or original(batch)
        table = tgdpo.pass_over(model, pairs.select(order), options, learn=True)
        back = {metric: [values[list(order).index(i)] for i in range(13)] for metric, values in table.items()}
        found[name] = (len(calls), back, [p.grad for p in model.parameters()])
    assert [found[name][0] for name in layouts] == [
        1,
        13,
        found["by tokens"][0],
        3,
        found["by tokens"][0],
        found["by tokens"][0],
    ]
    assert 3 < found["by tokens"][0] < 13
    _, table, grads = found["one pass"]
    for name, (_, other, others) in found.items():
        for metric, values in table.items():
            assert other[metric] == pytest.approx(values, abs=1e-5, rel=1e-5), (name, metric)
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_passes_take_each_pair_once_the_longest_first(device, ranks, monkeypatch):
    pairs = random_pairs(40)
    monkeypatch.setattr(tgdpo, "world", lambda: ranks)
    monkeypatch.setattr(tgdpo, "CPU_TOKENS", 100)
    groups = tgdpo.passes(pairs, tgdpo.Options(device=device, per_device_train_batch_size=6))
    lengths = tgdpo.pair_lengths(pairs)
    assert lengths[3] == sum(len(pairs[3][name]) for name in PAIRS)
    assert sorted(i for group in groups for i in group) == [*range(40)]
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)
    assert [*map(len, groups)][:-1] == sorted(map(len, groups[:-1])) and max(map(len, groups)) <= 6 * ranks
    assert all(len(group) % ranks == 0 for group in groups[:-1])
    for group in groups:
        each = len(group) / ranks
        assert device == "cuda" or each <= 1 or lengths[group[0]] * each <= 100
    if device == "cuda":
        assert [*map(len, groups)] == [6 * ranks] * (40 // (6 * ranks)) + [40 % (6 * ranks)]


def test_steps_take_the_same_pairs_whatever_their_lengths():
    """Sorting happens inside a step: which pairs a step takes is the seeded shuffle alone."""
    options = tgdpo.Options(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    steps = [tgdpo.pairs_of_step(20, step, options) for step in range(6)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(42)).tolist()
    assert steps[:3] == [order[:8], order[8:16], order[16:]]
    assert sorted(sum(steps[3:], [])) == [*range(20)]


# ----------------------------------------------------------------------------------------------------- bfloat16, reuse
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
def test_bfloat16_is_near_float32_in_both_layouts(family):
    """8 bits: each layout within a few hundredths of float32, and of the other."""
    model = build(family)
    exact = tgdpo.token_logps(model, tgdpo.collate(PAIRS, "cpu"))
    plain, shared = [
        tgdpo.token_logps(model, tgdpo.collate(PAIRS, "cpu", layout), "bfloat16") for layout in (False, True)
    ]
    for one, other in ((plain, exact), (shared, exact), (plain, shared)):
        assert (one - other).abs().max() < 0.15 and (one - other).abs().mean() < 0.02
    assert (shared - exact).abs().max() > 1e-4


@pytest.mark.parametrize("loss, passes", [("simpo", 0), ("dpo", 1), ("tgdpo", 2)])
def test_no_model_is_run_that_the_loss_does_not_need(tmp_path, monkeypatch, loss, passes):
    bench, calls = Bench(tmp_path), []
    original = tgdpo.token_columns
    monkeypatch.setattr(tgdpo, "token_columns", lambda *args: calls.append(args[0]) or original(*args))
    judge = bench.reward_model if loss == "tgdpo" else None
    bench.train(loss=loss, reward_model=judge, max_steps=1)
    assert len(calls) == passes
    bench.train(loss=loss, reward_model=judge, max_steps=1, alpha=0.1, beta=0.2)
    assert len(calls) == passes, "a sweep over alpha and beta annotates nothing again"


def test_a_run_tokenizes_once(tmp_path, monkeypatch):
    bench, calls = Bench(tmp_path), []
    original = tgdpo.tokenize
    monkeypatch.setattr(tgdpo, "tokenize", lambda *args: calls.append(1) or original(*args))
    bench.train(max_steps=1, eval_size=2)  # a reward model, annotations, training, evaluation
    assert len(calls) == 1
