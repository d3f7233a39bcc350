#!/usr/bin/env python3
"""The lab: methods x sources of token rewards x alpha x beta x steps x seeds, judged where the truth is known.

    python scripts/lab.py --quick                 2 seeds, 8 settings: 3 minutes on 2 cores
    python scripts/lab.py                         the full study of scripts/lab/README.md
    python scripts/lab.py --report FOLDER         only the summary, the answers and the figures, from its results.jsonl

On the tiny language (scripts/tiny_language.py) the true reward of each token is known. For each seed a world is made:
a language model, 4000 labelled pairs, models that give token rewards. Each point trains one policy in it and judges
that. Points run in parallel processes; every finished one is a row of results.jsonl (two of an on-policy method), and
the same command goes on where it stopped. summary.csv has means and 95 % intervals over seeds of every point in
results.jsonl.
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
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import datasets
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

T_97_5 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}   # by seeds
KLS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)   # where frontiers are compared
SETTINGS = ("method", "source", "beta", "alpha", "floor", "rate", "steps")   # of a point; the seed comes beside
ON_POLICY = ("rto", "rto end", "ppo")
EPOCHS_2 = 250   # optimizer steps: two passes over the pairs, as in the tiny mode
FULL = dict(quick=False, seeds=5, rto_marks=(10, 30), prompts=500)
QUICK = dict(quick=True, seeds=2, rto_marks=(10,), prompts=200)


# ---------------------------------------------------------------------------------------------------------- the study
def point(method, source="", beta=0.5, alpha=0.0, floor=None, rate=3e-4, steps=EPOCHS_2):
    """One setting, at the tiny mode's rate and length unless said. Of rto, beta is beta1; on-policy methods have their
    own rate and steps."""
    return dict(zip(SETTINGS, (method, source, beta, alpha, floor, rate, steps)))


def study(quick):
    """All settings, in the order in which they are run."""
    on_policy = [point("rto", "dpo", beta, steps=0) for beta in (0.25, 0.5)]
    on_policy += [point("rto end", "dpo", 0.5, steps=0), point("ppo", beta=0.0, steps=0)]
    if quick:
        points = [point("dpo", beta=beta, steps=60) for beta in (0.25, 0.5, 1.0)]
        points += [point("tgdpo", "dpo", alpha=alpha, steps=60) for alpha in (0.05, 0.5)]
        points += [point("tgdpo", "truth", alpha=0.5, steps=60), point("treg", "contrastive", alpha=0.25, steps=60)]
        return points + on_policy[1:2]
    points = [point("dpo", beta=beta) for beta in (0.25, 0.5, 1.0, 2.0)]
    points += [point("simpo", beta=beta, rate=rate)
               for beta, rate in ((2.0, 3e-4), (2.0, 1e-4), (2.0, 3e-5), (10.0, 3e-5))]
    # the paper's guidance: alpha, beta, the number of steps (each a run with a schedule of its own), the learning rate
    points += [point("tgdpo", "dpo", alpha=alpha) for alpha in (0.02, 0.05, 0.2, 0.5)]
    points += [point("tgdpo", "truth", alpha=alpha) for alpha in (0.25, 0.5, 1.0)]
    points += [point("tgdpo", source, beta, alpha) for source, alpha in (("dpo", 0.05), ("truth", 0.5))
               for beta in (1.0, 2.0)]
    for steps in (60, 125, 500):
        points += [point("dpo", steps=steps), point("simpo", beta=2.0, steps=steps)]
        points += [point("tgdpo", "dpo", alpha=0.05, steps=steps), point("tgdpo", "truth", alpha=0.25, steps=steps)]
    points += [point("tgdpo", *more, steps=steps) for steps in (60, 125)
               for more in (("dpo", 0.5, 0.2), ("dpo", 0.5, 0.5), ("truth", 0.5, 1.0))]
    points += [point("dpo", rate=1e-4), point("tgdpo", "dpo", alpha=0.05, rate=1e-4),
               point("tgdpo", "truth", alpha=0.5, rate=1e-4)]
    # steadier guidance
    points += [point("tgdpo", "dpo centred", alpha=alpha) for alpha in (0.05, 0.2, 0.5)]
    points += [point("tgdpo", "dpo large", alpha=alpha) for alpha in (0.05, 0.2)]
    points += [point("tgdpo", "dpo", alpha=0.5, floor=0.1)]
    # sources, all scaled to a root mean square of 1; of some of them other betas, for frontiers as wide as DPO's
    for source in ("truth", "noise25", "noise50", "dpo", "early", "simpo", "contrastive", "classifier"):
        points += [point("tgdpo", f"{source} scaled", alpha=alpha) for alpha in (0.05, 0.2)]
    points += [point("tgdpo", source, beta, 0.2) for beta in (1.0, 2.0)
               for source in ("dpo centred", "contrastive scaled", "classifier scaled")]
    # the other two uses
    points += [point("treg", *more) for more in (("dpo", 0.5, 0.2), ("truth", 0.5, 0.5), ("contrastive", 0.5, 0.25),
               ("contrastive", 0.5, 0.5), ("contrastive", 1.0, 0.5), ("contrastive", 2.0, 0.5))]
    return points + on_policy


def name_of(row):
    """A setting in words."""
    alpha = f" α {row['alpha']:g}" if row["method"] in ("tgdpo", "treg") else ""
    beta = f" {'β1' if row['method'].startswith('rto') else 'β'} {row['beta']:g}" * (row["method"] != "ppo")
    floor = f" f ≥ {row['floor']:g}" if row["floor"] is not None else ""
    return f"{row['method']}{beta}{alpha}{floor}{f' ({source})' if (source := row['source']) else ''}"


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
    names, found = ("prompt_ids", "chosen_ids", "rejected_ids"), {}
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
    prompts = "good {prompt}", "bad {prompt}"
    found["contrastive"] = treg.contrastive_rewards(start, rows, pairs, tokenizer, options, *prompts)
    found["truth"] = [tiny_language.tiny_truth(tokenizer, pairs[names[0]], pairs[side]) for side in names[1:]]
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


def read_source(folder, name):
    """A world's token rewards from one source -> a data set with the columns chosen and rejected."""
    return datasets.Dataset(pyarrow.parquet.read_table(folder / f"{name}.parquet"))


@lru_cache
def load_world(folder, seed, prompts):
    """A world's options, tokenizer, pairs, reference and the prompts to judge on, with the reference's responses."""
    options = world_options(folder, seed)
    tokenizer = tgdpo.load_tokenizer(options.model_name_or_path)
    rows = tgdpo.load_rows(options.dataset, None)
    pairs, _ = tgdpo.tokenize(rows, tokenizer, options.max_length, options.dataset)
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
    store = read_source(w.folder / "sources", base)
    columns = [[[*row] for row in store[side]] for side in ("chosen", "rejected")]
    return token_rewards.scale(columns) if name != base else columns


# ----------------------------------------------------------------------------------------------------------- a policy
@torch.no_grad()
def judge(w, policy, step):
    """What a policy in memory is worth on the world's prompts -> {quantity: mean over prompts or tokens}."""
    torch.manual_seed(1000 * w.options.seed + step)
    drawn = tiny_language.generate(policy, w.prompts, w.tokenizer)
    rows = datasets.Dataset.from_dict({"prompt_ids": w.prompts, "chosen_ids": drawn})
    logps = {"policy": [], "reference": []}
    for start in range(0, len(rows), 100):
        batch = tgdpo.collate(rows[start:start + 100], "cpu")
        for name, model in (("policy", policy), ("reference", w.reference)):
            logps[name] += model.token_logps(batch).sum(-1).tolist()
    truth = tiny_language.tiny_truth(w.tokenizer, w.prompts, drawn)
    legal = tiny_language.tiny_truth(w.tokenizer, w.prompts, drawn, tiny_language.tiny_legal)
    totals, tokens = [sum(row) for row in truth], sum(map(len, drawn))
    row = {"reward": fmean(totals), "gain": fmean(totals) - fmean(w.baselines["reference"]),
           "KL": fmean(a - b for a, b in zip(logps["policy"], logps["reference"])),
           "entropy": -fmean(logps["policy"]), "length": tokens / len(drawn),
           "off support": sum(not ok for line in legal for ok in line) / tokens,
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
    seconds = time.perf_counter() - began
    return {"loss": fmean(losses[-20:]), "seconds": seconds} | judge(w, model, steps) | facts


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
    points = study(quick)
    sources = dict.fromkeys(p["source"].removesuffix(" scaled") for p in points if p["source"])
    points = [point("source", source, steps=0) for source in sources] + points
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
    """Mean and half of its 95 % interval (Student's t, over seeds)."""
    values = list(values)
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), T_97_5.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values))


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
    """A quantity of one setting less another's, seed by seed -> (mean, half of the interval), or None if one lacks."""
    sides = [{row["seed"]: row[quantity] for row in rows} for rows in (mine, theirs)]
    seeds = sides[0].keys() & sides[1].keys()
    return interval(sides[0][seed] - sides[1][seed] for seed in sorted(seeds)) if len(seeds) > 1 else None


def frontier(rows, kl):
    """The most that a seed's rows gain at a KL of at most kl, with straight lines between those that gain more than all
    of smaller KL; nan below the smallest KL that was tried."""
    points = sorted((row["KL"], row["gain"]) for row in rows)
    if kl < points[0][0]:
        return math.nan
    last = points[0]
    for at, gain in points[1:]:
        if gain > last[1] and at > kl:
            return last[1] + (gain - last[1]) * (kl - last[0]) / (at - last[0])
        last = (at, gain) if gain > last[1] else last
    return last[1]


def compare(mine, theirs, kl):
    """Difference of two frontiers at a KL, seed by seed -> (mean, half of the interval), or None if one lacks it."""
    sides = [{seed: frontier(rows, kl) for (seed,), rows in group(some, "seed").items()} for some in (mine, theirs)]
    found = [sides[0][seed] - sides[1].get(seed, math.nan) for seed in sorted(sides[0])]
    return interval(found) if len(found) > 1 and not any(map(math.isnan, found)) else None


def at_equal_kl(mine, theirs, kl):
    """The most reward up to a KL, mean over seeds, and how it compares, in words."""
    found = fmean(frontier(rows, kl) for rows in group(mine, "seed").values())
    return f"KL {kl:g}: {found:.2f}" + f", {say(compare(mine, theirs, kl))}" * (mine is not theirs)


def say(found):
    """A difference and its interval in words."""
    if found is None:
        return "not measured"
    low, high = found[0] - found[1], found[0] + found[1]
    return f"{found[0]:+.2f} ± {found[1]:.2f} ({'more' if low > 0 else 'less' if high < 0 else 'not shown to differ'})"


# --------------------------------------------------------------------------------------------------------- the answers
def families(rows):
    """{name: rows}: methods, each with all settings that were tried, whose frontiers are compared."""
    names = {"DPO": dict(method="dpo"), "SimPO": dict(method="simpo"),
             "TGDPO, r̂ of the DPO model": dict(method="tgdpo", source="dpo"),
             "TGDPO, that r̂ centred": dict(method="tgdpo", source="dpo centred"),
             "TGDPO, that r̂ where large": dict(method="tgdpo", source="dpo large"),
             "TGDPO, contrastive r̂": dict(method="tgdpo", source="contrastive scaled"),
             "TGDPO, token classifier": dict(method="tgdpo", source="classifier scaled"),
             "TGDPO, true rewards": dict(method="tgdpo", source=("truth", "truth scaled")),
             "T-REG, r̂ of the DPO model": dict(method="treg", source="dpo"),
             "T-REG, contrastive r̂": dict(method="treg", source="contrastive"),
             "T-REG, true rewards": dict(method="treg", source="truth"),
             "RTO": dict(method="rto"), "RTO, all at the end": dict(method="rto end"), "PPO": dict(method="ppo")}
    found = {name: pick(rows, **values) for name, values in names.items()}
    return {name: some for name, some in found.items() if some}


def usual_length(rows):
    """The steps that most settings have, none of them on-policy."""
    return max((row["steps"] for row in rows if row["method"] not in ON_POLICY and row["steps"] <= EPOCHS_2), default=0)


def both(mine, theirs):
    """The differences in reward and in KL, in words."""
    reward, kl = [difference(mine, theirs, name) for name in ("gain", "KL")]
    return f"reward {say(reward)}, KL {f'{kl[0]:+.2f} ± {kl[1]:.2f}' if kl else 'not measured'}"


def complete(rows):
    """The rows of settings that every seed has; others stand in summary.csv only."""
    seeds = len({row["seed"] for row in rows})
    return [row for some in group(rows, *SETTINGS).values() if len(some) == seeds for row in some]


def answers(rows):
    """The questions of scripts/lab/README.md -> lines of text. Differences are paired by seed; ±: 95 % interval."""
    usual = pick(rows, rate=3e-4, floor=None)
    dpo, tgdpo_ = pick(usual, method="dpo", beta=0.5), pick(usual, method="tgdpo", beta=0.5)
    middle = dict(steps=usual_length(rows))
    text = ["1. Does a larger alpha converge faster, to the same place? TGDPO less DPO, both at beta 0.5:"]
    for (source, alpha, steps), some in sorted(
            group(pick(tgdpo_, source=("dpo", "truth")), "source", "alpha", "steps").items()):
        text.append(f"   r̂ {source}, alpha {alpha:g}, {steps} steps: {both(some, pick(dpo, steps=steps))}")
    text.append("2. Trained on, does it keep what DPO and SimPO lose? The longest run less the best length's:")
    for _, some in group(pick(usual, method=("dpo", "simpo", "tgdpo")), *SETTINGS[:-1]).items():
        lengths = {steps: at for (steps,), at in group(some, "steps").items()}
        best = max(lengths, key=lambda steps: fmean(row["gain"] for row in lengths[steps]))
        if len(lengths) > 1:
            last = max(lengths)
            more = ", the longest" if best == last else f"; after {last}: {both(lengths[last], lengths[best])}"
            text.append(f"   {name_of(some[0])}: best after {best} steps{more}")
    text.append("3. Is it robust to the source of r̂? TGDPO with r̂ scaled to 1, less DPO:")
    credit = {source: [fmean(row[name] for row in some) for name in ("AUC", "share on what matters")]
              for (source,), some in group(pick(rows, method="source"), "source").items()}
    scaled = [row for row in pick(tgdpo_, **middle) if row["source"].endswith(" scaled")]
    for (source, alpha), some in group(scaled, "source", "alpha").items():
        known = "AUC {:.2f}, {:.0%} on what matters".format(*credit[source.removesuffix(" scaled")])
        text.append(f"   {source} ({known}), alpha {alpha:g}: {both(some, pick(dpo, **middle))}")
    text.append("4. Is it ahead at equal KL? The most reward of all settings up to that KL, and that less DPO's:")
    every = families(rows)
    for name, some in every.items():
        text.append(f"   {name} ({len(group(some, *SETTINGS))} settings): "
                    + ("; ".join(at_equal_kl(some, every["DPO"], kl) for kl in KLS if compare(some, every["DPO"], kl))
                       or "none that all seeds of both have"))
    text.append("5. Is steadier guidance better than raw r̂? TGDPO less TGDPO with raw r̂ at the same alpha:")
    raw = pick(tgdpo_, source="dpo", **middle)
    for _, some in group(pick(tgdpo_, source=("dpo centred", "dpo large"), **middle), *SETTINGS).items():
        text.append(f"   {name_of(some[0])}: {both(some, pick(raw, alpha=some[0]['alpha']))}")
    for _, some in group([row for row in pick(rows, method="tgdpo") if row["floor"]], *SETTINGS).items():
        text.append(f"   {name_of(some[0])}: {both(some, pick(raw, alpha=some[0]['alpha']))}")
    text.append("6. T-REG less TGDPO at equal r̂ and alpha, and what RTO's token rewards bring:")
    for (source, alpha), some in group(pick(rows, method="treg", beta=0.5), "source", "alpha").items():
        if same := pick(tgdpo_, source=source, alpha=alpha, **middle):
            text.append(f"   r̂ {source}, alpha {alpha:g}: {both(some, same)}")
    dense = pick(rows, method="rto", beta=0.5)
    for (method, steps), some in group(pick(rows, method=("rto end", "ppo")), "method", "steps").items():
        if same := pick(dense, steps=steps):
            text.append(f"   rto β1 0.5 less {method}, {steps} steps: {both(same, some)}")
    return text


def write_summary(rows, file):
    """Every setting that was tried: mean and half of the interval over seeds of every quantity."""
    names = dict.fromkeys(name for row in rows for name in row)
    quantities = [name for name in names if name not in (*SETTINGS, "seed")]
    with open(file, "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow([*SETTINGS, "seeds", *(f"{name}{part}" for name in quantities for part in ("", " ±"))])
        for key, some in group(rows, *SETTINGS).items():
            cells = [interval(row[name] for row in some) if name in some[0] else () for name in quantities]
            numbers = [f"{value:.4g}" for cell in cells for value in (cell or (math.nan, math.nan))]
            table.writerow([*key, len(some), *("" if number == "nan" else number for number in numbers)])


# --------------------------------------------------------------------------------------------------------- the figures
COLOURS = ("#000000", "#999999", "#D55E00", "#E69F00", "#009E73", "#56B4E9", "#0072B2", "#CC79A7")   # Okabe and Ito
SHOWN = ("DPO", "SimPO", "TGDPO, r̂ of the DPO model", "TGDPO, contrastive r̂", "TGDPO, true rewards",
         "T-REG, contrastive r̂", "RTO", "PPO")


def figure_frontier(plt, rows, file):
    """Reward against KL: points are settings (means over seeds), lines the frontiers, bands their intervals."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    every, top = families(rows), 1.0
    for colour, name in zip(COLOURS, SHOWN):
        if name not in every:
            continue
        means = [[fmean(row[of] for row in some) for of in ("KL", "gain")]
                 for some in group(every[name], *SETTINGS).values()]
        axes.scatter(*zip(*means), s=10, color=colour, alpha=0.6, linewidths=0)
        seeds = list(group(every[name], "seed").values())
        first = max(min(row["KL"] for row in some) for some in seeds)   # from here on every seed has a point
        kls = [first * (max(KLS) / first) ** (i / 80) for i in range(81)] * (first < max(KLS))
        lines = [interval(frontier(some, kl) for some in seeds) for kl in kls]
        top = max([top] + [mean for mean, _ in lines])
        axes.plot(kls, [mean for mean, _ in lines], color=colour, label=name)
        axes.fill_between(kls, *([mean + sign * half for mean, half in lines] for sign in (-1, 1)), color=colour,
                          alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlabel="KL to the reference (nats a response)", ylabel="true reward above the reference's",
             title="The most reward up to a KL, over all settings; bands: 95 % intervals over seeds")
    axes.set_ylim(-2, 1.3 * top)
    axes.legend(fontsize=8)
    save(plt, figure, file)


def figure_alpha(plt, rows, file):
    """Reward and KL by the number of steps, each a run of its own, for several alpha and two sources."""
    figure, table = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    usual = pick(rows, rate=3e-4, floor=None, beta=0.5)
    for column, source in zip(zip(*table), ("dpo", "truth")):
        lines = {"DPO": pick(usual, method="dpo")}
        lines |= {f"α {alpha:g}": some for (alpha,), some in sorted(group(
            pick(usual, method="tgdpo", source=source), "alpha").items()) if len(group(some, "steps")) > 1}
        for axes, name, label in zip(column, ("gain", "KL"), ("true reward above the reference's", "KL (nats)")):
            for colour, (title, some) in zip(("#000000", "#56B4E9", "#0072B2", "#D55E00"), lines.items()):
                at = sorted(group(some, "steps").items())
                means = [interval(row[name] for row in found) for _, found in at]
                axes.errorbar([steps for (steps,), _ in at], *zip(*means), color=colour, label=title, capsize=3)
            axes.set(xscale="log", ylabel=label)
            axes.minorticks_off()
            axes.set_xticks(*[sorted({row["steps"] for row in pick(usual, method="dpo")})] * 2)
            axes.legend(fontsize=8)
        column[0].set_title("r̂ of the DPO model" if source == "dpo" else "true token rewards")
        column[1].set(xlabel="steps", yscale="log")
    save(plt, figure, file)


def figure_credit(plt, rows, file):
    """Two ways to say how well a source knows the true rewards, against what TGDPO makes of it, r̂ scaled to 1."""
    credit = {source: some for (source,), some in group(pick(rows, method="source"), "source").items()}
    usual = pick(rows, rate=3e-4, beta=0.5, steps=usual_length(rows))
    dpo, scaled = pick(usual, method="dpo"), [row for row in usual if row["source"].endswith(" scaled")]
    figure, pair = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, name, label in zip(pair, ("AUC", "share on what matters"), (
            "AUC: good tokens above bad ones", "share of |r̂| on tokens that are worth something")):
        for colour, ((alpha,), some) in zip(("#0072B2", "#D55E00"), group(scaled, "alpha").items()):
            found = {source.removesuffix(" scaled"): difference(at, dpo, "gain")
                     for (source,), at in group(some, "source").items()}
            places = [fmean(row[name] for row in credit[source]) for source in found]
            axes.errorbar(places, *zip(*found.values()), fmt="o", color=colour, capsize=3, label=f"α {alpha:g}")
            for x, (source, (mean, _)) in zip(places, found.items()):
                if alpha == max(row["alpha"] for row in scaled):
                    axes.annotate(source, (x, mean), fontsize=7, xytext=(-4, 4), textcoords="offset points", ha="right")
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set(xlabel=label)
        axes.set_yscale("symlog", linthresh=2)
    pair[0].set(ylabel="true reward, TGDPO less DPO")
    if scaled:
        pair[1].legend(fontsize=8)
    save(plt, figure, file)


def figure_maps(plt, folder, file):
    """A pair of the first world under several sources, each divided by its largest |r̂| there."""
    world = folder / "worlds" / "0"
    tokenizer = tgdpo.load_tokenizer(str(world / "start_model"))
    names = ("truth", "dpo", "dpo centred", "simpo", "contrastive", "classifier")
    stores = {name: read_source(world / "sources", name)
              for name in names if (world / "sources" / f"{name}.parquet").exists()}
    pairs, _ = tgdpo.tokenize(tgdpo.load_rows(str(world / "pairs.jsonl"), None), tokenizer, 256, "pairs")
    lengths = [sorted(len(pair[side]) for side in ("chosen_ids", "rejected_ids")) for pair in pairs]
    show = next((i for i, (short, long) in enumerate(lengths) if short > 9 and long < 20), 0)
    figure, pair = plt.subplots(2, 1, figsize=(11, 5), layout="constrained")
    for axes, side in zip(pair, ("chosen", "rejected")):
        values = [[*store[side][show]] for store in stores.values()]
        image = axes.imshow([[value / (max(map(abs, row)) or 1.0) for value in row] for row in values], cmap="PuOr",
                            vmin=-1, vmax=1, aspect="auto")
        words = tokenizer.convert_ids_to_tokens(pairs[show][f"{side}_ids"])
        axes.set_xticks(range(len(words)), words, rotation=45, ha="right")
        axes.set_yticks(range(len(stores)), stores)
        axes.set_title(side)
    figure.colorbar(image, ax=pair, label="token reward, a row's largest = 1")
    save(plt, figure, file)


def save(plt, figure, file):
    """Write a figure and forget it."""
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(folder):
    """summary.csv, answers.txt and the figures, from results.jsonl."""
    rows = read_results(folder / "results.jsonl")
    if not rows:
        raise InputError(f"{folder} holds no results.jsonl; expected the --output of a study")
    write_summary(rows, folder / "summary.csv")
    everywhere = complete(rows)
    text = "\n".join(answers(everywhere))
    tgdpo.write(folder / "answers.txt", text + "\n")
    print(text)
    try:
        import matplotlib
    except ImportError:
        return print("figures need matplotlib: pip install matplotlib, then --report")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure_frontier(plt, everywhere, folder / "frontier.png")
    figure_alpha(plt, everywhere, folder / "alpha.png")
    figure_credit(plt, everywhere, folder / "credit.png")
    if (folder / "worlds" / "0").is_dir():
        figure_maps(plt, folder, folder / "maps.png")
    print(f"written: {folder}/summary.csv, answers.txt and {len(list(folder.glob('*.png')))} figures")


def main(argv):
    """The command line -> exit status."""
    parser = strict(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                                formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--quick", action="store_true", help="2 seeds and few settings")
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
