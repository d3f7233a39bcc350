#!/usr/bin/env python3
"""The tokens of a row of pairs, and the numbers that the row has for them: for token rewards of your own.

    python scripts/show_tokens.py --model_name_or_path MODEL --dataset pairs.jsonl --row 3

chosen_rewards and rejected_rewards need one number for each token of the response, its end token included. A line is a
token: its place, its id, its text, and the row's numbers. Of tokens that make one character together the last one has
it. Nothing is cut to --max_length here: tgdpo.py cuts the tokens and their numbers together.
"""
import argparse
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import tgdpo
from common import command, strict, whole_tokens
from heatmap import pieces


def show(own):
    """Print the prompt and both responses; then refuse numbers that do not fit, as tgdpo.py does."""
    rows, tokenizer = tgdpo.load_rows(own.dataset, own.dataset_split), tgdpo.load_tokenizer(own.model_name_or_path)
    tgdpo.need(0 <= own.row < len(rows), f"--row is {own.row}; {own.dataset} has 0 to {len(rows) - 1}")
    row = rows[own.row]
    try:
        prompt, responses = whole_tokens(row, tokenizer)
        tgdpo.need(responses[0] != responses[1], "identical responses")
    except tgdpo.InputError as e:
        raise tgdpo.InputError(f"row {own.row} of {own.dataset} is not used in training: {e}") from e
    names = sorted({name.split("_", 1)[1] for name in row if re.match("(chosen|rejected)_.", name)
                    and (name.endswith("_rewards") or tgdpo.is_numbers(row[name]))})
    for side, ids in zip(("prompt", *tgdpo.SIDES), (prompt, *responses)):
        columns = {name: row.get(f"{side}_{name}") for name in names if side != "prompt"}
        columns = {name: values if isinstance(values, list) else [] for name, values in columns.items()}
        print(f"\n{side}: {len(ids)} tokens", *(f"{len(values)} {name}" for name, values in columns.items()), sep=", ")
        texts = pieces(tokenizer, [] if side == "prompt" else prompt, ids)
        texts = [tokenizer.decode(ids[:1])] * (len(ids) - len(texts)) + texts   # nothing stands before the prompt
        for place, (i, text) in enumerate(zip(ids, map(repr, texts))):
            numbers = [f"  {name} {values[place] if place < len(values) else '-'}" for name, values in columns.items()]
            print(f"{place:5} {i:7}  {text:18}{''.join(numbers)}".rstrip())
    for name in names:
        for side, ids in zip(tgdpo.SIDES, responses):
            tgdpo.own_numbers(row, own.row, f"{side}_{name}", ids, tokenizer)


def main(argv):
    """The command line -> exit status: 0; 2 for input that cannot be used, such as numbers that do not fit."""
    parser = strict(argparse.ArgumentParser(prog="show_tokens.py", description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--model_name_or_path", required=True, help="whose tokenizer it is")
    parser.add_argument("--dataset", required=True, help="pairs, as tgdpo.py reads them")
    parser.add_argument("--dataset_split", default="train", help="of a data set that has several")
    parser.add_argument("--row", type=int, default=0, help="number of the row, from 0 as tgdpo.py counts (0)")
    return command(lambda: show(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
