"""The sharded mode: real processes under torchrun (gloo) against one process. Few launches, many checks in each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import tgdpo
from conftest import Bench, make_model, rows_of, write_rows
from ranks import totals, unfinish
from start_model import train_tokenizer
from test_train import close, curve

ROOT = Path(tgdpo.__file__).parent
MODELS = {  # name: (family, changes of its configuration, options)
    "gpt2, tied": ("gpt2", {}, {}),
    "gpt2, tied, dropout": ("gpt2", dict(resid_pdrop=0.5, attn_pdrop=0.5), {}),
    "gpt2, checkpointed, head in chunks": ("gpt2", {}, dict(gradient_checkpointing=True, logits_bytes=4 * 26 * 3)),
    "llama, untied": ("llama", dict(tie_word_embeddings=False), {}),
    "llama, tied, checkpointed": ("llama", dict(tie_word_embeddings=True), dict(gradient_checkpointing=True)),
    "llama, long context": (
        "llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=5e5,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            )
        ),
        {},
    ),
    "qwen3": ("qwen3", dict(head_dim=8), {}),
    "gemma2": (
        "gemma2",
        dict(head_dim=8, sliding_window=4, final_logit_softcapping=2.0, attn_logit_softcapping=1.0),
        {},
    ),
    "mistral": ("mistral", dict(sliding_window=4), {}),
    "gpt2, published without a head": ("gpt2", {}, {}),
    "llama, said to be tied": ("llama", dict(tie_word_embeddings=False), {}),  # with a head of its own
    "hsdp": ("llama", {}, dict(hsdp=True)),
}
SEVERAL_MACHINES = ["gpt2, tied", "llama, untied", "hsdp"]


def torchrun(*arguments, ranks=2, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **kwargs
    )


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def finish(process, seconds=300):
    """-> (exit status, what it printed)"""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, text


def options_of(kind, ranks):
    """Options of the runs that are compared, on so many processes: 7 pairs in steps of 4 (4 + 3) and one held out."""
    split = {
        ("whole", 1): (4, 1),
        ("whole", 2): (2, 1),
        ("whole", 4): (1, 1),
        ("accumulated", 1): (1, 4),
        ("accumulated", 2): (1, 2),
        ("accumulated", 4): (1, 1),
    }[kind, ranks]
    return dict(
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        eval_size=1,
        eval_steps=2,
        num_train_epochs=3,
        logging_steps=1,
    )


class Launched:
    """A Bench whose runs were made by several processes in one launch; what they found, printed and returned."""

    def __init__(self, folder, ranks, machines=1):
        self.bench, self.ranks, self.folder = Bench(folder), ranks, folder
        self.own = dict(cache_dir=f"{folder}/cache{ranks}")  # each launch annotates by itself
        self.again = dict(loss="dpo", save_steps=3, **self.own, **options_of("whole", ranks))
        self.models, self.runs = {}, {}
        self.make_models([name for name in MODELS if name != "hsdp"] if machines == 1 else SEVERAL_MACHINES)
        self.add_runs(["--hsdp"] * (machines > 1))
        out = folder / "found.json"
        job = dict(models=self.models, out=str(out))
        if machines == 1:
            self.add_runs_of_one_machine()
            sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
            job["large"] = make_model(folder / "large", "llama", **sizes)
        job = write_rows(folder / "job.json", [job | dict(runs=list(self.runs.values()))])
        rendezvous = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=1", f"--rdzv_endpoint=localhost:{free_port()}"]
        several = rendezvous if machines > 1 else ["--standalone"]
        jobs = [torchrun(*several, ROOT / "tests" / "ranks.py", job, ranks=ranks // machines) for _ in range(machines)]
        self.ends = [finish(process) for process in jobs]
        assert out.exists(), [text[-6000:] for _, text in self.ends]
        self.found = json.loads(out.read_text())
        self.statuses = dict(zip(self.runs, self.found["statuses"]))

    def make_models(self, names):
        for i, name in enumerate(names):
            family, changes, options = MODELS[name]
            path = make_model(self.folder / f"m{i}", family, scale=4.0, seed=i, **changes)
            if "without a head" in name:  # as openai-community/gpt2 is: names without "transformer."
                transformers.AutoModel.from_pretrained(path).save_pretrained(path)
            if "said to be tied" in name:
                config = json.loads((Path(path) / "config.json").read_text()) | {"tie_word_embeddings": True}
                (Path(path) / "config.json").write_text(json.dumps(config))
            self.models[name] = (path, f"{self.folder}/saved{i}", options)

    def add(self, name, *flags, out=None, job=(), **options):
        """A command line for all ranks; job says what ranks.py does before it."""
        argv = self.bench.argv(*flags, out=self.folder / (out or name), **options)
        self.runs[name] = dict(argv=[str(a) for a in argv], **dict(job))

    def add_runs(self, hsdp):
        whole = self.own | options_of("whole", self.ranks)
        for loss in ("tgdpo", "simpo", "dpo"):
            judge = self.bench.reward_model if loss == "tgdpo" else None
            self.add(loss, *hsdp, loss=loss, reward_model=judge, **whole)
        self.add("accumulated", loss="dpo", **self.own, **options_of("accumulated", self.ranks))
        several = self.own | options_of("whole", self.ranks) | dict(gradient_accumulation_steps=2)
        self.add("several passes", *hsdp, loss="dpo", **several)
        self.add("stages", *hsdp, save_steps=2, **whole)  # trains a reward model first
        self.add("again", *hsdp, **self.again)
        unfinished = dict(unfinish=f"{self.folder}/again")
        self.add("again, resumed", "--resume", *hsdp, out="again", job=unfinished, **self.again)

    def add_runs_of_one_machine(self):
        own, folder = self.own, self.folder
        self.add("bfloat16", loss="dpo", dtype="bfloat16", max_steps=3, **own)
        self.add("to_1", **self.again)
        self.bench.train(out=f"{folder}/from_1", loss="dpo", save_steps=3, **options_of("whole", 1))
        unfinish(f"{folder}/from_1")
        self.add("from_1", "--resume", **self.again | dict(save_steps=0))
        small = dict(TINY_PAIRS=60)
        tiny = dict(model_name_or_path=None, dataset=None, per_device_train_batch_size=16 // self.ranks)
        self.add("tiny", job=dict(set=small), max_steps=3, eval_size=0.1, **tiny, **own)
        self.add("other_command", job={"own seed": True}, loss="dpo", max_steps=2)
        self.add("no_machines", "--hsdp", loss="dpo")
        self.add("damaged", **self.again)
        half = dict(unfinish=f"{folder}/damaged", damage=f"{folder}/damaged/checkpoint-3/__1_0.distcp")
        self.add("no_checkpoint", "--resume", out="damaged", job=half, **self.again)
        steep = dict(learning_rate=1e30, lr_scheduler_type="constant", warmup_ratio=0)
        self.add("not_finite", loss="dpo", max_steps=4, **steep, **own)

    def rows(self, name, evaluation=False):
        return curve(rows_of(self.bench.folder / name, evaluation))

    def single(self, name, **changes):
        """The same run in this one process -> its folder."""
        argv = self.runs[name]["argv"]
        options = dict(a[2:].split("=", 1) for a in argv if "=" in a)
        options |= {k: v for k, v in options_of("whole", 1).items() if k in options} | changes
        out = self.bench.folder / f"{name}_alone"
        self.bench.train(out=out, **options | dict(cache_dir=self.bench.folder / "cache_alone", output_dir=out))
        return f"{name}_alone"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Launched(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Two torchruns of two ranks each: two machines, as far as the program can tell."""
    return Launched(tmp_path_factory.mktemp("four"), 4, machines=2)


def same_run(launched, name, other):
    close(launched.rows(name), launched.rows(other))
    close(launched.rows(name, evaluation=True), launched.rows(other, evaluation=True))
    a, b = [
        transformers.AutoModelForCausalLM.from_pretrained(launched.bench.folder / n).state_dict() for n in (name, other)
    ]
    assert a.keys() == b.keys()
    for k in a:  # the gradient of a key's bias is 0 but for rounding, which AdamW makes steps of
        assert k.endswith("c_attn.bias") or (a[k] - b[k]).abs().max() < 1e-4, k


@pytest.mark.parametrize(
    "launch, name",
    [("two", name) for name in MODELS if name != "hsdp"] + [("four", name) for name in SEVERAL_MACHINES],
)
def test_a_sharded_model_equals_the_plain_one(launch, name, request):
    """Log-probs and gradients; float32 shares that add up; buffers that no file holds; the written directory."""
    launched = request.getfixturevalue(launch)
    found = launched.found["models"][name]
    assert launched.found["world"] == launched.ranks
    assert found["logps"] < 1e-5 and found["gradients"] < 1e-5 * found["gradient size"] and found["gradient size"] > 1
    assert found["same weights have gradients"] and found["buffers"]
    path, saved, changes = launched.models[name]
    assert found["training"] == (found["checkpointed"] if "gradient_checkpointing" in changes else [])
    assert found["units"] == found["layers"] + 1, "each block and the root"
    assert found["dtypes"] == ["torch.float32"]
    copies = 2 if name == "hsdp" else 1  # with hsdp one on each of the two machines
    assert found["weights of all ranks"] == copies * found["weights"]
    assert found["largest share"] < 1.2 * copies * found["weights"] / launched.ranks
    plain, written = [transformers.AutoModelForCausalLM.from_pretrained(p) for p in (path, saved)]
    assert type(plain) is type(written) and written.config.architectures == [type(plain).__name__]
    a, b = plain.state_dict(), written.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    names = [sorted(p.name for p in Path(folder).iterdir()) for folder in (path, saved)]
    assert names[0] == names[1]
    assert (Path(path) / "model.safetensors").stat().st_size == pytest.approx(
        (Path(saved) / "model.safetensors").stat().st_size, rel=0.01
    ), "a tied weight is written once"


def test_loading_takes_a_share_of_memory_on_all_ranks_but_the_first(two):
    """Of a model of 100 MB each of two ranks keeps half, and one tensor at a time is whole, of 4 MB: never a copy."""
    whole = (two.bench.folder / "large" / "model.safetensors").stat().st_size
    assert 9e7 < whole < 1.2e8
    first, second = two.found["loading"]["taken"]
    assert 0.3 * whole < second < whole < first
    assert two.found["loading"]["freed"], "nothing holds a model that is not used any more"


def test_totals_are_those_of_all_ranks_pairs_each_counted_once(two):
    want = totals(two.models["llama, untied"][0])
    assert two.found["totals"].keys() == want.keys() and want["pairs"] == 7
    for name, value in want.items():
        assert two.found["totals"][name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("name", ["tgdpo", "simpo", "dpo", "accumulated", "stages"])
@pytest.mark.parametrize("launch", ["two", "four"])
def test_the_curve_of_one_process(launch, name, request):
    """Each metric of each step and evaluation to 1e-5, and the weights; the last step of an epoch has 3 pairs."""
    launched = request.getfixturevalue(launch)
    assert launched.statuses[name] == 0
    alone = launched.single(name)
    same_run(launched, name, alone)
    rows = launched.rows(name)
    assert len(rows) == 6 and rows[0]["loss"] > rows[-1]["loss"] + 0.01, "it learns"
    if name == "stages":
        same_run(launched, f"{name}/reward_model", f"{alone}/reward_model")


def test_bfloat16_is_computed_but_not_kept(two):
    """Weights stay float32 and the numbers those of one process, to bfloat16's resolution; the start is ln 2."""
    rows = two.rows("bfloat16")
    close(rows, two.rows(two.single("bfloat16", gradient_accumulation_steps=1, per_device_train_batch_size=8)), 0.05)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=5e-3)
    weights = transformers.AutoModelForCausalLM.from_pretrained(two.bench.folder / "bfloat16", dtype="auto")
    assert {p.dtype for p in weights.parameters()} == {torch.float32}
    kept = [{p.name.split("-", 2)[2] for p in (two.bench.folder / c).iterdir()} for c in ("cache2", "cache_alone")]
    sharded = "bfloat16-sharded.parquet"
    assert sharded in kept[0] and sharded not in kept[1], "it rounds elsewhere: no common cache"
    assert 1e-3 < two.found["bfloat16"]["away"] < 0.5, "computed in bfloat16"
    assert two.found["bfloat16"]["beyond bfloat16"] > 0.3, "averaged in float32"


@pytest.mark.parametrize("launch", ["two", "four"])
def test_several_passes_are_one_step(launch, request):
    """Steps of 7 pairs in passes of 4 and 3; with --hsdp, machines add up their gradients after the last one only."""
    launched = request.getfixturevalue(launch)
    assert launched.statuses["several passes"] == 0
    alone = launched.single("several passes", per_device_train_batch_size=8)
    close(launched.rows("several passes"), launched.rows(alone))  # the gradient's norm and later losses among them
    assert len(launched.rows("several passes")) == 3


@pytest.mark.parametrize("launch", ["two", "four"])
def test_resumed_on_the_same_ranks_is_the_same_to_the_bit(launch, request):
    launched = request.getfixturevalue(launch)
    assert launched.statuses["again, resumed"] == 0 and len(launched.rows("again")) == 6
    assert launched.rows("again") == launched.rows("dpo")
    assert launched.rows("again", evaluation=True) == launched.rows("dpo", evaluation=True)


def test_resumed_on_another_number_of_ranks(two, capsys):
    """A run of 2 ranks continued by 1, and a run of 1 by 2, against one that was never interrupted."""
    alone = two.single("to_1", save_steps=0)
    assert two.statuses["from_1"] == 0
    same_run(two, "from_1", alone)
    assert len(list((two.bench.folder / "to_1" / "checkpoint-3").glob("*.distcp"))) == 2, "each rank wrote its part"
    unfinish(two.bench.folder / "to_1")
    two.bench.train("--resume", out=two.bench.folder / "to_1", loss="dpo", **options_of("whole", 1))
    same_run(two, "to_1", alone)
    half = options_of("whole", 1) | dict(per_device_train_batch_size=2)
    two.bench.train("--resume", out=two.bench.folder / "to_1", loss="dpo", status=2, **half)
    assert "--resume: pairs_per_step was 4 and is 2 now" in capsys.readouterr().err


def test_the_tiny_mode_on_two_ranks(two, monkeypatch):
    for name, value in two.runs["tiny"]["set"].items():
        monkeypatch.setattr(tgdpo, name, value)
    alone = two.single("tiny", model_name_or_path=None, dataset=None, per_device_train_batch_size=16, eval_size=0.1)
    for stage in ("", "/reward_model", "/true_rewards"):
        close(two.rows("tiny" + stage), two.rows(alone + stage))
    tables = [json.loads((two.bench.folder / n / "run.json").read_text())["table"] for n in ("tiny", alone)]
    assert tables[0].keys() == tables[1].keys()
    for model, row in tables[0].items():
        assert row == pytest.approx(tables[1][model], abs=1e-3), model


def test_bad_input_is_said_once_and_ends_all_ranks(two):
    text = two.ends[0][1]
    assert two.ends[0][0] == 0, text
    wrong = ["other_command", "no_machines", "no_checkpoint", "not_finite"]
    assert [two.statuses[name] for name in wrong] == [2, 2, 2, 1]
    assert text.count("tgdpo.py: error: ") == 3 and text.count("tgdpo.py: stopped at ") == 1
    assert "ranks with other command lines; expected the same on all machines" in text
    assert "--hsdp with 2 processes, 2 of them on this machine; expected several machines" in text
    assert "damaged/checkpoint-3 cannot be used (the one before serves, too)" in text
    assert text.count("tgdpo.py: stopped at step 2: loss (of pairs [") == 1
    assert text.count("done: ") == list(two.statuses.values()).count(0) > 5, "rank 0 alone prints"
    assert "Traceback" not in text


STEEP = dict(learning_rate=1e30, lr_scheduler_type="constant", warmup_ratio=0, max_steps=4)


@pytest.mark.parametrize(
    "options, line",
    [
        (  # seen by rank 0 alone
            dict(dataset="nothing.json"),
            r"error: --dataset nothing\.json cannot be used: FileNotFoundError: .*No such file.*",
        ),
        (STEEP, r"stopped at step 2: loss \(of pairs \[(\d, ){7}\d\]\) or gradient is no number; .*"),  # by all ranks
    ],
)
def test_a_failure_under_torchrun_is_one_line_and_nobody_waits(tmp_path, options, line):
    bench, began = Bench(tmp_path), time.time()
    argv = bench.argv(**dict(loss="dpo", out=tmp_path / "out") | options)
    status, text = finish(torchrun("--standalone", ROOT / "tgdpo.py", *argv), 60)
    assert status != 0 and time.time() - began < 60
    (said,) = [x for x in text.splitlines() if "tgdpo.py: " in x]
    assert re.fullmatch(f"tgdpo.py: {line}", said)
    assert 'tgdpo.py", line' not in text, "no traceback of ours"
    assert "Signal 6" not in text and "terminate called" not in text, "nobody aborts"
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_killed_rank_ends_the_job_and_the_run_continues(tmp_path, real_pairs):
    """kill -9 of rank 1 on real pairs: all end within a minute; --resume on 2 ranks gives the uninterrupted curve."""
    rows = json.loads(real_pairs.read_text())
    tokenizer = train_tokenizer([json.dumps(row) for row in rows])
    model = make_model(
        tmp_path / "model", tokenizer=tokenizer, vocab_size=len(tokenizer), n_positions=128, eos_token_id=2
    )
    flags = [f"--model_name_or_path={model}", f"--dataset={real_pairs}", "--max_length=128", "--learning_rate=3e-4"]
    flags += ["--loss=dpo", f"--cache_dir={tmp_path}/cache", "--device=cpu", "--save_steps=2", "--num_train_epochs=1"]
    two = [*flags, "--per_device_train_batch_size=5", f"--output_dir={tmp_path}/two"]
    process = torchrun("--standalone", ROOT / "tgdpo.py", *two)
    try:
        deadline = time.time() + 120
        while not (tmp_path / "two" / "checkpoint-6").exists():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = next(p for p in children if b"RANK=1" in Path(f"/proc/{p}/environ").read_bytes().split(b"\0"))
        os.kill(int(victim), signal.SIGKILL)
        killed = time.time()
    except BaseException:
        process.kill()
        raise
    status, text = finish(process, 60)
    assert status != 0 and time.time() - killed < 60
    assert "Signal 9 (SIGKILL)" in text, text
    assert not (tmp_path / "two" / "model.safetensors").exists()
    status, text = finish(torchrun("--standalone", ROOT / "tgdpo.py", *two, "--resume"))
    assert status == 0 and f"done: {tmp_path}/two" in text, text
    assert text.count("done:") == 1 and text.count("pairs read") == 1, "rank 0 alone prints"
    one = [*flags, "--per_device_train_batch_size=10", f"--output_dir={tmp_path}/one"]
    assert tgdpo.main(one) == 0
    close(curve(rows_of(tmp_path / "two")), curve(rows_of(tmp_path / "one")))
    assert len(rows_of(tmp_path / "two")) == 30
