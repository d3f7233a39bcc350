"""Section 7 of tgdpo.py: the language of three words, its numbers by hand, its pairs and its table.

Rewards and probabilities of the seven responses, from the tables in the file:

    .     not .   not not   not bad   bad .   bad not   bad bad
    0      -1       -1         2       -1       -1        -2       R(y)
    1/3   1/9       1/9       1/9      1/9      1/9       1/9      reference(y)
"""

import json
import math
import re

import pytest
import torch

import tgdpo
from conftest import rows_of

R = [0, -1, -1, 2, -1, -1, -2]
REF = [1 / 3] + [1 / 9] * 6
IDS = [[2], [0, 2], [0, 0], [0, 1], [1, 2], [1, 0], [1, 1]]
NOT_BAD = 3  # the place of "not bad"


def scores(p, beta):
    """A distribution over the seven responses -> J, reward, KL, P("not bad")."""
    reward = sum(a * r for a, r in zip(p, R))
    kl = sum(a * math.log(a / b) for a, b in zip(p, REF))
    return [reward - beta * kl, reward, kl, p[NOT_BAD]]


def best(beta):
    """max J: the log of what the reference tilted by exp(R / beta) sums to, times beta."""
    return beta * math.log(sum(q * math.exp(r / beta) for q, r in zip(REF, R)))


def each_alone(beta):
    """Each state's own tilt, multiplied along the responses: e^-1 for "bad", but e^2 after "not", ..."""
    e = math.exp
    start = after_bad = [1, e(-1 / beta), 1]
    after_not = [e(-1 / beta), e(2 / beta), e(-1 / beta)]
    start, after_not, after_bad = [[w / sum(row) for w in row] for row in (start, after_not, after_bad)]
    return [start[2], start[0] * after_not[2], start[0] * after_not[0], start[0] * after_not[1]] + [
        start[1] * after_bad[2], start[1] * after_bad[0], start[1] * after_bad[1]]  # fmt: skip


def test_the_tables_are_those_of_the_docstring():
    """Probabilities multiply along a response, rewards add up."""
    states, actions = tgdpo.SMALL_LANGUAGE
    words = tgdpo.RESPONSES[3].split()
    assert words == ["not", "bad"] and len(tgdpo.RESPONSES) == 7
    for y, (r, q) in enumerate(zip(R, REF)):
        steps = [(s, a) for s, a in zip(states[y].tolist(), actions[y].tolist()) if s >= 0]
        assert [["not", "bad", "."][a] for _, a in steps] == tgdpo.RESPONSES[y].split()
        assert [s for s, _ in steps] == [0, 1 + steps[0][1]][: len(steps)], "the state is what was said"
        assert sum(tgdpo.SMALL_REWARD[s, a].item() for s, a in steps) == r == tgdpo.SMALL_R[y]
        assert sum(tgdpo.SMALL_REF[s, a].item() for s, a in steps) == pytest.approx(math.log(q), abs=1e-6)
        assert tgdpo.SMALL_REF_Y[y].item() == pytest.approx(math.log(q), abs=1e-6)
    assert sum(REF) == pytest.approx(1)


def test_the_decomposition_by_hand(capsys):
    """Every number that show_decomposition prints, from three sums, with beta = 1:

        exp log Z(start) = exp log Z("bad") = ( 2 + e^-1 ) / 3   = .78929    log Z = -.23662
        exp log Z("not")                    = ( e^2 + 2 / e ) / 3 = 2.70827    log Z = .99631
    """
    tgdpo.show_decomposition()
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    found, tag = {}, ""
    for line in text.splitlines():
        tag = line.split(")")[0] if line.startswith("(") else tag
        text = line.replace("0.25", "").removeprefix(tag + ")")
        found.setdefault(tag, []).extend(float(number) for number in re.findall(r"-?\d+\.\d+", text))
    start, after_not = -0.23662, 0.99631
    assert found["(1b"] == [
        -0.444,  # ( -1 - 1 + 2 - 1 - 1 - 2 ) / 9
        0.287,  # log( 1/3 + ( e^2 + 4 / e + e^-2 ) / 9 ) = log 1.33287
    ]
    assert found["(4.1"][-1] == pytest.approx(start + after_not, abs=6e-4)  # .760: start, then the best state
    assert found["(4b"] == [pytest.approx(start + (after_not + start) / 3, abs=6e-4)]  # .017
    # alone: P(not) = 1 / 2.36788, P(bad) = .36788 / 2.36788; J adds up log Z of the states that this policy sees
    assert found["(4.3a"] == [
        pytest.approx(start + 0.42232 * after_not + 0.15536 * start, abs=6e-4),  # .147
        0.42,
        0.68,  # ( 2 / e + e^2 ) / 9 / 1.33287
    ]
    # r̂ in the start: .23662 where r = 0, -.76338 for bad: f = 1.05916 and .80916; log( ( 2 + e^(-1 / .80916) ) / 3 )
    closed, tried = found["(6a"][-2:]
    assert closed == pytest.approx(-0.2697, abs=6e-4) and closed - 0.05 < tried <= closed
    assert found["(4.3c"] == [0.0]
    # "not bad": l = .23662 + 1.00369; "bad .": l = -.76338 + .23662: φ = 1.24031 + .52676; δ = 3 - φ
    assert found["(4.4a"] == [3.0, 1.77, 1.23, 3.0]
    assert found["(8b"] == [1.0, 1.25, 0.75]  # r̂ = 2 - .99631, f = 1 ± .25 r̂


def test_its_pairs_are_drawn_and_labelled_as_said(tmp_path, monkeypatch):
    """6000 pairs of responses drawn from the reference, chosen with probability σ(R - R'); none of two equal ones."""
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 6000)
    options = tgdpo.Options(max_length=8, seed=1)
    tokenizer, pairs, counts = tgdpo.small_data(options, tmp_path / "start", tmp_path / "pairs.jsonl")
    assert tokenizer("not bad .").input_ids == [0, 1, 2]
    assert (counts["read"], counts["used"], len(pairs)) == (6000, 6000, 6000)
    assert {tuple(prompt) for prompt in pairs["prompt_ids"]} == {(2,)}
    both = [(IDS.index(w), IDS.index(l)) for w, l in zip(pairs["chosen_ids"], pairs["rejected_ids"])]
    different = 1 - sum(q * q for q in REF)
    for y, z in ((0, 4), (3, 4), (0, 3)):
        seen, wins = both.count((y, z)) + both.count((z, y)), both.count((y, z))
        assert seen / 6000 == pytest.approx(2 * REF[y] * REF[z] / different, abs=0.02)
        assert wins / seen == pytest.approx(1 / (1 + math.exp(R[z] - R[y])), abs=0.06)


def test_the_model_that_training_begins_with_is_the_reference(tmp_path, monkeypatch):
    """Its own logits, by transformers alone: every word has probability 1/3 everywhere. And small_policy reads tables:
    of a model with other logits, too."""
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 2)
    options = tgdpo.Options(max_length=8, device="cpu", dtype="float32")
    tokenizer, *_ = tgdpo.small_data(options, tmp_path / "start", tmp_path / "pairs.jsonl")
    model = tgdpo.AutoModelForCausalLM.from_pretrained(tmp_path / "start").eval()
    assert model(torch.tensor([[2, 0, 1]])).logits.softmax(-1).sub(1 / 3).abs().max() < 1e-6
    torch.manual_seed(3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    tgdpo.write_model(model, tokenizer, tmp_path / "other")
    table = tgdpo.small_policy(str(tmp_path / "other"), tokenizer, options)
    for state, said in enumerate(([2], [2, 0], [2, 1])):
        want = model(torch.tensor([said])).logits[0, -1].log_softmax(-1)
        assert table[state].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert table.exp().sub(1 / 3).abs().max() > 0.1


def test_the_table_against_sums_over_the_seven_responses(tmp_path, monkeypatch, capsys):
    """J, reward, KL and P("not bad") of every model that the run leaves, from transformers' own logits."""
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 400)
    out = tmp_path / "out"
    argv = [f"--output_dir={out}", f"--cache_dir={tmp_path / 'cache'}", "--device=cpu", "--beta=0.5"]
    assert tgdpo.main(argv) == 0
    run, text = json.loads((out / "run.json").read_text()), capsys.readouterr().out
    table, beta = run["table"], 0.5
    folders = {"reference": "start_model", "tgdpo": ".", "reward model": "reward_model"}
    folders["tgdpo, true r"] = "true_rewards"
    assert list(table) == [*folders, "each state alone", "optimum"]
    assert table["reference"] == pytest.approx([-4 / 9, -4 / 9, 0, 1 / 9], abs=1e-5)
    for name, folder in folders.items():
        model = tgdpo.AutoModelForCausalLM.from_pretrained(out / folder).eval()
        p = []
        for ids in IDS:
            logps = model(torch.tensor([[2, *ids]])).logits[0].double().log_softmax(-1)
            p.append(math.exp(sum(logps[t, token].item() for t, token in enumerate(ids))))
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert table[name] == pytest.approx(scores(p, beta), abs=2e-5), name
        assert table["reference"][0] - 1e-6 <= table[name][0] < best(beta)
    assert table["tgdpo"][3] > table["reward model"][3] > 0.15, "guided by its own r̂, it learns faster"
    assert table["each state alone"] == pytest.approx(scores(each_alone(beta), beta), abs=1e-5)
    assert table["optimum"] == [pytest.approx(best(beta), abs=1e-5)]
    assert text.index("(1b)") < text.index("pairs read") < text.index("all 7 responses")
    line = next(line for line in text.splitlines() if line.startswith("tgdpo "))
    assert [float(x) for x in line.split()[1:]] == [round(x, 3) for x in table["tgdpo"]]
    nearest = max(folders, key=lambda name: table[name][0])
    assert f'the model "{nearest}":\n{best(beta) - table[nearest][0]:.3f} below it.' in text
    assert max(map(len, text.replace(str(tmp_path), "runs").splitlines())) <= 80, "a terminal's width"
    assert rows_of(out) and rows_of(out / "reward_model") and rows_of(out / "true_rewards")
    # resumed, it ends with the same
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))
    assert tgdpo.main(argv + ["--resume"]) == 0
    assert json.loads((out / "run.json").read_text())["table"] == table


def test_losses_without_rewards_have_no_reward_model(tmp_path, monkeypatch):
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 40)
    argv = [f"--output_dir={tmp_path / 'out'}", f"--cache_dir={tmp_path / 'cache'}", "--max_steps=1", "--loss=dpo"]
    assert tgdpo.main(argv) == 0
    table = json.loads((tmp_path / "out" / "run.json").read_text())["table"]
    assert list(table) == ["reference", "dpo", "each state alone", "optimum"]
