"""scripts/plan.py and measure.py, and the settings in scripts/configs/*.yaml."""

import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
import yaml
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import tgdpo
from conftest import ROOT, eight_pairs, make_model, write_rows

SCRIPTS = ROOT / "scripts"

import plan

llama = transformers.LlamaConfig
PUBLISHED = {  # file: (its model's sizes as published, number of weights)
    "llama3_8b_instruct_pairrm": (
        llama(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
        ),
        8_030_261_248,
    ),
    "llama32_3b_instruct": (
        llama(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        3_212_749_824,
    ),
    "gemma2_2b_it": (transformers.Gemma2Config(tie_word_embeddings=True), 2_614_341_888),
}
PUBLISHED["llama3_8b_instruct_armorm"] = PUBLISHED["llama3_8b_instruct_pairrm"]


def planned(capsys, *argv, status=0):
    assert plan.main([str(a) for a in argv]) == status
    out, err = capsys.readouterr()
    return err if status else out


def configuration(folder, config):
    """A directory with config.json alone: no weights, no tokenizer."""
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [path.stem for path in sorted((SCRIPTS / "configs").glob("*.yaml"))])
def test_the_papers_settings_and_the_verdicts_in_their_files(name, tmp_path, capsys):
    """The values of the official example; a batch of 128 on 8 GPUs; the plan says what the file says it says."""
    file, (config, weights) = SCRIPTS / "configs" / f"{name}.yaml", PUBLISHED[name]
    options = tgdpo.read_options([str(file)])
    assert (options.loss, options.beta, options.alpha, options.max_length) == ("tgdpo", 0.1, 0.5, 2048)
    assert (options.learning_rate, options.lr_scheduler_type, options.warmup_ratio) == (7e-7, "cosine", 0.1)
    assert 8 * tgdpo.batch_size(options) == 128 and options.num_train_epochs == 1 and options.dtype == "bfloat16"
    text = file.read_text()
    assert f"torchrun --nproc_per_node 8 tgdpo.py scripts/configs/{name}.yaml\n" in text
    verdicts = re.findall(r"(\d) x (\d+) GB (fits|does not fit) \((\d+)", text)
    assert [verdict[:2] for verdict in verdicts] == [("8", "80"), ("4", "80"), ("1", "141")]
    model = configuration(tmp_path, config)
    for gpus, memory, verdict, gib in verdicts:
        out = planned(capsys, file, "--model_name_or_path", model, "--gpus", gpus, "--gpu_memory", memory)
        assert f"{weights / 1e9:.2f} billion weights" in out
        assert f"\n{verdict}: {gib} " in out
    assert sum(p.numel() for p in plan.empty_model(model, "bfloat16", True).parameters()) == weights


def test_the_plan_in_the_readme(tmp_path, capsys):
    readme = (SCRIPTS / "README.md").read_text()
    name, model = "llama3_8b_instruct_pairrm", "meta-llama/Meta-Llama-3-8B-Instruct"
    shown = readme.split(f"    $ python scripts/plan.py scripts/configs/{name}.yaml\n")[1].split("\nIt plans for")[0]
    here = configuration(tmp_path, PUBLISHED[name][0])
    out = planned(capsys, SCRIPTS / "configs" / f"{name}.yaml", "--model_name_or_path", here).replace(str(here), model)
    assert [line.strip() for line in shown.splitlines()] == [line.strip() for line in out.splitlines()]


def test_the_stages_of_a_run():
    stages = lambda **options: plan.stages_of(tgdpo.Options("m", **options))
    reference, train = ("annotate: reference", "m", False), ("train: tgdpo", "m", True)
    judge = [("train: reward model", "m", True), ("annotate: reward model", "m", False)]
    assert stages() == [reference, *judge, train]
    assert stages(reward_model="r") == [reference, ("annotate: reward model", "r", False), train]
    assert stages(loss="dpo", ref_model="s") == [("annotate: reference", "s", False), ("train: dpo", "m", True)]
    assert stages(loss="simpo") == [("train: simpo", "m", True)]


def test_a_reward_model_of_another_size_is_planned_for(tmp_path, capsys):
    """Twice the blocks: about twice the operations and weights of its annotation."""
    flags = ["--model_name_or_path", small(tmp_path / "m"), "--dataset", "d", "--gpus", 1, "--gpu_memory", 1]
    out = planned(capsys, *flags, "--reward_model", small(tmp_path / "r", num_hidden_layers=6))
    reference, judge = [float(re.search(rf"annotate: {x} +(\S+e\S+)", out)[1]) for x in ("reference", "reward model")]
    assert 1.5 < judge / reference < 2
    assert "train: reward model" not in out


def small(tmp_path, **changes):
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
    return configuration(tmp_path, llama(**sizes | dict(num_key_value_heads=2) | changes))


def test_memory_by_hand(tmp_path):
    """Of 4 shards: 4, 4 and 8 bytes a weight; gathered in bfloat16: embedding and head and their gradient, two blocks,
    a block's gradient and its float32 copy."""
    options = tgdpo.Options(str(small(tmp_path)), dtype="bfloat16")
    about, cost = plan.costs(options, 2, 32)
    block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    assert about.block == block and about.blocks == 3 and about.rest == 2 * 96 * 64 + 64
    parts = plan.memory(options, about, cost, 40, 4)
    weights = 3 * block + about.rest
    assert parts["train"]["weights"] == parts["train"]["gradients"] == parts["annotate"]["weights"] == weights
    assert parts["train"]["AdamW"] == 2 * weights and parts["annotate"]["AdamW"] == 0
    assert parts["train"]["gathered"] == 2 * (about.rest + 2 * block) + 2 * (about.rest + block) + 4 * block
    assert parts["train"]["activations"] == cost.activations
    assert parts["annotate"]["log-probs"] == (2 + 4 + 4) * 40 * 96  # bfloat16 logits, in float32, their log-softmax
    # The log-softmax and two gradients; hidden states of the responses and their gradient.
    assert parts["train"]["log-probs"] == 3 * 4 * 40 * 96 + 2 * 2 * 40 * 64
    many = plan.memory(options, about, cost, 10**9, 4)["annotate"]["log-probs"]
    rows = 8 * 2**27 // (4 * 96)  # on a GPU
    assert many == (2 + 4 + 4) * rows * 96
    on_cpu = tgdpo.replace(options, device="cpu")
    assert plan.memory(on_cpu, about, cost, 10**9, 4)["annotate"]["log-probs"] == (2 + 4 + 4) * (2**27 // (4 * 96)) * 96
    assert plan.total(parts["train"]) > plan.total(parts["annotate"])


def test_with_hsdp_weights_are_sharded_inside_a_machine(tmp_path, capsys):
    flags = ["--model_name_or_path", small(tmp_path), "--dataset", "d", "--gpus", 16]
    assert "GPUs: 16 of 80 GiB, weights in 16 shards" in planned(capsys, *flags)
    assert "GPUs: 16 of 80 GiB, weights in 8 shards" in planned(capsys, *flags, "--hsdp")
    assert "weights in 4 shards" in planned(capsys, *flags, "--hsdp", "--gpus_per_machine", 4)


def test_the_end_of_the_backward_pass_may_take_most(tmp_path):
    """A large vocabulary before one small block: 2 bytes of gradient and their float32 copy for each of its weights."""
    options = tgdpo.Options(str(small(tmp_path, vocab_size=50000, num_hidden_layers=1)), dtype="bfloat16")
    about, cost = plan.costs(options, 2, 8)
    train = plan.memory(options, about, cost, 2, 4)["train"]
    assert train["gathered"] == 6 * about.rest and train["activations"] == train["log-probs"] == 0


def test_operations_by_hand(tmp_path):
    """Forwards 2 for each weight of a block's matrices and token, and 4 T T hidden for attention in each block and
    sequence; backwards twice that; with gradient checkpointing forwards again, but for what is not needed again."""
    name = str(small(tmp_path))
    about, cost = plan.costs(tgdpo.Options(name, dtype="bfloat16"), 2, 32)
    forward = 3 * (2 * (about.block - 2 * 64) * 2 * 32 + 2 * 4 * 32 * 32 * 64)
    assert cost.forward == forward
    assert 2.9 * forward < cost.both <= 3 * forward + 3 * 4 * 32 * 32 * 64
    _, again = plan.costs(tgdpo.Options(name, dtype="bfloat16", gradient_checkpointing=True), 2, 32)
    assert again.forward == forward and cost.both + 0.6 * forward < again.both <= cost.both + forward


class Collectives(TorchDispatchMode):
    """Counts the bytes, all ranks' together, that each kind of collective is called with."""

    def __init__(self):
        super().__init__()
        self.bytes = {"allgather": 0, "reduce_scatter": 0, "allreduce": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for kind in self.bytes:
            if function.namespace == "c10d" and kind in function.__name__:
                tensors = [t for t in torch.utils._pytree.tree_leaves(args[:2]) if isinstance(t, torch.Tensor)]
                self.bytes[kind] += max(t.nbytes for t in tensors)
        return function(*args, **kwargs or {})


@pytest.fixture
def eight_ranks(monkeypatch):
    """Rank 0 of eight, two machines of four, the others imagined: collectives do nothing."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    tgdpo.device_mesh.cache_clear()
    yield
    dist.destroy_process_group()
    tgdpo.device_mesh.cache_clear()


@pytest.mark.parametrize(
    "options", [{}, dict(gradient_checkpointing=True), dict(hsdp=True), dict(dtype="float32")], ids=str
)
def test_what_moves_is_what_fsdp_moves(tmp_path, options, eight_ranks):
    """A frozen model's second pass, and a step of two passes: a block is gathered forwards and backwards, checkpointing
    or not, the rest once; gradients are reduced in float32 in each pass, across machines once a step."""
    name = str(small(tmp_path))
    options = tgdpo.Options(name, loss="simpo", device="cpu", **dict(dtype="bfloat16") | options)
    about, _ = plan.costs(options, 2, 8)
    config = transformers.AutoConfig.from_pretrained(name)
    model = tgdpo.prepare_model(transformers.AutoModelForCausalLM.from_config(config), options)
    tgdpo.shard(model, options)
    batch = tgdpo.collate(dict(prompt_ids=[[1, 2]], chosen_ids=[[3, 4, 5]], rejected_ids=[[6]]), "cpu")
    shards, machines = (4, 2) if options.hsdp else (8, 1)
    with torch.no_grad():
        model.token_logps(batch)
        with Collectives() as frozen:
            model.token_logps(batch)
    with Collectives() as trained:
        for n in (1, 2):
            losses, _ = tgdpo.losses_and_totals(model, batch, options)
            if options.hsdp:
                model.set_requires_all_reduce(n == 2)
            losses.sum().backward()
    size = 2 if options.dtype == "bfloat16" else 4
    blocks = 3 * about.block
    assert frozen.bytes == {"allgather": size * blocks, "reduce_scatter": 0, "allreduce": 0}
    # The first pass finds the rest gathered, by the frozen pass.
    assert trained.bytes["allgather"] == size * (4 * blocks + about.rest)
    assert trained.bytes["reduce_scatter"] == 2 * 4 * about.weights
    assert trained.bytes["allreduce"] == options.hsdp * 4 * about.weights / shards
    # Around a ring of n, all but an n-th of what is gathered comes to each GPU; of what is summed everywhere, twice.
    of_frozen, _ = plan.moved(options, about, False, shards, machines)
    in_pass, end = plan.moved(options, about, True, shards, machines)
    others = 1 - 1 / shards
    assert of_frozen == others * frozen.bytes["allgather"]
    assert 2 * in_pass == others * (sum(trained.bytes.values()) - trained.bytes["allreduce"] + size * about.rest)
    assert end == 2 * (1 - 1 / machines) * trained.bytes["allreduce"]


def test_moving_weights_by_hand(tmp_path, capsys):
    """Bytes over the slower of the two connections; one GPU has all weights, and waits for none."""
    name = small(tmp_path)
    flags = ["--model_name_or_path", name, "--dataset", "d", "--pairs", 128, "--peak", 1e-6, "--network", 1e-9]

    def seconds(*argv):
        out = planned(capsys, *flags, "--bandwidth", 4e-9, *argv)  # 4 bytes a second
        return float(re.search(r"train: tgdpo .* steps of \S+ and (\S+) seconds", out)[1])

    about, _ = plan.costs(tgdpo.Options(str(name), dtype="bfloat16"), 2, 8)
    moves = 4 * 3 * about.block + 2 * about.rest + 4 * about.weights  # of a pass
    assert seconds("--gpus", 1) == 0
    assert seconds("--gpus", 4) == pytest.approx(moves * 3 / 4 / 4, abs=0.06)
    assert seconds("--gpus", 4, "--gradient_accumulation_steps", 3) == pytest.approx(3 * moves * 3 / 4 / 4, abs=0.06)
    assert seconds("--gpus", 4, "--per_device_train_batch_size", 8) == pytest.approx(moves * 3 / 4 / 4, abs=0.06)
    # Two machines of two GPUs, with one card each: 2 bytes a second around the ring of 4; 1 with --hsdp, once a step.
    two = ["--gpus", 4, "--gpus_per_machine", 2]
    assert seconds(*two) == pytest.approx(moves * 3 / 4 / 2, abs=0.06)
    once = 2 * 4 * about.weights / 2 / 2
    assert seconds(*two, "--hsdp") == pytest.approx(moves / 2 / 4 + once, abs=0.06)
    passes = ["--gradient_accumulation_steps", 3]
    assert seconds(*two, "--hsdp", *passes) == pytest.approx(3 * moves / 2 / 4 + once, abs=0.06)


def test_what_would_let_it_compute_does(tmp_path, capsys):
    """The longer time counts; the split that is printed, followed: computing then bounds the step, the same step."""
    flags = ["--model_name_or_path", small(tmp_path), "--dataset", "d", "--gpus", 4, "--peak", 0.01]
    flags += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 5]
    tried, step = [], r"a step: (\d+) pairs"
    for bandwidth in (2e-5, 1.2e-4, 3.2e-4, 1):
        out = planned(capsys, *flags, "--bandwidth", bandwidth)
        times = [float(x) for x in re.search(r"train: tgdpo.* steps of (\S+) and (\S+) seconds", out).groups()]
        hours = [[float(x) for x in row] for row in re.findall(r"^\w+: .*\de\+\d+ +(\S+) +(\S+)", out, re.M)]
        whole = float(re.search(r"the whole run: (\S+) hours", out)[1])
        assert len(hours) == 4 and whole == pytest.approx(sum(map(max, hours)), abs=0.021)
        assert ("Computing bounds a step" in out) == (times[0] >= times[1])
        remedy = re.search(r"bound it with (.*) and (.*), the same batch: (\d+) GiB", out)
        if times[0] < times[1]:
            assert ("No other split" in out) == (remedy is None)
        if remedy:
            again = planned(capsys, *flags, "--bandwidth", bandwidth, *" ".join(remedy.groups()[:2]).split())
            assert "Computing bounds a step" in again and re.search(step, again)[0] == re.search(step, out)[0]
            assert f"fits: {remedy[3]} of" in again
        tried.append(remedy and int(remedy[2].split()[1]))
    assert tried == [None, 1, 2, None]  # 3 or 4 passes would be of 10 pairs, too, but not of equally many


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_of_a_real_model(tmp_path, family, recompute):
    """What autograd keeps of a real forward pass on the CPU, to 10 %."""
    sizes = {} if family == "gpt2" else dict(hidden_size=64, intermediate_size=160, head_dim=16)
    path = make_model(tmp_path, family, num_hidden_layers=4, **sizes)
    options = tgdpo.Options(path, dtype="bfloat16", gradient_checkpointing=recompute, device="cpu")
    _, cost = plan.costs(options, 4, 48)
    model = tgdpo.prepare_model(tgdpo.read_model(path), options).bfloat16()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        pack.alive.append(tensor)  # else its address may serve another
        return tensor

    pack.alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=torch.randint(0, 20, (4, 48)), use_cache=False)
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert cost.activations == pytest.approx(sum(kept.values()), rel=0.1)


def test_what_would_make_it_fit_does(tmp_path, capsys):
    """The remedy that is printed, followed: the plan then says that it fits."""
    file = tmp_path / "run.yaml"
    model = small(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=8000)
    file.write_text(f"model_name_or_path: {model}\ndataset: d\nper_device_train_batch_size: 4\nmax_length: 1024\n")
    tried = {}
    for memory in (16, 1.7, 1.3, 1.0, 0.4, 0.02):
        out = planned(capsys, file, "--gpus", 1, "--gpu_memory", memory)
        remedy = re.search(r"would with (\d* ?GPUs)?(.*): \d+ GiB\.", out)
        tried[memory] = remedy and (remedy[1], remedy[2].split(" (")[0].strip(", "))
        if remedy:
            assert "does not fit" in out
            flags = re.findall(r"--(?:gradient_checkpointing true|per_device_train_batch_size 1|max_length \d+)", out)
            gpus = (remedy[1] or re.search(r"(128) GPUs", out)[0] if "GPUs to" in out or "128" in out else "1").split()[
                0
            ]
            again = planned(capsys, file, *" ".join(flags).split(), "--gpus", gpus, "--gpu_memory", memory)
            assert "\nfits: " in again, (memory, flags, gpus)
    assert tried[16] is None and tried[0.02] is None and len({str(t) for t in tried.values()}) >= 4, tried
    assert "None of the options helps" in planned(capsys, file, "--gpus", 1, "--gpu_memory", 0.02)


def test_lengths_are_the_datas_where_it_is_here(tmp_path, capsys):
    """eight_pairs by words: the longest is "one two three ? red green blue <eos>" or "one two three ? sun <eos>"..."""
    model, data = make_model(tmp_path / "m"), write_rows(tmp_path / "d.jsonl", eight_pairs())
    out = planned(capsys, "--model_name_or_path", model, "--dataset", data, "--gpus", 2)
    longer = [
        len(p["prompt"].split()) + max(len(p["chosen"].split()), len(p["rejected"].split())) + 1 for p in eight_pairs()
    ]
    assert f"sequences of up to {max(longer)} tokens" in out
    assert f"8 pairs, {-(-sum(longer) // 8)} tokens in a sequence on average (lengths are the data's)" in out
    out = planned(capsys, "--model_name_or_path", model, "--dataset", "somewhere/else", "--gpus", 2)
    assert "60000 pairs, 64 tokens in a sequence on average (lengths are assumed" in out


def test_the_remedy_is_for_the_stage_that_needs_it(tmp_path, capsys):
    """A reference far larger than the policy: what it takes is the verdict, the host's memory and the remedy."""
    large = small(tmp_path / "r", hidden_size=2048, intermediate_size=8192, num_hidden_layers=8)
    flags = ["--model_name_or_path", small(tmp_path / "m"), "--dataset", "d", "--ref_model", large, "--gpu_memory", 1]
    out = planned(capsys, *flags, "--gpus", 1)
    assert "does not fit: 3 GiB" in out and "host memory of rank 0 while it loads or writes a model: 2 GiB" in out
    gpus = re.search(r"It would with (\d+) GPUs to shard over", out)[1]
    assert "\nfits: " in planned(capsys, *flags, "--gpus", gpus)


def test_the_plan_follows_the_run(tmp_path, capsys):
    """Positions limit the length; token rewards in the data need no reward model; another machine's device is fine."""
    model = make_model(tmp_path / "m")  # 64 positions
    rows = [
        p | {f"{s}_rewards": [0.0] * (len(p[s].split()) + 1) for s in ("chosen", "rejected")} for p in eight_pairs()
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    out = planned(capsys, "--model_name_or_path", model, "--dataset", "elsewhere", "--device", "cuda")
    assert "sequences of up to 64 tokens" in out and "train: reward model" in out
    out = planned(capsys, "--model_name_or_path", model, "--dataset", data)
    assert "reward model" not in out and "annotate: reference" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "no --model_name_or_path"),
        (["--gpus", "0"], "--gpus is 0; expected a number above 0"),
        (["--model_name_or_path", "m", "--dataset", "d", "--gpu", "3"], "unrecognized arguments: --gpu 3"),
        (["--model_name_or_path", "nothing", "--dataset", "d"], "the configuration of model nothing cannot be used"),
        (
            ["--model_name_or_path", "m", "--dataset", "d", "--hsdp"],
            "--hsdp with 8 GPUs on machines of 8; expected several full ones",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    err = planned(capsys, *argv, status=2)
    assert err.startswith("plan.py: error: ") and message in err and err.count("\n") == 1


def test_measured_beside_estimated(tmp_path):
    """measure.py, sharded over one process, on a model of 6 million weights: the estimate is of the measured order."""
    model = small(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, vocab_size=4000)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(dict(model_name_or_path=str(model), dataset="d", device="cpu", dtype="float32")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    command = [*launch, SCRIPTS / "measure.py", file, "--length", "256", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    estimated, measured = map(float, re.search(r"train +estimated +(\S+) GiB.*: (\S+)", done.stdout).groups())
    assert 0.5 < measured / estimated < 4, done.stdout
    tokens, seconds = (
        float(re.search(r"(\d+) tokens a second", done.stdout)[1]),
        re.search(r"(\S+) s a step", done.stdout),
    )
    assert tokens == pytest.approx(512 / float(seconds[1]), rel=0.2)
