#!/usr/bin/env python3
"""Every token of every pair, coloured by what TGDPO makes of it: one HTML page without a network, or the terminal.

    python scripts/heatmap.py --run RUN_DIR --output page.html              a finished run of tgdpo.py, on its own pairs
    python scripts/heatmap.py --run RUN_DIR --dataset pairs.jsonl --output page.html                      on other pairs
    python scripts/heatmap.py --model_name_or_path MODEL --reward_model DIR --dataset pairs.jsonl --output page.html
    python scripts/heatmap.py --run RUN_DIR --pairs 3 --terminal force                        printed, by one quantity

    rhat      r̂, the token's reward, (8a), or the data's own chosen_rewards and rejected_rewards
    truth     the token's true reward; only in the two tiny languages, where it is known
    f         1 ± α r̂, how much the token counts, (8b); computed by tgdpo.guidance, whatever that is
    force     -∂L/∂log π(y_t), (8d), divided by what DPO has in the same pair; without a policy at π = π_ref
    shift     log π/π_ref, how far the policy has moved it; with a policy only

All other options are tgdpo.py's. With --run they begin as the run had them, and the policy is the run's model. Relative
paths of the run are found from any working directory. In the true_rewards run of a tiny run r̂ is the truth. A slider
in the page changes α: f and the force at π_ref are recomputed by f = 1 ± α r̂. heatmap.html is the page without its
data; what runs there is that file's one script, whatever the texts hold.
"""
import argparse
import base64
import hashlib
import inspect
import json
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch

import tgdpo
import tiny_language
import token_rewards
from common import command, strict

# name: (title, the value that gets no colour, what its colours say)
QUANTITIES = {
    "rhat": ("reward r̂", 0, "The token's reward by the reward model, or in the data: blue good, orange bad."),
    "truth": ("true reward", 0, "What the token is really worth in this language: blue earns, orange costs."),
    "f": ("guidance f", 1, "How much the token counts, 1 in DPO: blue more, orange less. Dashed: f is 0 or below, it "
                           "counts for nothing or the wrong way."),
    "force": ("force", 1, "How hard the loss pushes the token, where 1 is DPO's push in the same pair: blue harder, "
                          "orange less hard, below 0 the wrong way."),
    "shift": ("shift", 0, "log π/π_ref, what training did to the token: blue made likelier, orange less likely.")}
SIDES = ("chosen", "rejected")
HERE = "device dtype output_dir resume".split()   # what a run's options say of its machine, not of its numbers
PATHS = "model_name_or_path ref_model reward_model dataset cache_dir".split()
# Characters that a terminal obeys, or that turn text around, as what can be seen; tabs and line breaks stay.
VISIBLE = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\t\n"} | {127: "␡"}
VISIBLE |= {c: f"\\{'xu'[c > 255]}{c:x}" for c in (*range(128, 160), *range(0x202a, 0x202f), *range(0x2066, 0x206a))}


# ------------------------------------------------------------------------------------------------------- the numbers
def token_values(rewards, shifts, options):
    """r̂ and ℓ = log π/π_ref of one pair, [chosen, rejected] each -> (its loss, DPO's push on a chosen token,
    {quantity: [chosen, rejected]})."""
    rhat, shift = [[torch.tensor(row, dtype=torch.float64)[None] for row in both] for both in (rewards, shifts)]
    logps = [l.requires_grad_() for l in shift]   # (1, T) each
    f = [tgdpo.guidance(r, options.alpha, side, options.guidance_floor) for r, side in zip(rhat, (1, -1))]
    four = (*logps, *[torch.zeros_like(l) for l in shift])
    loss = tgdpo.tgdpo_loss(*four, *rhat, options.beta, options.alpha, options.guidance_floor)[0].sum()
    # (8d)  -∂L/∂log π(y_t) = ± β σ(-φ) f, + on the chosen response; DPO's has f = 1: both losses are differentiated
    dpo = -torch.autograd.grad(tgdpo.dpo_loss(*four, options.beta)[0].sum(), logps)[0][0, 0].clamp(max=-1e-300)
    force = [-side * gradient / dpo for side, gradient in zip((1, -1), torch.autograd.grad(loss, logps))]
    return loss.item(), dpo.item(), {name: [side[0].tolist() for side in both] for name, both in
                                     dict(rhat=rhat, f=f, force=force, shift=shift).items()}


def true_rewards(tokenizer, pairs):
    """The true reward of each token, [chosen, rejected], in pairs of one of the two tiny languages; else None."""
    words, sides = tokenizer.get_vocab(), [pairs[ids] for ids in tgdpo.IDS]
    if words == tiny_language.tiny_tokenizer(8).get_vocab():
        nouns = {words[noun] for noun in tiny_language.NOUNS}
        if all(len(prompt) == 4 and prompt[2] in nouns for prompt in pairs["prompt_ids"]):
            return [tiny_language.tiny_truth(tokenizer, pairs["prompt_ids"], side) for side in sides]
    elif len(words) == 3 and {*words} == {*" ".join(tgdpo.RESPONSES).split()}:
        known, worth = tokenizer(tgdpo.RESPONSES).input_ids, tgdpo.along(tgdpo.SMALL_REWARD, tgdpo.SMALL_LANGUAGE)
        if all(ids in known for side in sides for ids in side):
            return [[worth[known.index(ids)][:len(ids)].tolist() for ids in side] for side in sides]
    return None


def columns(options, pairs, tokenizer, policy, truth):
    """-> (r̂, ℓ, where r̂ is from); r̂ and ℓ are [chosen, rejected] as truth is; without a policy ℓ is 0."""
    reference, source = options.ref_model or options.model_name_or_path, options.reward_model
    if policy:
        tgdpo.check_vocabulary(policy, tokenizer)
    if "chosen_rewards" in pairs.column_names:
        source = "the data's own rewards"
        print("token rewards: the columns chosen_rewards, rejected_rewards; no --reward_model is used")
        rewards = [pairs[f"{side}_rewards"] for side in SIDES]
    elif source:   # (8a)  r̂_t = β [ log π_rm - log π_ref ]
        rewards = token_rewards.log_ratio(source, reference, pairs, options)
    else:
        tgdpo.need(truth, "no reward model; expected --reward_model, or a --run that trained one, or chosen_rewards "
                   "and rejected_rewards in the data")
        source, rewards = "the true rewards", truth
        print("token rewards: the true ones")
    shifts = [[[0.0] * len(row) for row in side] for side in rewards]
    if policy:   # the same with β = 1
        shifts = token_rewards.log_ratio(policy, reference, pairs, replace(options, reward_beta=1.0))
    return rewards, shifts, source


def guidance_facts(options, run, scale):
    """What the page says of tgdpo.guidance, and what its slider needs; no slider where f is not 1 ± α r̂."""
    f, rhat, floor = tgdpo.guidance, torch.linspace(-9, 9, 37, dtype=torch.float64)[None], options.guidance_floor
    plain = all(torch.allclose(f(rhat, alpha, side, least), (1 + side * alpha * rhat).clamp(min=least or -math.inf))
                for alpha in (0.1, 1.0) for side in (1, -1) for least in (None, 0.5))
    text, same = f"f = 1 ± α r̂, α = {options.alpha:g}, " + (f"at least {floor:g}" if floor else "no floor"), not run
    with suppress(OSError, TypeError):   # what was typed in has no source
        same = same or tgdpo.read_record(Path(run)).get("code") == tgdpo.code_fingerprint(options.loss)
        f = inspect.getsource(f).strip()
    if not plain:
        text = f"another function than f = 1 ± α r̂, so there is no slider. α = {options.alpha:g}, floor {floor}.\n{f}"
    if not same:
        text += "\nThe run had another version of tgdpo.py or of guidance; the numbers here are by the present one."
    slider = dict(alpha=options.alpha, floor=floor, beta=options.beta, top=10 * options.alpha or 2 / scale)
    return {"text": text, "slider": slider if plain else None}


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


def measure(options, policy, most, run=None):
    """-> (the page's facts, pairs): of each pair its texts, token by token, and its numbers, to four digits."""
    def short(value):
        return float(f"{value:.4g}")
    tokenizer, data, _ = tgdpo.read_data(options)
    data = data.select(range(min(most, len(data))))
    truth, pairs, quantities = true_rewards(tokenizer, data), [], dict(QUANTITIES)
    rewards, shifts, source = columns(options, data, tokenizer, policy, truth)
    if truth and truth == [[[*map(float, row)] for row in side] for side in rewards]:
        quantities["rhat"], truth = quantities["truth"], None   # they would be shown twice
    for name, there in (("shift", policy), ("truth", truth)):
        there or quantities.pop(name)
    for i, row in enumerate(data):
        loss, dpo, values = token_values([side[i] for side in rewards], [side[i] for side in shifts], options)
        values["truth"] = [side[i] for side in truth or ()]
        pair = {"row": row["index"], "loss": short(loss), "dpo": short(dpo)}
        pair["prompt"] = tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False).translate(VISIBLE)
        for k, side in enumerate(SIDES):
            pair[side] = {"tokens": pieces(tokenizer, row["prompt_ids"], row[f"{side}_ids"])}
            pair[side] |= {name: [short(value) for value in values[name][k]] for name in quantities}
        pairs.append(pair)
    about = {"pairs": options.dataset, "model": options.model_name_or_path, "reference": options.ref_model,
             "policy": policy, "rewards by": source, "beta": options.beta, "reward beta": options.reward_beta}
    facts = {"about": [f"{name} {value}" for name, value in about.items() if value is not None], "quantities": {}}
    for name, (title, neutral, words) in quantities.items():
        scale = colour_scale([value for pair in pairs for side in SIDES for value in pair[side][name]], neutral)
        facts["quantities"][name] = {"title": title, "neutral": neutral, "scale": scale, "words": words}
    return facts | {"guidance": guidance_facts(options, run, facts["quantities"]["rhat"]["scale"])}, pairs


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
    for about, pair in zip(index, pairs if "truth" in facts["quantities"] else ()):
        missed = [abs(r - t) for side in SIDES for r, t in zip(pair[side]["rhat"], pair[side]["truth"])]
        about["peaks"]["differ"] = max(missed)
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
    """The pairs in the terminal, by one quantity; in the tiny languages r̂ and the truth on adjacent lines."""
    lines = ["rhat", "truth"] if name == "rhat" and "truth" in facts["quantities"] else [name]
    print("; ".join(facts["about"]), facts["guidance"]["text"], sep="\n")
    for line in lines:
        title, neutral, scale, words = facts["quantities"][line].values()
        print(f"{title}: {words} No colour at {neutral}, full {scale:g} away from it.")
    for pair in pairs:
        print(f"\npair {pair['row']}, loss {pair['loss']}\nprompt    {pair['prompt']}")
        for side in SIDES:
            for line in lines:
                tokens, (_, neutral, scale, _) = pair[side]["tokens"], facts["quantities"][line].values()
                print(f"{side if line == name else '  ' + line:10}"
                      + "".join(paint(text, value, neutral, scale) for text, value in zip(tokens, pair[side][line])))


# --------------------------------------------------------------------------------------------------- the command line
def beside(folder, output_dir, value):
    """A path in a run's options, when the run began in another working directory or its folder has been moved: where it
    lies, seen from the folder, as it lay seen from output_dir. What is not there, such as a model's name, stays."""
    there = Path(os.path.normpath(Path(folder).resolve() / os.path.relpath(value, output_dir)))
    here = Path(value).exists() and (Path(value).is_absolute() or Path(value).resolve() == there)
    return str(there) if there.exists() and not here else value


def run_options(folder, rest):
    """A finished run's options, overridden by the flags in rest -> Options; a reward model that it trained is named."""
    file, trained = Path(folder) / "run.json", Path(folder) / "reward_model"
    tgdpo.need(file.is_file(), f"--run {folder} holds no run.json; expected the --output_dir of a finished run of "
               "tgdpo.py")
    with tgdpo.reading(str(file)):
        run = json.loads(file.read_text(encoding="utf-8"))
        found, finished = run["options"], run["finished"]
    tgdpo.need(finished, f"--run {folder} is not finished; tgdpo.py's --resume --output_dir {folder} goes on with it")
    known = {field.name for field in fields(tgdpo.Options)} - set(HERE)
    found = {name: value for name, value in found.items() if name in known and value is not None}
    found |= {name: beside(folder, run["options"]["output_dir"], found[name]) for name in PATHS if name in found}
    options = tgdpo.read_options([f"--{name}={value}" for name, value in found.items()] + rest)
    tgdpo.need(options.loss in ("tgdpo", "dpo"),
               f"--run {folder} was trained by --loss {options.loss}; expected tgdpo, or dpo, where f is 1")
    return replace(options, alpha=options.alpha * (options.loss == "tgdpo"),
                   reward_model=options.reward_model or (str(trained) if trained.is_dir() else None))


def check(mine, options):
    """Raise InputError for what is missing or would be overwritten."""
    file, need = mine.output or "", tgdpo.need
    need(file or mine.terminal, "neither --output nor --terminal; expected --output page.html, or --terminal to print")
    found = "exists already" if Path(file).exists() else "is no .html"
    need(not file or file.endswith(".html") and not Path(file).exists(),
         f"--output {file} {found}; expected the name of a new .html file")
    need(mine.pairs > 0, f"--pairs is {mine.pairs}; expected at least 1")
    need(options.model_name_or_path,
         "--model_name_or_path is missing; expected it, or --run with a finished run of tgdpo.py")
    need(mine.terminal != "shift" or mine.policy or mine.run,
         "--terminal shift needs a policy; expected --policy or --run")
    if file:
        with tgdpo.reading(f"--output {file}"):
            Path(file).parent.mkdir(parents=True, exist_ok=True)


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
        facts, pairs = measure(options, mine.policy or mine.run, mine.pairs, mine.run)
        if mine.terminal:
            tgdpo.need(mine.terminal in facts["quantities"], f"--terminal {mine.terminal}: these pairs do not have it; "
                       f"expected one of {', '.join(facts['quantities'])}")
            print_pairs(facts, pairs, mine.terminal)
        if mine.output:
            tgdpo.write(Path(mine.output), page(facts, pairs))
            tokens = sum(len(pair[side]["tokens"]) for pair in pairs for side in SIDES)
            size = Path(mine.output).stat().st_size / 1e6
            print(f"{mine.output}: {len(pairs)} pairs, {tokens} response tokens, {size:.1f} MB")
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
