"""scripts/walkthrough.ipynb: the file is a notebook without outputs, its cells run, and its answers are what comes out.

The cells run in one namespace, in their order, with the standard library only; the training is shorter. The expected
numbers are worked by hand, from the seven responses of the tiny language:

    .     not .   not not   not bad   bad .   bad not   bad bad
    0      -1       -1         2       -1       -1        -2       R(y)
    1/3   1/9       1/9       1/9      1/9      1/9       1/9      reference(y)
"""

import ast
import contextlib
import html
import io
import json
import math
import re
import sys
import tempfile

import pytest
import torch

import tgdpo
from conftest import ROOT

FILE = ROOT / "scripts" / "walkthrough.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CELLS = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"]}
CODE = [cell["id"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
STEPS = 20  # in place of the notebook's own number


def execute(name, namespace):
    """Run a code cell -> what it prints. The value of a last expression is in namespace["_"], as in Jupyter."""
    tree, printed = ast.parse(CELLS[name]), io.StringIO()
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.copy_location(ast.Assign([ast.Name("_", ast.Store())], tree.body[-1].value), tree.body[-1])
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.fix_missing_locations(tree), f"cell {name}", "exec"), namespace)
    return printed.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The namespace after all cells, what each printed, and the empty directory in which they ran."""
    folder, printed = tmp_path_factory.mktemp("walkthrough"), {}
    (folder / "elsewhere").mkdir()
    (folder / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(ROOT / "scripts")
        namespace = {"__name__": "__main__"}
        for name in CODE:
            printed[name] = execute(name, namespace)
            if name == CODE[0]:  # Jupyter starts in the project or in scripts/; from here on, the place does not matter
                namespace["STEPS"] = STEPS
                patch.chdir(folder / "elsewhere")
    return namespace, printed, folder


# ------------------------------------------------------------------------------------------------------------ the file
def test_the_file_is_a_notebook_without_outputs():
    """What nbformat 4.5 demands; one code cell after each question."""
    assert {*NOTEBOOK} == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert len(CELLS) == len(NOTEBOOK["cells"]) <= 25, "ids are unique, and the cells are few"
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", cell["id"]) and cell["metadata"] == {}
        lines, code = cell["source"], cell["cell_type"] == "code"
        assert lines and all(line.endswith("\n") for line in lines[:-1]) and not lines[-1].endswith("\n")
        assert all(line.count("\n") <= 1 and len(line) <= 121 for line in lines)
        more = {"execution_count", "outputs"} if code else set()
        assert {*cell} == {"cell_type", "id", "metadata", "source"} | more
        assert cell["cell_type"] in ("code", "markdown")
        assert not code or (cell["execution_count"], cell["outputs"]) == (None, []), "it is stored without outputs"


def test_each_computation_is_asked_for_before_it_is_seen():
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) + ["markdown"]
    texts = [text for name, text in CELLS.items() if name not in CODE]
    for text in texts[1:-1]:
        parts = re.fullmatch(r"## (.*)\*\*Predict\.\*\*(.*)<details>(.*)</details>", text, re.S)
        before, question, answer = parts.groups()
        assert "?" in question and "<summary>Answer</summary>" in answer
        assert "`" not in answer and "\n\n" not in answer, "within an HTML block Markdown is not read"
        assert len(re.findall("[a-z]{2,}", before)) <= 80 and len(answer.split()) <= 60, "one idea a cell"


@pytest.mark.parametrize("folder", [".", "scripts", "scripts/lab"])
def test_the_first_cell_finds_the_project(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT / folder)
    namespace = {}
    execute(CODE[0], namespace)
    assert namespace["ROOT"] == ROOT and {str(ROOT), str(ROOT / "scripts")} <= {*sys.path[:3]}
    assert namespace["FOLDER"].parent == tmp_path


# ------------------------------------------------------------------------------------------------- what the cells find
def answers(name):
    """The numbers of a cell's folded answer, fractions worked out."""
    text = CELLS[name].split("<summary>Answer</summary>")[1].split("</details>")[0]
    return [int(a) / int(b or 1) if "." not in a else float(a)
            for a, b in re.findall(r"(-?\d+(?:\.\d+)?)(?:/(\d+))?", text)]


def say(name, *values):
    """Each of these values stands in the answer, to three digits."""
    found = answers(name)
    for value in values:
        assert any(abs(x - float(value)) < 6e-4 for x in found), f"{value} is not in the answer of {name}: {found}"


def test_the_tables_in_the_text_are_those_of_the_code(ran):
    """Section 1's rewards; section 6's ℓ and r̂."""
    rows = [[float(x) for x in re.findall(r"\| (-?\d+)", line)] for line in CELLS["language"].splitlines()]
    assert [row for row in rows if row] == tgdpo.SMALL_REWARD.tolist()
    rows = [[float(x) for x in re.findall(r"\| (-?\d\.\d)", line)] for line in CELLS["pair"].splitlines()]
    both = [ran[0][f"{name}_{side}"] for name in ("moved", "rhat") for side in "wl"]
    assert sum(filter(None, rows), []) == pytest.approx(torch.cat(both, 1).flatten().tolist())


def test_rewards_and_objective_by_hand(ran):
    """J of the reference: ( -1 - 1 + 2 - 1 - 1 - 2 ) / 9. max J = log( 1/3 + ( e^2 + 4 / e + e^-2 ) / 9 ) = .2873."""
    namespace, printed, _ = ran
    assert printed["responses"].count("\n") == 7 and "not bad    reward  2   probability 0.111" in printed["responses"]
    assert answers("language")[-3:] == [1 / 3, 1 / 3, 1 / 9]
    assert namespace["J_reference"].item() == pytest.approx(-4 / 9)
    assert printed["objective-code"] == "J of the reference: -0.444\n"
    say("objective", -4 / 9)
    weights = [1 / 3, *[math.exp(R) / 9 for R in (-1, -1, 2, -1, -1, -2)]]
    best, p = math.log(sum(weights)), [w / sum(weights) for w in weights]
    assert best == pytest.approx(0.2873, abs=5e-5)
    assert namespace["J_best"].item() == pytest.approx(best)
    assert namespace["best_y"].exp().tolist() == pytest.approx(p)
    assert namespace["J_always"] == pytest.approx(2 - math.log(9))
    say("optimum", 2 - math.log(9), -4 / 9, best, p[3], p[0])


def test_each_state_alone_and_delta_by_hand(ran):
    """Start and "bad": weights 1, 1 / e, 1, sum 2.3679; "not": e^2, 1 / e, 1 / e, sum 8.1248. For "not bad" over
    "bad ." δ = log Z("not") - log Z("bad") = log( 8.1248 / 2.3679 ) = 1.233, and φ = 3 - δ."""
    namespace, printed, _ = ran
    start, after_not = 2 + 1 / math.e, math.e**2 + 2 / math.e
    assert namespace["not_alone"].item() == namespace["stop_alone"].item() == pytest.approx(1 / start)
    say("alone", 1 / start, namespace["not_best"], namespace["J_alone"])
    weights = [math.exp(R) / 9 for R in (-1, -1, 2)]
    assert namespace["not_best"].item() == pytest.approx(sum(weights) / math.exp(namespace["J_best"]))
    # J = log Z(start) + P("not") log Z("not") + P("bad") log Z("bad"): a state that is left costs nothing more
    J = math.log(start / 3) + math.log(after_not / 3) / start + math.log(start / 3) / math.e / start
    assert namespace["J_alone"].item() == pytest.approx(J, abs=1e-6)
    delta = math.log(after_not / start)
    assert namespace["delta_alone"].item() == pytest.approx(delta, abs=1e-6)
    assert namespace["phi_alone"].item() == pytest.approx(3 - delta, abs=1e-6)
    assert namespace["phi_best"].item() == pytest.approx(3, abs=1e-6)
    assert "φ 1.767 + δ 1.233 = 3.000" in printed["delta-code"]
    say("delta", 3 - delta, delta, 3)


def test_the_pair_by_hand(ran):
    """f_w 1.2 1.5, f_l 1.4 .9; φ = ( .24 + .6 ) - ( -.56 + .09 ) = 1.31; DPO .6 + .3 = .9; losses log( 1 + e^-φ )."""
    namespace, _, _ = ran
    assert namespace["f_w"][0].tolist() == pytest.approx([1.2, 1.5])
    assert namespace["f_l"][0].tolist() == pytest.approx([1.4, 0.9])
    assert namespace["phi_by_hand"].item() == pytest.approx(1.31)
    losses = [math.log1p(math.exp(-phi)) for phi in (1.31, 0.9)]
    assert [namespace["loss"].item(), namespace["loss_dpo"].item()] == pytest.approx(losses)
    say("pair", 1.2, 1.5, 1.4, 0.9, 1.31, 0.90, *losses)


def test_the_forces_by_hand(ran):
    """β σ(0) f: half of 1 + α r̂ and of -(1 - α r̂), with r̂ .4 -3 and -.8 .2."""
    namespace, printed, _ = ran
    for alpha in (0.0, 0.25, 0.5):
        chosen, rejected = namespace["forces"](alpha, namespace["bad_token"], namespace["rhat_l"])
        assert chosen.tolist() == pytest.approx([(1 + alpha * r) / 2 for r in (0.4, -3.0)])
        assert rejected.tolist() == pytest.approx([-(1 - alpha * r) / 2 for r in (-0.8, 0.2)])
    assert "alpha  0.5: chosen [0.6, -0.25], rejected [-0.7, -0.45]" in printed["force-code"]
    say("force", 0.5, 0.125, 0.25)


def test_the_training_learns_and_r_hat_looks_ahead(ran):
    """The perfect r̂ is log π*/π_ref of each word. After a few steps the learned one has its large signs."""
    namespace, printed, _ = ran
    run = json.loads((namespace["RUN"] / "run.json").read_text())
    assert run["steps"] == STEPS and "all 7 responses" in printed["training-code"]
    start, reward_model, guided = [run["table"][name][0] for name in ("reference", "reward model", "tgdpo")]
    assert start == pytest.approx(-4 / 9, abs=1e-3) and min(reward_model, guided) > -0.2
    say("training", 0.23, 0.27)  # what 110 steps give was read from a full run
    z = math.exp(namespace["J_best"])
    p = [1 / 3 / z, *[math.exp(R) / 9 / z for R in (-1, -1, 2, -1, -1, -2)]]  # in the order above
    want = [[sum(p[1:4]), sum(p[4:]), p[0]], [p[2], p[3], p[1]], [p[5], p[6], p[4]]]
    want = [[math.log(3 * x / sum(row)) for x in row] for row in want]
    assert namespace["rhat_perfect"].flatten().tolist() == pytest.approx(sum(want, []), abs=1e-5)
    say("rhat", want[0][0], want[1][1], want[0][0] + want[1][1], 2, namespace["J_best"])
    rhat = namespace["rhat"]
    for s in range(3):
        for a in range(3):
            assert abs(want[s][a]) < 0.7 or rhat[s, a] * want[s][a] > 0, f"after {s} the word {a} has r̂ {rhat[s, a]}"
    lines = printed["rhat-code"].splitlines()
    assert len(lines) == 10 and re.fullmatch(r"not +bad +2 +1\.00 +\d\.\d\d", lines[5])


def test_the_heat_map_is_in_the_notebook_and_nothing_is_left_elsewhere(ran):
    """"bad" is blue after "not", orange elsewhere, as the question of section 10 has it."""
    namespace, printed, folder = ran
    assert namespace["rhat"][1, 1] > 0 > max(namespace["rhat"][0, 1], namespace["rhat"][2, 1])
    page = namespace["page"].read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>") and str(namespace["page"]) in printed["colours-code"]
    frame = namespace["_"]._repr_html_()
    assert html.unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<>]*></iframe>', frame)[1]) == page
    assert not [*(folder / "elsewhere").iterdir()], "cells write into their own folder"
    assert [*(folder / "temporary").glob("walkthrough-*")] == [namespace["FOLDER"]]
