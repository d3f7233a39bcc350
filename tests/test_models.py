"""Models are tried before they are trusted: what is refused, what is mended, and what is written."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
import transformers

import tgdpo
from conftest import make_model, rows_of, word_tokenizer
from test_train import curve

OPTIONS = tgdpo.Options(device="cpu", dtype="float32")
MOE = dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3)


def prepared(path):
    return tgdpo.prepare_model(tgdpo.read_model(path), OPTIONS)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("phimoe", dict(input_jitter_noise=0.3, **MOE)),
        ("mixtral", MOE),
        ("falcon", dict(hidden_dropout=0.5)),
        ("persimmon", dict(hidden_dropout=0.5)),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_that_draw_in_training_mode_answer_the_same_twice(bench, family, changes, checkpointing, capsys):
    model = make_model(bench.folder / family, family, scale=4.0, **changes)
    options = dict(model_name_or_path=model, loss="dpo", learning_rate=0, max_steps=3)
    if checkpointing and family == "falcon":  # its checkpointed blocks believe that they train, and draw
        bench.train(gradient_checkpointing=True, status=2, **options)
        assert "answers at random" in capsys.readouterr().err
        return
    rows, _ = bench.train(gradient_checkpointing=checkpointing, **options)
    assert [row["loss"] for row in rows] == [pytest.approx(0.693147, abs=1e-5)] * 3
    tgdpo.try_model(model, prepared(model))


def test_a_model_that_looks_at_later_tokens_is_refused_and_trains_as_a_decoder(bench, capsys):
    bert = make_model(bench.folder / "bert", "bert", scale=4.0, pad_token_id=1)
    bench.train(model_name_or_path=bert, loss="dpo", status=2)
    error = capsys.readouterr().err
    assert "looks at later tokens" in error and error.count("\n") == 1
    decoder = make_model(bench.folder / "decoder", "bert", scale=4.0, pad_token_id=1, is_decoder=True)
    rows, _ = bench.train(model_name_or_path=decoder, loss="dpo")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda logits: logits + 0.01 * torch.randn_like(logits), "answers at random"),
        # by the place in a row, which a head at chosen places does not know
        (lambda logits: logits * (1 + torch.arange(logits.shape[1]))[:, None], "has other log-probs by its own logits"),
    ],
)
def test_a_head_that_is_not_what_we_compute_is_refused(bench, change, said):
    model = prepared(bench.model)
    tgdpo.try_model("m", model)
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    with pytest.raises(tgdpo.InputError, match=f"model m {said}"):
        tgdpo.try_model("m", model)


@pytest.mark.parametrize("family", ["llama4_text", "modernbert-decoder"])
def test_what_is_called_a_decoder_and_is_none(family):
    """Llama 4 names all of the model, ModernBERT's decoder a part of the head."""
    config = transformers.AutoConfig.for_model(family)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    more = dict(num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48, num_local_experts=2)
    known = {name: value for name, value in (sizes | more).items() if name in config.to_dict()}
    config = transformers.AutoConfig.for_model(
        family, **known, pad_token_id=1, bos_token_id=2, eos_token_id=3, layer_types=None
    )
    torch.manual_seed(0)
    model = tgdpo.prepare_model(transformers.AutoModelForCausalLM.from_config(config), OPTIONS)
    assert model.get_decoder() is not tgdpo.decoder(model)
    tgdpo.try_model(family, model)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8]])).logits
        got = tgdpo.token_logps(model, tgdpo.collate({"prompt_ids": [[5, 6]], "chosen_ids": [[7, 8]]}, "cpu"))
    want = logits[0, 1:3].log_softmax(-1)[[0, 1], [7, 8]]
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=0)


def resumes(bench, model):
    """A run with a checkpoint after its first step, whole and continued from there -> its folder."""
    options = dict(model_name_or_path=model, loss="dpo", max_steps=2, save_steps=1, weight_decay=0.1)
    rows, out = bench.train(**options)
    rows = curve(rows)
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))
    (out / "model.safetensors").unlink()
    assert curve(bench.train("--resume", out=out, **options)[0]) == rows
    return out


def test_a_vision_tower_is_frozen_and_the_run_resumes(bench):
    text = dict(vocab_size=26, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=1, eos_token_id=3)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | dict(image_size=28, patch_size=14), image_token_index=25
    )
    torch.manual_seed(0)
    path = bench.folder / "gemma"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    out = resumes(bench, str(path))
    before, after = [transformers.AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (path, out)]
    beside = [name for name in before if "language_model" not in name and "lm_head" not in name]
    assert any("vision_tower" in name for name in beside) and before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in beside), name


def test_weights_that_nothing_uses_do_not_keep_a_run_from_resuming(bench):
    """The attention to an encoder that BART's decoder has, and no text reaches."""
    sizes = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=1)
    sizes |= dict(encoder_attention_heads=4, encoder_ffn_dim=48, pad_token_id=1, bos_token_id=2, vocab_size=26)
    config = transformers.BartConfig(**sizes, max_position_embeddings=64, eos_token_id=3)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(bench.folder / "bart")
    word_tokenizer().save_pretrained(bench.folder / "bart")
    resumes(bench, str(bench.folder / "bart"))


def test_a_head_of_its_own_stays_although_the_configuration_says_tied(bench):
    path = Path(make_model(bench.folder / "own", "llama", scale=4.0, tie_word_embeddings=False))
    want = tgdpo.read_model(str(path)).lm_head.weight
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    _, out = bench.train(model_name_or_path=str(path), loss="dpo", learning_rate=0)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    saved = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(saved.lm_head.weight, want) and saved.lm_head.weight is not saved.model.embed_tokens.weight


def test_the_tokenizers_files_are_copied_byte_for_byte(bench):
    source = Path(bench.model)
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text("{}")
    _, out = bench.train(loss="dpo", max_steps=1)
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_colleagues_can_read_the_weights(bench):
    before = os.umask(0o022)
    try:
        _, out = bench.train(max_steps=1)
    finally:
        os.umask(before)
    for folder in (out, out / "reward_model"):
        assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644


def test_what_is_no_causal_language_model_is_said(bench, capsys):
    adapter = bench.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    transformers.T5Config().save_pretrained(bench.folder / "t5")
    word_tokenizer().save_pretrained(adapter)
    word_tokenizer().save_pretrained(bench.folder / "t5")
    for name, said in (("adapter", "is a LoRA adapter"), ("t5", "is a t5; expected a causal language model")):
        bench.train(model_name_or_path=str(bench.folder / name), status=2)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_long_ropes_and_mixtures_of_experts_say_what_is_done(bench, capsys):
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    limit = dict(pad_token_id=1, original_max_position_embeddings=16)
    model = make_model(bench.folder / "phi3", "phi3", scale=4.0, rope_parameters=rope, **limit)
    bench.train(model_name_or_path=model, loss="dpo", max_steps=1)
    assert "--max_length 2048 is lowered to 16" in capsys.readouterr().out
    model = make_model(bench.folder / "moe", "mixtral", **MOE)
    bench.train(model_name_or_path=model, loss="dpo", max_steps=1)
    assert "its auxiliary loss, which balances them, is not trained" in capsys.readouterr().out


def test_blocks_inside_blocks_are_sharded_from_the_inside(bench, monkeypatch, capsys):
    order = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda unit, **how: order.append(unit))
    monkeypatch.setattr("torch.distributed.fsdp.register_fsdp_forward_method", lambda *args: None)
    monkeypatch.setattr(tgdpo, "device_mesh", lambda *args: None)
    model = prepared(bench.model)
    model._no_split_modules = ["GPT2Block", "GPT2MLP"]
    tgdpo.shard(model, OPTIONS)
    names = [type(unit).__name__ for unit in order]
    assert names == ["GPT2MLP", "GPT2Block"] * 2 + ["GPT2LMHeadModel"] and not capsys.readouterr().out
    order.clear()
    model.transformer.h[1].mlp = model.transformer.h[0].mlp  # one MLP for both blocks, as Zamba has it
    tgdpo.shard(model, OPTIONS)
    assert [type(unit).__name__ for unit in order] == ["GPT2LMHeadModel"], "a tensor has one unit"
    capsys.readouterr()
    model._no_split_modules = None
    tgdpo.shard(model, OPTIONS)
    assert "GPT2LMHeadModel has no known blocks" in capsys.readouterr().out


def test_checkpointing_where_a_family_lacks_it(bench, monkeypatch, capsys):
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(transformers.GPT2PreTrainedModel, "supports_gradient_checkpointing", False)
    bench.train(loss="dpo", gradient_checkpointing=True, status=2)
    error = capsys.readouterr().err
    assert "--gradient_checkpointing for this model" in error and error.count("\n") == 1
    assert not rows_of(bench.folder / "run1")


def test_tokenizers_are_read_by_transformers_own_classes(bench, monkeypatch):
    """AutoTokenizer takes mistral-common's class where that package is installed; it has no added_tokens_decoder."""
    original, seen = transformers.AutoTokenizer.from_pretrained, []
    monkeypatch.setattr(tgdpo.AutoTokenizer, "from_pretrained", lambda *a, **k: seen.append(k) or original(*a, **k))
    assert tgdpo.load_tokenizer(bench.model).added_tokens_decoder
    assert seen[-1].get("mistral_format") is False
