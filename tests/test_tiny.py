"""The tiny language, and the tiny mode from nothing to its table."""

import json
import random

import pytest
import torch

import tgdpo
from conftest import rows_of


def sentence(text):
    return tgdpo.tiny_rewards("cat", text.split())


def test_true_rewards_by_hand():
    assert sentence("the cat is good . <eos>") == [0, 0, 0, 1, 0, 0]
    assert sentence("the cat is bad . <eos>") == [0, 0, 0, -1, 0, 0]
    assert sentence("the cat is not good . <eos>") == [0, 0, 0, 0, -1, 0, 0], '"not" turns the sign'
    assert sentence("the cat is not bad") == [0, 0, 0, 0, 1]
    assert sentence("the cat is very kind") == [0, 0, 0, 0, 2]
    assert sentence("the cat is not very lazy") == [0, 0, 0, 0, 0, 2]
    assert sentence("the cat is not good and it was very happy .") == [0, 0, 0, 0, -1, 0, 0, 0, 0, 2, 0], (
        '"not" ends with its adjective'
    )
    assert sentence("the cat not is good") == [0, 0, -1, -1, 1], '"not" reaches over "very" alone'
    assert sentence("the dog is good good") == [0, -1, -1, 1, -1], (
        "not the noun asked for; a verb after that; good twice"
    )


def test_sentences_of_the_grammar_break_no_rule_and_earn_nothing_on_average():
    rng, totals = random.Random(0), []
    for _ in range(2000):
        words = [""]
        while words[-1] != "<eos>":
            words.append(rng.choice(tgdpo.tiny_next(words[-1], "cat")))
        assert all(tgdpo.tiny_legal("cat", words[1:]))
        totals.append(sum(tgdpo.tiny_rewards("cat", words[1:])))
    assert abs(sum(totals) / len(totals)) < 0.15


def test_pairs_are_labelled_by_bradley_terry(tmp_path, monkeypatch):
    """Sampled from a stub: "good" (+1) against "bad" (-1), so P(good is chosen) = sigma(2) = 0.881."""
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 4000)
    tokenizer = tgdpo.tiny_tokenizer(None, 64)

    def stub(path, prompts, *_):
        return [
            tokenizer(f"{tokenizer.decode(p[1:3])} is {word} . <eos>").input_ids
            for p, word in zip(prompts, ["good"] * 4000 + ["bad"] * 4000)
        ]

    monkeypatch.setattr(tgdpo, "sample", stub)
    tgdpo.tiny_pairs("nowhere", tokenizer, tgdpo.Options(), tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    share = sum("good" in row["chosen"] for row in rows) / 4000
    assert share == pytest.approx(0.881, abs=0.02)
    assert rows[0]["prompt"].startswith("describe the ") and rows[0]["chosen"].endswith("<eos>")


def test_samples_stop_at_the_end_token_and_follow_the_model(tmp_path):
    """A model that always says "good <eos>", whatever the prompt's length."""
    from conftest import make_model
    import transformers

    tokenizer = tgdpo.tiny_tokenizer(None, 64)
    path = make_model(tmp_path / "m", tokenizer=tokenizer, vocab_size=len(tokenizer), eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    good = tokenizer("good").input_ids[0]
    with torch.no_grad():  # the last layer's normalisation gives a constant; the head turns it into one token
        for p in model.parameters():
            p.zero_()
        model.transformer.wpe.weight[:, 0] = 1.0
        model.transformer.ln_f.bias[0] = 1.0
        model.lm_head.weight[good, 0] = 50.0
    model.save_pretrained(path)
    prompts = [[4, 5], [4, 5, 6, 7]]
    options = tgdpo.Options(device="cpu")
    assert tgdpo.sample(path, prompts, options, tokenizer, "s") == [[good] * 32] * 2
    with torch.no_grad():
        model.lm_head.weight[good, 0], model.lm_head.weight[2, 0] = 0.0, 50.0
    model.save_pretrained(path)
    assert tgdpo.sample(path, prompts, options, tokenizer, "s") == [[2]] * 2


def test_samples_of_prompts_of_unequal_length_do_not_depend_on_each_other(tmp_path):
    """Weights so large that the first draws are all but certain: the same alone and beside a longer prompt."""
    import transformers
    from conftest import make_model

    tokenizer = tgdpo.tiny_tokenizer(None, 64)
    path = make_model(
        tmp_path / "m",
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        eos_token_id=2,
        scale=8.0,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    model.save_pretrained(path)
    prompts, options = [[4, 5], [9, 12, 6, 7, 20], [8], [30, 21, 9]], tgdpo.Options(device="cpu")
    together = [ids[:3] for ids in tgdpo.sample(path, prompts, options, tokenizer, "s")]
    assert together == [tgdpo.sample(path, [prompt], options, tokenizer, "s")[0][:3] for prompt in prompts]
    assert len({tuple(ids) for ids in together}) > 2


def test_a_published_temperature_does_not_count_and_is_kept(tmp_path):
    """Chat models come with a temperature and more; draws are at temperature 1 all the same, and the model keeps it."""
    from conftest import make_model

    tokenizer = tgdpo.tiny_tokenizer(None, 64)
    path = make_model(tmp_path / "m", tokenizer=tokenizer, vocab_size=len(tokenizer), eos_token_id=2, scale=3.0)
    model = tgdpo.read_model(path).eval()
    torch.manual_seed(0)
    plain = tgdpo.generate(model, [[4, 5]] * 20, tokenizer)
    model.generation_config.update(do_sample=True, temperature=1e-4, top_p=0.1, repetition_penalty=5.0)
    torch.manual_seed(0)
    assert tgdpo.generate(model, [[4, 5]] * 20, tokenizer) == plain and len(set(map(tuple, plain))) > 5
    assert model.generation_config.temperature == 1e-4


def test_credit_by_brute_force():
    """Correlation and AUC, equal values counted as half, tokens worth nothing not at all."""
    values = [0.3, 0.1, 0.1, -0.2, 0.3, 0.0, 0.1]
    worth = [1.0, 2.0, -1.0, -1.0, 0.0, 0.0, -2.0]
    correlation, auc = tgdpo.credit(torch.tensor(values), torch.tensor(worth))
    good, bad = [[v for v, w in zip(values, worth) if w * sign > 0] for sign in (1, -1)]
    assert auc == pytest.approx(sum((a > b) + 0.5 * (a == b) for a in good for b in bad) / 6) == 5 / 6
    mean = [sum(x) / 7 for x in (values, worth)]
    products = [
        sum((a - m) * (b - n) for a, b in zip(x, y))
        for x, m, y, n in (
            (values, mean[0], worth, mean[1]),
            (values, mean[0], values, mean[0]),
            (worth, mean[1], worth, mean[1]),
        )
    ]
    assert correlation == pytest.approx(products[0] / (products[1] * products[2]) ** 0.5, abs=1e-5)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tgdpo, "TINY_STEPS", 60)
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 100)
    monkeypatch.setattr(tgdpo, "TINY_PROMPTS", 40)


def test_the_tiny_mode_from_nothing_to_a_table(small, tmp_path, capsys):
    argv = [
        f"--output_dir={tmp_path / 'out'}",
        f"--cache_dir={tmp_path / 'cache'}",
        "--num_train_epochs=1",
        "--max_length=64",
    ]
    assert tgdpo.main(argv) == 0
    out = tmp_path / "out"
    run = json.loads((out / "run.json").read_text())
    assert list(run["table"]) == ["reference", "dpo", "tgdpo", "tgdpo, truth"]
    for row in run["table"].values():
        assert set(row) >= {"KL", "length", "ungrammatical", "true reward", "wins over reference"}
    assert run["table"]["reference"]["KL"] == [0.0, 0.0]
    assert run["table"]["reference"]["wins over reference"] == [0.5, 0.0]
    assert -1 <= run["correlation"] <= 1 and 0 <= run["AUC"] <= 1
    text = capsys.readouterr().out
    assert "correlation" in text and text.count("tgdpo, truth") == 3
    assert rows_of(out) and rows_of(out / "reward_model") and rows_of(out / "true_rewards")
    # a kill before the last stage: --resume keeps what is there and ends with the same table
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))
    assert tgdpo.main(argv + ["--resume"]) == 0
    again = json.loads((out / "run.json").read_text())
    assert again["table"] == run["table"]


def test_the_tiny_mode_on_real_pairs(small, real_pairs, tmp_path, capsys):
    rows = json.loads(real_pairs.read_text())[:60]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    assert (
        tgdpo.main(
            [
                f"--dataset={tmp_path / 'some.json'}",
                f"--output_dir={tmp_path / 'out'}",
                f"--cache_dir={tmp_path / 'cache'}",
                "--num_train_epochs=1",
                "--max_length=96",
                "--eval_size=1",
            ]
        )
        == 0
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(run["table"]["tgdpo"]) == {"KL", "length"} and run["evaluation"]["eval_loss"] > 0
    tokenizer = tgdpo.load_tokenizer(str(tmp_path / "out"))
    assert (
        tokenizer.apply_chat_template([dict(role="user", content="Hi!")], tokenize=False, add_generation_prompt=True)
        == "<|user|>Hi!<eos><|assistant|>"
    )


def test_tokens_are_painted_on_a_terminal_and_numbered_elsewhere(monkeypatch):
    assert tgdpo.paint("good", 1.26) == "good[+1.3]" and tgdpo.paint("the", 0.1) == "the"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert tgdpo.paint("good", 1.26) == "\033[38;5;16;48;5;69mgood\033[0m" and "216" not in tgdpo.paint("x", 0.0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert tgdpo.paint("bad", -2.0) == "bad[-2.0]"
