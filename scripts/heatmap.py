#!/usr/bin/env python3
"""Every token of every pair, coloured by what TGDPO makes of it: one HTML page without a network, or the terminal.

    python scripts/heatmap.py --run RUN_DIR --output page.html              a finished run of tgdpo.py, on its own pairs
    python scripts/heatmap.py --run RUN_DIR --dataset pairs.jsonl --output page.html                      on other pairs
    python scripts/heatmap.py --model_name_or_path MODEL --reward_model DIR --dataset pairs.jsonl --output page.html
    python scripts/heatmap.py --model_name_or_path MODEL --reward_model DIR --policy DIR ...      with a policy of yours
    python scripts/heatmap.py --run RUN_DIR --pairs 3 --terminal weight                       printed, by one quantity

    rhat      r̂, the token's reward, (8a), or the data's own chosen_rewards and rejected_rewards
    f         1 ± α r̂, what the token counts, (8b)
    weight    -∂L/∂log π(y_t), how the loss pushes it, (8d); without a policy at π = π_ref
    shift     log π/π_ref, how far the policy has moved it; with a policy only

All other options are tgdpo.py's. With --run they begin as the run had them, and the policy is the run's model.
heatmap.html is the page without its data; what runs there is that file's one script, whatever the texts hold.
"""
import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch

import tgdpo
import tiny_language
import token_rewards
from common import command, strict
from tgdpo import InputError

# name: (title, the value that gets no colour)
QUANTITIES = {"rhat": ("reward r̂", 0), "f": ("f = 1 ± α r̂", 1), "weight": ("gradient weight −∂L/∂log π", 0),
              "shift": ("shift log π/π_ref", 0)}
SIDES = ("chosen", "rejected")
HERE = "device dtype output_dir resume".split()   # what a run's options say of its machine, not of its numbers
# Characters that a terminal obeys, or that turn text around, as what can be seen; tabs and line breaks stay.
VISIBLE = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {127: "␡"}
VISIBLE |= {c: f"\\{'xu'[c > 255]}{c:x}" for c in (*range(128, 160), *range(0x202a, 0x202f), *range(0x2066, 0x206a))}


# ------------------------------------------------------------------------------------------------------- the numbers
def token_values(rewards, shifts, options):
    """r̂ and ℓ = log π/π_ref of one pair, [chosen, rejected] each -> (its loss, {quantity: [chosen, rejected]})."""
    rhat, shift = [[torch.tensor(row, dtype=torch.float64)[None] for row in both] for both in (rewards, shifts)]
    logps, ref_logps = [l.requires_grad_() for l in shift], [torch.zeros_like(l) for l in shift]        # (1, T) each
    f = [tgdpo.guidance(r, options.alpha, side, options.guidance_floor) for r, side in zip(rhat, (1, -1))]
    loss = tgdpo.tgdpo_loss(*logps, *ref_logps, *rhat, options.beta, options.alpha, options.guidance_floor)[0].sum()
    # (8d)  -∂L/∂log π(y_t) = ± β σ(-φ) f, + on the chosen response: the loss itself is differentiated
    weight = [-gradient for gradient in torch.autograd.grad(loss, logps)]
    return loss.item(), {name: [side[0].tolist() for side in both] for name, both in
                         dict(rhat=rhat, f=f, weight=weight, shift=shift).items()}


def columns(options, pairs, tokenizer, policy):
    """-> (r̂, ℓ), each [chosen, rejected] with one row of numbers for each pair; without a policy ℓ is 0."""
    reference, own = options.ref_model or options.model_name_or_path, "chosen_rewards" in pairs.column_names
    if not (own or options.reward_model):
        raise InputError("no reward model; expected --reward_model, or a --run that trained one, or chosen_rewards and "
                         "rejected_rewards in the data")
    if policy:
        tgdpo.check_vocabulary(policy, tokenizer)
    if own:
        print("token rewards: the data set's own; --reward_model is not used")
        rewards = [pairs[f"{side}_rewards"] for side in SIDES]
    else:   # (8a)  r̂_t = β [ log π_rm - log π_ref ]
        rewards = token_rewards.log_ratio(options.reward_model, reference, pairs, options)
    if policy:   # the same with β = 1
        return rewards, token_rewards.log_ratio(policy, reference, pairs, replace(options, reward_beta=1.0))
    return rewards, [[[0.0] * len(row) for row in side] for side in rewards]


def pieces(tokenizer, prompt_ids, ids):
    """What each token adds to the text: strings that join to the response's text. Of the tokens that make one character
    together the last one gets it, the others "" (a byte alone is no character)."""
    def decode(part):
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    line, found = [*prompt_ids[-1:], *ids], []
    first, last = 0, 1   # the tokens before: many tokenizers drop a space where a text begins
    for end in range(2, len(line) + 1):
        before, text = decode(line[first:last]), decode(line[first:end])
        whole = not text.endswith("\ufffd")
        found.append(text[len(before):].translate(VISIBLE) if whole else "")
        first, last = (last, end) if whole else (first, last)
    return found


def colour_scale(values, neutral):
    """Where colours are full: above 98 % of the distances from neutral, the next 1, 2 or 5 times a power of ten."""
    sizes = sorted(abs(value - neutral) for value in values)
    size = sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1] or 1.0
    power = 10.0 ** math.floor(math.log10(size))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= size * (1 - 1e-9))


def measure(options, policy, most):
    """-> (the page's facts, pairs): of each pair its texts, token by token, and its numbers, to four digits."""
    def short(value):
        return float(f"{value:.4g}")
    tokenizer, data, _ = tgdpo.read_data(options)
    data = data.select(range(min(most, len(data))))
    rewards, shifts = columns(options, data, tokenizer, policy)
    quantities, pairs = [name for name in QUANTITIES if policy or name != "shift"], []
    for i, row in enumerate(data):
        loss, values = token_values([side[i] for side in rewards], [side[i] for side in shifts], options)
        pair = {"row": row["index"], "loss": short(loss)}
        pair["prompt"] = tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False).translate(VISIBLE)
        for k, side in enumerate(SIDES):
            pair[side] = {"tokens": pieces(tokenizer, row["prompt_ids"], row[f"{side}_ids"])}
            pair[side] |= {name: [short(value) for value in values[name][k]] for name in quantities}
        pairs.append(pair)
    models = {"model": options.model_name_or_path, "reference": options.ref_model, "policy": policy,
              "reward model": "the data's own rewards" if "chosen_rewards" in data.column_names
              else options.reward_model}
    numbers = {"beta": options.beta, "alpha": options.alpha, "reward beta": options.reward_beta,
               "guidance floor": options.guidance_floor}
    about = {"pairs": options.dataset} | models | numbers
    facts = {"about": [f"{name} {value}" for name, value in about.items() if value is not None], "quantities": {}}
    for name in quantities:
        title, neutral = QUANTITIES[name]
        scale = colour_scale([value for pair in pairs for side in SIDES for value in pair[side][name]], neutral)
        facts["quantities"][name] = {"title": title, "neutral": neutral, "scale": scale}
    return facts, pairs


# -------------------------------------------------------------------------------------------- the page, the terminal
def as_json(value):
    """JSON that no HTML parser sees anything in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def page(facts, pairs):
    """heatmap.html with its data. The policy lets its own style and script run, known by their hashes, and no other."""
    def digest(tag):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    index = [{"row": pair["row"], "loss": pair["loss"], "peaks": {
        name: max(abs(value - q["neutral"]) for side in SIDES for value in pair[side][name])
        for name, q in facts["quantities"].items()}} for pair in pairs]
    data = [f'<script type="application/json" id="facts">{as_json(facts | {"pairs": index})}</script>']
    data += [f'<script type="application/json" class="pair">{as_json(pair)}</script>' for pair in pairs]
    parts = {"POLICY": f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
                       "base-uri 'none'; form-action 'none'", "DATA": "\n".join(data)}
    return re.sub("@(POLICY|DATA)@", lambda found: parts[found[1]], template)


def paint(text, value, neutral, scale):
    """A token in colour; where colours are not wanted, with its value behind it if that is far from neutral."""
    *lines, last = (text or "◦").split("\n")   # ◦: a part of a character
    lines = [line + "↵" for line in lines] + [last]
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):   # its colours are full at 2
        return "\n".join(line and tiny_language.paint(line, 2 * (value - neutral) / scale) for line in lines)
    return "\n".join(lines) + f"[{value:+.2g}]" * (abs(value - neutral) >= scale / 4)


def print_pairs(facts, pairs, name):
    """The pairs in the terminal, by one quantity."""
    title, neutral, scale = facts["quantities"][name].values()
    print("; ".join(facts["about"]))
    print(f"{title}: blue above {neutral}, orange below, full {scale:g} away from it")
    for pair in pairs:
        print(f"\npair {pair['row']}, loss {pair['loss']}\nprompt    {pair['prompt']}")
        for side in SIDES:
            tokens = zip(pair[side]["tokens"], pair[side][name])
            print(f"{side:10}" + "".join(paint(text, value, neutral, scale) for text, value in tokens))


# --------------------------------------------------------------------------------------------------- the command line
def run_options(folder, rest):
    """A finished run's options, overridden by the flags in rest -> Options; a reward model that it trained is named."""
    file = Path(folder) / "run.json"
    if not file.is_file():
        raise InputError(f"--run {folder} holds no run.json; expected the --output_dir of a finished run of tgdpo.py")
    with tgdpo.reading(str(file)):
        run = json.loads(file.read_text(encoding="utf-8"))
        found, finished = run["options"], run["finished"]
    if not finished:
        raise InputError(f"--run {folder} is not finished; tgdpo.py's --resume --output_dir {folder} goes on with it")
    known = {field.name for field in fields(tgdpo.Options)} - set(HERE)
    options = tgdpo.read_options(
        [f"--{name}={value}" for name, value in found.items() if name in known and value is not None] + rest)
    if options.loss not in ("tgdpo", "dpo"):
        raise InputError(f"--run {folder} was trained by --loss {options.loss}; expected tgdpo, or dpo, where f is 1")
    trained = Path(folder) / "reward_model"
    return replace(options, alpha=options.alpha * (options.loss == "tgdpo"),
                   reward_model=options.reward_model or (str(trained) if trained.is_dir() else None))


def check(mine, options):
    """Raise InputError for what is missing or would be overwritten."""
    if not (mine.output or mine.terminal):
        raise InputError("neither --output nor --terminal; expected --output page.html, or --terminal to print")
    if mine.output and (Path(mine.output).exists() or not mine.output.endswith(".html")):
        raise InputError(f"--output {mine.output} {'exists already' if Path(mine.output).exists() else 'is no .html'}; "
                         "expected the name of a new .html file")
    if mine.pairs < 1:
        raise InputError(f"--pairs is {mine.pairs}; expected at least 1")
    if not options.model_name_or_path:
        raise InputError("--model_name_or_path is missing; expected it, or --run with a finished run of tgdpo.py")
    if mine.terminal == "shift" and not (mine.policy or mine.run):
        raise InputError("--terminal shift needs a policy; expected --policy or --run")
    if mine.output:
        with tgdpo.reading(f"--output {mine.output}"):
            Path(mine.output).parent.mkdir(parents=True, exist_ok=True)


def main(argv):
    """Write the page, or print -> exit status."""
    def work():
        parser = strict(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                                    formatter_class=argparse.RawDescriptionHelpFormatter))
        parser.add_argument("--run", metavar="DIR", help="a finished run of tgdpo.py")
        parser.add_argument("--policy", metavar="DIR", help="a trained model; none: that of --run, or none at all")
        parser.add_argument("--output", metavar="FILE", help="the .html file to write")
        parser.add_argument("--pairs", type=int, default=300, help="how many are shown, from the first; default 300")
        parser.add_argument("--terminal", nargs="?", const="rhat", choices=list(QUANTITIES),
                            help="print, coloured by this quantity; default rhat")
        mine, rest = parser.parse_known_args(argv)
        options = run_options(mine.run, rest) if mine.run else tgdpo.read_options(rest)
        check(mine, options)
        facts, pairs = measure(options, mine.policy or mine.run, mine.pairs)
        if mine.terminal:
            print_pairs(facts, pairs, mine.terminal)
        if mine.output:
            tgdpo.write(Path(mine.output), page(facts, pairs))
            tokens = sum(len(pair[side]["tokens"]) for pair in pairs for side in SIDES)
            size = Path(mine.output).stat().st_size / 1e6
            print(f"{mine.output}: {len(pairs)} pairs, {tokens} response tokens, {size:.1f} MB")
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
