"""How a step is cut into passes, the head into chunks, bfloat16, what a run does only once: no number depends on it."""

import random

import datasets
import pytest
import torch
import transformers

import tgdpo
from conftest import Bench, small_config
from test_logps import FAMILIES

ids = random.Random(0).choices
PAIRS = {
    # Padding on both sides; one-token responses, both and one; a prompt of one token; responses that differ at the end.
    "prompt_ids": [[7, 8, 9, 10], [10], [11, 12], [13, 14, 15], [7, 9]],
    "chosen_ids": [[11, 12, 3], [13, 14, 15, 16, 17, 3], [3], [18, 19, 20, 3], [9]],
    "rejected_ids": [[18], [7, 7, 3], [20], [18, 19, 20, 21], [8, 12, 13, 3]],
}


def build(family, module=tgdpo, **changes):
    """A model far from uniform, with the functions of tgdpo.py or of scripts/fast.py."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        small_config(family, **{**FAMILIES.get(family, {}), **changes})
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    model = module.prepare_model(model, tgdpo.Options(device="cpu"))
    model.token_logps = lambda batch: module.token_logps(model, batch)
    return model


def gradients(model, logps):
    """Of a sum with another weight for each token."""
    weights = torch.linspace(-1, 2, logps.numel()).reshape(logps.shape)
    found = torch.autograd.grad((logps * weights).sum(), list(model.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def random_pairs(n, longest=12):
    """Pairs of random lengths, with reference log-probs and rewards."""
    rng = random.Random(1)
    rows = {name: [ids(range(4, 20), k=rng.randint(1, longest)) for _ in range(n)] for name in PAIRS}
    for name in ("chosen", "rejected"):
        rows[f"{name}_ref_logps"] = [[rng.gauss(-3, 1) for _ in row] for row in rows[f"{name}_ids"]]
        rows[f"{name}_rewards"] = [[rng.gauss(0, 1) for _ in row] for row in rows[f"{name}_ids"]]
    return datasets.Dataset.from_dict({"index": [*range(n)], **rows})


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere"])
def test_chunks_give_the_full_gradient(family, monkeypatch):
    model = build(family)
    found = []
    for size in (2**28, 4 * model.config.vocab_size * 3):  # all at once; three tokens at a time
        monkeypatch.setattr(tgdpo, "LOGITS_BYTES", size)
        logps = tgdpo.token_logps(model, tgdpo.collate(PAIRS, "cpu"))
        found.append((logps.detach(), gradients(model, logps)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, b.abs().max().item()), rtol=0)


def passes_and_results(pairs, options, order):
    """-> (number of passes, totals, losses by pair, gradients) of run_pairs, pairs in this order."""
    model, calls, losses = build("llama"), [], {}
    original, inner = model.token_logps, tgdpo.losses_and_totals

    def losses_and_totals(model, batch, options):
        found, totals = inner(model, batch, options)
        for row, loss in zip(batch["input_ids"].chunk(2)[0].tolist(), found.tolist()):
            losses[tuple(token for token in row if token)] = loss
        return found, totals

    model.token_logps = lambda batch: calls.append(len(batch["mask"])) or original(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tgdpo, "losses_and_totals", losses_and_totals)
        totals = tgdpo.run_pairs(model, pairs.select(order), options, learn=True)
    assert sum(calls) == 2 * len(order)
    return len(calls), totals, losses, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("loss, alpha", [("tgdpo", 0.5), ("tgdpo", 4.0), ("simpo", 0.5)])
def test_how_a_step_is_cut_into_passes_does_not_matter(loss, alpha, monkeypatch):
    """One pass of all 13 pairs, passes of one, passes by tokens, another order: the same gradient, loss of each pair,
    and totals."""
    pairs = random_pairs(13)
    options = tgdpo.Options(device="cpu", dtype="float32", loss=loss, alpha=alpha, per_device_train_batch_size=13)
    splits = {
        "one pass": (options, 10**6, range(13)),
        "single pairs": (options, 1, range(13)),
        "by tokens": (options, 60, range(13)),
        "by pairs": (tgdpo.replace(options, per_device_train_batch_size=5), 10**6, range(13)),
        "another order": (options, 60, random.Random(2).sample(range(13), 13)),
    }
    found = {}
    for name, (options, tokens, order) in splits.items():
        monkeypatch.setattr(tgdpo, "CPU_TOKENS", tokens)
        found[name] = passes_and_results(pairs, options, order)
    assert [found[name][0] for name in splits] == [1, 13, found["by tokens"][0], 3, found["by tokens"][0]]
    assert 3 < found["by tokens"][0] < 13
    _, totals, losses, grads = found["one pass"]
    assert totals["pairs"] == 13 and totals["not finite"] == [] and len(losses) == 13
    assert totals["loss"] == pytest.approx(sum(losses.values()), rel=1e-6)
    assert (loss == "tgdpo") == ("guidance/min" in totals)
    for name, (_, others, by_pair, other_grads) in found.items():
        assert others.keys() == totals.keys()
        for metric, value in totals.items():
            assert others[metric] == pytest.approx(value, abs=1e-5, rel=1e-5), (name, metric)
        assert by_pair == pytest.approx(losses, abs=1e-5, rel=1e-5), name
        for a, b in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_passes_take_each_pair_once_the_longest_first(device, ranks, monkeypatch):
    """Of all ranks together; a rank that has no pair left runs one of another's, and does not count it."""
    pairs, options = random_pairs(40), tgdpo.Options(device=device, per_device_train_batch_size=6)
    monkeypatch.setattr(tgdpo, "world", lambda: ranks)
    monkeypatch.setattr(tgdpo, "CPU_TOKENS", 100)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(tgdpo, "rank", lambda: rank)
        shares.append(tgdpo.microbatches(pairs, options))
    lengths = tgdpo.pair_lengths(pairs)
    row = pairs[3]
    assert lengths[3] == 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert len({len(share) for share in shares}) == 1, "all ranks run equally often"
    groups = [sorted(sum((rows for rows, counted in group if counted), [])) for group in zip(*shares)]
    assert sorted(sum(groups, [])) == [*range(40)]
    for group, after in zip(groups, groups[1:]):
        assert min(lengths[i] for i in group) >= max(lengths[i] for i in after)
    for step, group in enumerate(zip(*shares)):
        for rows, counted in group:
            assert rows and (counted or rows == group[0][0][:1] and step == len(groups) - 1)
            assert len(rows) <= 6
            assert device == "cuda" or len(rows) == 1 or max(lengths[rows]) * len(rows) <= 100
    sizes = [len(group) for group in groups]
    assert sizes[:-1] == sorted(sizes[:-1]) and all(size % ranks == 0 for size in sizes[:-1])
    if device == "cuda":
        assert sizes == [6 * ranks] * (40 // (6 * ranks)) + [40 % (6 * ranks)]
    else:
        assert len(set(sizes)) > 2, "passes of several sizes"


def test_steps_take_the_same_pairs_whatever_their_lengths():
    """Sorting happens inside a step: which pairs a step takes is the seeded shuffle alone."""
    options = tgdpo.Options(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    steps = [tgdpo.pairs_of_step(20, step, options) for step in range(6)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(42)).tolist()
    assert steps[:3] == [order[:8], order[8:16], order[16:]]
    assert sorted(sum(steps[3:], [])) == [*range(20)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
def test_bfloat16_is_near_float32(family):
    """8 bits: within a few hundredths of float32, and not float32."""
    model, batch = build(family), tgdpo.collate(PAIRS, "cpu")
    exact, rounded = [tgdpo.token_logps(model, batch, dtype) for dtype in ("float32", "bfloat16")]
    apart = (rounded - exact).abs()
    assert apart.max() < 0.15 and apart.mean() < 0.02 and apart.max() > 1e-4


@pytest.mark.parametrize("loss, models", [("simpo", 0), ("dpo", 1), ("tgdpo", 2)])
def test_no_model_is_run_that_the_loss_does_not_need(tmp_path, monkeypatch, loss, models):
    bench, calls = Bench(tmp_path), []
    original = tgdpo.frozen_logps
    monkeypatch.setattr(tgdpo, "frozen_logps", lambda *args: calls.append(args[0]) or original(*args))
    judge = bench.reward_model if loss == "tgdpo" else None
    bench.train(loss=loss, reward_model=judge, max_steps=1)
    assert calls == [bench.model, bench.reward_model][:models]
    bench.train(loss=loss, reward_model=judge, max_steps=1, alpha=0.1, beta=0.2)
    assert len(calls) == models, "a sweep over alpha and beta annotates nothing again"


def test_a_run_tokenizes_once(tmp_path, monkeypatch):
    bench, calls = Bench(tmp_path), []
    original = tgdpo.tokenize
    monkeypatch.setattr(tgdpo, "tokenize", lambda *args: calls.append(1) or original(*args))
    bench.train(max_steps=1, eval_size=2)  # a reward model, annotations, training, evaluation
    assert len(calls) == 1
