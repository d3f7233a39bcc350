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
"""
import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from tqdm import tqdm

import rto
import tgdpo
from tgdpo import InputError


# ------------------------------------------------------------------------------------------------------- the sources
# A source returns [chosen, rejected], each a list with one list of numbers for each pair: what tgdpo.add_columns takes.
def log_ratio(name, reference, pairs, options):
    """tgdpo.py's own r̂ of a reward model against the reference, in units of β."""
    logps = [tgdpo.annotate(model, pairs, options, f"annotate: {model}") for model in (name, reference)]
    return [[tgdpo.implicit_reward(*row, options.reward_beta or options.beta) for row in zip(*side)]
            for side in zip(*logps)]


@torch.no_grad()
def classifier(name, pairs, options):
    """Scores of a token classifier at the tokens themselves, which stand one column after the state before them."""
    model = rto.read_scorer("token", name, options).to(options.device)
    return columns_of(lambda batch: rto.token_scores(model, batch, batch["states"] + batch["mask"], options), pairs,
                      options, f"score: {name}")


@torch.no_grad()
def reference_means(name, reference, pairs, options):
    """E_{a~π_ref}[ r̂(s,a) ] in the state before each response token, over the whole vocabulary, (10a)."""
    models = [tgdpo.load_model(model, options) for model in (name, reference)]

    def means(batch):
        mask = batch["mask"]
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
        outputs = [model.get_decoder()(input_ids=batch["input_ids"], use_cache=False) for model in models]
        hidden = [output.last_hidden_state[rows[mask], batch["states"][mask]] for output in outputs]    # (M, H)
        parts, size = [], max(1, tgdpo.LOGITS_BYTES // (4 * models[1].config.get_text_config().vocab_size))
        for chunks in zip(*[h.split(size) for h in hidden]):
            judge, ref = [tgdpo.head_logits(model, h, type(output)).float().log_softmax(-1)             # (M, V)
                          for model, h, output in zip(models, chunks, outputs)]
            parts.append((ref.exp() * (judge - ref)).sum(-1))
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(parts))
    columns = columns_of(means, pairs, options, "means under the reference")
    beta = options.reward_beta or options.beta
    return [[[beta * value for value in row] for row in side] for side in columns]


def columns_of(values, pairs, options, title):
    """values(batch) -> (N, R), over all pairs in the plain layout -> columns."""
    columns = [[None] * len(pairs), [None] * len(pairs)]
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    for group in tqdm(tgdpo.passes(pairs, options), desc=title, disable=None):
        rows = pairs.select_columns(names)[group]
        table = values(tgdpo.collate(rows, options.device)).cpu().tolist()
        for k, i in enumerate(group):
            for j, name in enumerate(names[1:]):
                columns[j][i] = table[k + j * len(group)][:len(rows[name][k])]
    return columns


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


# ---------------------------------------------------------------------------------------------------------- the files
def check_output(file):
    """Raise InputError unless a .jsonl file can be made there."""
    if Path(file).exists() or not str(file).endswith(".jsonl"):
        raise InputError(f"--output {file} {'exists already' if Path(file).exists() else 'is no .jsonl file'}; "
                         "expected the name of a new .jsonl file")
    with tgdpo.reading(f"--output {file}"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def write_rewards(file, rows, pairs, columns, tokenizer):
    """Write the usable rows with chosen_rewards and rejected_rewards. A response that --max_length cut gets 0 for the
    tokens that nobody judged; how many such responses there are is said."""
    lines, cut = [], 0
    for pair, *rewards in zip(pairs, *columns):
        row = rows[pair["index"]]
        turns, *texts = tgdpo.read_pair(row, tokenizer.chat_template is not None)
        whole = tgdpo.encode(tokenizer, turns, texts)[1]
        cut += sum(len(ids) > len(values) for ids, values in zip(whole, rewards))
        both = [[*values] + [0.0] * (len(ids) - len(values)) for ids, values in zip(whole, rewards)]
        lines.append(json.dumps(row | dict(zip(("chosen_rewards", "rejected_rewards"), both)), default=str) + "\n")
    tgdpo.write(Path(file), "".join(lines))
    print(f"{file}: {len(lines)} pairs with token rewards"
          + f"; {cut} responses are longer than --max_length, their last tokens have reward 0" * bool(cut))


def main(argv):
    """Write a data set with token rewards -> exit status."""
    parser = rto.strict(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
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
        if not (options.model_name_or_path and options.reward_model):
            raise InputError("--model_name_or_path or --reward_model is missing; expected both")
        if not 0 < mine.keep <= 1:
            raise InputError(f"--keep is {mine.keep:g}; expected a share above 0 and at most 1")
        if mine.centre and mine.source != "log_ratio":
            raise InputError("--centre needs --source log_ratio: other sources have no mean under the reference")
        rows = tgdpo.load_rows(options.dataset, options.dataset_split)
        tokenizer, pairs, _ = tgdpo.read_data(options)
        reference = options.ref_model or options.model_name_or_path
        tgdpo.check_models([reference, options.reward_model], tokenizer, pairs)
        if mine.source == "classifier":
            columns = classifier(options.reward_model, pairs, options)
        else:
            columns = log_ratio(options.reward_model, reference, pairs, options)
        if mine.centre:
            columns = centre(columns, reference_means(options.reward_model, reference, pairs, options))
        columns = keep(columns, mine.keep)
        write_rewards(mine.output, rows, pairs, scale(columns) if mine.scale else columns, tokenizer)
    return rto.command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
