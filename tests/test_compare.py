"""scripts/compare.py, export.py and show_tokens.py: what a researcher does with runs, checkpoints and token rewards."""

import json
import os
import re
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from safetensors.torch import load_file

import compare
import export
import show_tokens
import sweep
import tgdpo
from conftest import CHATML, eight_pairs, make_model, rows_of, word_tokenizer, write_rows
from start_model import train_tokenizer
from test_fsdp import free_port
from test_train import curve


def one_line(capsys, *parts):
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(part in text for part in parts), text


# -------------------------------------------------------------------------------------------------------- compare.py
def make_run(folder, rows=(), ends="\n", facts=(), **options):
    """A run's folder with run.json and metrics.jsonl; rows as (step, {metric: value}) -> its name."""
    shared = dict(loss="tgdpo", alpha=0.5, seed=42, eval_size=8, model_name_or_path="m", dataset="d", ref_model=None)
    options = shared | dict(output_dir=str(folder), cache_dir=str(folder), resume=False) | options
    run = dict(options=options, model="1", data="2", pairs_per_step=4, finished=True) | dict(facts)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    lines = [json.dumps({"step": step} | row) + "\n" for step, row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines).removesuffix("\n") + ends)
    return str(folder)


def evaluation(loss, accuracy, margin, **more):
    return {"eval_loss": loss, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin} | more


ROWS = [
    (2, {"loss": 0.6}),
    (2, evaluation(0.61, 0.6, 0.1, eval_dpo_loss=0.65)),
    (4, {"loss": 0.4}),
    (4, evaluation(0.41, 0.75, 0.2, eval_dpo_loss=0.5)),
    (6, {"loss": 0.25}),
    (6, evaluation(0.52, 0.875, 1.25, eval_dpo_loss=0.55)),
]


def printed(capsys, *argv, status=0):
    assert compare.main([str(a) for a in argv]) == status
    return capsys.readouterr().out


def test_the_tables(tmp_path, capsys):
    """b is unfinished and names the same model otherwise; dpo's own loss is its dpo_loss. Of a the second evaluation is
    the best, of b, whose last line is being written, the first."""
    a = make_run(tmp_path / "a", ROWS)
    b = make_run(tmp_path / "b", ROWS[:2], '\n{"step": 4, "eval_lo', dict(finished=False), alpha=1.0,
                 model_name_or_path="elsewhere/m", resume=True)
    c = make_run(tmp_path / "b" / "reward_model", [(4, evaluation(0.5, 0.7, 0.3))], loss="dpo", ref_model="m",
                 facts=dict(reference="9"))
    out = printed(capsys, a, b, c)
    assert out == """\
alpha, loss: eval_loss has another scale in each run. Over alpha compare eval_dpo_loss.

options that differ
                 loss  alpha  ref_model
a               tgdpo    0.5       None
b               tgdpo      1       None
b/reward_model    dpo    0.5          m

last training loss and last evaluation
                finished  steps  loss  at step  eval_loss  dpo_loss  accuracies  margins
a                    yes      6  0.25        6       0.52      0.55       0.875     1.25
b                     no      2   0.6        2       0.61      0.65         0.6      0.1
b/reward_model       yes      4     -        4        0.5       0.5         0.7      0.3

best evaluation, by its eval_loss
                at step  eval_loss  dpo_loss  accuracies  margins
a                     4       0.41       0.5        0.75      0.2
b                     2       0.61      0.65         0.6      0.1
b/reward_model        4        0.5       0.5         0.7      0.3
"""


def test_one_run_and_a_run_that_has_not_begun(tmp_path, capsys):
    out = printed(capsys, make_run(tmp_path / "a", ROWS))
    assert "differ" not in out and "another scale" not in out and "\na " in out
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text(json.dumps(dict(options={})))
    assert re.search(r"^b +no +0 +-$", printed(capsys, tmp_path / "b"), re.M)


@pytest.mark.parametrize("facts, options", [(dict(data="3"), {}), ({}, dict(seed=1)), ({}, dict(eval_size=9))])
def test_other_evaluation_pairs_are_said(tmp_path, capsys, facts, options):
    a, b = make_run(tmp_path / "a", ROWS), make_run(tmp_path / "b", ROWS, facts=facts, **options)
    line = "These runs differ in their pairs, in numbers beside them or in which pairs are held out.\n"
    assert line in printed(capsys, a, b) and line not in printed(capsys, a, a)


def test_a_data_set_of_another_content_is_shown(tmp_path, capsys):
    runs = [make_run(tmp_path / name, facts=dict(data=name), dataset=name * 3) for name in "ab"]
    assert re.search(r"^ +dataset\na +aaa\nb +bbb$", printed(capsys, *runs), re.M)


def test_wide_tables_go_on_below(tmp_path, capsys):
    options = [{f"option_number_{k}": f"{k * n:012}" for k in range(20)} for n in (1, 2)]
    out = printed(capsys, *[make_run(tmp_path / f"run{n}", **more) for n, more in enumerate(options)])
    assert max(map(len, out.splitlines())) in range(85, 101)
    assert [len(re.findall(rf"option_number_{k}\b", out)) for k in range(20)] == [0] + [1] * 19  # 0 is the same in both
    assert len(re.findall("0{9}", out)) == 2 * 19


def test_what_tiny_models_are_worth(tmp_path, capsys):
    """tgdpo.py's table is J, reward, KL and a probability; that of tiny_language.py has means and half intervals."""
    ours = {"reference": [-0.4, -0.4, 0.0, 0.1], "tgdpo": [0.25, 1.25, 0.5, 0.6], "each state alone": [1.0, 1, 1, 1],
            "optimum": [0.3]}
    words = {"reference": {"KL": [0.0, 0.0], "true reward": [0.1, 0.1]},
             "tgdpo": {"KL": [4.5, 0.1], "length": [9.0, 0.1], "true reward": [2.5, 0.2]}}
    out = printed(capsys, *[make_run(tmp_path / name, facts=dict(table=table))
                            for name, table in dict(a=ours, b=words).items()])
    assert out.endswith("what the models are worth\n             J  reward   KL\na: tgdpo  0.25    1.25  0.5\n"
                        "b: tgdpo     -     2.5  4.5\n")


def drawing(file):
    """The svg of a page -> ([points of each curve], texts)."""
    page = file.read_text()
    assert not re.search("http|src=|<script|url", page), "needs nothing from elsewhere"
    svg = ElementTree.fromstring(page[page.index("<svg"):page.index("</svg>") + 6])
    paths = [path.get("d").split("M")[1].split("L") for path in svg.iter("path") if path.get("fill") == "none"]
    return [[tuple(map(float, point.split())) for point in path] for path in paths], [t.text for t in svg.iter("text")]


def test_curves(tmp_path, capsys):
    """Points lie where their numbers say; a run without the metric is left out; names are text, not markup."""
    runs = [make_run(tmp_path / name, rows) for name, rows in {"a": ROWS, "<b&>": ROWS[:4], "c": ROWS[:1]}.items()]
    file = tmp_path / "curves.html"
    assert f"{file}: eval_loss of a, <b&>\n" in printed(capsys, *runs, "--metric=eval_loss", f"--output={file}")
    curves, texts = drawing(file)
    assert [len(curve) for curve in curves] == [3, 2] and curves[0][:2] == curves[1]
    (x2, y2), (x4, y4), (x6, y6) = curves[0]
    assert x2 < x4 < x6 and x6 - x4 == pytest.approx(x4 - x2, abs=0.2)
    assert y4 > y6 > y2 and (y4 - y6) / (y4 - y2) == pytest.approx((0.52 - 0.41) / (0.61 - 0.41), abs=0.01)
    assert {"eval_loss", "0.45", "0.5", "2", "4", "6"} <= {*texts}
    assert texts[-2:] == ["a: 0.52 at step 6", "<b&>: 0.41 at step 4"]


def test_a_single_point_and_the_default_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed(capsys, make_run(tmp_path / "a", ROWS[:2]), "--metric=eval_loss")
    assert [len(curve) for curve in drawing(tmp_path / "curves.html")[0]] == [1]


@pytest.mark.parametrize("low, high", [(0, 1), (0.41, 0.75), (-350.0, -3), (0, 1e-5), (-0.3, 113.2), (7, 9)])
def test_ticks_are_round_numbers_inside(low, high):
    found = compare.ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert {f"{b - a:.3e}"[:5] for a, b in zip(found, found[1:])} in ({"1.000"}, {"2.000"}, {"5.000"})


def test_png_and_no_matplotlib(tmp_path, capsys, monkeypatch):
    run, file = make_run(tmp_path / "a", ROWS), tmp_path / "a.png"
    pytest.importorskip("matplotlib")
    printed(capsys, run, f"--output={file}")  # of eval_loss
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 5000
    file.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare.main([run, f"--output={file}"]) == 2 and not file.exists()
    one_line(capsys, f"{file} needs matplotlib: pip install matplotlib")


@pytest.mark.parametrize(
    "argv, parts",
    [
        ([], ["required: RUN"]),
        (["none"], ["none has no run.json; expected the --output_dir of a run"]),
        (["a", "old"], ["old/run.json has no options"]),
        (["broken"], ["broken/run.json cannot be used"]),
        (["a", "--metric=eval_los"], ["--metric eval_los: no run has it; there are eval_dpo_loss, eval_loss, eval_re"]),
        (["a", "--metric=loss", "--output=a.svg"], ["--output a.svg; expected the name of an .html or a .png file"]),
        (["a", "--metric=loss", "--output=no/a.html"], ["--output no/a.html cannot be used: FileNotFoundError"]),
        (["a", "--metric=loss", "--output=no/a.png"], ["--output no/a.png cannot be used: FileNotFoundError"]),
    ],
)
def test_wrong_arguments(tmp_path, capsys, monkeypatch, argv, parts):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a", ROWS)
    for name, text in (("old", "{}"), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    assert compare.main(argv) == 2
    one_line(capsys, "error: ", *parts)


# --------------------------------------------------------------------------------------------------------- export.py
STEPS = dict(loss="dpo", lr_scheduler_type="constant", warmup_ratio=0, per_device_train_batch_size=4)


def same_model(folder, other):
    """Two model directories have the same files, byte for byte."""
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [name for name in names if (folder / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.mark.parametrize("family, changes", [("gpt2", {}), ("llama", dict(tie_word_embeddings=False))])
def test_an_exported_checkpoint_is_the_run_that_ended_there(bench, family, changes, capsys):
    """Steps 5 with a checkpoint at 2 and 4; for the newest of them a run of 4 steps is the same to the byte."""
    bench.model = make_model(bench.folder / family, family, scale=4.0, **changes)
    _, out = bench.train(max_steps=5, save_steps=2, **STEPS)
    _, short = bench.train(max_steps=4, **STEPS)
    exported = bench.folder / "new" / "exported"
    assert export.main([str(out / "checkpoint-4"), str(exported)]) == 0
    assert f"{exported}: {bench.model} after 4 steps of the run in {out}\n" in capsys.readouterr().out
    same_model(exported, short)
    start, end, later = [load_file(path / "model.safetensors") for path in (bench.folder / family, exported, out)]
    assert start.keys() == end.keys()
    assert not any(torch.equal(end[name], other[name]) for name in end for other in (start, later))


def two_ranks(rank, port, name, folder):
    """One of two processes: other weights than the model's, a checkpoint after step 3, the model as a run ends with."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="localhost", MASTER_PORT=str(port))
    assert tgdpo.start_processes()
    options = tgdpo.Options(device="cpu", dtype="float32", max_steps=9)
    model = tgdpo.load_model(name, options)
    optimizer, scheduler, _ = tgdpo.make_optimizer(model, 8, options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)
    tgdpo.save_checkpoint(folder, model, optimizer, scheduler, 3, {})
    tgdpo.save_model(model, tgdpo.load_tokenizer(name), folder)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family, changes", [("gpt2", {}), ("llama", dict(tie_word_embeddings=False))])
def test_a_checkpoint_of_two_processes(tmp_path, family, changes):
    """Forked from this one, which takes a second where torchrun takes twenty: no training in them."""
    name, run = make_model(tmp_path / family, family, scale=4.0, **changes), tmp_path / "run"
    run.mkdir()
    tgdpo.record(run, options=dict(model_name_or_path=name), model=tgdpo.model_fingerprint(name))
    arguments, deadline = (free_port(), name, run), time.time() + 120
    ranks = torch.multiprocessing.start_processes(two_ranks, arguments, 2, join=False, start_method="fork")
    while not ranks.join(5):
        if time.time() > deadline:
            [process.kill() for process in ranks.processes]
    assert len([*(run / "checkpoint-3").glob("*.distcp")]) == 2, "each process wrote a part"
    assert export.main([str(run / "checkpoint-3"), str(tmp_path / "exported")]) == 0
    same_model(tmp_path / "exported", run)
    start, end = [load_file(folder / "model.safetensors") for folder in (tmp_path / family, tmp_path / "exported")]
    assert start.keys() == end.keys() and all(torch.equal(end[name], start[name] * 0.7) for name in end)


def test_what_cannot_be_exported(bench, capsys):
    """A folder that is there, no or half a checkpoint, a damaged one, another model. A moved model is named."""
    _, out = bench.train(max_steps=2, save_steps=1, **STEPS)
    good, new = out / "checkpoint-1", bench.folder / "new"

    def refused(source, target, *more):
        capsys.readouterr()
        assert export.main([str(source), str(target), *more]) == 2
    refused(good, out)
    one_line(capsys, f"{out} exists already; expected the name of a new directory")
    good.rename(out / "checkpoint-1.saving")
    for name in ("", "checkpoint-1.saving", "checkpoint-9"):
        refused(out / name, new)
        one_line(capsys, "is no complete checkpoint; expected a directory checkpoint-N")
    (out / "checkpoint-1.saving").rename(good)
    refused(good, new, f"--model_name_or_path={bench.reward_model}")
    one_line(capsys, f"model {bench.reward_model} is not what the run in {out} began with")
    moved = bench.folder / "moved"
    (bench.folder / "model").rename(moved)
    assert export.main([str(good), str(new), f"--model_name_or_path={moved}"]) == 0
    (good / "__0_0.distcp").write_bytes(b"half a file")
    refused(good, bench.folder / "newer", f"--model_name_or_path={moved}")
    one_line(capsys, f"{good} cannot be used: ")
    assert not (bench.folder / "newer").exists()


# ---------------------------------------------------------------------------------------------------- show_tokens.py
def shown(folder, rows, status=0, row=0):
    data = write_rows(folder / "data.jsonl", rows)
    argv = [f"--model_name_or_path={folder}", f"--dataset={data}", f"--row={row}"]
    assert show_tokens.main(argv) == status


def test_tokens_and_numbers_of_a_row(tmp_path, capsys):
    word_tokenizer(template=CHATML, eos="<|im_end|>").save_pretrained(tmp_path)
    row = dict(prompt="red ?", chosen="yes .", rejected="no", chosen_rewards=[0.5, -1, 0], rejected_rewards=[2, 0.25],
               chosen_weight=[1, 2, 3], rejected_weight=[4, 5], chosen_score=7)
    shown(tmp_path, [row])
    assert capsys.readouterr().out == r"""
prompt: 10 tokens
    0       4  '<|im_start|>'
    1      22  ' user'
    2       6  ' \n'
    3       7  ' red'
    4      20  ' ?'
    5       5  ' <|im_end|>'
    6       6  ' \n'
    7       4  ' <|im_start|>'
    8      23  ' assistant'
    9       6  ' \n'

chosen: 3 tokens, 3 rewards, 3 weight
    0      17  ' yes'              rewards 0.5  weight 1
    1      19  ' .'                rewards -1  weight 2
    2       5  ' <|im_end|>'       rewards 0  weight 3

rejected: 2 tokens, 2 rewards, 2 weight
    0      18  ' no'               rewards 2  weight 4
    1       5  ' <|im_end|>'       rewards 0.25  weight 5
"""


@pytest.mark.parametrize("template", [None, CHATML])
def test_the_tokens_are_those_of_training(tmp_path, capsys, template):
    tokenizer, rows = word_tokenizer(bos=True, template=template), eight_pairs()
    tokenizer.save_pretrained(tmp_path)
    for pair in tgdpo.tokenize(rows, tokenizer, 64, "rows")[0]:
        capsys.readouterr()
        shown(tmp_path, rows, row=pair["index"])
        found = re.findall(r"^ +(\d+) +(\d+)  '", capsys.readouterr().out, re.M)
        sides = [pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert [(int(place), int(i)) for place, i in found] == [x for side in sides for x in enumerate(side)]


def test_bytes_that_make_a_character_together(tmp_path, capsys):
    """ö was never seen by this tokenizer: it is two tokens, one byte each, and the text is beside the second."""
    train_tokenizer(["ab cd"] * 3).save_pretrained(tmp_path)
    shown(tmp_path, [dict(prompt="ab", chosen="ö", rejected="cd")])
    chosen = re.search(r"chosen: 3 tokens\n(.*)\n(.*)\n(.*)\n", capsys.readouterr().out).groups()
    assert [line.split()[2] for line in chosen] == ["''", "'ö'", "'<eos>'"]


NUMBERS = dict(chosen_rewards=[0.5, 1], rejected_rewards=[1, 2, 3])


@pytest.mark.parametrize(
    "changes, lines, message",
    [
        (dict(chosen_rewards=[0.5]), ["chosen: 2 tokens, 1 rewards", "rewards 0.5", "rewards -"], "expected 2 fini"),
        (dict(rejected_rewards=[1, 2, 3, 4]), ["rejected: 3 tokens, 4 rewards"], "rejected_rewards has 4 values; exp"),
        (dict(rejected_rewards=None), ["rejected: 3 tokens, 0 rewards"], "row 1: rejected_rewards has no list of nu"),
        (dict(chosen_rewards="high"), ["chosen: 2 tokens, 0 rewards"], "row 1: chosen_rewards has no list of numbers"),
        (dict(chosen_rewards="high", rejected_rewards=None), [], "row 1: chosen_rewards has no list of numbers"),
        (dict(chosen=""), [], "is not used in training: an empty response"),
        (dict(chosen=" no no"), [], "is not used in training: identical responses"),
    ],
)
def test_numbers_and_rows_that_do_not_fit(tmp_path, capsys, changes, lines, message):
    """The table comes first: it shows which token has no number."""
    word_tokenizer().save_pretrained(tmp_path)
    row = dict(prompt="red", chosen=" yes", rejected=" no no") | NUMBERS
    shown(tmp_path, [row, row | changes], status=2, row=1)
    out, err = capsys.readouterr()
    assert all(line in out for line in lines) and message in err and err.count("\n") == 1
    shown(tmp_path, [row, row | changes])
    assert "2 tokens, 2 rewards" in capsys.readouterr().out


@pytest.mark.parametrize("row", [-1, 8])
def test_a_row_that_is_not_there(tmp_path, capsys, row):
    word_tokenizer().save_pretrained(tmp_path)
    shown(tmp_path, eight_pairs(), status=2, row=row)
    one_line(capsys, f"--row is {row}; ", "has 0 to 7")


# ------------------------------------------------------------------------------------------------------------- sweep.py
def test_a_sweep_over_alpha_trains_the_dpo_model_once_and_changes_nothing(bench, capsys):
    options = dict(max_steps=3, eval_size=2)
    argv = ["--vary", "alpha", "0.1", "0.4", *bench.argv(out=bench.folder / "sweep", **options)]
    assert sweep.main(argv) == 0
    text, runs = capsys.readouterr().out, [bench.folder / "sweep" / f"alpha-{alpha}" for alpha in ("0.1", "0.4")]
    assert text.count("reward model, since none is given") == 1 and not (runs[1] / "reward_model").exists()
    assert "options that differ" in text and "alpha-0.4" in text
    own, _ = bench.train(alpha=0.4, **options)
    assert curve(rows_of(runs[1])) == curve(own)
    # the same command goes on where a kill has left off
    tgdpo.record(runs[1], finished=False)
    assert sweep.main(argv) == 0
    assert "alpha-0.1: finished already" in capsys.readouterr().out and curve(rows_of(runs[1])) == curve(own)


@pytest.mark.parametrize(
    "vary, said",
    [
        ([], "--vary: expected it once"),
        (["--vary", "alpha", "0.1"], "at least two different values"),
        (["--vary", "alpha", "0.1", "x"], "invalid float value: 'x'"),
        (["--vary", "alpha", "0.1", "-1"], "expected a number, 0 or above"),
        (["--vary", "output_dir", "a", "b"], "each run has its own"),
    ],
)
def test_a_sweep_that_cannot_be(bench, vary, said, capsys):
    assert sweep.main([*vary, *bench.argv(out=bench.folder / "sweep")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (bench.folder / "sweep").exists()
