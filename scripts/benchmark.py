#!/usr/bin/env python3
"""How fast tgdpo.py and fast.py are and how much memory they take, measured side by side on this machine.

    python scripts/benchmark.py --dataset pairs.json                    annotate and train: pairs and tokens a second,
                                                                        memory, share of the machine's matrix rate
    python scripts/benchmark.py --dataset pairs.json --against trl      whole runs of DPO and TGDPO against TRL's DPO
    python scripts/benchmark.py --grow --script tgdpo.py                time and memory over tokens, vocabulary, layers
                                                                        and pairs, and how they grow
    python scripts/benchmark.py --dataset pairs.json --without          what each of fast.py's tricks brings: the stages
                                                                        without it

The model is a GPT-2 of random weights (--layers, --width, --vocabulary); without --dataset the pairs are random words.
Every measurement is a process of its own; memory is the most that the process has held (Linux's VmHWM), on CUDA what
torch has allocated at most. TRL (`pip install trl==1.16.0`, in an environment of its own if you like: --trl_python)
gets the same tokens of the same pairs, the same model, type, batch and number of steps; of its process only the
training loop counts, of ours everything, from the start of python on.
"""
import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

ROOT = Path(__file__).resolve().parent.parent
GROW = {"tokens": (256, 512, 1024, 2048, 4096), "vocabulary": (16384, 32768, 65536, 131072), "layers": (1, 2, 4, 8),
        "pairs": (4, 8, 16, 32)}
WITHOUT = "two_calls shared_prompts passes one_logits blocks gelu large_pages".split()
SCRIPTS = {"tgdpo.py": ROOT / "tgdpo.py", "fast.py": ROOT / "scripts" / "fast.py"}


# ------------------------------------------------------------------------------------------ in processes of their own
def matrix_rate(device, dtype):
    """Operations a second of this machine's own matrix multiplication, the best of several."""
    import torch
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(6):
        began = time.perf_counter()
        (a @ a)[0, 0].item()   # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def useful(pairs, model):
    """Multiplications and additions that log-probs of the pairs take at least: the prompt once, no padding, the head at
    response tokens only, attention to what is visible. A gradient takes twice that on top."""
    import plan
    about, total = plan.describe("", model), 0
    for prompt, chosen, rejected in zip(*[pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]):
        p, c, r = len(prompt), len(chosen), len(rejected)
        seen = p * (p + 1) / 2 + (c + r) * p + c * (c + 1) / 2 + r * (r + 1) / 2   # pairs of a token and one it sees
        total += 2 * about.blocks * about.block * (p + c + r) + 4 * about.blocks * about.hidden * seen
        total += 2 * about.hidden * about.vocabulary * (c + r)
    return total


def leave_out(trick):
    """Change fast.py so that it does without one of WITHOUT; the numbers stay what they are."""
    import fast
    import tgdpo
    import transformers
    if trick == "two_calls":   # attention of a shared row under one mask
        collate = fast.collate
        fast.OWN["collate"] = lambda *args: {name: x for name, x in collate(*args).items() if name != "parts"}
    elif trick == "shared_prompts":
        fast.refusal = lambda *args, **kwargs: "without shared prompts"
    elif trick == "passes":   # a step's pairs go through the model together
        tgdpo.CPU_TOKENS = 2**60
    elif trick == "one_logits":   # autograd keeps and makes what it needs
        fast.LabelLogps.apply = lambda logits, labels: logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    elif trick == "blocks":
        fast.BLOCK_BYTES = 2**60
    elif trick == "gelu":
        fast.GELUTanh = transformers.activations.NewGELUActivation


def rates(job):
    """Log-probs of all pairs, then optimizer steps, by the script's own functions -> what was measured. The loss is
    SimPO's, which needs no reference; what a pass costs does not depend on the loss."""
    import datasets
    import torch
    import transformers

    import fast
    import measure
    import tgdpo
    transformers.logging.disable_progress_bar()
    if job.get("without") != "large_pages":
        tgdpo.os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")   # as main does
    leave_out(job.get("without"))
    with fast.faster() if job["script"] == "fast.py" else nullcontext():
        options = tgdpo.read_options([*job["argv"], "--loss=simpo"])
        pairs = datasets.load_from_disk(job["pairs"])
        if job["script"] == "fast.py":
            fast.choose(pairs, options)
        model = tgdpo.load_model(options.model_name_or_path, options)
        optimizer, scheduler, steps = tgdpo.make_optimizer(model, len(pairs), options)
        batches = [pairs.select(tgdpo.pairs_of_step(len(pairs), step, options)) for step in range(steps)]

        def learn(batch):
            """One optimizer step."""
            tgdpo.run_pairs(model, batch, options, learn=True)
            tgdpo.clip_gradients(model, options.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        learn(batches[0])   # the first one allocates AdamW's state
        stages = {"annotate": (lambda batch: tgdpo.run_pairs(model, batch, options, learn=False), [pairs], 1),
                  "train": (learn, batches, 3)}
        found = {"matrix": matrix_rate(options.device, options.dtype)}
        for stage, (work, parts, factor) in stages.items():
            measure.forget_peak(options.device)
            began = time.perf_counter()
            for part in parts:
                work(part)
            torch.cuda.synchronize() if options.device == "cuda" else None
            found[stage] = {"seconds": time.perf_counter() - began, "peak": measure.peak(options.device)}
            tokens = sum(int(tgdpo.pair_lengths(part).sum()) for part in parts)
            found[stage] |= {"pairs": sum(map(len, parts)), "tokens": tokens,
                             "operations": factor * sum(useful(part, model) for part in parts)}
    return found | {"matrix": max(found["matrix"], matrix_rate(options.device, options.dtype))}


def trl(job):
    """TRL's DPOTrainer on tokenized pairs -> the seconds of its training loop."""
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """Takes pairs whose tokens are given."""

        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset
    device = dict(use_cpu=True) if job["device"] == "cpu" else {}
    config = DPOConfig(
        output_dir=job["out"], per_device_train_batch_size=job["batch"], max_steps=job["steps"], beta=0.1,
        max_length=job["tokens"], learning_rate=7e-7, lr_scheduler_type="cosine", warmup_steps=0.1, weight_decay=0.0,
        bf16=job["dtype"] == "bfloat16", gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_steps=1, disable_tqdm=True, seed=42, **device)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    pairs = datasets.load_from_disk(job["pairs"]).select_columns(columns)
    trainer = Tokenized(model=model, args=config, train_dataset=pairs,
                        processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]))
    began = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------- the benchmark itself
def process(argv, what):
    """Run a command -> (its last line of output, seconds, the most memory it has held, in bytes)."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([str(arg) for arg in argv], stdout=out, stderr=err)
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            try:   # gone between two looks, or on a system without /proc
                lines = status.read_text().splitlines()
                peak = max([peak] + [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")])
            except OSError:
                pass
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        texts = [stream.seek(0) or stream.read() for stream in (out, err)]
    if child.returncode:
        last = (texts[1] or texts[0]).strip().splitlines()[-1:] or [f"status {child.returncode}"]
        raise RuntimeError(f"{what} failed: {last[0]}")
    return texts[0].strip().splitlines()[-1] if texts[0].strip() else "", seconds, peak


def of_child(kind, job, folder, python=sys.executable):
    """Run rates or trl on a job in a process of its own -> what it returned, and that process's peak of memory."""
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    line, _, peak = process([python, __file__, f"--{kind}", file], kind)
    return json.loads(line) | {"peak": peak}


def random_rows(n):
    """Pairs of random words, in lengths that vary as in chats."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(3000)]
    text = lambda middle: " ".join(rng.choices(words, k=min(2000, 1 + int(rng.lognormvariate(math.log(middle), 0.7)))))
    return [{"prompt": text(60), "chosen": text(120), "rejected": text(120)} for _ in range(n)]


def make_model(folder, sizes, tokenizer, seed):
    """Write a GPT-2 of random weights."""
    import torch
    import transformers
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=max(sizes["vocabulary"], len(tokenizer or [])), n_positions=sizes["tokens"], n_embd=sizes["width"],
        n_layer=sizes["layers"], n_head=max(1, sizes["width"] // 64), bos_token_id=None, eos_token_id=2, pad_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return str(folder)


def prepare(own, folder):
    """Write rows, a tokenizer made from them and two models -> (data file, model, reward model, tokenized pairs)."""
    import tgdpo
    from start_model import train_tokenizer
    rows = tgdpo.load_rows(own.dataset, "train") if own.dataset else random_rows(own.pairs or 256)
    rows = [row for row, _ in zip(rows, range(own.pairs or len(rows)))]
    data = folder / "pairs.json"
    data.write_text(json.dumps(rows))
    tokenizer = train_tokenizer([json.dumps(row, ensure_ascii=False) for row in rows], own.vocabulary, own.tokens)
    models = [make_model(folder / name, vars(own), tokenizer, seed) for seed, name in enumerate(("model", "judge"))]
    pairs, _ = tgdpo.tokenize(rows, tokenizer, own.tokens, str(own.dataset or "random words"))
    pairs.save_to_disk(str(folder / "tokens"))
    return str(data), *models, pairs


def spread(ratios):
    """The median, and in parentheses all."""
    return f"{median(ratios):.2f} ({' '.join(f'{ratio:.2f}' for ratio in ratios)})"


def against_trl(own, folder):
    """Alternate TRL's DPO, our DPO and our TGDPO -> print medians and ratios."""
    data, model, judge, pairs = prepare(own, folder)
    steps, seen = own.steps or math.ceil(len(pairs) / own.batch), own.steps * own.batch or len(pairs)
    job = dict(model=model, pairs=str(folder / "tokens"), batch=own.batch, steps=steps, tokens=own.tokens,
               device=own.device, dtype=own.dtype, out=str(folder / "trl"))
    common = ["--model_name_or_path", model, "--dataset", data, "--max_length", own.tokens, "--max_steps", steps,
              "--per_device_train_batch_size", own.batch, "--device", own.device, "--dtype", own.dtype]
    found = {"TRL, DPO": []} | {f"{script}, {loss}": [] for script in own.scripts for loss in ("DPO", "TGDPO")}
    for k in range(own.rounds):
        measured = of_child("trl", job, folder, own.trl_python)
        found["TRL, DPO"].append((measured["seconds"], measured["peak"]))
        for script in own.scripts:
            for loss, more in (("dpo", []), ("tgdpo", ["--reward_model", judge])):
                place = folder / f"{script}-{loss}-{k}"
                more += ["--loss", loss, "--output_dir", place, "--cache_dir", f"{place}-cache"]
                _, seconds, peak = process([sys.executable, SCRIPTS[script], *common, *more], script)
                found[f"{script}, {loss.upper()}"].append((seconds, peak))
    print(f"{steps} steps of {own.batch} pairs; median of {own.rounds}; in parentheses the ratios, run by run")
    print(f"{'':17}{'seconds':>9}{'pairs a second':>16}{'times TRL':>24}{'peak GiB':>10}{'of TRL':>8}")
    for name, runs in found.items():
        seconds, peak = [median(values) for values in zip(*runs)]
        ratios = [first[0] / run[0] for first, run in zip(found["TRL, DPO"], runs)]
        share = median(run[1] / first[1] for first, run in zip(found["TRL, DPO"], runs))
        print(f"{name:17}{seconds:9.1f}{seen / seconds:16.2f}{spread(ratios):>24}{peak / 2**30:10.2f}{share:8.2f}")


def print_rates(script, found, peak):
    """A line for each stage."""
    print(f"{script}: this machine multiplies matrices at {found['matrix'] / 1e9:.0f} x 10^9 operations a second")
    print(f"{'':10}{'pairs a second':>15}{'tokens a second':>17}{'share of it':>15}{'peak GiB':>10}")
    for stage in ("annotate", "train"):
        row = found[stage]
        share = row["operations"] / row["seconds"] / found["matrix"]
        print(f"{stage:10}{row['pairs'] / row['seconds']:15.2f}{row['tokens'] / row['seconds']:17.0f}{share:15.2f}"
              f"{row['peak'] / 2**30:10.2f}")
    print(f"the whole process: {peak / 2**30:.2f} GiB")


def without(own, folder):
    """The whole and each trick's absence, in turns -> print how much longer both stages take, and the memory."""
    _, model, _, pairs = prepare(own, folder)
    job = dict(argv=rates_argv(own, model), pairs=str(folder / "tokens"), script="fast.py")
    found = {name: [] for name in ("", *own.tricks)}
    for _ in range(own.rounds):
        for name, runs in found.items():
            runs.append(of_child("rates", job | {"without": name}, folder))
    print(f"{len(pairs)} pairs; how many times as long it takes, and how many MiB more: medians of {own.rounds}\n"
          f"{'without':16}{'annotate':>26}{'train':>26}{'peak':>8}")
    for name in own.tricks:
        line = f"{name:16}"
        for stage in ("annotate", "train"):
            ratios = [run[stage]["seconds"] / whole[stage]["seconds"] for run, whole in zip(found[name], found[""])]
            line += f"{spread(ratios):>26}"
        more = median(run["peak"] - whole["peak"] for run, whole in zip(found[name], found[""])) / 2**20
        print(line + f"{more:+8.0f}")


def rates_argv(own, model):
    """The options of tgdpo.py that fit the benchmark's."""
    argv = ["--model_name_or_path", model, "--dataset", "-", "--max_length", str(own.tokens), "--dtype", own.dtype,
            "--per_device_train_batch_size", str(own.batch), "--device", own.device]
    return argv + ["--max_steps", str(own.steps)] * (own.steps > 0)


def slope(xs, ys):
    """The exponent p of y ~ x^p, by least squares on logarithms."""
    xs, ys = [math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]
    mean = sum(xs) / len(xs)
    return sum((x - mean) * y for x, y in zip(xs, ys)) / sum((x - mean) ** 2 for x in xs)


def of_sizes(script, sizes, own, place):
    """rates of a script for random pairs and a model of these sizes."""
    import measure
    model = make_model(place / "model", sizes, None, 0)
    measure.random_pairs(sizes["pairs"], sizes["tokens"], sizes["vocabulary"]).save_to_disk(place / "tokens")
    argv = ["--model_name_or_path", model, "--dataset", "-", "--device", own.device, "--dtype", own.dtype,
            "--max_length", str(sizes["tokens"]), "--per_device_train_batch_size", str(sizes["pairs"]),
            "--max_steps", "3"]
    return of_child("rates", dict(argv=argv, pairs=str(place / "tokens"), script=script), place)


def grow(own, folder):
    """One quantity after the other grows, the others stay; what time and memory do -> print them and the fits."""
    base = dict(tokens=512, vocabulary=16384, layers=2, pairs=8, width=64)
    print("base: " + ", ".join(f"{value} {name}" for name, value in base.items()) + "; half of the tokens are prompt; "
          "all pairs are in one step; MiB is what the process holds at most, and + by how much that grows")
    for script, name in itertools.product(own.scripts, own.axes):
        rows = []
        for value in GROW[name]:
            found = of_sizes(script, base | {name: value}, own, folder / f"{script}-{name}-{value}")
            rows.append([found[stage][key] for stage in ("annotate", "train") for key in ("seconds", "peak")])
        columns = [list(column) for column in zip(*rows)]
        columns[2] = [seconds / 3 for seconds in columns[2]]
        print(f"\n{script}\n{name:>12}{'annotate s':>12}{'MiB':>8}{'train s a step':>16}{'MiB':>8}")
        for value, (a, b, c, d) in zip(GROW[name], zip(*columns)):
            print(f"{value:12}{a:12.3f}{b / 2**20:8.0f}{c:16.3f}{d / 2**20:8.0f}")
        time_slopes = [slope(GROW[name], columns[k]) for k in (0, 2)]
        more = [(max(columns[k]) - min(columns[k])) / 2**20 for k in (1, 3)]
        print(f"{'grows as':>12}{f'{name[0]}^{time_slopes[0]:.2f}':>12}{f'+{more[0]:.0f}':>8}"
              f"{f'{name[0]}^{time_slopes[1]:.2f}':>16}{f'+{more[1]:.0f}':>8}")


def read_argv(argv):
    """Command line -> the benchmark's options."""
    from common import strict   # not at the top: TRL's process has another environment
    parser = strict(argparse.ArgumentParser(
        prog="benchmark.py", allow_abbrev=False, description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    parser.add_argument("--dataset", help="preference pairs, as for tgdpo.py; none: random words")
    parser.add_argument("--against", choices=["trl"], help="compare whole runs with TRL's DPOTrainer")
    parser.add_argument("--grow", nargs="*", choices=[*GROW], help="which quantities shall grow; none named: all")
    parser.add_argument("--without", nargs="*", choices=WITHOUT, help="which tricks to leave out; none named: each")
    parser.add_argument("--script", choices=[*SCRIPTS, "both"], default="both", help="what is measured")
    parser.add_argument("--trl_python", default=sys.executable, help="a python that has TRL")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, alternating")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type")
    for name, value, text in (("layers", 4, "of the model"), ("width", 256, "of the model"),
                              ("vocabulary", 16384, "of the model"), ("tokens", 512, "most of prompt and response"),
                              ("batch", 4, "pairs a step"), ("pairs", 0, "0: all; 256 random ones"),
                              ("steps", 0, "optimizer steps; 0: one epoch")):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    own = parser.parse_args(argv)
    own.scripts = [*SCRIPTS] if own.script == "both" else [own.script]
    own.axes = None if own.grow is None else own.grow or [*GROW]
    own.tricks = None if own.without is None else own.without or WITHOUT
    return own


def check(own):
    """Raise InputError for what cannot be measured."""
    import tgdpo
    for name in ("layers", "width", "vocabulary", "tokens", "batch", "pairs", "steps", "rounds"):
        least = {"pairs": 0, "steps": 0, "vocabulary": 300, "tokens": 64}.get(name, 1)   # 300: all bytes, and some
        if getattr(own, name) < least:
            raise tgdpo.InputError(f"--{name} is {getattr(own, name)}; expected at least {least}")
    if own.width % max(1, own.width // 64):
        raise tgdpo.InputError(f"--width is {own.width}; expected a multiple of its number of heads, a 64th of it")
    if sum(map(bool, (own.against, own.axes, own.tricks))) > 1:
        raise tgdpo.InputError("--against, --grow and --without: expected one of them")
    if own.against:
        test = [own.trl_python, "-c", "import trl; print(trl.__version__)"]
        try:
            print(f"TRL {process(test, 'TRL')[0]}")
        except (OSError, RuntimeError) as e:
            raise tgdpo.InputError(f"--against trl: {own.trl_python} cannot import TRL ({e}); expected a python where "
                                   "it is installed (pip install trl==1.16.0), given with --trl_python") from e


def main(argv):
    """Measure and print -> exit status."""
    if argv[:1] in (["--rates"], ["--trl"]):   # a process of its own
        print(json.dumps({"--rates": rates, "--trl": trl}[argv[0]](json.loads(Path(argv[1]).read_text()))))
        return 0
    import tgdpo
    tgdpo.quiet()
    try:
        own = read_argv(argv)
        check(own)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if own.against:
                against_trl(own, folder)
            elif own.axes:
                grow(own, folder)
            elif own.tricks:
                without(own, folder)
            else:
                _, model, _, pairs = prepare(own, folder)
                for script in own.scripts:
                    job = dict(argv=rates_argv(own, model), pairs=str(folder / "tokens"), script=script)
                    found = of_child("rates", job, folder)
                    print_rates(script, found, found["peak"])
    except (tgdpo.InputError, RuntimeError) as e:
        print(f"benchmark.py: error: {e}", file=sys.stderr)
        return 2 if isinstance(e, tgdpo.InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
