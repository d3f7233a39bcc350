"""The files of a run: locks, damaged files, interruptions, a changed code. Nothing is lost or passes in silence."""

import json
import os

import datasets
import filelock
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.api import CheckpointException

import tgdpo
from conftest import rows_of, small_config
from test_train import curve


def line(capsys):
    """What was said on stderr, which must be one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def unfinished(out):
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"finished": False}))


def test_one_directory_is_for_one_process(bench, capsys):
    _, out = bench.train(loss="dpo", max_steps=1)
    unfinished(out)
    with filelock.FileLock(out / "run.lock"):  # as another process would hold it
        bench.train("--resume", loss="dpo", max_steps=1, out=out, status=2)
    assert f"--output_dir {out}: another process is at work there" in line(capsys)
    bench.train("--resume", loss="dpo", max_steps=1, out=out)


def test_a_directory_in_which_a_run_only_failed_can_be_used(bench, capsys):
    out = bench.folder / "again"
    bench.train(loss="dpo", eval_size=8, out=out, status=2)
    out.mkdir(exist_ok=True)
    (out / "run.lock").touch()
    bench.train(loss="dpo", out=out)


@pytest.mark.parametrize("damage", ["half a file", "other lengths", "no parquet"])
def test_a_damaged_annotation_is_made_again(bench, damage, capsys):
    rows, _ = bench.train(loss="dpo")
    (file,) = (bench.folder / "cache").glob("*.parquet")
    good = file.read_bytes()
    if damage == "other lengths":
        tgdpo.write_annotation(file, [[[0.5]] * 8] * 2)
    else:
        file.write_bytes(good[: len(good) // 2] if damage == "half a file" else b"")
    capsys.readouterr()
    again, _ = bench.train(loss="dpo")
    assert curve(again) == curve(rows) and "from the cache" not in capsys.readouterr().out
    assert file.read_bytes() == good


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_damaged_file_of_a_run_is_a_line(bench, name, capsys):
    _, out = bench.train(loss="dpo", max_steps=2, save_steps=1)
    unfinished(out)
    (out / name).write_text('{"loss": 1, "oops"}\n')
    assert tgdpo.main(bench.argv("--resume", loss="dpo", max_steps=2, save_steps=1, out=out)) == 2
    assert f"{name} cannot be used" in line(capsys)


def test_a_cache_inside_the_output_directory_does_not_keep_a_killed_run_from_resuming(bench):
    out = bench.folder / "whole"
    options = dict(loss="dpo", cache_dir=out / "cache", out=out)
    rows, _ = bench.train(**options)
    for file in out.iterdir():
        if file.name != "cache":
            file.unlink()
    (out / "run.lock").touch()  # what a kill behind the annotation leaves
    assert curve(bench.train("--resume", **options)[0]) == curve(rows)


def test_a_run_does_not_go_on_under_another_guidance(bench, monkeypatch, capsys):
    options = dict(reward_model=bench.reward_model, max_steps=2, save_steps=1)
    _, out = bench.train(**options)
    unfinished(out)

    def guidance(token_rewards, alpha, side, floor=None):
        return 1 + side * alpha * token_rewards.tanh()

    with monkeypatch.context() as changed:
        changed.setattr(tgdpo, "guidance", guidance)
        bench.train("--resume", out=out, status=2, **options)
    assert "--resume: code was" in line(capsys)
    bench.train("--resume", out=out, **options)


def test_the_tiny_mode_does_not_go_on_with_another_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 60)
    out = tmp_path / "out"
    argv = [f"--output_dir={out}", f"--cache_dir={tmp_path / 'cache'}", "--device=cpu", "--max_steps=1"]
    assert tgdpo.main(argv) == 0
    pairs = (out / "pairs.jsonl").read_text()
    (out / "run.json").unlink()
    (out / "reward_model" / "run.json").unlink()
    assert tgdpo.main([*argv, "--resume", "--seed=1"]) == 2
    assert "has other pairs; expected the --seed" in line(capsys)
    assert (out / "pairs.jsonl").read_text() == pairs
    assert tgdpo.main([*argv, "--resume"]) == 0


@pytest.mark.parametrize(
    "error, status, said",
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command with --resume"),
        (OSError(28, "No space left on device"), 2, "cannot be written: OSError(28, 'No space left on device')"),
    ],
)
def test_what_happens_while_a_checkpoint_is_written(bench, monkeypatch, error, status, said, capsys):
    rows, _ = bench.train(loss="dpo", max_steps=3)
    save, out = dcp.save, bench.folder / "out"
    options = dict(loss="dpo", max_steps=3, save_steps=1, out=out)

    def fails(state, checkpoint_id, **how):
        if "checkpoint-2" in str(checkpoint_id):
            raise CheckpointException("", {0: (error, None)})
        save(state, checkpoint_id=checkpoint_id, **how)

    with monkeypatch.context() as broken:
        broken.setattr(dcp, "save", fails)
        bench.train(status=status, **options)
    assert said in line(capsys)
    assert curve(bench.train("--resume", **options)[0]) == curve(rows)


def test_a_full_disk_at_the_end_is_a_line_and_the_run_resumes(bench, monkeypatch, capsys):
    import transformers

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    options = dict(loss="dpo", max_steps=2, save_steps=1, out=bench.folder / "out")
    with monkeypatch.context() as broken:
        broken.setattr(transformers.GPT2LMHeadModel, "save_pretrained", full)
        bench.train(status=2, **options)
    assert "No space left on device" in line(capsys)
    assert len(bench.train("--resume", **options)[0]) == 2


def test_out_of_memory_says_what_to_change(bench, monkeypatch, capsys):
    def run_pairs(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(tgdpo, "run_pairs", run_pairs)
    bench.train(loss="dpo", status=1)
    assert "--per_device_train_batch_size" in line(capsys)


def test_a_process_of_another_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert tgdpo.main([]) == 2
    assert "RANK but no LOCAL_RANK, WORLD_SIZE; expected all of them" in line(capsys)


def test_a_parquet_file_is_the_one_that_was_named_as_it_is_now(bench, capsys):
    rows = [json.loads(text) for text in open(bench.data)]
    name, other = bench.folder / "a[1]*.parquet", bench.folder / "a1x.parquet"
    datasets.Dataset.from_list(rows[:3]).to_parquet(str(other))
    datasets.Dataset.from_list(rows).to_parquet(str(name))
    assert len(tgdpo.load_rows(str(name), "train")) == 8
    stamp = os.stat(name)
    datasets.Dataset.from_list(rows[:5]).to_parquet(str(name))
    os.utime(name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert len(tgdpo.load_rows(str(name), "train")) == 5


def test_a_run_can_be_made_again_from_its_run_json(bench):
    rows, out = bench.train(loss="dpo", beta=0.3, max_steps=2)
    again = bench.folder / "again"
    assert tgdpo.main([str(out / "run.json"), f"--output_dir={again}"]) == 0
    assert curve(rows_of(again)) == curve(rows)


def test_a_cloned_data_set_and_a_list_inside_an_object_name_convert(bench, capsys):
    clone, wrapped = bench.folder / "clone", bench.folder / "wrapped.json"
    clone.mkdir()
    (clone / "README.md").write_text("x")
    wrapped.write_text(json.dumps({"version": 1, "data": [{"prompt": "a"}]}))
    for name, said in ((clone, "nor saved by `datasets`"), (wrapped, "1 rows with the columns: data, version;")):
        bench.train(dataset=name, status=2)
        assert said in (error := line(capsys)) and "scripts/convert.py" in error


def test_the_longest_pass_is_tried_before_step_1_on_a_gpu(bench, monkeypatch):
    """Forward and backward, the longest two of four pairs; nothing of it is left behind."""
    responses = dict(chosen_ids=[[5], [6, 7, 8], [5] * 9, [5]], rejected_ids=[[6], [9, 8, 7, 6], [7, 8], [7]])
    zeros = {name.replace("ids", "ref_logps"): [[0.0] * len(row) for row in rows] for name, rows in responses.items()}
    columns = {"index": [*range(4)], "prompt_ids": [[4], [4, 5], [4], [4]]} | responses | zeros
    options = tgdpo.read_options(bench.argv(loss="dpo", per_device_train_batch_size=2))
    model, seen, backward = tgdpo.load_model(bench.model, options), [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: seen.append("backward") or backward(loss))
    forward = model.token_logps
    model.token_logps = lambda batch: seen.append(batch["mask"].sum(1).tolist()) or forward(batch)
    tgdpo.rehearse(model, datasets.Dataset.from_dict(columns), options)
    assert seen == [[9, 3, 2, 4], "backward"] and all(p.grad is None for p in model.parameters())


def test_on_a_gpu_more_logits_exist_at_one_time():
    model = transformers.AutoModelForCausalLM.from_config(small_config(vocab_size=1000))
    cpu, cuda = [tgdpo.logits_rows(model, torch.device(name)) for name in ("cpu", "cuda")]
    assert cpu == 2**27 // 4000 and cuda == 2**30 // 4000


def test_what_is_out_of_memory_is_no_unreadable_file():
    with pytest.raises(torch.OutOfMemoryError), tgdpo.reading("a model"):
        raise torch.OutOfMemoryError("CUDA out of memory")
