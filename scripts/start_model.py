#!/usr/bin/env python3
"""A tiny GPT-2 and its tokenizer from scratch, on the text of your pairs: a model to try tgdpo.py with.

    python scripts/start_model.py --dataset pairs.jsonl --output tiny
    python tgdpo.py --model_name_or_path tiny --dataset pairs.jsonl --max_length 256

The tokenizer is a byte-level BPE with a chat template. The model has two layers of width 128. It reads
prompt and response of both sides for --steps steps, which takes a minute or two. It is no chat model.
"""
import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import tgdpo
from common import command, from_scratch, strict
from tgdpo import InputError, need


def train_tokenizer(texts, size=4096, max_length=None):
    """A byte-level BPE of so many tokens, trained on texts, with a chat template."""
    core = Tokenizer(models.BPE())
    special = ["<unk>", "<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
                "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>",
        model_max_length=max_length, additional_special_tokens=special[3:], chat_template=template)


def texts_of(rows):
    """All that is said in the usable rows, as a list of texts."""
    texts = []
    for row in rows:
        try:
            turns, answers = tgdpo.read_pair(row)
        except InputError:  # tokenize counts and reports it
            continue
        said = [turn["content"] for turn in [*turns, *answers]]
        texts += [text.encode("utf-8", "replace").decode() for text in said]
    return texts


def make(own):
    """Train tokenizer and model, and write them."""
    folder = Path(own.output)
    need(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
         f"--output {folder} exists already; expected a new directory")
    for name, least in (("max_length", 16), ("vocab_size", 300), ("steps", 1)):
        value = getattr(own, name)
        need(value >= least, f"--{name} is {value}; expected at least {least}")
    rows = tgdpo.load_rows(own.dataset, own.dataset_split)
    tokenizer = train_tokenizer(texts_of(rows), own.vocab_size, own.max_length)
    pairs, _ = tgdpo.tokenize(rows, tokenizer, own.max_length, own.dataset)
    sequences = [pair["prompt_ids"] + pair[side] for pair in pairs for side in tgdpo.IDS]
    options = tgdpo.Options(seed=own.seed, max_length=own.max_length, device="cpu")
    from_scratch(sequences, tokenizer, options, folder, own.steps)
    print(f"{folder}: {len(tokenizer)} tokens, sequences of up to {own.max_length}; train it with "
          f"python tgdpo.py --model_name_or_path {folder} --dataset {own.dataset}")


def main(argv):
    """The command line -> exit status: 0, or 2 for input that cannot be used."""
    parser = strict(argparse.ArgumentParser(
        prog="start_model.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--dataset", required=True, help="pairs, as tgdpo.py reads them")
    parser.add_argument("--dataset_split", default="train", help="of a data set that has several")
    parser.add_argument("--output", required=True, help="the directory to write, new")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens, at most (4096)")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (400)")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (42)")
    return command(lambda: make(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
