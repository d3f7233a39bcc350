"""scripts/lab.py: the statistics by hand, and a study of a few points on a tiny world, killed and resumed."""

import csv
import json
import math
import shutil
from pathlib import Path

import matplotlib
import pytest
import torch
import transformers

import tgdpo

import lab
import rto
import tiny_language


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STUDY = Path(lab.__file__).parent / "lab"  # the full study's results


def row(seed, kl, gain, method="dpo", **setting):
    return dict(seed=seed, KL=kl, gain=gain, **lab.point(method, **setting))


# ---------------------------------------------------------------------------------------------------- statistics
def test_interval_by_hand():
    """1, 2, 3, 4, 5: sd sqrt(2.5), so 2.776 * sqrt(2.5 / 5) = 1.963 around 3."""
    mean, half = lab.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.963, abs=1e-3)
    assert lab.interval([2.0, 4.0])[0] == 3
    assert math.isnan(lab.interval([2.0])[1]) and math.isnan(lab.interval([2.0, 4.0])[1]), "no interval from two seeds"


def test_frontier_by_hand():
    """(1, 2) and (4, 5) with a worse point between them: a straight line, then level; nothing below what was tried."""
    rows = [row(0, 4.0, 5.0), row(0, 2.0, 1.0), row(0, 1.0, 2.0), row(0, 8.0, 4.0)]
    found = [lab.frontier(rows, kl) for kl in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)]
    assert found == pytest.approx([2.0, 3.0, 4.0, 5.0, 5.0, 5.0])
    assert math.isnan(lab.frontier(rows, 0.9)) and lab.frontier(rows, 9.0) == 5.0


def test_comparisons_are_paired_by_seed():
    mine = [row(0, 2.0, 3.0), row(1, 2.0, 13.0), row(2, 2.0, 5.0), row(3, 2.0, 7.0)]
    theirs = [row(1, 2.0, 12.0), row(0, 2.0, 1.0), row(2, 2.0, 2.0)]
    mean, half = lab.difference(mine, theirs, "gain")  # of 2, 1 and 3: sd 1
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert lab.difference(mine[:2], theirs, "gain") is None, "two seeds"
    assert lab.compare(mine, theirs, 2.0) is None, "not the same seeds"
    assert lab.compare(mine[:3], theirs, 2.0) == pytest.approx((2.0, half))
    assert lab.compare(mine[:2], theirs, 2.0) is None, "two seeds"
    assert lab.compare(mine[:3], theirs, 1.5) is None, "nobody has been there"
    assert lab.say((1.0, 0.5)).endswith("(more)") and lab.say((-1.0, 0.5)).endswith("(less)")
    assert lab.say((0.3, 0.5)).endswith("(not shown to differ)")


def test_no_setting_is_listed_twice_and_every_one_has_a_name():
    for quick, seeds in ((True, 2), (False, 5)):
        keys = [lab.key_of(job) for job in lab.jobs_of(quick, seeds)]
        assert len(keys) == len(set(keys))
        names = [lab.name_of(p) + f" {p['rate']} {p['steps']}" for p in lab.study(quick)]
        assert len(names) == len(set(names))
    methods = {p["method"] for p in lab.study(False)}
    assert methods == {"dpo", "simpo", "tgdpo", "treg", *lab.ON_POLICY} and len(lab.study(False)) == 78


def test_the_quick_study_asks_one_question():
    """Truth, raw and centred r̂ against DPO, at one alpha, with every DPO that is needed, and nothing else."""
    points = lab.study(True)
    guided = [p for p in points if p["method"] == "tgdpo"]
    assert {p["source"] for p in guided} == {"truth", "dpo", "dpo centred"} and len(guided) == 3
    assert {p["method"] for p in points} == {"dpo", "tgdpo"} and len(points) <= 4
    same = [{name: p[name] for name in ("beta", "rate", "steps")} for p in points if p["method"] == "dpo"]
    assert all({name: p[name] for name in ("beta", "rate", "steps")} in same for p in guided)
    for p in points:  # as in the full study, so that its seeds are the first two of that
        assert p in lab.study(False)
    assert lab.QUICK["prompts"] == lab.FULL["prompts"] and lab.QUICK["seeds"] == 2


def test_the_short_answer_by_hand():
    """TGDPO less the DPO of the same seed and beta: no, yes, in one of two worlds; each seed's values, no interval."""
    rows = [row(1, 4.0, 2.0), row(0, 3.0, 1.0), row(0, 9.0, 50.0, beta=1.0), row(1, 9.0, 50.0, beta=1.0)]
    for source, gains in (("dpo", (0.5, 1.75)), ("truth", (1.25, 3.0)), ("dpo centred", (0.0, 2.5))):
        rows += [row(seed, 5.0, gains[seed], "tgdpo", source=source, alpha=0.5) for seed in (1, 0)]
    text = lab.short_answer(rows)
    assert text[1:4] == [
        "   DPO model, α 0.5: no (-0.50 and -0.25)",
        "   true rewards, α 0.5: yes (+0.25 and +1.00)",
        "   DPO model, centred, α 0.5: in 1 of 2 worlds (-1.00 and +0.50)",
    ]
    assert "   DPO, β 0.5: 1.00 (KL 3.0) and 2.00 (KL 4.0)" in text
    assert "Two seeds show a direction at most" in text[-1] and "±" not in "".join(text)


# ------------------------------------------------------------------------------------------------------- a small study
POINTS = [
    lab.point("dpo", steps=3),
    lab.point("tgdpo", "dpo", alpha=0.5, steps=3),
    lab.point("tgdpo", "truth scaled", alpha=0.2, steps=3),
    lab.point("treg", "contrastive", alpha=0.5, steps=3),
    lab.point("ppo", beta=0.0, steps=0),
]
SIZE = dict(quick=True, seeds=2, rto_marks=(1, 2), prompts=20)


class Here:
    """Stands in for the pool of processes: the same work, in this one, where the sizes are patched."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *job):
        future = lab_future()
        future.set_result(work(*job))
        return future

    def shutdown(self, **_):
        pass


def lab_future():
    from concurrent.futures import Future

    return Future()


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory):
    """A finished study; its worlds have 40 pairs."""
    patch = pytest.MonkeyPatch()
    for module, name, value in (
        (tiny_language, "TINY_STEPS", 10),
        (tiny_language, "TINY_PAIRS", 40),
        (rto, "BT_STEPS", 3),
        (lab, "QUICK", SIZE),
        (lab, "study", lambda quick: POINTS),
        (lab, "ProcessPoolExecutor", Here),
        (tiny_language, "TINY", tiny_language.TINY | dict(num_train_epochs=1.0)),
        (rto, "TINY", rto.TINY | dict(rollouts=16, minibatches=2)),
    ):
        patch.setattr(module, name, value)
    patch.setenv("TQDM_DISABLE", "1")
    folder = tmp_path_factory.mktemp("lab") / "study"
    lab.run_study(folder, True, 1)
    yield folder
    patch.undo()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_study_judges_every_point_in_every_world(study_folder):
    rows = rows_of(study_folder)
    assert {lab.key_of(r) for r in rows} == {lab.key_of(job) for job in lab.jobs_of(True, 2)}
    trained = [r for r in rows if r["method"] != "source"]
    assert len(trained) == 2 * (4 + 2), "ppo is judged after both numbers of steps"
    for r in trained:
        assert {"reward", "gain", "KL", "entropy", "length", "off support", "wins over reference", "seconds"} <= set(r)
        assert 0 <= r["off support"] <= 1 and 1 <= r["length"] <= 32
    guided = [r for r in trained if r["method"] == "tgdpo"]
    assert all(r["f min"] < 1 < r["f max"] for r in guided)
    sources = {r["source"]: r for r in rows if r["method"] == "source" and r["seed"] == 0}
    assert sources["truth"]["AUC"] == 1 and sources["truth"]["correlation"] == pytest.approx(1)
    assert sources["truth"]["share on what matters"] == 1 > sources["dpo"]["share on what matters"]


def test_a_point_is_what_tgdpo_py_trains(study_folder, tmp_path):
    """Judged with one policy by both: the lab's steps give the weights of tgdpo.train, told by the KL of the row."""
    world = study_folder / "worlds" / "0"
    w = lab.load_world(world, 0, SIZE["prompts"])
    options = lab.replace(w.options, loss="tgdpo", alpha=0.5, max_steps=3, output_dir=str(tmp_path / "run"))
    pairs = tgdpo.add_columns(w.pairs, "rewards", lab.source_columns(w, "dpo"))
    tgdpo.train(options, pairs, w.tokenizer, {})
    again = lab.judge(w, tgdpo.load_model(str(tmp_path / "run"), w.options), 3)
    row = next(r for r in rows_of(study_folder) if r["seed"] == 0 and r["method"] == "tgdpo" and r["source"] == "dpo")
    for name in ("KL", "reward", "entropy", "length"):
        assert again[name] == pytest.approx(row[name], abs=1e-4), name


def test_judge_against_plain_transformers(study_folder):
    """KL and entropy of drawn responses by full logits; the reference's own KL is 0."""
    w = lab.load_world(study_folder / "worlds" / "1", 1, SIZE["prompts"])
    assert lab.judge(w, w.reference, 0)["KL"] == 0
    policy = tgdpo.load_model(str(w.folder / "dpo"), w.options)
    found = lab.judge(w, policy, 7)
    torch.manual_seed(1007)
    drawn = tiny_language.generate(policy, w.prompts, w.tokenizer)
    kl = entropy = 0.0
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        for path in (w.folder / "dpo", w.options.model_name_or_path)
    ]
    for prompt, ids in zip(w.prompts, drawn):
        with torch.no_grad():
            tables = [m(torch.tensor([prompt + ids])).logits[0].log_softmax(-1) for m in models]
        mine, ref = [sum(t[len(prompt) - 1 + k, i].item() for k, i in enumerate(ids)) for t in tables]
        kl, entropy = kl + (mine - ref) / len(drawn), entropy - mine / len(drawn)
    assert found["KL"] == pytest.approx(kl, abs=1e-4) and found["entropy"] == pytest.approx(entropy, abs=1e-4)
    totals = [
        sum(tiny_language.tiny_rewards(w.tokenizer.decode([prompt[2]]), w.tokenizer.convert_ids_to_tokens(ids)))
        for prompt, ids in zip(w.prompts, drawn)
    ]
    assert found["reward"] == pytest.approx(sum(totals) / len(totals))


def test_a_killed_study_goes_on_and_finished_points_stay(study_folder, capsys):
    file = study_folder / "results.jsonl"
    before = file.read_text().splitlines(keepends=True)
    last = json.loads(before[-1])
    kept = [line for line in before if lab.key_of(json.loads(line)) != lab.key_of(last)]
    file.write_text("".join(kept) + before[-1][:30])  # killed while it wrote
    lab.run_study(study_folder, True, 1)
    after = file.read_text().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    timeless = lambda lines: sorted(json.dumps(json.loads(line) | {"seconds": 0}) for line in lines)
    assert timeless(after) == timeless(before), "the same numbers again"
    settings = (study_folder / "study.json").read_text()
    (study_folder / "study.json").write_text('{"quick": false}')
    with pytest.raises(tgdpo.InputError, match="holds another study"):
        lab.run_study(study_folder, True, 1)
    (study_folder / "study.json").write_text(settings)


def test_report_of_two_seeds_draws_one_figure_and_no_interval(study_folder, capsys):
    assert lab.main(["--report", str(study_folder)]) == 0
    rows, table = rows_of(study_folder), list(csv.DictReader(open(study_folder / "summary.csv")))
    some = [r for r in rows if r["method"] == "treg"]
    line = next(r for r in table if r["method"] == "treg")
    assert float(line["KL"]) == pytest.approx(sum(r["KL"] for r in some) / 2, rel=1e-3)
    assert line["seeds"] == "2" and len(table) == len(lab.group(rows, *lab.SETTINGS))
    assert {value for r in table for name, value in r.items() if name.endswith("±")} == {""}
    gains = {(r["method"], r["source"], r["seed"]): r["gain"] for r in rows if r["method"] in ("dpo", "tgdpo")}
    less = [gains["tgdpo", "dpo", seed] - gains["dpo", "", seed] for seed in (0, 1)]
    text = (study_folder / "answers.txt").read_text()
    assert f"({less[0]:+.2f} and {less[1]:+.2f})" in text and "±" not in text and text in capsys.readouterr().out
    assert [file.name for file in study_folder.glob("*.png")] == ["quick.png"]
    assert (study_folder / "quick.png").read_bytes()[:4] == b"\x89PNG"


def test_report_of_the_full_study_gives_its_files_again(tmp_path, capsys):
    """From the results in the repository: the same answers and means as beside them, and every figure but the maps."""
    shutil.copy(STUDY / "results.jsonl", tmp_path)
    assert lab.main(["--report", str(tmp_path)]) == 0
    for name in ("answers.txt", "summary.csv"):
        assert (tmp_path / name).read_text() == (STUDY / name).read_text(), f"python scripts/lab.py --report {STUDY}"
    assert {file.name for file in tmp_path.glob("*.png")} == {"frontier.png", "alpha.png", "credit.png"}
    text = (tmp_path / "answers.txt").read_text()
    assert [line[0] for line in text.splitlines() if line[0] != " "] == list("123456")
    assert "right signs 75 % (AUC 0.75, 100% on what matters)" in text
    rows = lab.read_results(tmp_path / "results.jsonl")
    table = csv.DictReader(open(tmp_path / "summary.csv"))
    line = next(r for r in table if r["method"] == "dpo" and r["beta"] == "1.0")
    mean, half = lab.interval(r["KL"] for r in lab.pick(rows, method="dpo", beta=1.0))
    assert float(line["KL"]) == pytest.approx(mean, rel=1e-3) and float(line["KL ±"]) == pytest.approx(half, rel=1e-3)


def test_figures_have_few_lines_plain_words_and_one_colour_a_method():
    rows = lab.read_results(STUDY / "results.jsonl")
    rows = [r for some in lab.group(rows, *lab.SETTINGS).values() if len(some) == 5 for r in some]
    figures = [draw(plt, rows) for draw in (lab.figure_frontier, lab.figure_alpha, lab.figure_credit)]
    colours, words = {}, set()
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1 and line.get_linestyle() != "None"]
            assert len([line for line in lines if not line.get_label().startswith("_child")]) <= 4
            labels = axes.get_xticklabels() + axes.get_yticklabels()
            assert not any("math" in label.get_text() for label in labels), "a tick such as 10^0"
            words |= {label.get_text() for label in labels}
            for handle, label in zip(*axes.get_legend_handles_labels()):
                words.add(label)
                line = handle[0] if isinstance(handle, tuple) else handle
                colours.setdefault(label.split(", α")[0], set()).add(line.get_color())
    assert all(len(found) == 1 for found in colours.values()), colours
    assert {"DPO", "SimPO", "RTO", "TGDPO, DPO model, centred", "T-REG, contrastive prompts"} <= words
    assert {"right signs 75 %", "right signs 50 %", "DPO model", "DPO model, centred", "true rewards"} <= words
    assert not {"noise25", "noise50", "dpo", "dpo centred", "truth"} & words
    for axes in figures[0].axes:
        assert len([text for text in axes.get_legend().get_texts() if text.get_text() in lab.COLOURS]) == 4
    dots = [line for axes in figures[0].axes for line in axes.get_lines() if len(line.get_xdata()) == 1]
    shown, families = [*list(lab.COLOURS)[:7], "DPO"], lab.families(rows)  # DPO is in both panels
    assert len(dots) == sum(len(lab.group(families[name], *lab.SETTINGS)) for name in shown)
    for figure in figures:
        plt.close(figure)


def test_a_map_of_a_world_has_a_row_for_each_source(study_folder):
    figure = lab.figure_maps(plt, study_folder / "worlds" / "0")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["true rewards", "DPO model", "contrastive prompts"]
    w = lab.load_world(study_folder / "worlds" / "0", 0, 1)
    image, words = figure.axes[1].get_images()[0].get_array(), [t.get_text() for t in figure.axes[1].get_xticklabels()]
    show = w.pairs["rejected_ids"].index(w.tokenizer.convert_tokens_to_ids(words))
    truth = lab.source_columns(w, "truth")[1][show]
    assert list(image[0]) == pytest.approx([value / (max(map(abs, truth)) or 1) for value in truth])
    assert lab.figure_maps(plt, study_folder / "nowhere") is None
    plt.close(figure)


def test_figures_without_data_are_not_drawn(tmp_path, capsys):
    """Three seeds, but nothing to compare with; then DPO alone."""
    rows = [row(seed, 0.0, 0.0, "source", source="dpo", steps=0) for seed in range(3)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert lab.main(["--report", str(tmp_path)]) == 0
    assert "DPO, to which all are compared, is not finished" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert lab.figure_credit(plt, [row(seed, 1.0, 1.0) for seed in range(3)]) is None


@pytest.mark.parametrize(
    "argv, found",
    [
        (["--processes=0"], "--processes is 0; expected 1 or more"),
        (["--report=nowhere"], "nowhere holds no results.jsonl"),
        (["--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_wrong_command_lines_get_one_line(argv, found, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert lab.main(argv) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("\n") == 1


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert lab.main([f"--output={tmp_path}"]) == 2
    assert "is not empty and holds no study" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
