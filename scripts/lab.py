#!/usr/bin/env python3
"""The lab: methods x sources of token rewards x alpha x beta x steps x seeds, judged where the truth is known.

    python scripts/lab.py --quick                 does TGDPO beat DPO? 4 settings, 2 seeds: 5 minutes on 2 cores
    python scripts/lab.py                         the full study of scripts/lab/README.md
    python scripts/lab.py --report FOLDER         only the summary, the answers and the figures, from its results.jsonl

On the tiny language (scripts/tiny_language.py) the true reward of each token is known. For each seed a world is made:
a language model, 4000 labelled pairs, models that give token rewards. Each point trains one policy in it and judges
that. Points run in parallel processes. Each finished one is a row of results.jsonl (two of an on-policy method), and
the same command goes on where it stopped. summary.csv has every point's mean and, from 3 seeds on, 95 % interval.
"""
import argparse
import csv
import io
import json
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import replace
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import numpy
import pyarrow.parquet
import torch
from tqdm import tqdm

import rto
import tgdpo
import tiny_language
import token_rewards
import treg
from common import command, strict
from tgdpo import InputError

T_97_5 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}   # by seeds
UNCOMPARED = ("dpo scaled", "noise25 scaled", "noise50 scaled", "early scaled", "simpo scaled")   # at equal KL
KLS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)   # where frontiers are compared
SETTINGS = ("method", "source", "beta", "alpha", "floor", "rate", "steps")   # of a point; the seed comes beside
ON_POLICY = ("rto", "rto end", "ppo")
EPOCHS_2 = 250   # optimizer steps: two passes over the pairs, as in the tiny mode
FULL = dict(quick=False, seeds=5, rto_marks=(10, 30), prompts=500)
QUICK = dict(quick=True, seeds=2, prompts=500)


# ---------------------------------------------------------------------------------------------------------- the study
def point(method, source="", beta=0.5, alpha=0.0, floor=None, rate=3e-4, steps=EPOCHS_2):
    """One setting. Of rto, beta is beta1; on-policy methods have their own rate and steps."""
    return dict(zip(SETTINGS, (method, source, beta, alpha, floor, rate, steps)))


def grid(method, sources=("",), betas=(0.5,), alphas=(0.0,), lengths=(EPOCHS_2,), **more):
    """The points of all combinations."""
    return [point(method, *one, steps=steps, **more) for *one, steps in product(sources, betas, alphas, lengths)]


def study(quick):
    """All settings, in the order in which they are run."""
    if quick:   # at the official example's alpha
        return grid("dpo") + grid("tgdpo", ("truth", "dpo", "dpo centred"), alphas=(0.5,))
    points = grid("dpo", betas=(0.25, 0.5, 1.0, 2.0)) + grid("dpo", lengths=(60, 125, 500)) + grid("dpo", rate=1e-4)
    points += grid("simpo", betas=(2.0,), lengths=(60, 125, 250, 500)) + grid("simpo", betas=(2.0,), rate=1e-4)
    points += grid("simpo", betas=(2.0, 10.0), rate=3e-5)
    # the paper's guidance: alpha, beta, the number of steps (each a run with a schedule of its own), the learning rate
    points += grid("tgdpo", ("dpo",), alphas=(0.02,)) + grid("tgdpo", ("dpo",), (1.0, 2.0), (0.05,))
    points += grid("tgdpo", ("truth",), (0.5, 1.0, 2.0), (0.5,))
    for source, small, large in (("dpo", 0.05, (0.2, 0.5)), ("truth", 0.25, (1.0,))):
        points += grid("tgdpo", (source,), alphas=(small,), lengths=(60, 125, 250, 500))
        points += grid("tgdpo", (source,), alphas=large, lengths=(60, 125, 250))
    points += grid("tgdpo", ("dpo",), alphas=(0.05,), rate=1e-4) + grid("tgdpo", ("truth",), alphas=(0.5,), rate=1e-4)
    # steadier guidance
    points += grid("tgdpo", ("dpo centred",), alphas=(0.05, 0.2, 0.5))
    points += grid("tgdpo", ("dpo large",), alphas=(0.05, 0.2)) + grid("tgdpo", ("dpo",), alphas=(0.5,), floor=0.1)
    # sources, all scaled to a root mean square of 1; of some of them other betas, for frontiers as wide as DPO's
    sources = ("truth", "noise25", "noise50", "dpo", "early", "simpo", "contrastive", "classifier")
    points += grid("tgdpo", [f"{source} scaled" for source in sources], alphas=(0.05, 0.2))
    points += grid("tgdpo", ("dpo centred", "contrastive scaled", "classifier scaled"), (1.0, 2.0), (0.2,))
    # the other two uses
    points += grid("treg", ("contrastive",), (0.5, 1.0, 2.0), (0.5,)) + grid("treg", ("contrastive",), alphas=(0.25,))
    points += grid("treg", ("dpo",), alphas=(0.2,)) + grid("treg", ("truth",), alphas=(0.5,))
    points += grid("rto", ("dpo",), (0.25, 0.5), lengths=(0,)) + grid("rto end", ("dpo",), lengths=(0,))
    return points + grid("ppo", betas=(0.0,), lengths=(0,))


METHODS = {"dpo": "DPO", "simpo": "SimPO", "tgdpo": "TGDPO", "treg": "T-REG", "rto": "RTO",
           "rto end": "RTO, all at the end", "ppo": "PPO"}
SOURCES = {"truth": "true rewards", "noise25": "right signs 75 %", "noise50": "right signs 50 %", "dpo": "DPO model",
           "dpo centred": "DPO model, centred", "dpo large": "DPO model, largest fifth", "simpo": "SimPO model",
           "early": "DPO model, 1/8 trained", "contrastive": "contrastive prompts", "classifier": "token classifier"}
SOURCES |= {f"{source} scaled": words for source, words in SOURCES.items()}


def family(row):
    """A method and its source in plain words."""
    return METHODS[row["method"]] + (f", {SOURCES[row['source']]}" if row["method"] in ("tgdpo", "treg") else "")


def name_of(row):
    """A setting in plain words."""
    letters = {"beta": "β1" if row["method"].startswith("rto") else "β", "alpha": "α", "floor": "f ≥"}
    numbers = [f"{letter} {row[name]:g}" for name, letter in letters.items() if row[name]]
    scaled = ["scaled"] if row["source"].endswith(" scaled") else []
    return ", ".join([family(row), *scaled, *numbers])


# ---------------------------------------------------------------------------------------------------------- the world
def world_options(folder, seed):
    """tgdpo.py's options of the tiny mode, for a world."""
    return tgdpo.Options(**tiny_language.TINY | dict(
        model_name_or_path=str(folder / "start_model"), dataset=str(folder / "pairs.jsonl"), eval_size=0.0, seed=seed,
        device="cpu", dtype="float32", cache_dir=str(folder / "cache"), output_dir=str(folder)))


def make_world(folder, seed, quick):
    """Everything that the points of a seed share, as far as the study needs it; a finished world is kept."""
    if (folder / "sources").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    options, tokenizer = world_options(folder, seed), tiny_language.tiny_tokenizer(256)
    start, wanted = options.model_name_or_path, {p["source"].removesuffix(" scaled") for p in study(quick)}
    treg.prefixed_language_model(tokenizer, options, Path(start))
    tiny_language.tiny_pairs(start, tokenizer, options, folder / "pairs.jsonl")
    rows = tgdpo.load_rows(options.dataset, None)
    pairs, counts = tgdpo.tokenize(rows, tokenizer, options.max_length, options.dataset)
    found = {}
    for name, changes in (("dpo", {"loss": "dpo"}), ("early", {"loss": "dpo", "num_train_epochs": 0.25}),
                          ("simpo", {"loss": "simpo", "beta": 2.0})):
        if name in wanted | {"dpo"}:   # to which all are compared
            stage = replace(options, output_dir=str(folder / name), **changes)
            tgdpo.reward_then_train(stage, tokenizer, pairs, counts)
            found[name] = token_rewards.log_ratio(str(folder / name), start, pairs, options)
    if "classifier" in wanted:
        rto.train_reward_model("token", start, pairs, options, folder / "token")
        found["classifier"] = token_rewards.classifier(str(folder / "token"), pairs, options)
    if "ppo" in {p["method"] for p in study(quick)}:
        rto.train_reward_model("sequence", start, pairs, options, folder / "sequence")
    if "contrastive" in wanted:
        prompts = "good {prompt}", "bad {prompt}"
        found["contrastive"] = treg.contrastive_rewards(start, rows, pairs, tokenizer, options, *prompts)
    found["truth"] = [tiny_language.tiny_truth(tokenizer, pairs["prompt_ids"], pairs[side]) for side in tgdpo.IDS]
    if "dpo centred" in wanted:
        means = token_rewards.reference_means(str(folder / "dpo"), start, pairs, options)
        found["dpo centred"] = token_rewards.centre(found["dpo"], means)
    found["dpo large"] = token_rewards.keep(found["dpo"], 0.2)
    for share in (25, 50):
        rng = random.Random(share)
        found[f"noise{share}"] = [[[-value if rng.random() < share / 100 else value for value in row] for row in side]
                                  for side in found["truth"]]
    (folder / "sources.saving").mkdir()
    for name, columns in found.items():
        tgdpo.write_annotation(folder / "sources.saving" / f"{name}.parquet", columns)
    (folder / "sources.saving").rename(folder / "sources")


@lru_cache
def load_world(folder, seed, prompts):
    """A world's options, tokenizer, pairs, reference and the prompts to judge on, with the reference's responses."""
    options = world_options(folder, seed)
    tokenizer, pairs, _ = tgdpo.read_data(options)
    pairs = tgdpo.annotate(pairs, "ref_logps", options.model_name_or_path, options)
    nouns = random.Random(f"judge {seed}").choices(tiny_language.NOUNS, k=prompts)
    w = SimpleNamespace(folder=folder, options=options, tokenizer=tokenizer, pairs=pairs,
                        prompts=tokenizer([f"describe the {noun} :" for noun in nouns]).input_ids,
                        reference=tgdpo.load_model(options.model_name_or_path, options), baselines={})
    for name, path in (("reference", options.model_name_or_path), ("dpo", str(folder / "dpo"))):
        drawn = tiny_language.sample(path, w.prompts, options, tokenizer, None)
        w.baselines[name] = [sum(row) for row in tiny_language.tiny_truth(tokenizer, w.prompts, drawn)]
    return w


def source_columns(w, name):
    """A source's token rewards for the pairs of a world; "... scaled" has a root mean square of 1."""
    base = name.removesuffix(" scaled")
    table = pyarrow.parquet.read_table(w.folder / "sources" / f"{base}.parquet")
    columns = [table[side].to_pylist() for side in tgdpo.SIDES]
    return token_rewards.scale(columns) if name != base else columns


# ----------------------------------------------------------------------------------------------------------- a policy
@torch.no_grad()
def judge(w, policy, step):
    """What a policy in memory is worth on the world's prompts -> {quantity: mean over prompts or tokens}."""
    torch.manual_seed(1000 * w.options.seed + step)
    drawn = tiny_language.generate(policy, w.prompts, w.tokenizer)
    batch = tgdpo.collate({"prompt_ids": w.prompts, "chosen_ids": drawn}, "cpu")
    logps, ref_logps = [model.token_logps(batch).sum(-1).tolist() for model in (policy, w.reference)]
    truth = tiny_language.tiny_truth(w.tokenizer, w.prompts, drawn)
    legal = tiny_language.tiny_truth(w.tokenizer, w.prompts, drawn, tiny_language.tiny_legal)
    totals, tokens = [sum(row) for row in truth], sum(map(len, drawn))
    row = {"reward": fmean(totals), "gain": fmean(totals) - fmean(w.baselines["reference"]),
           "KL": fmean(a - b for a, b in zip(logps, ref_logps)), "entropy": -fmean(logps),
           "length": tokens / len(drawn), "off support": sum(not ok for line in legal for ok in line) / tokens,
           "distinct": len({tuple(ids) for ids in drawn}) / len(drawn)}
    return row | {f"wins over {name}": fmean((a > b) + 0.5 * (a == b) for a, b in zip(totals, theirs))
                  for name, theirs in w.baselines.items()}


def train_on_pairs(w, setting):
    """A point of dpo, simpo, tgdpo or treg, by tgdpo.py's own steps -> a row."""
    options = replace(w.options, loss=setting["method"], beta=setting["beta"], alpha=setting["alpha"],
                      guidance_floor=setting["floor"], learning_rate=setting["rate"], max_steps=setting["steps"])
    pairs, facts, began = w.pairs, {}, time.perf_counter()
    if setting["source"]:
        columns = source_columns(w, setting["source"])
        pairs = tgdpo.add_columns(pairs, "rewards", columns)
        if options.loss == "tgdpo":
            f = torch.cat([tgdpo.guidance(torch.tensor([value for row in side for value in row]), options.alpha, sign,
                                          options.guidance_floor) for side, sign in zip(columns, (+1, -1))])
            facts = {"f min": f.min().item(), "f max": f.max().item(), "f <= 0": (f <= 0).float().mean().item()}
    model = tgdpo.load_model(options.model_name_or_path, options)
    optimizer, scheduler, steps = tgdpo.make_optimizer(model, len(pairs), options)
    losses = []
    for step in range(steps):
        batch = pairs.select(tgdpo.pairs_of_step(len(pairs), step, options))
        totals = tgdpo.run_pairs(model, batch, options, learn=True)
        tgdpo.clip_gradients(model, options.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(totals["loss"] / totals["pairs"])
    return {"loss": fmean(losses[-20:]), "seconds": time.perf_counter() - began} | judge(w, model, steps) | facts


def train_on_policy(w, setting, marks):
    """A point of rto, rto end or ppo, judged at marks -> rows."""
    options = replace(rto.Options(**rto.TINY), beta1=0.0 if setting["method"] == "ppo" else setting["beta"],
                      beta3=float(setting["method"] == "ppo"), steps=marks[-1], seed=w.options.seed,
                      placement="end" if setting["method"] == "rto end" else "tokens", device="cpu", dtype="float32")
    start, rows, began = w.options.model_name_or_path, [], time.perf_counter()
    policy, dpo = [tgdpo.load_model(path, w.options) for path in (start, str(w.folder / "dpo"))]
    end_reward = None
    if options.beta3:
        scorer = rto.read_scorer("sequence", str(w.folder / "sequence"), options)
        end_reward = rto.make_end_reward("sequence", scorer, options)

    def look(step, _):
        rows.append({"steps": step, "seconds": time.perf_counter() - began} | judge(w, policy, step))
    rto.train(policy, rto.make_critic(start, options), w.reference, dpo, end_reward,
              w.pairs["prompt_ids"], w.tokenizer, options, look, marks)
    return rows


def work(folder, job, size):
    """One job in a process of its own: a world, or a point in one -> rows of results.jsonl."""
    tgdpo.quiet()
    torch.set_num_threads(1)   # the models are small: two processes do more than two threads
    seed, world = job["seed"], Path(folder) / "worlds" / str(job["seed"])
    with redirect_stdout(io.StringIO()):
        if "method" not in job:
            make_world(world, seed, size["quick"])
            return []
        w = load_world(world, seed, size["prompts"])
        if job["method"] == "source":
            rows = [source_credit(w, job["source"])]
        elif job["method"] in ON_POLICY:
            rows = train_on_policy(w, job, size["rto_marks"])
        else:
            rows = [train_on_pairs(w, job)]
    return [job | row for row in rows]


def source_credit(w, name):
    """How well a source knows the true rewards of the pairs' tokens."""
    values, worth = [torch.tensor([value for side in source_columns(w, source) for row in side for value in row])
                     for source in (name, "truth")]
    correlation, auc = tiny_language.credit(values, worth)
    return {"correlation": correlation, "AUC": auc, "rms": values.square().mean().sqrt().item(),
            "share on what matters": (values.abs() * (worth != 0)).sum().item() / values.abs().sum().item(),
            "mean": values.mean().item()}


# ------------------------------------------------------------------------------------------------------ the whole study
def jobs_of(quick, seeds):
    """All jobs but the worlds: the credit of each source, then the points."""
    sources = dict.fromkeys(p["source"].removesuffix(" scaled") for p in study(quick) if p["source"])
    points = [point("source", source, steps=0) for source in sources] + study(quick)
    return [{"seed": seed} | p for p in points for seed in range(seeds)]


def key_of(row):
    """What makes two rows the same point; one of an on-policy method is judged after several numbers of steps."""
    return (row["seed"], *(row[name] for name in SETTINGS[:-1]), 0 if row["method"] in ON_POLICY else row["steps"])


def read_results(file):
    """The finished points' rows; half a line, which a kill leaves, is cut off."""
    text = file.read_text() if file.exists() else ""
    if text and not text.endswith("\n"):
        text = text[:text.rfind("\n") + 1]
        tgdpo.write(file, text)
    return [json.loads(line) for line in text.splitlines()]


def open_study(folder, size):
    """Begin a study in a new folder, or go on with the same one."""
    with tgdpo.reading(f"--output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    this, file = json.dumps(size | {"rto": rto.TINY}), folder / "study.json"
    if file.exists() and file.read_text() != this:
        raise InputError(f"{folder} holds another study, {file.read_text()}; expected {this}, or a new --output")
    if not file.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no study; expected a new --output")
    tgdpo.write(file, this)


def run_study(folder, quick, processes):
    """Do what is not done yet. A point's rows are written at once: a kill costs only the points that were running."""
    size = QUICK if quick else FULL
    open_study(folder, size)
    file = folder / "results.jsonl"
    done = {key_of(row) for row in read_results(file)}
    left = [job for job in jobs_of(quick, size["seeds"]) if key_of(job) not in done]
    worlds = [{"seed": seed} for seed in sorted({job["seed"] for job in left})]
    bar = tqdm(total=len(worlds) + len(left), desc="lab", disable=None)
    os.environ["TQDM_DISABLE"] = "1"   # for the processes to come; this one's bar is there already
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))   # processes run one job after the other
    try:
        with bar, open(file, "a") as log:
            running = {pool.submit(work, str(folder), job, size): job for job in worlds}
            while running:
                for finished in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(finished)
                    log.write("".join(json.dumps(row) + "\n" for row in finished.result()))
                    log.flush()
                    bar.update()
                    if job in worlds:   # its points can begin
                        running |= {pool.submit(work, str(folder), one, size): one for one in left
                                    if one["seed"] == job["seed"]}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)   # after Ctrl-C nobody waits for what was to come


# -------------------------------------------------------------------------------------------------------- statistics
def interval(values):
    """Mean and half of its 95 % interval (Student's t, over seeds); nan for fewer than three."""
    values = list(values)
    half = T_97_5.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values)) if len(values) > 2 else math.nan
    return fmean(values), half


def group(rows, *names):
    """Rows by the values of some of their fields, in the order of their first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def pick(rows, **values):
    """The rows with these values; a tuple allows several."""
    return [row for row in rows if all(row[name] in (value if isinstance(value, tuple) else (value,))
                                       for name, value in values.items())]


def difference(mine, theirs, quantity):
    """A quantity of one setting less another's, seed by seed -> (mean, half of the interval), or None below three."""
    sides = [{row["seed"]: row[quantity] for row in rows} for rows in (mine, theirs)]
    seeds = sides[0].keys() & sides[1].keys()
    return interval(sides[0][seed] - sides[1][seed] for seed in sorted(seeds)) if len(seeds) > 2 else None


def frontier(rows, kl):
    """The most that a seed's rows gain at a KL of at most kl, with straight lines between those that gain more than all
    of smaller KL; nan below the smallest KL that was tried."""
    points = sorted((row["KL"], row["gain"]) for row in rows)
    best = [at for k, at in enumerate(points) if all(at[1] > gain for _, gain in points[:k])]
    return float(numpy.interp(kl, *zip(*best), left=math.nan))


def compare(mine, theirs, kl):
    """Difference of two frontiers at a KL, seed by seed -> (mean, half of the interval), or None if one lacks it."""
    sides = [{seed: frontier(rows, kl) for (seed,), rows in group(some, "seed").items()} for some in (mine, theirs)]
    found = [sides[0][seed] - sides[1].get(seed, math.nan) for seed in sorted(sides[0])]
    return interval(found) if len(found) > 2 and not any(map(math.isnan, found)) else None


def say(found):
    """A difference and its interval in words."""
    low, high = found[0] - found[1], found[0] + found[1]
    return f"{found[0]:+.2f} ± {found[1]:.2f} ({'more' if low > 0 else 'less' if high < 0 else 'not shown to differ'})"


# --------------------------------------------------------------------------------------------------------- the answers
def families(rows):
    """{name: rows}: methods, each with all settings that were tried, whose frontiers are compared."""
    kept = [row for row in rows if row["method"] != "source" and row["source"] not in UNCOMPARED]
    groups = group([row | {"family": family(row)} for row in kept], "family")
    return {name: groups[name,] for (name,) in sorted(groups, key=lambda key: (key != ("DPO",), key))}


def both(mine, theirs):
    """The differences in reward and in KL, in words."""
    if not theirs:
        return "not measured"
    reward, kl = [difference(mine, theirs, name) for name in ("gain", "KL")]
    return f"reward {say(reward)}, KL {kl[0]:+.2f} ± {kl[1]:.2f}"


def short_answer(rows):
    """For fewer than three seeds: TGDPO against DPO of the same beta and length, each seed's values, no intervals."""
    rows = sorted(pick(rows, method=("dpo", "tgdpo")), key=lambda row: (row["method"], -row["beta"], row["seed"]))
    text = ["Does TGDPO beat DPO? By the source of its token rewards; its true reward less DPO's, for each seed:"]
    for (_, source, beta, alpha, _, rate, steps), some in group(pick(rows, method="tgdpo"), *SETTINGS).items():
        dpo = pick(rows, method="dpo", beta=beta, rate=rate, steps=steps)
        less = [mine["gain"] - theirs["gain"] for mine, theirs in zip(some, dpo)]
        won, values = sum(value > 0 for value in less), " and ".join(f"{value:+.2f}" for value in less)
        verdict = {0: "no", len(less): "yes"}.get(won, f"in {won} of {len(less)} worlds")
        text.append(f"   {SOURCES[source]}, α {alpha:g}: {verdict} ({values})")
    text.append("True reward above the language model's, and KL to it, for each seed:")
    for _, some in group(rows, *SETTINGS).items():
        values = " and ".join(f"{row['gain']:.2f} (KL {row['KL']:.1f})" for row in some)
        text.append(f"   {name_of(some[0])}: {values}")
    return text + ["Two seeds show a direction at most. `python scripts/lab.py` takes five, with intervals."]


def answers(rows):
    """The questions of scripts/lab/README.md -> lines of text. Differences are paired by seed; ±: 95 % interval."""
    usual = pick(rows, rate=3e-4, floor=None)
    dpo, tgdpo_ = pick(usual, method="dpo", beta=0.5), pick(usual, method="tgdpo", beta=0.5)
    text = ["1. Does a larger alpha converge faster, to the same place? TGDPO less DPO, both at beta 0.5:"]
    for (source, alpha, steps), some in sorted(
            group(pick(tgdpo_, source=("dpo", "truth")), "source", "alpha", "steps").items()):
        text.append(f"   {SOURCES[source]}, alpha {alpha:g}, {steps} steps: {both(some, pick(dpo, steps=steps))}")
    text.append("2. Trained on, does it keep what DPO and SimPO lose? The longest run less the best length's:")
    for _, some in group(pick(usual, method=("dpo", "simpo", "tgdpo")), *SETTINGS[:-1]).items():
        lengths = {steps: at for (steps,), at in group(some, "steps").items()}
        best, last = max(lengths, key=lambda steps: fmean(row["gain"] for row in lengths[steps])), max(lengths)
        if len(lengths) > 1:
            more = ", the longest" if best == last else f"; after {last}: {both(lengths[last], lengths[best])}"
            text.append(f"   {name_of(some[0])}: best after {best} steps{more}")
    text.append("3. Is it robust to the source of r̂? TGDPO with r̂ scaled to 1, less DPO:")
    credit = {source: [fmean(row[name] for row in some) for name in ("AUC", "share on what matters")]
              for (source,), some in group(pick(rows, method="source"), "source").items()}
    scaled = [row for row in pick(tgdpo_, steps=EPOCHS_2) if row["source"].endswith(" scaled")]
    for (source, alpha), some in group(scaled, "source", "alpha").items():
        known = "AUC {:.2f}, {:.0%} on what matters".format(*credit[source.removesuffix(" scaled")])
        text.append(f"   {SOURCES[source]} ({known}), alpha {alpha:g}: {both(some, pick(dpo, steps=EPOCHS_2))}")
    text.append("4. Is it ahead at equal KL? The most reward of all settings up to that KL, and that less DPO's:")
    for name, some in families(rows).items():
        found = []
        for kl in KLS:
            if less := compare(some, pick(rows, method="dpo"), kl):
                most = fmean(frontier(one, kl) for one in group(some, "seed").values())
                found.append(f"KL {kl:g}: {most:.2f}" + f", {say(less)}" * (name != "DPO"))
        found = "; ".join(found) or "none that all seeds of both have"
        text.append(f"   {name} ({len(group(some, *SETTINGS))} settings): {found}")
    text.append("5. Is steadier guidance better than raw r̂? TGDPO less TGDPO with raw r̂ at the same alpha:")
    raw = pick(tgdpo_, source="dpo", steps=EPOCHS_2)
    steadier = pick(tgdpo_, source=("dpo centred", "dpo large"), steps=EPOCHS_2)
    for _, some in group(steadier + [row for row in rows if row["floor"]], *SETTINGS).items():
        text.append(f"   {name_of(some[0])}: {both(some, pick(raw, alpha=some[0]['alpha']))}")
    text.append("6. T-REG less TGDPO at equal r̂ and alpha, and what RTO's token rewards bring:")
    for (source, alpha), some in group(pick(rows, method="treg", beta=0.5), "source", "alpha").items():
        if same := pick(tgdpo_, source=source, alpha=alpha, steps=EPOCHS_2):
            text.append(f"   {SOURCES[source]}, alpha {alpha:g}: {both(some, same)}")
    for (method, steps), some in group(pick(rows, method=("rto end", "ppo")), "method", "steps").items():
        if same := pick(rows, method="rto", beta=0.5, steps=steps):
            text.append(f"   RTO β1 0.5 less {METHODS[method]}, {steps} steps: {both(same, some)}")
    return text


def write_summary(rows, file):
    """Every setting that was tried: mean and half of the interval over seeds of every quantity."""
    names = dict.fromkeys(name for row in rows for name in row)
    quantities = [name for name in names if name not in (*SETTINGS, "seed")]
    with open(file, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow([*SETTINGS, "seeds", *(f"{name}{part}" for name in quantities for part in ("", " ±"))])
        for key, some in group(rows, *SETTINGS).items():
            cells = [interval(row[name] for row in some) if name in some[0] else [math.nan] * 2 for name in quantities]
            table.writerow([*key, len(some), *("" if math.isnan(x) else f"{x:.4g}" for cell in cells for x in cell)])


# --------------------------------------------------------------------------------------------------------- the figures
COLOURS = {"DPO": "#000000", "TGDPO, DPO model": "#D55E00", "TGDPO, DPO model, centred": "#E69F00",
           "TGDPO, true rewards": "#009E73", "SimPO": "#999999", "T-REG, contrastive prompts": "#56B4E9",
           "RTO": "#0072B2", "others": "#CC79A7"}   # Okabe and Ito; a method has its colour in every picture


def ticks(axis, values):
    """These ticks alone, as plain numbers."""
    axis.set_ticks(values, [f"{value:g}".replace("-", "−") for value in values])
    axis.set_ticks([], minor=True)


def figure_frontier(plt, rows):
    """Reward against KL: points are settings (means over seeds), lines the frontiers, bands their intervals."""
    figure, pair = plt.subplots(1, 2, figsize=(9, 5.6), sharey=True, layout="constrained")
    every, low, names = families(rows), -3, list(COLOURS)
    for axes, shown in zip(pair, (names[:4], names[:1] + names[4:7])):   # as they are compared, four lines each
        for name in filter(every.get, shown):
            colour, seeds = COLOURS[name], group(every[name], "seed").values()
            for some in group(every[name], *SETTINGS).values():
                kl, gain = [fmean(row[of] for row in some) for of in ("KL", "gain")]
                at, mark = (gain, "o") if gain >= low else (low - 0.5, "v")
                axes.plot(kl, at, mark, color=colour, alpha=0.7, markersize=4, markeredgewidth=0)
            first = max(min(row["KL"] for row in some) for some in seeds)   # from here on every seed has a point
            kls = [first * (max(KLS) / first) ** (i / 80) for i in range(81)] if first < max(KLS) else []
            lines = [interval(frontier(some, kl) for some in seeds) for kl in kls]
            axes.plot(kls, [mean for mean, _ in lines], color=colour, label=name, linewidth=2)
            axes.fill_between(kls, *([mean + sign * half for mean, half in lines] for sign in (-1, 1)), color=colour,
                              alpha=0.12, linewidth=0)
        axes.plot([], [], "o", color="#666666", markersize=4, label="one setting, mean of the seeds")
        axes.plot([], [], "v", color="#666666", markersize=4, label=f"one with less than −{-low}")
        axes.set(xscale="log", xlabel="KL to the reference (nats a response)")
        ticks(axes.xaxis, [0.5, 1, 2, 5, 10, 20, 50])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)
    pair[0].set_ylabel("true reward above the reference's")
    figure.suptitle("The most reward up to a KL, over all settings; bands: 95 % intervals over seeds", fontsize=11)
    return figure


def figure_alpha(plt, rows):
    """Reward and KL by the number of steps, each a run of its own, for several alpha and two sources."""
    usual = pick(rows, rate=3e-4, floor=None, beta=0.5)
    dpo = pick(usual, method="dpo")
    figure, table = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    for column, source in zip(zip(*table), ("dpo", "truth")):
        title = f"TGDPO, {SOURCES[source]}"
        lines = {"DPO": dpo} | {f"{title}, α {alpha:g}": some for (alpha,), some in sorted(group(
            pick(usual, method="tgdpo", source=source), "alpha").items()) if len(group(some, "steps")) > 1}
        for axes, name, label in zip(column, ("gain", "KL"), ("reward above the reference's", "KL (nats)")):
            for k, (line, some) in enumerate(lines.items()):
                at = sorted(group(some, "steps").items())
                means = [interval(row[name] for row in found) for _, found in at]
                axes.errorbar([steps * 1.05 ** k for (steps,), _ in at], *zip(*means), label=line, capsize=3,
                              marker=" o^s"[k], linestyle=("-", ":", "--", "-")[k], color=COLOURS[title if k else line])
            axes.set(xscale="log", ylabel=label)
            ticks(axes.xaxis, sorted({row["steps"] for row in dpo}))
        column[0].set_title(title)
        column[1].set(xlabel="steps", yscale="log")
        ticks(column[1].yaxis, [2, 5, 10, 20, 50])
        column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False, fontsize=9)
    return figure


def figure_credit(plt, rows):
    """How well each source knows the true rewards, in two numbers, beside what TGDPO makes of it, r̂ scaled to 1."""
    usual = pick(rows, rate=3e-4, beta=0.5, floor=None, steps=EPOCHS_2)
    # centred r̂ is not scaled: its root mean square is 0.4, so that its alpha of 0.5 is like 0.2 of the others
    found = group([row | {"source": row["source"].removesuffix(" scaled")} for row in usual if
                   (row["source"].split(" ")[-1], row["alpha"]) in (("scaled", 0.2), ("centred", 0.5))], "source")
    if not found:
        return None
    credit = {key: [fmean(row[name] for row in some) for name in ("share on what matters", "AUC")]
              for key, some in group(pick(rows, method="source"), "source").items()}
    figure, three = plt.subplots(1, 3, figsize=(9, 4.2), sharey=True, layout="constrained", width_ratios=(1, 1, 2.6))
    titles = ("good tokens above\nbad ones (AUC)", "share of |r̂| on tokens\nworth something",
              "true reward, TGDPO (α 0.2) less DPO")
    order = sorted(found, key=credit.get)
    for y, key in enumerate(order):
        colour = COLOURS.get(f"TGDPO, {SOURCES[key[0]]}", COLOURS["others"])
        for axes, value, shown in zip(three, credit[key][::-1], ("{:.2f}", "{:.0%}")):
            axes.barh(y, value, color=colour, alpha=0.6, height=0.6)
            axes.text(0.03, y, shown.format(value), va="center")
        mean, half = difference(found[key], pick(usual, method="dpo"), "gain")
        three[2].errorbar(mean, y, xerr=half, color=colour, marker="o", capsize=3)
    three[0].set_yticks(range(len(order)), [SOURCES[key[0]] for key in order])
    three[2].axvline(0, color="black", linewidth=0.8)
    three[2].set_xscale("symlog", linthresh=2)
    for axes, title, places in zip(three, titles, ([0, 0.5, 1], [0, 0.5, 1], [-20, -10, -5, -2, -1, 0, 1, 2])):
        axes.set_title(title, fontsize=10)
        ticks(axes.xaxis, places)
    return figure


def figure_maps(plt, world):
    """A pair of the world of seed 0 under several sources, each divided by its largest |r̂| there."""
    if not (world / "sources").exists():
        return None
    w = load_world(world, 0, 1)
    names = ("truth", "dpo", "dpo centred", "simpo", "contrastive", "classifier")
    stores = {name: source_columns(w, name) for name in names if (world / "sources" / f"{name}.parquet").exists()}
    lengths = [sorted(map(len, both)) for both in zip(w.pairs["chosen_ids"], w.pairs["rejected_ids"])]
    show = next((i for i, (short, long) in enumerate(lengths) if short > 9 and long < 20), 0)
    figure, pair = plt.subplots(2, 1, figsize=(9, 5), layout="constrained")
    colours = plt.matplotlib.colors.LinearSegmentedColormap.from_list("signs", ("#D55E00", "white", "#0072B2"))
    for k, (axes, side) in enumerate(zip(pair, ("chosen", "rejected"))):
        values = [columns[k][show] for columns in stores.values()]
        image = axes.imshow([[value / (max(map(abs, row)) or 1.0) for value in row] for row in values], cmap=colours,
                            vmin=-1, vmax=1, aspect="auto")
        words = w.tokenizer.convert_ids_to_tokens(w.pairs[f"{side}_ids"][show])
        axes.set_xticks(range(len(words)), words, rotation=45, ha="right")
        axes.set_yticks(range(len(stores)), [SOURCES[name] for name in stores])
        axes.set_title(side)
    figure.colorbar(image, ax=pair, label="token reward, a row's largest = 1")
    return figure


def figure_quick(plt, rows):
    """Reward against KL, a mark for each setting in each world."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for mark, some in zip("osD^phX*", group(pick(rows, method=("dpo", "tgdpo")), *SETTINGS).values()):
        for row in some:
            axes.plot(row["KL"], row["gain"], mark, markersize=15, color=COLOURS.get(family(row), COLOURS["others"]))
            axes.text(row["KL"], row["gain"], row["seed"], color="wk"[row["alpha"] > 0], ha="center", va="center")
        axes.lines[-1].set_label(name_of(row))
    axes.set(xlabel="KL to the language model (nats a response)", ylabel="true reward above the language model's",
             title="The number on a mark is its seed: compare marks of the same number")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, markerscale=0.6)
    return figure


def report(folder):
    """summary.csv, answers.txt and the figures that have data. What not every seed has stands in summary.csv only."""
    rows = read_results(folder / "results.jsonl")
    if not rows:
        raise InputError(f"{folder} holds no results.jsonl; expected the --output of a study")
    write_summary(rows, folder / "summary.csv")
    seeds = len({row["seed"] for row in rows})
    rows = [row for some in group(rows, *SETTINGS).values() if len(some) == seeds for row in some]
    if not pick(rows, method="dpo"):
        return print(f"written: {folder}/summary.csv; DPO, to which all are compared, is not finished in every world")
    text = "\n".join(answers(rows) if seeds > 2 else short_answer(rows))
    tgdpo.write(folder / "answers.txt", text + "\n")
    print(text)
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("figures need matplotlib: pip install matplotlib, then --report")
    plt.switch_backend("Agg")
    figures = dict(frontier=figure_frontier, alpha=figure_alpha, credit=figure_credit, maps=figure_maps)
    for name, draw in figures.items() if seeds > 2 else [("quick", figure_quick)]:
        if figure := draw(plt, rows if name != "maps" else folder / "worlds" / "0"):
            figure.savefig(folder / f"{name}.png", dpi=150)
            plt.close(figure)
            print(f"written: {folder}/{name}.png")
    print(f"written: {folder}/summary.csv, answers.txt")


def main(argv):
    """The command line -> exit status."""
    parser = strict(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--quick", action="store_true", help="4 settings, 2 seeds: does TGDPO beat DPO?")
    parser.add_argument("--output", default=None, metavar="FOLDER", help="default runs/lab, or runs/lab-quick")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--report", default=None, metavar="FOLDER", help="no training")

    def go():
        options = parser.parse_args(argv)
        if options.processes < 1:
            raise InputError(f"--processes is {options.processes}; expected 1 or more")
        folder = Path(options.report or options.output or ("runs/lab-quick" if options.quick else "runs/lab"))
        if not options.report:
            run_study(folder, options.quick, options.processes)
        report(folder)
    return command(go)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
