#!/usr/bin/env python3
"""Token rewards from other sources than tgdpo.py's own, written as the columns that it trains on.

    python scripts/token_rewards.py --source log_ratio --centre --model_name_or_path MODEL --reward_model DPO_MODEL \\
        --dataset pairs.jsonl --output rewarded.jsonl
    python scripts/token_rewards.py --source classifier --reward_model CLASSIFIER --scale ...
    python tgdpo.py --model_name_or_path MODEL --dataset rewarded.jsonl

log_ratio is tgdpo.py's own r̂, (8a); classifier is an AutoModelForTokenClassification with one label, whose score at a
token is that token's reward. What T-REG's contrastive prompts say is written by scripts/treg.py. All other options are
tgdpo.py's. Then, in this order:

    --centre         less its mean under the reference in each state (log_ratio only), (10c)
    --keep SHARE     0 but for this share of the tokens, those with the largest |r̂|
    --scale          divided by its root mean square, so that one alpha means the same for every data set

A frozen weight w >= 0 of your own for each token, as other papers have, becomes such columns, too: (w - 1) / alpha as
chosen_rewards and (1 - w) / alpha as rejected_rewards make f = w on both sides, at that --alpha.
"""
import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch

import tgdpo
from common import check_output, columns_of, command, strict, write_rewards
from rto import read_scorer


# ------------------------------------------------------------------------------------------------------- the sources
# A source returns [chosen, rejected], each a list with one list of numbers for each pair: what tgdpo.add_columns takes.
def log_ratio(name, reference, pairs, options):
    """tgdpo.py's own r̂ of a reward model against the reference, in units of β."""
    pairs = pairs.select_columns(["prompt_ids", *tgdpo.IDS])
    for column, model in (("ref_logps", reference), ("rm_logps", name)):
        pairs = tgdpo.annotate(pairs, column, model, options)
    pairs = tgdpo.add_token_rewards(pairs, options.reward_beta or options.beta)
    return [[*pairs[f"{side}_rewards"]] for side in tgdpo.SIDES]


def classifier(name, pairs, options):
    """Scores of a token classifier at the tokens themselves, which stand one place after the state before them."""
    model = read_scorer("token", name, options).to(options.device)

    def scores(batch):
        with torch.autocast(model.device.type, getattr(torch, options.dtype), enabled=options.dtype != "float32"):
            table = model(input_ids=batch["input_ids"], use_cache=False).logits[..., 0]             # (N, T)
        return tgdpo.in_rows(table.float().flatten()[batch["states"] + 1], batch)
    return columns_of(scores, pairs, options, f"score: {name}")


def reference_means(name, reference, pairs, options):
    """E_{a~π_ref}[ r̂(s,a) ] in the state before each response token, over the whole vocabulary, (10a)."""
    models = [tgdpo.load_model(model, options) for model in (name, reference)]
    beta = options.reward_beta or options.beta

    def means(batch):
        outputs = [tgdpo.decoder(model)(input_ids=batch["input_ids"], use_cache=False) for model in models]
        hidden = [output.last_hidden_state.flatten(0, 1)[batch["states"]] for output in outputs]    # (M, H)
        parts, size = [], tgdpo.logits_rows(models[1], hidden[0].device)
        for chunks in zip(*[h.split(size) for h in hidden]):
            judge, ref = [tgdpo.head_logits(model, h, type(output)).float().log_softmax(-1)         # (M, V)
                          for model, h, output in zip(models, chunks, outputs)]
            parts.append((ref.exp() * tgdpo.token_rewards(judge, ref, beta)).sum(-1))
        return tgdpo.in_rows(torch.cat(parts), batch)
    return columns_of(means, pairs, options, "means under the reference")


# --------------------------------------------------------------------------------------------- what is done with them
def centre(columns, means):
    """r̂ without its mean under the reference in each state."""
    # (10c)  r̂'(s,a) = r̂(s,a) - E_{a~π_ref}[ r̂(s,a) ]
    return [[[value - mean for value, mean in zip(*both)] for both in zip(*side)] for side in zip(columns, means)]


def keep(columns, share):
    """r̂ where |r̂| is among the largest `share` of all tokens, else 0."""
    sizes = sorted((abs(value) for side in columns for row in side for value in row), reverse=True)
    least = sizes[max(1, round(share * len(sizes))) - 1]
    return [[[value if abs(value) >= least else 0.0 for value in row] for row in side] for side in columns]


def scale(columns):
    """r̂ divided by its root mean square over all response tokens of the data."""
    values = torch.tensor([value for side in columns for row in side for value in row], dtype=torch.float64)
    size = values.square().mean().sqrt().item() or 1.0
    return [[[value / size for value in row] for row in side] for side in columns]


# --------------------------------------------------------------------------------------------------- the command line
def main(argv):
    """Write a data set with token rewards -> exit status."""
    parser = strict(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--source", choices=("log_ratio", "classifier"), required=True)
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    parser.add_argument("--centre", action="store_true")
    parser.add_argument("--keep", type=float, default=1.0, metavar="SHARE")
    parser.add_argument("--scale", action="store_true")

    def work():
        mine, rest = parser.parse_known_args(argv)
        options = tgdpo.read_options(rest)
        check_output(mine.output)
        tgdpo.need(options.model_name_or_path and options.reward_model,
                   "--model_name_or_path or --reward_model is missing; expected both")
        tgdpo.need(0 < mine.keep <= 1, f"--keep is {mine.keep:g}; expected a share above 0 and at most 1")
        tgdpo.need(not mine.centre or mine.source == "log_ratio",
                   "--centre needs --source log_ratio: other sources have no mean under the reference")
        rows = tgdpo.load_rows(options.dataset, options.dataset_split)
        tokenizer, pairs, _ = tgdpo.read_data(options)
        reference = options.ref_model or options.model_name_or_path
        if mine.source == "classifier":
            columns = classifier(options.reward_model, pairs, options)
        else:
            columns = log_ratio(options.reward_model, reference, pairs, options)
        if mine.centre:
            columns = centre(columns, reference_means(options.reward_model, reference, pairs, options))
        columns = keep(columns, mine.keep)
        write_rewards(mine.output, rows, pairs, scale(columns) if mine.scale else columns, tokenizer)
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
