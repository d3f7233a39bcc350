#!/usr/bin/env python3
"""Runs side by side: the options that differ, their evaluations, and curves of any metric.

    python scripts/compare.py runs/*
    python scripts/compare.py runs/* --metric eval_loss --output curves.html      or curves.png, with matplotlib

A run may be unfinished. A model or a data set counts as different by its content, not by its name. The best evaluation
is the one with the lowest eval_loss. J, reward and KL are those that the tiny languages wrote into run.json.
"""
import argparse
import html
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import tgdpo
from common import command, strict

EVAL = {"eval_loss": "eval_loss", "eval_dpo_loss": "dpo_loss", "eval_rewards/accuracies": "accuracies",
        "eval_rewards/margins": "margins"}
CONTENT = {"model_name_or_path": "model", "ref_model": "reference", "reward_model": "reward_model_fingerprint",
           "dataset": "data"}   # options that name files, and where run.json has the fingerprint of what was in them
SCALES = {"loss", "alpha", "beta", "reward_beta", "gamma", "guidance_floor"}   # options that change what eval_loss is
COLOURS = ("#2f7fbf #d9730d #009e73 #cc79a7 #767676 #a6761d #7b4fbf #c0392b #7fa62f #5fb4d9 #e6ab02 #b07aa1").split()


def read_run(folder):
    """A run's folder -> (run.json, rows of metrics.jsonl)."""
    file = folder / "metrics.jsonl"
    tgdpo.need((folder / "run.json").is_file(), f"{folder} has no run.json; expected the --output_dir of a run")
    run = tgdpo.read_record(folder)
    tgdpo.need("options" in run, f"{folder}/run.json has no options; expected what a run of tgdpo.py writes")
    with tgdpo.reading(file):
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]   # a last half line is being written
    if run["options"].get("loss") == "dpo":   # there it is the loss itself
        rows = [row | {f"{x}dpo_loss": row[f"{x}loss"] for x in ("", "eval_") if f"{x}loss" in row} for row in rows]
    return run, rows


def show(title, table, width=100):
    """Print {line: {column: value}}. Columns that do not fit into the width go on below."""
    names = dict.fromkeys(name for row in table.values() for name in row)
    values = [[name, *(row.get(name, "-") for row in table.values())] for name in names]
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in column] for column in values]
    columns = [[cell.rjust(max(map(len, column)) + 2) for cell in column] for column in cells]
    first = [line.ljust(max(map(len, table), default=0)) for line in ("", *table)]
    if columns:
        print(f"\n{title}")
    while columns:
        n = 1
        while n < len(columns) and sum(len(column[0]) for column in (first, *columns[:n + 1])) <= width:
            n += 1
        print("\n".join(map("".join, zip(first, *columns[:n]))))
        columns = columns[n:]


def differing(runs):
    """{run: {option: value}} of the options that are not the same in all runs; says what that means for eval_loss."""
    facts = {line: run["options"] | {name: run.get(name) for name in (*CONTENT.values(), "pairs_per_step")}
             for line, run in runs.items()}
    other = {name for row in facts.values() for name in row if len({str(of.get(name)) for of in facts.values()}) > 1}
    if other & {"data", "seed", "eval_size"}:
        print("These runs differ in their pairs, in numbers beside them or in which pairs are held out.")
    if scales := ", ".join(sorted(other & SCALES)):
        print(f"{scales}: eval_loss has another scale in each run. Over alpha compare eval_dpo_loss.")
    other -= {"output_dir", "cache_dir", "resume", *CONTENT.values(), *(x for x in CONTENT if CONTENT[x] not in other)}
    return {line: {name: row[name] for name in row if name in other} for line, row in facts.items()}


def tables(runs):
    """Print all tables of {run: (run.json, rows)}."""
    show("options that differ", differing({line: run for line, (run, _) in runs.items()}))
    last, best, models = {}, {line: {} for line in runs}, {}
    for line, (run, rows) in runs.items():
        losses, evaluations = [[row for row in rows if name in row] for name in ("loss", "eval_loss")]
        last[line] = {"finished": "yes" if run.get("finished") else "no", "steps": rows[-1]["step"] if rows else 0,
                      "loss": losses[-1]["loss"] if losses else "-"}
        if evaluations:
            for table, row in ((last, evaluations[-1]), (best, min(evaluations, key=lambda row: row["eval_loss"]))):
                table[line] |= {"at step": row["step"]} | {EVAL[name]: row[name] for name in EVAL if name in row}
        for name, row in run.get("table", {}).items():   # tgdpo.py: J, reward, KL, ...; tiny_language.py: [mean, ±]
            row = row if isinstance(row, list) else ["-", row["true reward"][0], row["KL"][0]]
            if name not in ("reference", "each state alone", "optimum"):   # those that a run has trained
                models[f"{line}: {name}"] = dict(zip(("J", "reward", "KL"), row))
    show("last training loss and last evaluation", last)
    show("best evaluation, by its eval_loss", best)
    show("what the models are worth", models)


def ticks(low, high):
    """At most six round numbers between two."""
    step = min(k * 10.0**e for e in range(-30, 30) for k in (1, 2, 5) if high - low <= 5 * k * 10.0**e)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def page(curves, metric):
    """{run: [(step, value)]} -> an HTML page with one drawing: steps to the right, the legend below."""
    spans = [(min(values), max(values)) for values in zip(*sum(curves.values(), []))]
    (left, right), (low, high) = [(a - (b - a or 1) / 25, b + (b - a or 1) / 25) for a, b in spans]
    x = lambda step: f"{70 + 550 * (step - left) / (right - left):.1f}"
    y = lambda value: f"{330 - 290 * (value - low) / (high - low):.1f}"
    parts = [f'<text x="70" y="22">{html.escape(metric)}</text><text x="620" y="376" text-anchor="end">step</text>']
    parts += [f'<path d="M70 {y(t)}H620" stroke="#8886"/><text x="62" y="{y(t)}" dy=".35em" text-anchor="end">{t:.6g}'
              "</text>" for t in ticks(low, high)]
    parts += [f'<text x="{x(t)}" y="352" text-anchor="middle">{t:.6g}</text>' for t in ticks(left, right) if t % 1 == 0]
    for n, (line, curve) in enumerate(curves.items()):
        colour, name, row = COLOURS[n % len(COLOURS)], html.escape(line), 400 + 22 * n
        points = "L".join(f"{x(step)} {y(value)}" for step, value in curve)
        parts.append(f'<path d="M{points}M70 {row}h30" stroke="{colour}" stroke-width="2" fill="none"/>'
                     f'<text x="110" y="{row}" dy=".35em">{name}: {curve[-1][1]:.4g} at step {curve[-1][0]}</text>')
        parts += [f'<circle cx="{x(step)}" cy="{y(value)}" r="3" fill="{colour}"><title>{name}, step {step}: '
                  f"{value:.4g}</title></circle>" for step, value in curve if len(curve) <= 100]
    return (f'<!doctype html><meta charset="utf-8"><title>{html.escape(metric)}</title><style>:root {{ color-scheme: '
            "light dark } svg { width: 100%; max-width: 60rem } text { fill: currentColor; font: 14px sans-serif }"
            f'</style><svg viewBox="0 0 640 {400 + 22 * len(curves)}">\n' + "\n".join(parts) + "\n</svg>\n")


def png(curves, metric, file):
    """The same by matplotlib, into a file."""
    tgdpo.need(find_spec("matplotlib"), f"{file} needs matplotlib: pip install matplotlib; an .html file needs nothing")
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for n, (line, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve), ".-" if len(curve) <= 100 else "-", color=COLOURS[n % len(COLOURS)], label=line)
    axes.set(xlabel="step", ylabel=metric)
    axes.legend(fontsize=8)
    axes.figure.savefig(file, dpi=120)


def draw(runs, metric, output):
    """Write the curves of one metric of {run: (run.json, rows)}."""
    file = Path(os.path.expanduser(output))
    tgdpo.need(file.suffix in (".html", ".png"), f"--output {output}; expected the name of an .html or a .png file")
    points = {line: [(row["step"], row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan))]
              for line, (_, rows) in runs.items()}
    curves = {line: curve for line, curve in points.items() if curve}
    there = sorted({name for _, rows in runs.values() for row in rows for name in row} - {"step"})
    tgdpo.need(curves, f"--metric {metric}: no run has it; there are {', '.join(there) or 'none yet'}")
    with tgdpo.reading(f"--output {output}"):
        png(curves, metric, file) if file.suffix == ".png" else tgdpo.write(file, page(curves, metric))
    print(f"\n{file}: {metric} of {', '.join(curves)}")


def main(argv):
    """The command line -> exit status: 0, or 2 for input that cannot be used."""
    parser = strict(argparse.ArgumentParser(prog="compare.py", description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    parser.add_argument("--metric", help="draw this metric of all runs, such as rewards/margins (eval_loss)")
    parser.add_argument("--output", help="the picture, .html or .png (curves.html)")

    def work():
        """Read, print and draw."""
        own = parser.parse_args(argv)
        paths = [Path(os.path.abspath(os.path.expanduser(name))) for name in own.runs]
        top = os.path.commonpath([path.parent for path in paths])
        runs = {os.path.relpath(path, top): read_run(path) for path in paths}
        tables(runs)
        if own.metric or own.output:
            draw(runs, own.metric or "eval_loss", own.output or "curves.html")
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
