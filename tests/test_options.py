"""The command line: files of options, defaults, and one clear line for what cannot be used."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import tgdpo
from conftest import make_model, word_tokenizer, write_rows


def read(*argv):
    return tgdpo.read_options(list(argv))


def test_defaults_follow_the_paper_and_the_tiny_mode_has_its_own():
    options = read("--model_name_or_path", "m", "--dataset", "d")
    assert (options.beta, options.alpha, options.learning_rate, options.max_length) == (0.1, 0.5, 7e-7, 2048)
    tiny = read()
    assert {name: getattr(tiny, name) for name in tgdpo.TINY} == tgdpo.TINY
    assert read("--beta", "0.3").beta == 0.3


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "o.yaml",
            "model_name_or_path: m\ndataset: d\nlearning_rate: 7e-7\nresume: false\n"
            "reward_model: null\nloss: dpo\nmax_steps: -1\n",
        ),
        (
            "o.json",
            '{"model_name_or_path": "m", "dataset": "d", "learning_rate": 7e-7, "loss": "dpo", "resume": false}',
        ),
    ],
)
def test_a_file_of_options_and_flags_that_override_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    options = read(str(tmp_path / name), "--loss", "simpo")
    assert (options.model_name_or_path, options.learning_rate, options.loss, options.resume) == (
        "m",
        7e-7,
        "simpo",
        False,
    )
    assert options.reward_model is None and options.beta == 0.1, "a model in the file means no tiny defaults"
    (tmp_path / "tiny.yaml").write_text("alpha: 0.3")
    assert (read(str(tmp_path / "tiny.yaml")).alpha, read(str(tmp_path / "tiny.yaml")).beta) == (
        0.3,
        tgdpo.TINY["beta"],
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--alpa", "1"], "unrecognized arguments: --alpa 1; --help lists all options"),
        (["--learning", "1"], "unrecognized arguments: --learning"),
        (["--trust_remote_code", "true"], "unrecognized arguments: --trust_remote_code"),
        (["--loss", "ipo"], "argument --loss: invalid choice: 'ipo' (choose from"),
        (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
        (["--beta", "0"], "--beta is 0.0; expected a number above 0"),
        (["--beta", "nan"], "--beta is nan"),
        (["--beta", "inf"], "--beta is inf"),
        (["--alpha", "-1"], "--alpha is -1.0; expected a number, 0 or above"),
        (["--reward_beta", "-1"], "--reward_beta"),
        (["--warmup_ratio", "1.5"], "at most 1"),
        (["--max_length", "3"], "--max_length is 3; expected 4 or more"),
        (["--max_steps", "0"], "-1 or a number above 0"),
        (["--eval_size", "1.5"], "a share below 1 or a whole number"),
        (["--logging_steps", "0"], "above 0"),
        (["--guidance_floor", "0"], "above 0"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--model_name_or_path", "m"], "--model_name_or_path and --dataset: expected both or none"),
        (["--resume"], "--output_dir is None; expected"),
        (["pairs.jsonl"], "data goes behind --dataset"),
        (["--alpha", "1", "run.yaml"], "unrecognized arguments: run.yaml"),
        (["--dataset", "d.jsonl"], "scripts/start_model.py makes a tiny model from your text"),
        (["missing.yaml"], "missing.yaml, taken for a file of options (data goes behind --dataset), cannot be used"),
        (["--device", "cuda"], "--device is cuda; torch finds cpu here"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(argv, message, capsys):
    if argv == ["--device", "cuda"] and tgdpo.torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert tgdpo.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("alpa: 1", "unrecognized arguments: --alpa=1"),
        ("loss: ipo", "invalid choice: 'ipo'"),
        ("beta: [1]", "invalid float value: '[1]'"),
        ("- beta", "expected lines such as 'beta: 0.1'"),
        ("beta: 'x'", "invalid float value"),
        ("a: b: c", "cannot be used"),
        ("learning: 1", "unrecognized arguments"),
        ("beta: 1\nloss: dpo\nbeta: 2", "beta more than once; expected one value"),
    ],
)
def test_a_bad_file_of_options(tmp_path, text, message, capsys):
    (tmp_path / "o.yaml").write_text(text)
    assert tgdpo.main([str(tmp_path / "o.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_the_dashed_spelling_of_an_option_is_the_same_option(tmp_path):
    for argv in (["--model-name-or-path", "m", "--dataset", "d"], ["--model-name-or-path=m", "--dataset=d"]):
        assert (read(*argv).beta, read(*argv).learning_rate) == (0.1, 7e-7), (
            "a real model must not get the tiny defaults"
        )
    (tmp_path / "o.yaml").write_text("model-name-or-path: m\ndataset: ~/d")
    options = read(str(tmp_path / "o.yaml"))
    assert options.beta == 0.1 and not options.dataset.startswith("~")


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        read("--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert e.value.code == 0
    for field in dataclasses.fields(tgdpo.Options):
        assert f"--{field.name}" in text
    assert text.count("(default:") == len(dataclasses.fields(tgdpo.Options))
    assert f"--loss {{{','.join(tgdpo.LOSSES)}}}" in text, "also what companions have added"
    assert all(f"--{name} {value}" in text for name, value in tgdpo.TINY.items())


def test_processes_without_a_gpu_of_their_own_are_refused(monkeypatch, capsys):
    for name, value in dict(RANK="5", LOCAL_RANK="5", WORLD_SIZE="8", MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert tgdpo.main([]) == 2
    assert "process 5 (from 0) on a machine with 4 GPUs; expected one for each" in capsys.readouterr().err


def test_checkpoints_need_an_output_directory_that_all_machines_see(bench, monkeypatch, capsys):
    answers = lambda value: [value, False] if value is True else [value]  # what another machine would answer
    monkeypatch.setattr(tgdpo, "gather", answers)
    bench.train(loss="dpo", save_steps=1, status=2)
    assert "is not there on all machines; expected a file system that they share" in capsys.readouterr().err


def test_bad_data_is_found_before_any_model_is_loaded(tmp_path, capsys, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", [dict(question="a")])
    monkeypatch.setattr(tgdpo, "load_model", None)  # calling it would fail
    model = make_model(tmp_path / "m")
    assert tgdpo.main(["--model_name_or_path", model, "--dataset", data, "--output_dir", str(tmp_path / "o")]) == 2
    assert "columns: question; expected chosen and rejected" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_missing_model_and_one_without_safetensors(bench, capsys):
    bench.train(model_name_or_path=str(bench.folder / "nothing"), status=2)
    assert "nothing: no such directory" in capsys.readouterr().err
    (bench.folder / "reward_model" / "model.safetensors").rename(bench.folder / "reward_model" / "pytorch_model.bin")
    bench.train(reward_model=bench.reward_model, status=2)
    error = capsys.readouterr().err
    assert "reward_model" in error and "safetensors" in error and error.count("\n") == 1


def test_a_model_that_lacks_weights_is_refused_instead_of_filled_with_random_ones(bench, capsys):
    import transformers
    from conftest import small_config

    classifier = transformers.AutoModelForSequenceClassification.from_config(small_config("llama"))
    classifier.save_pretrained(bench.folder / "classifier")
    word_tokenizer().save_pretrained(bench.folder / "classifier")
    bench.train(reward_model=str(bench.folder / "classifier"), status=2)
    assert "lacks the weights ['lm_head.weight']" in capsys.readouterr().err


def test_a_reward_model_without_a_tokenizer_is_taken_at_its_word(bench, capsys):
    for file in Path(bench.reward_model).glob("tokenizer*"):
        file.unlink()
    bench.train(reward_model=bench.reward_model, max_steps=1)
    assert "comes without a tokenizer" in capsys.readouterr().out
    bench.train(reward_model=bench.reward_model, max_steps=1, eval_steps=3, status=2)
    assert "--eval_steps without --eval_size: no pairs are held out" in capsys.readouterr().err


def test_an_embedding_smaller_than_the_tokenizer_is_refused(bench, capsys):
    small = make_model(bench.folder / "small", vocab_size=20)
    bench.train(loss="dpo", ref_model=small, status=2)
    assert "another vocabulary" in capsys.readouterr().err


def test_a_directory_that_is_no_model_and_paths_that_cannot_be(bench, capsys):
    (bench.folder / "empty").mkdir()
    bench.train(model_name_or_path=str(bench.folder / "empty"), status=2)
    (bench.folder / "file").write_text("x")
    bench.train(loss="dpo", cache_dir=bench.folder / "file", status=2)
    bench.train(loss="dpo", out=bench.folder / "file" / "out", status=2)
    assert capsys.readouterr().err.count("\n") == 3


def test_models_with_another_vocabulary_are_refused(bench, capsys):
    other = make_model(bench.folder / "other", tokenizer=word_tokenizer(special=("<|a|>",)))
    for role in ("ref_model", "reward_model"):
        bench.train(**{role: other}, status=2)
        assert "another vocabulary" in capsys.readouterr().err


def test_the_output_directory_is_never_overwritten(bench, capsys):
    out = bench.folder / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    for flags in ((), ("--resume",)):
        bench.train(*flags, out=out, status=2)
    error = capsys.readouterr().err
    assert "is not empty" in error and "holds no run" in error
    assert [f.name for f in out.iterdir()] == ["thesis.txt"]
