"""scripts/benchmark.py: what it counts, what it runs, what it refuses. No test here is timed."""

import re
import sys

import datasets
import pytest
import torch
import transformers

import benchmark
import fast
import tgdpo
from conftest import eight_pairs, small_config, write_rows

SMALL = ["--layers", "1", "--width", "16", "--vocabulary", "300", "--tokens", "64", "--batch", "4"]


def test_useful_operations_by_hand():
    """A prompt of 3 tokens, responses of 2 and 1: 6 tokens through the blocks, 3 through the head."""
    model = transformers.AutoModelForCausalLM.from_config(small_config("llama", num_hidden_layers=1))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    pairs = datasets.Dataset.from_list([{"prompt_ids": [7, 8, 9], "chosen_ids": [5, 6], "rejected_ids": [4]}])
    seen = (1 + 2 + 3) + (4 + 5) + 4  # what each token of prompt, chosen and rejected sees
    assert benchmark.useful(pairs, model) == 2 * block * 6 + 4 * 32 * seen + 2 * 32 * model.config.vocab_size * 3
    assert benchmark.useful(datasets.concatenate_datasets([pairs] * 3), model) == 3 * benchmark.useful(pairs, model)


def test_the_exponent_of_a_growth():
    xs = [256, 512, 2048]
    assert benchmark.slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert benchmark.slope(xs, [7, 7, 7]) == pytest.approx(0)


def test_a_process_reports_its_last_line_its_time_and_its_memory():
    code = "import time; data = bytearray(200 * 2**20); time.sleep(0.3); print('x'); print('last')"
    line, seconds, peak = benchmark.process([sys.executable, "-c", code], "it")
    assert line == "last" and seconds >= 0.3
    assert 200 * 2**20 < peak < 300 * 2**20
    with pytest.raises(RuntimeError, match="it failed: .*no such thing"):
        benchmark.process([sys.executable, "-c", "raise ValueError('no such thing')"], "it")


@pytest.mark.parametrize("data, script", [("random", "tgdpo.py"), ("own", "fast.py")])
def test_rates_of_both_stages(data, script, tmp_path, capsys):
    own = ["--dataset", write_rows(tmp_path / "p.jsonl", eight_pairs())] if data == "own" else ["--pairs", "8"]
    assert benchmark.main([*own, *SMALL, "--script", script]) == 0
    out = capsys.readouterr().out
    assert "8 pairs read, 8 used" in out
    assert [line.split(":")[0] for line in out.splitlines() if "multiplies matrices at" in line] == [script]
    assert re.search(r"multiplies matrices at [1-9]\d* x 10\^9", out)
    for stage in ("annotate", "train"):
        pairs, tokens, share, peak = map(float, re.search(rf"{stage} +(\S+) +(\S+) +(\S+) +(\S+)\n", out).groups())
        assert tokens > pairs > 0 and share < 1 and 0.2 < peak < 3


def test_growth_over_one_quantity(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.GROW, "tokens", (64, 128))
    assert benchmark.main(["--grow", "tokens", "--script", "fast.py"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nfast.py\n.*\n +64 .*\n +128 .*\n +grows as +t\^", out)
    assert "tgdpo.py" not in out and "layers " not in out


@pytest.mark.parametrize("trick", benchmark.WITHOUT)
def test_without_a_trick_the_numbers_are_the_same(trick, tmp_path, monkeypatch):
    """What is left out is left out, and nothing else: loss and gradient of a step, by a GPT-2."""
    places = {tgdpo: ["CPU_TOKENS"], fast: ["refusal", "BLOCK_BYTES", "GELUTanh"], fast.LabelLogps: ["apply"]}
    for place, names in places.items():  # put back after the test
        [monkeypatch.setattr(place, name, getattr(place, name)) for name in names]
    monkeypatch.setattr(fast, "OWN", dict(fast.OWN))
    state = lambda: [getattr(place, name) for place, names in places.items() for name in names] + [*fast.OWN.values()]

    def step():
        argv = ["--model_name_or_path", model_folder, "--dataset", "-", "--device=cpu", "--loss=simpo"]
        with fast.faster():
            options = tgdpo.read_options([*argv, "--per_device_train_batch_size=4"])
            fast.choose(pairs, options)
            model = tgdpo.load_model(model_folder, options)
            totals = tgdpo.run_pairs(model, pairs, options, learn=True)
        assert fast.RUN.shared == (trick != "shared_prompts" or not left_out)
        return torch.tensor(totals["loss"]), torch.cat([p.grad.flatten() for p in model.parameters()])

    own = benchmark.read_argv([*SMALL, "--pairs", "6"])
    _, model_folder, _, pairs = benchmark.prepare(own, tmp_path)
    left_out, before = False, state()
    whole = step()
    benchmark.leave_out(trick)
    left_out = True
    assert sum(a != b for a, b in zip(state(), before)) == (trick != "large_pages")
    torch.testing.assert_close(step(), whole, atol=1e-5, rtol=1e-4)


def test_what_a_trick_brings_is_said_for_time_and_memory(capsys):
    assert benchmark.main(["--pairs", "4", *SMALL, "--without", "gelu", "--rounds", "1"]) == 0
    assert re.search(r"\ngelu( +\d+\.\d\d \(\d+\.\d\d\)){2} +[+-]\d+\n$", capsys.readouterr().out)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--layers", "0"], "--layers is 0; expected at least 1"),
        (["--width", "191"], "--width is 191; expected a multiple of its number of heads"),
        (["--pairs", "-1"], "--pairs is -1"),
        (["--against", "trl", "--grow"], "expected one of them"),
        (["--grow", "--without", "gelu"], "expected one of them"),
        (["--against", "trl", "--trl_python", "/no/python"], "/no/python cannot import TRL"),
        (["--dataset", "nothing.json"], "nothing.json"),
        (["--script", "slow.py"], "argument --script: invalid choice: 'slow.py'"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(argv, message, capsys):
    assert benchmark.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("benchmark.py: error: ") and error.count("\n") == 1


def test_whole_runs_beside_another_trainer(tmp_path, capsys):
    """TRL is not among the tests' packages: a process that takes its place shows that both get the same pairs."""
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, datasets, transformers\n"
        "if sys.argv[1] == '-c':\n"
        "    print('1.16.0'), sys.exit()\n"
        "job = json.load(open(sys.argv[3]))\n"
        "pairs = datasets.load_from_disk(job['pairs'])\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(job['model'])\n"
        "assert sys.argv[2] == '--trl' and len(pairs) == 8 and job['steps'] == 2 and job['batch'] == 4\n"
        "assert model.config.n_layer == 1 and {'prompt_ids', 'chosen_ids', 'rejected_ids'} <= set(pairs.column_names)\n"
        "print(json.dumps({'seconds': 1000.0}))\n"
    )
    fake.chmod(0o755)
    rows = write_rows(tmp_path / "p.jsonl", eight_pairs())
    argv = ["--against", "trl", "--trl_python", str(fake), "--rounds", "1", "--dataset", rows, *SMALL]
    assert benchmark.main(argv) == 0
    out = capsys.readouterr().out
    assert "TRL 1.16.0" in out and "2 steps of 4 pairs" in out
    ratios = dict(re.findall(r"^(\S+, T?G?DPO) .*?(\d+\.\d\d) \(", out, re.M))
    assert float(ratios.pop("TRL, DPO")) == 1
    assert [*ratios] == ["tgdpo.py, DPO", "tgdpo.py, TGDPO", "fast.py, DPO", "fast.py, TGDPO"]
    assert all(float(ratio) > 10 for ratio in ratios.values())
