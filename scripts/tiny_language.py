#!/usr/bin/env python3
"""A language of 31 words in which the true reward of every token is known: TGDPO from nothing to a table, on a laptop.

    python scripts/tiny_language.py                                      two minutes on 2 CPU cores
    python scripts/tiny_language.py --alpha 0.1 --output_dir DIR         options are tgdpo.py's, with the TINY defaults
    torchrun --nproc_per_node 2 scripts/tiny_language.py

A response describes a noun: "the cat is not good and it was very kind . <eos>". Good and bad adjectives earn rewards
that depend on the words before them. A tiny GPT-2 learns the grammar. Bradley-Terry labels pairs of its responses, by
the sums of their true rewards. Then tgdpo.py trains a DPO model, TGDPO with its r̂, and TGDPO with the true rewards.
The table judges what all of them say to fresh prompts. scripts/treg.py, rto.py and lab.py use this language too.
"""
import json
import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

import tgdpo
from common import from_scratch

NOUNS, VERBS = "cat dog bird fish horse king queen child".split(), "is was seems".split()
GOOD, BAD = "good kind happy brave wise calm".split(), "bad cruel sad weak lazy loud".split()
TINY_STEPS, TINY_PAIRS, TINY_PROMPTS = 400, 4000, 1000   # language model steps, pairs, fresh prompts to judge on
NEW_TOKENS = 32   # the longest response that is drawn
TINY = dict(beta=0.5, alpha=0.05, max_length=256, learning_rate=3e-4, num_train_epochs=2.0,
            per_device_train_batch_size=32, eval_size=0.1)   # this language's defaults for tgdpo.py's options


# ------------------------------------------------------------------------------------------------------ the language
def tiny_next(before, noun):
    """The grammar: what may follow the word `before` ("" at the start) in a description of `noun`, as a list to draw
    from. It makes sentences such as "the cat is not good and it was very kind . <eos>"."""
    if before in VERBS:
        return GOOD + BAD + ["not"] * 8 + ["very"] * 6
    if before in GOOD + BAD:
        return ["and", "."]
    return {"": ["the"], "the": [noun], noun: VERBS, "it": VERBS, "not": GOOD + BAD + ["very"] * 4, "very": GOOD + BAD,
            "and": ["it"], ".": ["<eos>"]}.get(before, [])


def tiny_sentence(noun, rng):
    """A random description of `noun` by the grammar, as its words; the last is <eos>."""
    words = [""]
    while words[-1] != "<eos>":
        words.append(rng.choice(tiny_next(words[-1], noun)))
    return words[1:]


def tiny_legal(noun, words):
    """Which of the words the grammar allows."""
    return [word in tiny_next(before, noun) for before, word in zip(["", *words], words)]


def tiny_rewards(noun, words):
    """The true reward of each word: a good adjective +1, a bad one -1, twice that after "very" and the opposite after
    "not", so that the same word earns more or less by its context; -1 for a word against the grammar; else 0."""
    rewards = []
    for two_before, before, word, legal in zip(["", "", *words], ["", *words], words, tiny_legal(noun, words)):
        sign = -1 if "not" in (before, before == "very" and two_before) else 1   # "not good", "not very good"
        rewards.append(float(((word in GOOD) - (word in BAD)) * sign * (1 + (before == "very"))) if legal else -1.0)
    return rewards


def tiny_truth(tokenizer, prompts, responses, of=tiny_rewards):
    """tiny_rewards, or tiny_legal, of responses to "describe the <noun> :", both as lists of token ids."""
    return [of(tokenizer.decode(prompt[2]), tokenizer.convert_ids_to_tokens(ids))
            for prompt, ids in zip(prompts, responses)]


def tiny_tokenizer(max_length):
    """One token a word."""
    words = "<unk> <pad> <eos> describe : the it not very and .".split() + NOUNS + VERBS + GOOD + BAD
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>",
                                                eos_token="<eos>", model_max_length=max_length)


# ------------------------------------------------------------------------------------------ models and what they say
@torch.no_grad()
def generate(model, prompts, tokenizer, title=None, new_tokens=NEW_TOKENS):
    """A response to each prompt, drawn at temperature 1: lists of prompt ids -> lists of at most new_tokens ids, an end
    token included. A title shows a bar."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    settings = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=True, top_k=0,
                                             max_new_tokens=new_tokens)
    published, model.generation_config = model.generation_config, settings   # else its temperature and the like count
    responses = []
    try:
        for start in tqdm(range(0, len(prompts), 256), desc=title, disable=title is None or None):
            batch = tokenizer.pad({"input_ids": prompts[start:start + 256]}, padding_side="left", return_tensors="pt")
            drawn = model.generate(**batch.to(model.device))[:, batch["input_ids"].shape[1]:]
            responses += [ids[:ids.index(eos) + 1] if eos in ids else ids for ids in drawn.tolist()]
    finally:
        model.generation_config = published
    return responses


def sample(path, prompts, options, tokenizer, title):
    """`generate` from the model in a directory, seeded."""
    torch.manual_seed(options.seed)
    return generate(tgdpo.read_model(path).to(options.device).eval(), prompts, tokenizer, title)


def language_model(texts, tokenizer, options, folder):
    """A tiny GPT-2 that has read the texts, in folder. Nothing happens if it is there already."""
    if not (folder / "tokenizer.json").exists():   # written last
        from_scratch(tokenizer(texts).input_ids, tokenizer, options, folder, TINY_STEPS)


def tiny_pairs(path, tokenizer, options, file):
    """Two responses to each prompt, Bradley-Terry on their summed true rewards chooses: {prompt, chosen, rejected}."""
    rng = random.Random(options.seed)
    nouns = [rng.choice(NOUNS) for _ in range(TINY_PAIRS)]
    prompts = tokenizer([f"describe the {noun} :" for noun in nouns] * 2).input_ids
    drawn = [tokenizer.convert_ids_to_tokens(ids) for ids in sample(path, prompts, options, tokenizer, "sample pairs")]
    rows = []
    for noun, *both in zip(nouns, drawn[:TINY_PAIRS], drawn[TINY_PAIRS:]):
        first, second = [sum(tiny_rewards(noun, words)) for words in both]
        if rng.random() > 1 / (1 + math.exp(second - first)):   # P(the first is chosen) = σ(first - second)
            both.reverse()
        rows.append({"prompt": f"describe the {noun} : ", "chosen": " ".join(both[0]), "rejected": " ".join(both[1])})
    tgdpo.write(file, "".join(json.dumps(row) + "\n" for row in rows))


def tiny_data(options, start, file):
    """The reference, in start, and pairs of its responses, in file; made unless they are there -> (tokenizer, pairs,
    counts, prompts to judge on)."""
    rng, tokenizer = random.Random(options.seed), tiny_tokenizer(options.max_length)
    texts = [f"describe the {noun} : {' '.join(tiny_sentence(noun, rng))}" for noun in rng.choices(NOUNS, k=20000)]
    prompts = tokenizer([f"describe the {noun} :" for noun in rng.choices(NOUNS, k=TINY_PROMPTS)]).input_ids
    language_model(texts, tokenizer, options, start)
    if not file.exists():
        tiny_pairs(start, tokenizer, options, file)
    pairs, counts = tgdpo.tokenize(tgdpo.load_rows(str(file), None), tokenizer, options.max_length, str(file))
    return tokenizer, pairs, counts, prompts


# --------------------------------------------------------------------------------------------------------- the table
def credit(values, worth):
    """Token rewards and the true ones, (M,) each -> (correlation, AUC: P(value of a good token > that of a bad))."""
    good, bad = values[worth > 0], values[worth < 0].sort().values
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)   # equal ones count half
    return torch.corrcoef(torch.stack([values, worth]))[0, 1].item(), (below / 2).mean().item() / max(1, len(bad))


def paint(text, value):
    """A token on a blue (r̂ > 0) or orange ground; where colours are not wanted, with r̂ behind it if that is large."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return f"{text}[{value:+.1f}]" if abs(value) >= 0.5 else text
    ground = ((255, 153, 111, 69, 33) if value > 0 else (255, 223, 216, 209, 202))[min(4, int(2 * abs(value) + 0.5))]
    return f"\033[38;5;16;48;5;{ground}m{text}\033[0m"


def interval(values):
    """Mean and half of its 95 % interval."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), 1.96 * values.std(correction=0).item() / len(values) ** 0.5


def tiny_report(options, tokenizer, found, prompts):
    """What the models of found, {name: directory}, say to the same prompts: a table and a few responses, for the
    terminal and run.json. found["reference"] and found[options.loss] must be there."""
    reference = found["reference"]
    judge = found.get("reward model", found.get("dpo", found[options.loss]))   # whose r̂ is shown
    draws, truth, rhat, table = {}, {}, {}, {}
    for name, path in found.items():
        draws[name] = tgdpo.once(sample, path, prompts, options, tokenizer, f"sample: {name}")
        rows = datasets.Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": draws[name]})
        judges = dict.fromkeys((path, reference, judge))   # each once, in the same order on all ranks
        logps = {p: tgdpo.frozen_logps(p, rows, options, f"judge: {name}")[0] for p in judges}
        rhat[name] = [tgdpo.token_rewards(*row, options.reward_beta or options.beta)
                      for row in zip(logps[judge], logps[reference])]
        truth[name], legal = [tiny_truth(tokenizer, prompts, draws[name], of) for of in (tiny_rewards, tiny_legal)]
        table[name] = {"KL": interval([float(sum(a - b)) for a, b in zip(logps[path], logps[reference])]),
                       "length": interval([float(len(ids)) for ids in draws[name]]),
                       "ungrammatical": interval([float(not all(row)) for row in legal]),
                       "true reward": interval([sum(row) for row in truth[name]])}
        for other in [other for other in ("reference", "dpo", "reward model") if other in truth]:
            totals = [(sum(mine), sum(theirs)) for mine, theirs in zip(truth[name], truth[other])]
            table[name][f"wins over {other}"] = interval([(a > b) + 0.5 * (a == b) for a, b in totals])
    print_table(table, list(table[options.loss]), len(prompts))
    # Does r̂ find the tokens that truly matter, in what the reference says?
    correlation, auc = credit(*[torch.tensor([float(value) for row in rows["reference"] for value in row])
                                for rows in (rhat, truth)])
    print(f"r̂ and the true token rewards: correlation {correlation:.3f}, AUC {auc:.3f}")
    tgdpo.once(tgdpo.record, Path(options.output_dir), table=table, correlation=correlation, AUC=auc)
    print(f"\nresponses and the r̂ of their tokens: {paint('above 0', 1.0)}, {paint('below 0', -1.0)}")
    for k in range(min(2, len(prompts))):
        print(tokenizer.decode(prompts[k]))
        for name in found:
            words = map(paint, tokenizer.convert_ids_to_tokens(draws[name][k]), rhat[name][k])
            cut = "" if draws[name][k][-1] == tokenizer.eos_token_id else f"... (cut at {len(draws[name][k])} tokens)"
            print(f"{name:14}", *words, cut)
    print_differences(table)


def print_table(table, columns, prompts):
    """Means and half intervals: a line for each measure, a column for each model. Four models take 80 characters."""
    print(f"\n{prompts} fresh prompts, means ± half of the 95 % interval")
    print(" " * 20 + "".join(f"{name:>15}" for name in table))
    for column in columns:
        cells = [f"{row[column][0]:.2f} ± {row[column][1]:.2f}" if column in row else "" for row in table.values()]
        print(f"{column:20}" + "".join(f"{cell:>15}" for cell in cells))


def print_differences(table):
    """What each method has more of than DPO, in a sentence."""
    dpo = table.get("dpo", table.get("reward model"))
    for name, row in table.items() if dpo else ():
        if row is not dpo and name != "reference":
            times = f", at {row['KL'][0] / dpo['KL'][0]:.1f} times its KL" if dpo["KL"][0] > 0.1 else ""
            print(f"{name}: {row['true reward'][0] - dpo['true reward'][0]:+.2f} true reward against DPO{times}")


# -------------------------------------------------------------------------------------------------- the command line
def read_options(argv):
    """tgdpo.py's options with this language's defaults; raises InputError for a model or a data set."""
    with patch.dict(tgdpo.TINY, TINY):
        options = tgdpo.read_options(argv)
    tgdpo.need(not options.model_name_or_path, "--model_name_or_path and --dataset: the tiny language makes its own; "
               "expected neither")
    return options


def run(options):
    """A language model, pairs, a DPO model, TGDPO with its r̂ and with the true rewards; then the table."""
    folder = Path(options.output_dir)
    start, file = folder / "start_model", folder / "pairs.jsonl"
    tgdpo.once(tgdpo.open_folder, folder, options)
    with tgdpo.lock(folder):
        tokenizer, pairs, counts, prompts = tgdpo.once(tiny_data, options, start, file)
        options = replace(options, model_name_or_path=str(start), dataset=str(file))
        tgdpo.reward_then_train(options, tokenizer, pairs, counts)
        found = {"reference": options.ref_model or str(start)}
        if options.loss in tgdpo.NO_REWARDS:
            found[options.loss] = options.output_dir
        else:
            judge = "reward model" if options.reward_model else "dpo"
            truth = [tiny_truth(tokenizer, pairs["prompt_ids"], pairs[side]) for side in tgdpo.IDS]
            stage = replace(options, output_dir=str(folder / "true_rewards"))
            tgdpo.reward_then_train(stage, tokenizer, tgdpo.add_columns(pairs, "rewards", truth), counts)
            found |= {judge: options.reward_model or str(folder / "reward_model"), options.loss: options.output_dir,
                      f"{options.loss}, truth": stage.output_dir}
        tiny_report(options, tokenizer, found, prompts)
    print(f"done: {folder}")


def main(argv):
    """The command line -> exit status, as tgdpo.main has it; under torchrun, too."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__ + "\nDefaults: " + ", ".join(f"--{name} {value}" for name, value in TINY.items())
              + "\nAll options: python tgdpo.py --help")
        return 0
    with patch.object(tgdpo, "run", lambda argv: run(tgdpo.once(read_options, argv))):
        return tgdpo.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
