#!/usr/bin/env python3
"""The picture at the top of README.md: one sentence, the true reward of each token, and the DPO model's r̂ for it.

    python scripts/tiny_language.py --output_dir runs/words
    python scripts/front_picture.py --run runs/words          draws scripts/figures/front.svg, says what it shows

The sentence is the first chosen one of the run's pairs that is grammatical, ends, has two parts and at most 12 tokens,
and in which one word earns something and another one costs something. The numbers at the foot of the picture are over
all tokens of all pairs.
"""
import argparse
import sys
from html import escape
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import tgdpo
from common import command, strict
from heatmap import run_options
from tiny_language import tiny_legal, tiny_rewards, tiny_truth
from token_rewards import log_ratio

BLUE, ORANGE, INK, GREY = "#2f7fbf", "#d9730d", "#1a1a1a", "#767676"   # above 0, below 0
LEFT, STEP, UNIT, ROWS = 150, 60, 46, (92, 246)   # of the columns; pixels for a reward of 1; the two lines of zero


def measure(folder):
    """A run of tiny_language.py -> (words, true rewards, r̂ of one sentence; facts about all pairs)."""
    options = run_options(folder, [])
    tokenizer = tgdpo.load_tokenizer(options.model_name_or_path)
    rows = tgdpo.load_rows(options.dataset, None)
    pairs, _ = tgdpo.tokenize(rows, tokenizer, options.max_length, options.dataset)
    rhat = log_ratio(options.reward_model, options.model_name_or_path, pairs, options)
    truth = [tiny_truth(tokenizer, pairs["prompt_ids"], pairs[side]) for side in tgdpo.IDS]
    ids = [i for side in tgdpo.IDS for row in pairs[side] for i in row]
    tokens = list(zip(tokenizer.convert_ids_to_tokens(ids), [x for side in rhat for row in side for x in row],
                      [x for side in truth for row in side for x in row]))
    stops = [value for word, value, worth in tokens if word == "." and worth == 0]
    worthless = sum(abs(value) for _, value, worth in tokens if worth == 0)
    facts = {"stops": len(stops), "stop": sum(stops) / len(stops),
             "worthless": worthless / sum(abs(value) for _, value, _ in tokens)}
    for n, chosen in enumerate(pairs["chosen_ids"]):
        words, noun = tokenizer.convert_ids_to_tokens(chosen), tokenizer.decode(pairs[n]["prompt_ids"][2])
        worth = tiny_rewards(noun, words)
        short = words.count("and") == 1 and len(words) <= 12 and words[-1] == "<eos>"
        if short and all(tiny_legal(noun, words)) and min(worth) < 0 < max(worth):
            return words, worth, rhat[0][n], facts | {"row": pairs[n]["index"]}
    raise tgdpo.InputError(f"{folder}: no such sentence; expected a run of scripts/tiny_language.py")


def text(x, y, words, size=15, colour=INK, more='text-anchor="middle"'):
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" {more}>{escape(words)}</text>'


def bars(values, zero):
    """A row of bars, up and blue or down and orange, with their numbers."""
    parts = [f'<line x1="{LEFT}" x2="{LEFT + STEP * len(values)}" y1="{zero}" y2="{zero}" stroke="{GREY}"/>']
    for n, value in enumerate(values):
        x, size = LEFT + STEP * n, abs(value) * UNIT
        top, colour = (zero - size, BLUE) if value > 0 else (zero, ORANGE)
        parts.append(f'<rect x="{x + 10}" y="{top:.1f}" width="{STEP - 20}" height="{size:.1f}" fill="{colour}"/>')
        number = "0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")
        below = number != "0" and value < 0
        parts.append(text(x + STEP / 2, zero + size + 15 if below else zero - size - 5, number, 13,
                          GREY if number == "0" else INK))
    return parts


def picture(words, truth, rhat, facts):
    """The SVG, as text."""
    width, stop = LEFT + STEP * len(words) + 10, LEFT + STEP * words.index(".")
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 342" width="{width}" height="342" '
             'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" role="img">',
             "<title>The true reward of each token of one sentence, and the DPO model's r̂ of the same tokens</title>",
             f'<rect width="{width}" height="342" rx="8" fill="#fff"/>',
             f'<rect x="{stop + 3}" y="14" width="{STEP - 6}" height="292" rx="6" fill="#fdf3e7" stroke="{ORANGE}" '
             'stroke-dasharray="4 3"/>', text(stop + STEP / 2, 30, "full stop", 11)]
    for zero, title, line in zip(ROWS, ("true reward", "DPO model's r̂"), ("what a token is worth",
                                                                           "β log π_rm / π_ref")):
        parts += [text(12, zero - 4, title, 15, INK, 'font-weight="bold"'), text(12, zero + 14, line, 12, GREY, "")]
    parts += bars(truth, ROWS[0]) + bars(rhat, ROWS[1])
    parts += [text(LEFT + STEP * (n + 0.5), 174, word, 16, INK, 'text-anchor="middle" font-weight="bold"')
              for n, word in enumerate(words)]
    foot = (f"All pairs: the full stop is worth 0 and gets {facts['stop']:+.2f} on average; "
            f"{facts['worthless']:.0%} of all |r̂| lies on tokens that are worth 0.").replace("-", "−")
    return "\n".join([*parts, text(12, 330, foot, 13, INK, ""), "</svg>", ""])


def main(argv):
    """Draw it -> exit status."""
    parser = strict(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--run", required=True, metavar="DIR", help="a finished run of scripts/tiny_language.py")
    parser.add_argument("--output", default=str(Path(__file__).resolve().parent / "figures" / "front.svg"),
                        metavar="FILE", help="default scripts/figures/front.svg")

    def work():
        mine = parser.parse_args(argv)
        words, truth, rhat, facts = measure(mine.run)
        Path(mine.output).parent.mkdir(parents=True, exist_ok=True)
        tgdpo.write(Path(mine.output), picture(words, truth, rhat, facts))
        print(f"{mine.output}: row {facts['row']} of the pairs; {facts['stops']} full stops that are worth 0")
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
