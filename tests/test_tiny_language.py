"""scripts/tiny_language.py: the language of 31 words, and from nothing to its table."""

import json
import random

import pytest
import torch
import transformers

import tgdpo
import tiny_language
from conftest import make_model, rows_of


def sentence(text):
    return tiny_language.tiny_rewards("cat", text.split())


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
            words.append(rng.choice(tiny_language.tiny_next(words[-1], "cat")))
        assert all(tiny_language.tiny_legal("cat", words[1:]))
        totals.append(sum(tiny_language.tiny_rewards("cat", words[1:])))
    assert abs(sum(totals) / len(totals)) < 0.15


def test_pairs_are_labelled_by_bradley_terry(tmp_path, monkeypatch):
    """Sampled from a stub: "good" (+1) against "bad" (-1), so P(good is chosen) = sigma(2) = 0.881."""
    monkeypatch.setattr(tiny_language, "TINY_PAIRS", 4000)
    tokenizer = tiny_language.tiny_tokenizer(64)

    def stub(path, prompts, *_):
        return [
            tokenizer(f"{tokenizer.decode(p[1:3])} is {word} . <eos>").input_ids
            for p, word in zip(prompts, ["good"] * 4000 + ["bad"] * 4000)
        ]

    monkeypatch.setattr(tiny_language, "sample", stub)
    tiny_language.tiny_pairs("nowhere", tokenizer, tgdpo.Options(), tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    share = sum("good" in row["chosen"] for row in rows) / 4000
    assert share == pytest.approx(0.881, abs=0.02)
    assert rows[0]["prompt"].startswith("describe the ") and rows[0]["chosen"].endswith("<eos>")


def test_samples_stop_at_the_end_token_and_follow_the_model(tmp_path):
    """A model that always says "good <eos>", whatever the prompt's length."""
    tokenizer = tiny_language.tiny_tokenizer(64)
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
    assert tiny_language.sample(path, prompts, options, tokenizer, "s") == [[good] * 32] * 2
    with torch.no_grad():
        model.lm_head.weight[good, 0], model.lm_head.weight[2, 0] = 0.0, 50.0
    model.save_pretrained(path)
    assert tiny_language.sample(path, prompts, options, tokenizer, "s") == [[2]] * 2


def test_samples_of_prompts_of_unequal_length_do_not_depend_on_each_other(tmp_path):
    """Weights so large that the first draws are all but certain: the same alone and beside a longer prompt."""
    tokenizer = tiny_language.tiny_tokenizer(64)
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
    together = [ids[:3] for ids in tiny_language.sample(path, prompts, options, tokenizer, "s")]
    assert together == [tiny_language.sample(path, [prompt], options, tokenizer, "s")[0][:3] for prompt in prompts]
    assert len({tuple(ids) for ids in together}) > 2


def test_a_published_temperature_does_not_count_and_is_kept(tmp_path):
    """Chat models come with a temperature and more; draws are at temperature 1 all the same, and the model keeps it."""
    tokenizer = tiny_language.tiny_tokenizer(64)
    path = make_model(tmp_path / "m", tokenizer=tokenizer, vocab_size=len(tokenizer), eos_token_id=2, scale=3.0)
    model = tgdpo.read_model(path).eval()
    torch.manual_seed(0)
    plain = tiny_language.generate(model, [[4, 5]] * 20, tokenizer)
    model.generation_config.update(do_sample=True, temperature=1e-4, top_p=0.1, repetition_penalty=5.0)
    torch.manual_seed(0)
    assert tiny_language.generate(model, [[4, 5]] * 20, tokenizer) == plain and len(set(map(tuple, plain))) > 5
    assert model.generation_config.temperature == 1e-4


def test_credit_by_brute_force():
    """Correlation and AUC, equal values counted as half, tokens worth nothing not at all."""
    values = [0.3, 0.1, 0.1, -0.2, 0.3, 0.0, 0.1]
    worth = [1.0, 2.0, -1.0, -1.0, 0.0, 0.0, -2.0]
    correlation, auc = tiny_language.credit(torch.tensor(values), torch.tensor(worth))
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
    monkeypatch.setattr(tiny_language, "TINY_STEPS", 20)
    monkeypatch.setattr(tiny_language, "TINY_PAIRS", 60)
    monkeypatch.setattr(tiny_language, "TINY_PROMPTS", 20)


def test_from_nothing_to_a_table(small, tmp_path, capsys):
    argv = [f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}", "--num_train_epochs=1"]
    argv.append("--max_length=64")
    assert tiny_language.main(argv) == 0
    out = tmp_path / "out"
    run = json.loads((out / "run.json").read_text())
    assert list(run["table"]) == ["reference", "dpo", "tgdpo", "tgdpo, truth"]
    for row in run["table"].values():
        assert set(row) >= {"KL", "length", "ungrammatical", "true reward", "wins over reference"}
    assert run["table"]["reference"]["KL"] == [0.0, 0.0]
    assert run["table"]["reference"]["wins over reference"] == [0.5, 0.0]
    assert -1 <= run["correlation"] <= 1 and 0 <= run["AUC"] <= 1
    text = capsys.readouterr().out
    table = text.split("fresh prompts")[1].split("correlation")[0]
    assert max(map(len, table.split("\n"))) <= 80
    assert text.count("\ntgdpo, truth") == 3 and text.count("\ndescribe the ") == 2, "two prompts, with all responses"
    dpo, guided = run["table"]["dpo"], run["table"]["tgdpo"]
    assert f"\ntgdpo: {guided['true reward'][0] - dpo['true reward'][0]:+.2f} true reward against DPO" in text
    assert rows_of(out) and rows_of(out / "reward_model") and rows_of(out / "true_rewards")
    # a kill before the last stage: --resume keeps what is there and ends with the same table
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))
    assert tiny_language.main(argv + ["--resume"]) == 0
    again = json.loads((out / "run.json").read_text())
    assert again["table"] == run["table"]


def test_the_table_by_hand(tmp_path, monkeypatch, capsys):
    """Two models that say known sentences with known log-probs: every cell, and r̂ = beta (log pi_dpo - log pi_ref)."""
    tokenizer, texts = tiny_language.tiny_tokenizer(64), {
        "ref": ["the cat is bad . <eos>", "the cat is good . <eos>"],
        "new": ["the cat is very good . <eos>", "cat"],
    }
    says = {tuple(tokenizer(text).input_ids): path for path, both in texts.items() for text in both}
    good = tokenizer("good").input_ids[0]

    def logps(path, rows, *_):
        """-1 a token; of "new", -0.5, and -0.2 for the word good."""
        value = {"ref": lambda i: -1.0, "new": lambda i: -0.2 if i == good else -0.5}[path]
        assert all(says[tuple(row)] for row in rows["chosen_ids"])
        return [[torch.tensor([value(i) for i in ids]).numpy() for ids in rows["chosen_ids"]]]

    monkeypatch.setattr(tiny_language, "sample", lambda path, *_: tokenizer(texts[path]).input_ids)
    monkeypatch.setattr(tgdpo, "frozen_logps", logps)
    options = tgdpo.Options(loss="dpo", beta=2.0, output_dir=str(tmp_path))
    prompts = tokenizer(["describe the cat :"] * 2).input_ids
    tiny_language.tiny_report(options, tokenizer, {"reference": "ref", "dpo": "new"}, prompts)
    run = json.loads((tmp_path / "run.json").read_text())
    half = 1.96 / 2**0.5  # of two values, the half interval is this times half of their distance
    want = {
        "reference": {"KL": (0, 0), "length": (6, 0), "ungrammatical": (0, 0), "true reward": (0, half)}
        | {"wins over reference": (0.5, 0)},  # a draw is half a win
        # 7 tokens, one of them good: 6 * 0.5 + 0.8 = 3.8; "cat" alone: 0.5. Rewards 2 and -1: wins over -1, loses to 1.
        "dpo": {"KL": (2.15, half * 1.65), "length": (4, half * 3), "ungrammatical": (0.5, half / 2)}
        | {"true reward": (0.5, half * 1.5), "wins over reference": (0.5, half / 2)},
    }
    for name, row in want.items():
        for column, values in row.items():
            assert run["table"][name][column] == pytest.approx(values, abs=1e-6), (name, column)
    # in what the reference says r̂ is 2 * 0.5 = 1, and 1.6 for good, the one word of worth 1; bad is worth -1
    assert run["AUC"] == 1.0
    x, y = [1.0] * 12, [0.0] * 12
    x[9], y[9], y[3] = 1.6, 1.0, -1.0
    mean = sum(x) / 12
    covariance = sum((a - mean) * b for a, b in zip(x, y))  # the mean of y is 0
    want = covariance / (sum((a - mean) ** 2 for a in x) * 2) ** 0.5
    assert run["correlation"] == pytest.approx(want, abs=1e-5)
    text = capsys.readouterr().out
    assert "reference      the[+1.0] cat[+1.0] is[+1.0] good[+1.6] .[+1.0] <eos>[+1.0]" in text
    assert "2.15 ± 2.29" in text
    assert "\ndpo            cat[+1.0] ... (cut at 1 tokens)\n" in text, "no end token"
    assert "r̂ of their tokens: above 0[+1.0], below 0[-1.0]" in text


def test_what_each_method_has_more_of_than_dpo(capsys):
    rows = {"reference": (0.0, 0.0), "dpo": (2.0, 2.5), "tgdpo": (5.0, 2.2), "tgdpo, truth": (3.0, 3.25)}
    table = {name: {"KL": [kl, 0.1], "true reward": [reward, 0.1]} for name, (kl, reward) in rows.items()}
    tiny_language.print_differences(table)
    want = ["tgdpo: -0.30 true reward against DPO, at 2.5 times its KL"]
    want.append("tgdpo, truth: +0.75 true reward against DPO, at 1.5 times its KL")
    assert capsys.readouterr().out.splitlines() == want
    tiny_language.print_differences({"reference": table["reference"]})
    assert capsys.readouterr().out == ""


def test_its_own_defaults_and_steps_and_nothing_of_yours(tmp_path, monkeypatch, capsys):
    before = dict(tgdpo.TINY)
    options = tiny_language.read_options(["--alpha=3"])
    assert (options.beta, options.alpha, options.max_length, options.eval_size) == (0.5, 3.0, 256, 0.1)
    assert tgdpo.TINY == before and before["beta"] != 0.5
    for wrong, found in (
        (["--model_name_or_path=x", "--dataset=y"], "makes its own; expected neither"),
        (["--dataset=y"], "expected both or none"),
        (["--nonsense=1"], "unrecognized arguments: --nonsense=1"),
    ):
        assert tiny_language.main(wrong) == 2
        error = capsys.readouterr().err
        assert found in error and error.count("\n") == 1
    calls = []
    monkeypatch.setattr(tiny_language, "from_scratch", lambda ids, *more: calls.append((ids, more[-1])))
    tokenizer = tiny_language.tiny_tokenizer(64)
    tiny_language.language_model(["the cat"], tokenizer, options, tmp_path)
    assert calls == [([tokenizer("the cat").input_ids], 400)]
    tokenizer.save_pretrained(tmp_path)  # the last file of a model: now it is there
    tiny_language.language_model(["the cat"], tokenizer, options, tmp_path)
    assert len(calls) == 1


def test_tokens_are_painted_on_a_terminal_and_numbered_elsewhere(monkeypatch):
    assert tiny_language.paint("good", 1.26) == "good[+1.3]" and tiny_language.paint("the", 0.1) == "the"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert tiny_language.paint("good", 1.26) == "\033[38;5;16;48;5;69mgood\033[0m"
    assert "216" not in tiny_language.paint("x", 0.0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert tiny_language.paint("bad", -2.0) == "bad[-2.0]"
