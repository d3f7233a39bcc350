"""scripts/treg.py and scripts/token_rewards.py: token rewards from prompts and classifiers, and uses of them."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

import tgdpo
from conftest import CHATML, eight_pairs, ids, small_config, word_tokenizer, write_rows

import token_rewards
import treg


def label_logps(path, prompt, response):
    """log-probs of response ids behind prompt ids, by the model's own full logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        table = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]


def options(bench, **changes):
    return tgdpo.Options(
        **dict(model_name_or_path=bench.model, dataset=bench.data, cache_dir=str(bench.folder / "cache"))
        | dict(device="cpu", dtype="float32", max_length=64, per_device_train_batch_size=3)
        | changes
    )


def test_contrastive_rewards_by_hand(bench):
    """(9d): the response's own tokens behind two other prompts, sigma of the difference less 1/2."""
    rows, o = eight_pairs(), options(bench)
    tokenizer = tgdpo.load_tokenizer(bench.model)
    pairs, _ = tgdpo.tokenize(rows, tokenizer, 64, "pairs")
    columns = treg.contrastive_rewards(bench.model, rows, pairs, tokenizer, o, "green {prompt} sun", "red {prompt}")
    for row, pair, *both in zip(rows, pairs, *columns):
        better, worse = ids(f"green {row['prompt']} sun"), ids(f"red {row['prompt']}")
        for side, got in zip(("chosen_ids", "rejected_ids"), both):
            high, low = [label_logps(bench.model, prompt, pair[side]) for prompt in (better, worse)]
            assert got == pytest.approx([1 / (1 + math.exp(b - a)) - 0.5 for a, b in zip(high, low)], abs=1e-5)
            assert max(map(abs, got)) <= 0.5
    assert max(abs(value) for side in columns for row in side for value in row) > 0.05, "the prompts must matter"


def test_the_instruction_goes_into_the_last_user_turn_and_responses_keep_their_tokens():
    tokenizer = word_tokenizer(template=CHATML)
    turns = [
        dict(role="system", content="red"),
        dict(role="user", content="one ?"),
        dict(role="assistant", content="two"),
    ]
    turns.append(dict(role="user", content="cat ?"))
    wrapped = treg.wrap(turns, "sun {prompt} moon")
    assert wrapped[:3] == turns[:3] and wrapped[3] == dict(role="user", content="sun cat ? moon")
    assert turns[3]["content"] == "cat ?", "the pair itself is left alone"
    tail = [dict(role="user", content="x"), dict(role="system", content="y")]
    assert treg.wrap(tail, "a {prompt}") == [dict(role="user", content="a x"), tail[1]]
    assert treg.wrap([dict(role="system", content="x")], "a {prompt}") == [dict(role="system", content="a x")]
    rows = [
        dict(
            prompt=turns,
            chosen=[dict(role="assistant", content="yes .")],
            rejected=[dict(role="assistant", content="no")],
        )
    ]
    pairs, _ = tgdpo.tokenize(rows, tokenizer, 64, "pairs")
    asked = treg.asked(rows, pairs, tokenizer, 64, "sun {prompt} moon")
    assert asked[0]["chosen_ids"] == pairs[0]["chosen_ids"] and asked[0]["rejected_ids"] == pairs[0]["rejected_ids"]
    said = tokenizer.decode(asked[0]["prompt_ids"])
    assert (
        "sun cat ? moon" in said
        and said.endswith("assistant \n")
        and "sun" not in tokenizer.decode(pairs[0]["prompt_ids"])
    )


def test_a_prompt_that_becomes_too_long_loses_its_left_end_and_keeps_the_instruction():
    tokenizer = word_tokenizer()
    rows = [dict(prompt="red " * 20, chosen=" yes", rejected=" no no")]
    pairs, _ = tgdpo.tokenize(rows, tokenizer, 16, "pairs")
    assert len(pairs[0]["prompt_ids"]) == 13
    for positions, kept in ((64, 13), (16, 11)):  # as much of the prompt as without the instruction, if there is room
        asked = treg.asked(rows, pairs, tokenizer, positions, "{prompt} sun moon")
        assert asked[0]["prompt_ids"] == ids("red " * kept + "sun moon")
    tokenizer = word_tokenizer(bos=True)  # a BOS stays, as in the pairs themselves
    pairs, _ = tgdpo.tokenize(rows, tokenizer, 16, "pairs")
    assert pairs[0]["prompt_ids"] == [2] + ids("red " * 12)
    for positions, kept in ((64, 12), (16, 10)):
        asked = treg.asked(rows, pairs, tokenizer, positions, "{prompt} sun moon")
        assert asked[0]["prompt_ids"] == [2] + ids("red " * kept + "sun moon")


def test_annotate_writes_what_both_trainers_read(bench, capsys):
    """From pairs to a data set to T-REG and TGDPO; one pair has a response that --max_length cuts, one is unusable."""
    out = bench.folder / "rewarded.jsonl"
    rows = eight_pairs() + [
        dict(prompt="red", chosen=" one" * 30, rejected=" two"),
        dict(prompt="a", chosen="", rejected="b"),
    ]
    data = write_rows(bench.folder / "more.jsonl", rows)
    argv = ["annotate", f"--model_name_or_path={bench.model}", f"--dataset={data}", f"--output={out}"]
    argv += [
        "--max_length=20",
        f"--cache_dir={bench.folder / 'cache'}",
        "--better=green {prompt}",
        "--worse={prompt} red",
    ]
    assert treg.main(argv) == 0
    text = capsys.readouterr().out
    assert "9 pairs with token rewards; 1 responses are longer than --max_length" in text and "dropped 1" in text
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows[:9]]
    long = written[8]["chosen_rewards"]
    assert len(long) == 31 and not any(long[19:]) and all(long[:19])
    first, _ = bench.train("--loss=treg", dataset=out, max_length=20)
    other, _ = bench.train("--loss=tgdpo", dataset=out, max_length=20)
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-5), "(9c): one gradient at the start"
    before = out.read_text()
    assert treg.main(argv) == 2 and out.read_text() == before
    assert "exists already" in capsys.readouterr().err


def test_treg_train_is_tgdpo_py_with_another_loss(bench):
    argv = bench.argv(reward_model=bench.reward_model, alpha=2.0, num_train_epochs=4)
    assert treg.main(["train", *argv]) == 0
    out = Path(next(a for a in argv if a.startswith("--output_dir=")).split("=", 1)[1])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((out / "run.json").read_text())["options"]["loss"] == "treg"
    dpo, _ = bench.train("--loss=dpo", num_train_epochs=4)
    tgdpo_, _ = bench.train(reward_model=bench.reward_model, alpha=2.0, num_train_epochs=4)
    assert len({round(table[-1]["loss"], 5) for table in (rows, dpo, tgdpo_)}) == 3
    assert not [name for name in rows[0] if name.startswith("guidance/")]


@pytest.mark.parametrize(
    "argv, found",
    [
        (["annotate", "--output=x.jsonl", "--better=be good"], "--dataset"),
        (["annotate", "--output=x.txt", "--dataset=pairs.jsonl"], "x.txt is no .jsonl file"),
        (["nonsense"], "unknown command nonsense; expected annotate, train or tiny"),
        (["tiny", "--dataset=x.jsonl", "--model_name_or_path=x"], "makes its own; expected neither"),
        (["tiny", "--dataset=x.jsonl"], "expected both or none"),
        (["train", "--loss_=1"], "unrecognized arguments: --loss_=1"),
        (["annotate"], "required: --output"),
    ],
)
def test_wrong_command_lines_of_treg_get_one_line(bench, argv, found, capsys, monkeypatch):
    monkeypatch.chdir(bench.folder)
    if argv[0] == "annotate":
        argv = argv + [f"--model_name_or_path={bench.model}"]
    assert treg.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and found in lines[0]


def test_a_template_without_the_prompt_is_refused(bench, capsys):
    argv = [f"--model_name_or_path={bench.model}", f"--dataset={bench.data}", f"--output={bench.folder / 'x.jsonl'}"]
    assert treg.main(["annotate", *argv, "--worse=be bad"]) == 2
    assert "'be bad' has no {prompt} in it" in capsys.readouterr().err


def make_classifier(folder, seed=3, labels=1):
    torch.manual_seed(seed)
    model = transformers.AutoModelForTokenClassification.from_config(small_config(num_labels=labels))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_classifier_scores_stand_at_the_token_itself(bench):
    name = make_classifier(bench.folder / "classifier")
    pairs, _ = tgdpo.tokenize(eight_pairs(), tgdpo.load_tokenizer(bench.model), 64, "pairs")
    columns = token_rewards.classifier(name, pairs, options(bench))
    model = transformers.AutoModelForTokenClassification.from_pretrained(name).eval()
    for pair, *both in zip(pairs, *columns):
        for side, got in zip(("chosen_ids", "rejected_ids"), both):
            with torch.no_grad():
                scores = model(torch.tensor([pair["prompt_ids"] + pair[side]])).logits[0, :, 0]
            assert got == pytest.approx(scores[len(pair["prompt_ids"]) :].tolist(), abs=1e-5)


def test_centred_rewards_have_no_mean_under_the_reference(bench, monkeypatch):
    """(10c), (10a): the means against full logits, in chunks of the head too; r̂ less its mean, every token of the
    vocabulary weighed by the reference, is 0."""
    o = options(bench, beta=0.3)
    pairs, _ = tgdpo.tokenize(eight_pairs(), tgdpo.load_tokenizer(bench.model), 64, "pairs")
    means = token_rewards.reference_means(bench.reward_model, bench.model, pairs, o)
    monkeypatch.setattr(tgdpo, "LOGITS_BYTES", 4 * 27 * 3)
    again = token_rewards.reference_means(bench.reward_model, bench.model, pairs, o)
    rewards = token_rewards.log_ratio(bench.reward_model, bench.model, pairs, o)
    centred = token_rewards.centre(rewards, means)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(name).eval() for name in (bench.reward_model, bench.model)
    ]
    for i, pair in enumerate(pairs):
        for j, side in enumerate(("chosen_ids", "rejected_ids")):
            with torch.no_grad():
                judge, ref = [
                    m(torch.tensor([pair["prompt_ids"] + pair[side]])).logits[0].double().log_softmax(-1)
                    for m in models
                ]
            state = slice(len(pair["prompt_ids"]) - 1, -1)
            rhat = 0.3 * (judge - ref)[state]
            want = (ref[state].exp() * rhat).sum(-1)
            assert means[j][i] == pytest.approx(want.tolist(), abs=1e-5) == again[j][i]
            assert max(means[j][i]) < 0
            got = rhat[range(len(pair[side])), pair[side]] - want
            assert centred[j][i] == pytest.approx(got.tolist(), abs=1e-5)
            assert (ref[state].exp() * (rhat - want[:, None])).sum(-1).abs().max() < 1e-12


def test_keep_and_scale_by_hand():
    columns = [[[0.1, -0.4], [0.2]], [[0.3], [-0.1, 0.0]]]
    assert token_rewards.keep(columns, 0.34) == [[[0.0, -0.4], [0.0]], [[0.3], [0.0, 0.0]]]
    assert token_rewards.keep(columns, 1.0) == columns
    scaled = token_rewards.scale(columns)
    size = math.sqrt((0.01 + 0.16 + 0.04 + 0.09 + 0.01) / 6)
    assert scaled[0][0] == pytest.approx([0.1 / size, -0.4 / size]) and scaled[1][1][1] == 0.0
    assert token_rewards.scale([[[0.0]], [[0.0]]]) == [[[0.0]], [[0.0]]]


def test_token_rewards_from_the_command_line(bench, capsys):
    classifier = make_classifier(bench.folder / "classifier")
    common = [f"--model_name_or_path={bench.model}", f"--dataset={bench.data}", f"--cache_dir={bench.folder / 'cache'}"]
    common += ["--max_length=64", "--beta=0.3"]
    out = [bench.folder / f"{name}.jsonl" for name in ("plain", "centred", "scores")]
    rm = f"--reward_model={bench.reward_model}"
    assert token_rewards.main([*common, rm, "--source=log_ratio", f"--output={out[0]}"]) == 0
    assert token_rewards.main([*common, rm, "--source=log_ratio", "--centre", "--keep=0.5", f"--output={out[1]}"]) == 0
    argv = [*common, f"--reward_model={classifier}", "--source=classifier", "--scale", f"--output={out[2]}"]
    assert token_rewards.main(argv) == 0
    plain, centred, scores = [[json.loads(line) for line in file.read_text().splitlines()] for file in out]
    values = [value for row in scores for side in ("chosen", "rejected") for value in row[f"{side}_rewards"]]
    assert sum(value**2 for value in values) / len(values) == pytest.approx(1)
    kept = [value for row in centred for side in ("chosen", "rejected") for value in row[f"{side}_rewards"]]
    assert 0.4 < sum(value != 0 for value in kept) / len(kept) < 0.6
    # the plain ones give what tgdpo.py computes by itself
    own, _ = bench.train(reward_model=bench.reward_model, beta=0.3, max_length=64, num_train_epochs=3)
    given, _ = bench.train(dataset=out[0], beta=0.3, max_length=64, num_train_epochs=3)
    assert [row["loss"] for row in given] == pytest.approx([row["loss"] for row in own], abs=1e-6)
    capsys.readouterr()
    for wrong, found in (
        ([], "required: --source"),
        (["--source=nonsense"], "invalid choice: 'nonsense'"),
        (["--source=classifier", "--centre"], "--centre needs --source log_ratio"),
        (["--source=log_ratio", "--keep=0"], "--keep is 0"),
    ):
        assert token_rewards.main([*common, rm, *wrong, f"--output={bench.folder / 'n.jsonl'}"]) == 2
        error = capsys.readouterr().err
        assert found in error and error.count("\n") == 1
    argv = [*common, rm, "--source=classifier", f"--output={bench.folder / 'n.jsonl'}"]
    assert token_rewards.main(argv) == 2, "a language model is no classifier"
    assert "expected a token classifier with one label" in capsys.readouterr().err


@pytest.mark.parametrize("script", [token_rewards, treg])
def test_several_processes_would_all_write_one_file(bench, script, monkeypatch, capsys):
    """Under torchrun these ones say so; they do not write half of it twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = bench.folder / "out.jsonl"
    argv = ["annotate"] if script is treg else ["--source=log_ratio"]
    assert script.main([*argv, *bench.argv(), f"--output={output}"]) == 2
    assert "2 processes; expected one" in capsys.readouterr().err and not output.exists()


def test_a_frozen_weight_is_a_token_reward():
    """f = w on both sides, as the docstring of token_rewards.py says."""
    w, alpha = torch.tensor([0.0, 0.4, 1.0, 3.0]), 0.3
    torch.testing.assert_close(tgdpo.guidance((w - 1) / alpha, alpha, +1), w)
    torch.testing.assert_close(tgdpo.guidance((1 - w) / alpha, alpha, -1), w)
