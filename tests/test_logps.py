"""Token log-probs against the models' own logits."""

import pytest
import torch
import transformers

import tgdpo
from conftest import make_model, small_config

FAMILIES = {
    "gpt2": {},
    "llama": {},
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=8),
    "mistral": dict(sliding_window=4),
    "gemma2": dict(head_dim=8, final_logit_softcapping=0.5, attn_logit_softcapping=5.0),
    "gemma3_text": dict(head_dim=8),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=5.0),
    "phi": {},
    "opt": dict(ffn_dim=48, word_embed_proj_dim=16),
    "gpt_neox": {},
    "mixtral": dict(num_local_experts=4),
}


def build(family, **changes):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small_config(family, **FAMILIES[family], **changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)  # far from uniform
    return tgdpo.prepare_model(model, tgdpo.Options(device="cpu"))


ROWS = {
    "prompt_ids": [[7, 8, 9], [10]],
    "chosen_ids": [[11, 12, 3], [13, 14, 15, 16, 17, 3]],
    "rejected_ids": [[18], [7, 7]],
}


def brute(model, rows):
    """log softmax of the model's own full logits, one sequence at a time, gathered in a loop."""
    out = []
    for side in ("chosen_ids", "rejected_ids"):
        for prompt, response in zip(rows["prompt_ids"], rows[side]):
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
            logps = torch.log_softmax(logits.float(), -1)
            out.append([logps[len(prompt) + t - 1, token] for t, token in enumerate(response)])
    return out


def test_a_batch_by_hand():
    """Two pairs; a state lies one place before its token, flattened over rows of 7 (prompt 1 + response 6) tokens."""
    batch = tgdpo.collate(ROWS | {"chosen_x": [[1.0, 2.0, 3.0], [4.0] * 6], "rejected_x": [[5.0], [6.0, 7.0]]}, "cpu")
    assert batch["input_ids"].tolist() == [
        [7, 8, 9, 11, 12, 3, 0], [10, 13, 14, 15, 16, 17, 3], [7, 8, 9, 18, 0, 0, 0], [10, 7, 7, 0, 0, 0, 0]
    ]
    assert batch["labels"].tolist() == [11, 12, 3, 13, 14, 15, 16, 17, 3, 18, 7, 7]
    assert batch["states"].tolist() == [2, 3, 4, 7, 8, 9, 10, 11, 12, 16, 21, 22]
    assert batch["places"].tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 18, 19]
    assert batch["mask"].sum(1).tolist() == [3, 6, 1, 2] and batch["mask"].shape == (4, 6)
    assert batch["x"].tolist()[0] == [1, 2, 3, 0, 0, 0] and batch["x"].tolist()[3] == [6, 7, 0, 0, 0, 0]
    assert tgdpo.in_rows(torch.arange(12.0), batch).tolist()[2:] == [[9, 0, 0, 0, 0, 0], [10, 11, 0, 0, 0, 0]]


@pytest.mark.parametrize("p", [0.5, 0.97, 0.99])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_gradient_of_a_likely_label_of_bfloat16_logits(p, dtype):
    """In one process (autocast), and as under torchrun, where FSDP has cast the weights and there is no autocast.

    Softmax minus one is a difference of near-equal numbers: taken in float32, then rounded. The label's gradient is
    p - 1, here to bfloat16's resolution of 2^-8; taken in bfloat16 it would be off by 7 % at .97 and 21 % at .99."""
    model, batch = build("llama"), tgdpo.collate(ROWS, "cpu")
    size, found = model.config.vocab_size, []
    z = torch.tensor(p / (1 - p) * (size - 1)).log().item()

    def head(model, hidden, output_class):
        logits = torch.zeros(len(hidden), size).scatter(-1, batch["labels"][:, None], z).bfloat16().requires_grad_()
        found.append(logits)
        return logits + 0 * hidden.sum().bfloat16()

    original, tgdpo.head_logits = tgdpo.head_logits, head
    try:
        (-tgdpo.token_logps(model, batch, dtype)).sum().backward()
    finally:
        tgdpo.head_logits = original
    logits = found[0].detach().double()
    want = logits.softmax(-1).gather(-1, batch["labels"][:, None])[:, 0] - 1
    got = found[0].grad.double().gather(-1, batch["labels"][:, None])[:, 0]
    assert found[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [1, 3])
def test_equal_to_the_models_own_logits(family, chunks, monkeypatch):
    """(1a): log-softmax of the full logits, shifted by one."""
    model = build(family)
    if chunks > 1:  # 12 response tokens in chunks of 5
        monkeypatch.setattr(tgdpo, "LOGITS_BYTES", 4 * model.config.vocab_size * 5)
    batch = tgdpo.collate(ROWS, "cpu")
    got = tgdpo.token_logps(model, batch)
    want = brute(model, ROWS)
    assert got.shape == (4, 6) and got.dtype == torch.float32
    weights = torch.linspace(-1, 1, 6)
    got_gradient = torch.autograd.grad((got * weights).sum(), list(model.parameters()), allow_unused=True)
    total = sum(w * value for row in want for w, value in zip(weights, row))
    want_gradient = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    for row, values in zip(got, want):
        torch.testing.assert_close(row[: len(values)], torch.stack(values), atol=1e-5, rtol=0)
        assert row[len(values) :].abs().sum() == 0, "zero where there is no response token"
    for a, b in zip(got_gradient, want_gradient):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    assert "forward" not in vars(model.get_decoder()), "the body's forward must be the class's again"


def test_the_head_sees_response_positions_only_and_in_chunks(monkeypatch):
    model, seen = build("llama"), []
    original = tgdpo.head_logits
    monkeypatch.setattr(
        tgdpo, "head_logits", lambda model, hidden, kind: seen.append(len(hidden)) or original(model, hidden, kind)
    )
    monkeypatch.setattr(tgdpo, "LOGITS_BYTES", 4 * model.config.vocab_size * 5)
    batch = tgdpo.collate(ROWS, "cpu")
    logps = tgdpo.token_logps(model, batch)
    assert seen == [5, 5, 2]  # 3 + 6 + 1 + 2 response tokens
    logps.sum().backward()
    assert len(seen) == 6, "each chunk is computed again in the backward pass"


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemma_2s_soft_capping_is_honoured_when_it_is_loaded(cap, tmp_path):
    """Written out here: z -> cap tanh(z / cap) on attention scores and on logits. Without either, other log-probs."""
    caps = dict(attn_logit_softcapping=0.3, final_logit_softcapping=0.5)
    small = dict(head_dim=8, query_pre_attn_scalar=1, sliding_window=4)
    path = make_model(tmp_path / "with", "gemma2", scale=20.0, **small, **caps)
    batch = tgdpo.collate(ROWS, "cpu")

    def logps(model):
        with torch.no_grad():
            return model.token_logps(batch)

    got = logps(tgdpo.load_model(path, tgdpo.Options(device="cpu", dtype="float32")))
    without = tgdpo.load_model(path, tgdpo.Options(device="cpu", dtype="float32"))
    plain, tanh = torch.nn.functional.softmax, torch.tanh
    if cap == "final_logit_softcapping":
        without.config.final_logit_softcapping = None
        forward = without.lm_head.forward
        without.lm_head.forward = lambda hidden: 0.5 * tanh(forward(hidden) / 0.5)
        capped = logps(without)
        without.lm_head.forward = forward
    else:
        for layer in without.model.layers:
            layer.self_attn.attn_logit_softcapping = None

        def softmax(scores, *args, **kwargs):  # masked scores are far below, and stay there
            seen = scores > -1e30
            return plain(torch.where(seen, 0.3 * tanh(scores.where(seen, 0.0) / 0.3), scores), *args, **kwargs)

        torch.nn.functional.softmax = softmax
        try:
            capped = logps(without)
        finally:
            torch.nn.functional.softmax = plain
    torch.testing.assert_close(got, capped, atol=1e-5, rtol=0)
    assert (got - logps(without)).abs().max() > 0.05


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_and_batching_do_not_matter(family):
    model = build(family)
    batch = tgdpo.collate(ROWS, "cpu")
    together = tgdpo.token_logps(model, batch)
    width = batch["input_ids"].shape[1]
    row, column = batch["states"] // width, batch["states"] % width
    wider = batch | {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 9), value=5)}
    wider["states"] = row * (width + 9) + column
    torch.testing.assert_close(tgdpo.token_logps(model, wider), together, atol=1e-5, rtol=0)
    for i in range(2):
        alone = tgdpo.collate({name: column[i : i + 1] for name, column in ROWS.items()}, "cpu")
        logps = tgdpo.token_logps(model, alone)
        torch.testing.assert_close(logps, together[[i, i + 2], : logps.shape[1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family, dropout",
    [
        ("gpt2", dict(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)),
        ("llama", dict(attention_dropout=0.5)),
        ("gpt_neox", dict(attention_dropout=0.5, hidden_dropout=0.5)),
        ("opt", dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5)),
    ],
)
def test_dropout_is_off_and_training_equals_evaluation(family, dropout):
    model = build(family, **dropout)
    batch = tgdpo.collate(ROWS, "cpu")
    first, second = [tgdpo.token_logps(model, batch) for _ in range(2)]
    assert torch.equal(first, second)
    torch.testing.assert_close(tgdpo.token_logps(build(family), batch), first, atol=1e-6, rtol=0)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    model = build("llama")
    batch = tgdpo.collate(ROWS, "cpu")
    exact, rounded = [tgdpo.token_logps(model, batch, dtype) for dtype in ("float32", "bfloat16")]
    assert rounded.dtype == torch.float32
    difference = (exact - rounded).abs().max().item()
    assert 1e-4 < difference < 0.2  # bfloat16 has 8 bits: it must differ, and not by much


def test_weights_are_float32_whatever_was_saved(tmp_path):
    path = make_model(tmp_path / "m", "llama", dtype=torch.bfloat16)
    model = tgdpo.load_model(path, tgdpo.Options(device="cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradient():
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(small_config("llama"))
        model = tgdpo.prepare_model(model, tgdpo.Options(device="cpu", gradient_checkpointing=on))
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        batch = tgdpo.collate(ROWS, "cpu")
        tgdpo.token_logps(model, batch).sum().backward()
        assert len(calls) == 1 + on, "checkpointing runs a layer again in the backward pass"
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
