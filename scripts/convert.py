#!/usr/bin/env python3
"""Preference pairs in other layouts -> the one form that tgdpo.py reads: prompt, chosen, rejected.

    python scripts/convert.py theirs.json pairs.jsonl
    python scripts/convert.py theirs.csv pairs.jsonl
    python scripts/convert.py CLONED_DIRECTORY pairs.jsonl --split test
    python scripts/convert.py hh.jsonl.gz pairs.jsonl --plain        for a model without a chat template

It reads what tgdpo.py reads, .csv and .tsv files, directories of parquet or JSON files, and JSON
files that have their rows under a key. Of a row it reads

    the prompt      prompt, conversations, messages, instruction, question or input; the first that
                    is not empty. An input beside an instruction is its second part.
    before it       system, a text; history, a list of [question, answer]
    the answers     chosen and rejected: text, messages, or whole conversations with the prompt
    as one text     messages as JSON or as Python prints them; transcripts with Human: and Assistant:

Each becomes a list of messages. With --plain a transcript stays a text, up to its last Assistant:.
Columns chosen_NAME and rejected_NAME with lists of numbers are kept. What cannot be used is dropped,
counted by reason and reported; so are columns that are not used.
"""
import argparse
import ast
import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import datasets
from tqdm import tqdm

import tgdpo
from common import check_output, command, strict
from tgdpo import SIDES, InputError, need

PROMPTS = "prompt conversations messages instruction question input".split()  # in this order
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]")  # as one text
NOT_TEXT = "tools images videos audios".split()
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)


def read_rows(name, split):
    """The rows of a file or data set, as they stand there."""
    file = Path(name)
    if file.suffix in (".csv", ".tsv"):
        with tgdpo.reading(f"{name}"), open(file, newline="", encoding="utf-8-sig") as stream:
            csv.field_size_limit(2**31 - 1)
            return list(csv.DictReader(stream, delimiter="," if file.suffix == ".csv" else "\t"))
    saved = any((file / own).exists() for own in ("dataset_dict.json", "state.json"))
    if file.is_dir() and not saved:
        with tgdpo.reading(f"the directory {name}, split {split},"):
            return datasets.load_dataset(name, split=split)
    return unwrap(tgdpo.load_rows(name, split), split)


def unwrap(rows, split):
    """Rows under a key, {"data": [...]} or {split: [...]}, and rows of which each is {"row": {...}}."""
    if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict):
        lists = {key: value for key, value in rows[0].items()
                 if isinstance(value, list) and value and isinstance(value[0], dict)}
        if "chosen" not in rows[0] and lists:
            need(len(lists) == 1 or split in lists, f"rows under the keys {', '.join(lists)}; "
                 "expected one of them as --split")
            rows = lists.get(split) or [*lists.values()][0]
    return [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row
            for row in rows]


def written_out(value):
    """Messages that were written as one text -> messages; all else as it is."""
    if isinstance(value, str) and MESSAGES.match(value):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value)
            except (ValueError, SyntaxError):
                pass
        raise InputError("messages as one text that is neither JSON nor Python")
    if isinstance(value, str) and TRANSCRIPT.match(value):
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value.strip())[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [{"role": roles[who], "content": text.strip()}
                for who, text in zip(parts[::2], parts[1::2])]
    return value


def plain_pair(row):
    """A row of two transcripts -> the texts up to the last Assistant: and behind it, as messages."""
    both = [row[side].rpartition("\n\nAssistant:") for side in SIDES]
    need(both[0][0] == both[1][0], "chosen and rejected differ before their last message")
    prompt = both[0][0] + both[0][1]
    need(all(answer.strip() for _, _, answer in both), "an empty response")
    return [{"role": "user", "content": prompt}], [
        {"role": "assistant", "content": answer} for _, _, answer in both]


def before_prompt(row):
    """The turns that system and history add."""
    system, history = row.get("system"), row.get("history") or []
    need(isinstance(system or "", str), "a system column that is no text")
    good = isinstance(history, list) and all(isinstance(t, list) and len(t) == 2 for t in history)
    need(good, "a history that is no list of [question, answer]")
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def convert(row, plain):
    """A row -> ({"prompt", "chosen", "rejected"}, the names of the columns that were read)."""
    need(isinstance(row, dict), "a row is no object")
    for name in NOT_TEXT:
        need(not row.get(name), f"a column {name}, which is not trained on")
    if plain and all(isinstance(row.get(side), str) and TRANSCRIPT.match(row[side]) for side in SIDES):
        turns, answers = plain_pair(row)
        return form(turns, answers), SIDES
    sides = {side: written_out(row.get(side)) for side in SIDES}
    name = next((name for name in PROMPTS if row.get(name)), "prompt")
    prompt, read = written_out(row.get(name)), {name, "system", "history", *SIDES}
    more = row.get("input") if name == "instruction" else None
    if more:
        need(isinstance(prompt, str) and isinstance(more, str), "an input that is no text")
        prompt, read = f"{prompt}\n{more}", read | {"input"}
    turns = tgdpo.read_messages([] if prompt is None else prompt, "user")
    given = before_prompt(row)
    own = [turn["content"].strip() for turn in turns if turn["role"] == "system"]
    if given and given[0]["role"] == "system" and own:
        need(own == [given[0]["content"].strip()], "two different system texts")
        given = given[1:]
        turns, given = turns[1:], turns[:1] + given
    # read_pair checks all of it, and puts the prompt and whole conversations together.
    return form(*tgdpo.read_pair({"prompt": given + turns} | sides)), read


def form(turns, answers):
    """The one form of a pair."""
    return {"prompt": turns} | {side: [answer] for side, answer in zip(SIDES, answers)}


def convert_all(own):
    """Convert a data set, write it, and say what was done."""
    check_output(own.output)
    rows, lines = read_rows(own.input, own.split), []
    reasons, unread, filled = Counter(), set(), set()
    for row in tqdm(rows, desc="convert", disable=None):
        try:
            pair, read = convert(row, own.plain)
        except InputError as e:
            reasons[str(e)] += 1
            continue
        numbers = {name: value for name, value in row.items()
                   if re.match("chosen_|rejected_", name) and isinstance(value, list)}
        filled |= {name for name, value in row.items() if value not in (None, "", [])}
        unread |= row.keys() - {*read, *numbers}
        lines.append(json.dumps(pair | numbers, default=str) + "\n")
    dropped = "".join(f"; dropped {n}: {reason}" for reason, n in reasons.items())
    report = f"{own.input}: {len(rows)} rows read, {len(lines)} written to {own.output}{dropped}"
    need(lines, f"{report}; expected chosen and rejected in each row, beside one of "
         f"{', '.join(PROMPTS)}, or with it")
    tgdpo.write(Path(own.output), "".join(lines))
    print(report)
    if unread & filled:
        print(f"columns not used: {', '.join(sorted(unread & filled))}")


def main(argv):
    """The command line -> exit status: 0, or 2 for input that cannot be used."""
    parser = strict(argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("input", help="a file, a directory or a hub name")
    parser.add_argument("output", help="the .jsonl file to write, new")
    parser.add_argument("--split", default="train", help="of a data set that has several")
    parser.add_argument("--plain", action="store_true", help="leave transcripts as text")
    return command(lambda: convert_all(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
