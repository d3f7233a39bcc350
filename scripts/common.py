"""What the companions in scripts/ share.

    strict(parser)                     a parser whose complaints are one line each
    command(work)                      run a companion's work -> exit status; one line for what went wrong
    check_output(file)                 a .jsonl file can be made there
    whole_tokens(row, tokenizer)       a row's prompt and responses as token ids, nothing cut
    write_rewards(file, rows, pairs, columns, tokenizer)     pairs with token rewards -> a data set
    columns_of(values, pairs, options, title)       values(batch) -> (N, R), over all pairs -> columns
    from_scratch(sequences, tokenizer, options, folder, steps)      a tiny GPT-2 from scratch

columns are [chosen, rejected], each a list with one list of numbers for each pair: what tgdpo.add_columns takes.
"""
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import tgdpo


def strict(parser):
    """A parser whose complaints become InputErrors, one line each; argparse itself would print several."""
    parser.error = lambda text: tgdpo.need(False, text)
    return parser


def command(work, torchrun=False):
    """Run what a companion does -> exit status: 0; 2 for input that cannot be used; 1 for a run that broke off; 130 for
    Ctrl-C; each but 0 with one line that says why. torchrun: whether it may start several processes."""
    tgdpo.quiet()
    try:
        count, name = int(os.environ.get("WORLD_SIZE", 1)), Path(sys.argv[0]).name
        tgdpo.need(torchrun or count == 1, f"{count} processes; expected one: start {name} without torchrun")
        work()
        return 0
    except tgdpo.InputError as e:
        status, text = 2, f"error: {e}"
    except tgdpo.Diverged as e:
        status, text = 1, f"stopped: {e}"
    except KeyboardInterrupt:
        status, text = 130, "interrupted"
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return status


def check_output(file):
    """Raise InputError unless a .jsonl file can be made there."""
    found = "exists already" if Path(file).exists() else "is no .jsonl file"
    tgdpo.need(str(file).endswith(".jsonl") and not Path(file).exists(),
               f"--output {file} {found}; expected the name of a new .jsonl file")
    with tgdpo.reading(f"--output {file}"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def whole_tokens(row, tokenizer):
    """A usable row -> (prompt, [chosen, rejected]) as tgdpo.tokenize has them, but nothing is cut."""
    texts, chat = tgdpo.pair_texts(row, tokenizer)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    return tgdpo.split_tokens(ids, tokenizer, not chat, sys.maxsize)[:2]


def write_rewards(file, rows, pairs, columns, tokenizer):
    """Write the usable rows with chosen_rewards and rejected_rewards. A response that --max_length cut gets 0 for the
    tokens that nobody judged; how many such responses there are is said."""
    lines, cut = [], 0
    for pair, *rewards in zip(pairs, *columns):
        row = rows[pair["index"]]
        _, whole = whole_tokens(row, tokenizer)
        cut += sum(len(ids) > len(values) for ids, values in zip(whole, rewards))
        for side, ids, values in zip(tgdpo.SIDES, whole, rewards):
            row = row | {f"{side}_rewards": [float(value) for value in values] + [0.0] * (len(ids) - len(values))}
        lines.append(json.dumps(row, default=str) + "\n")
    tgdpo.write(Path(file), "".join(lines))
    print(f"{file}: {len(lines)} pairs with token rewards"
          + (f"; {cut} responses are longer than --max_length, their last tokens have reward 0" if cut else ""))


@torch.no_grad()
def columns_of(values, pairs, options, title):
    """values(batch) -> (N, R), over all pairs -> columns."""
    columns = [[None] * len(pairs) for _ in tgdpo.SIDES]
    pairs = pairs.select_columns(["prompt_ids", *tgdpo.IDS])
    for rows, _ in tqdm(tgdpo.microbatches(pairs, options), desc=title, disable=None):
        batch = pairs[rows]
        table = iter(values(tgdpo.collate(batch, options.device)).cpu().tolist())   # N rows: chosen, then rejected
        for column, ids in zip(columns, tgdpo.IDS):
            for row, response in zip(rows, batch[ids]):
                column[row] = next(table)[:len(response)]
    return columns


def from_scratch(sequences, tokenizer, options, folder, steps):
    """A two-layer GPT-2, trained from scratch on lists of token ids for some steps and saved in folder."""
    torch.manual_seed(options.seed)
    model = tgdpo.prepare_model(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=options.max_length, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)), options).to(options.device)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=2e-3), random.Random(options.seed)
    scheduler = transformers.get_scheduler("cosine", optimizer, steps // 10, steps)
    size = max(4, 1600 * len(sequences) // sum(map(len, sequences)))  # about 1600 tokens a step
    for _ in tqdm(range(steps), desc="language model", disable=None):
        batch = [torch.tensor(ids[:options.max_length]) for ids in rng.choices(sequences, k=size)]
        ids, labels = [pad_sequence(batch, batch_first=True, padding_value=pad).to(model.device)
                       for pad in (0, -100)]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    tgdpo.write_model(model, tokenizer, folder)
