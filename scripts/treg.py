#!/usr/bin/env python3
"""T-REG on tgdpo.py (arXiv 2412.02685): token rewards that a model gives itself, from two opposite prompts, and a loss
in which they stand beside DPO's as a regulariser.

    python scripts/treg.py annotate --model_name_or_path MODEL --dataset pairs.jsonl --output rewarded.jsonl
    python scripts/treg.py train --model_name_or_path MODEL --dataset rewarded.jsonl --alpha 0.25      T-REG
    python tgdpo.py --model_name_or_path MODEL --dataset rewarded.jsonl               TGDPO with the same token rewards
    python scripts/treg.py tiny --output_dir DIR          all of it from nothing, on scripts/tiny_language.py

`train` is tgdpo.py with another loss: its options, its files, torchrun. Without chosen_rewards and rejected_rewards in
the data, its token rewards are a DPO model's, as TGDPO's are. `annotate` takes tgdpo.py's options for model and data.
The paper's alphas are 0.1, 0.25 (the default of `tiny`) and 0.5, say paper notes (derivation.md, section 9). Its code
was not at hand: the two instructions are our wording, and what is detached in the loss is our choice.
"""
import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import datasets
import torch
import torch.nn.functional as F

import tgdpo
import tiny_language
from common import check_output, command, strict, whole_tokens, write_rewards

# Behind the prompt, since what is too long loses its left end.
BETTER = "{prompt}\n\nYour answer must be helpful, correct, coherent and concise."
WORSE = "{prompt}\n\nYour answer must be unhelpful, incorrect, incoherent and verbose."


# ----------------------------------------------------------------------------------------------------------- the loss
def treg_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
              chosen_rewards, rejected_rewards, beta, alpha):
    """T-REG's loss of B pairs, with the arguments and the results of tgdpo.tgdpo_loss; its weight w and r̂ get no
    gradient. Source: paper notes (derivation.md, section 9).

    ℓ stands in for log π, from which it differs by a constant: the same gradient, and a loss of ln 2 at the start.
    """
    chosen_ratios = policy_chosen_logps - ref_chosen_logps                              # ℓ_t of y_w, (B, R)
    rejected_ratios = policy_rejected_logps - ref_rejected_logps                        # ℓ_t of y_l, (B, R)
    phi = beta * chosen_ratios.sum(-1) - beta * rejected_ratios.sum(-1)                 # φ_DPO, (B,)
    weight = torch.sigmoid(-phi).detach()                                               # w, (B,)
    # (9a)  L = -log σ(φ_DPO) - α w Σ_t β r̂_t log π(y_t|s_t), over both responses, w = σ(-φ_DPO)
    raised = (chosen_rewards.detach() * chosen_ratios).sum(-1) + (rejected_rewards.detach() * rejected_ratios).sum(-1)
    losses = -F.logsigmoid(phi) - alpha * weight * beta * raised
    return losses, beta * chosen_ratios.sum(-1).detach(), beta * rejected_ratios.sum(-1).detach()


# From here on tgdpo.py knows --loss treg.
tgdpo.LOSSES["treg"] = lambda logps, batch, o: treg_loss(
    *logps, *batch["ref_logps"], *batch["rewards"], o.beta, o.alpha)


# -------------------------------------------------------------------------------------------------- the token rewards
def wrap(turns, template):
    """Messages with the last user turn put into a template."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
    content = template.replace("{prompt}", turns[last]["content"])
    return [*turns[:last], turns[last] | {"content": content}, *turns[last + 1:]]


def asked(rows, pairs, tokenizer, positions, template):
    """The pairs with their prompts in a template; the responses' tokens stay, so that log-probs compare. A prompt that
    was cut is cut to as many tokens of its own, at its left end, as far as the model's number of positions allows."""
    prompts = []
    for pair in pairs:
        turns, answers = tgdpo.read_pair(rows[pair["index"]])
        (plain, _), (wrapped, _) = [
            whole_tokens({"prompt": some} | {side: [answer] for side, answer in zip(tgdpo.SIDES, answers)}, tokenizer)
            for some in (turns, wrap(turns, template))]
        room = positions - max(len(pair[ids]) for ids in tgdpo.IDS)
        room = min(room, len(pair["prompt_ids"]) + len(wrapped) - len(plain))
        prompts.append(tgdpo.cut_left(wrapped, room, tokenizer.bos_token_id))
    return datasets.Dataset.from_dict({"prompt_ids": prompts} | {ids: pairs[ids] for ids in tgdpo.IDS})


def contrastive_rewards(name, rows, pairs, tokenizer, options, better=BETTER, worse=WORSE):
    """What a model thinks of each token, by how much likelier it is when a good answer is asked for than when a bad one
    is: within ±1/2 -> columns as tgdpo.add_columns takes them. Source: paper notes (derivation.md, section 9)."""
    logps, positions = [], getattr(tgdpo.load_config(name), "max_position_embeddings", None) or sys.maxsize
    for template, column in ((better, "better"), (worse, "worse")):
        tgdpo.need("{prompt}" in template, f"the instruction {template!r} has no {{prompt}} in it; expected it where "
                   "the prompt goes")
        judged = tgdpo.annotate(asked(rows, pairs, tokenizer, positions, template), column, name, options)
        logps.append([judged.with_format("torch")[f"{side}_{column}"] for side in tgdpo.SIDES])
    # (9d)  r̂_t = σ( log π_ref(y_t | x_better, y_<t) - log π_ref(y_t | x_worse, y_<t) ) - 1/2
    return [[(high - low).sigmoid().sub(0.5).tolist() for high, low in zip(*side)] for side in zip(*logps)]


def annotate(argv):
    """The command `annotate`."""
    parser = strict(argparse.ArgumentParser(prog="treg.py annotate", allow_abbrev=False,
                                            epilog="All other options are tgdpo.py's: python tgdpo.py --help"))
    parser.add_argument("--output", required=True, help="the .jsonl file to write")
    parser.add_argument("--better", default=BETTER, help="the prompt's template for a good answer")
    parser.add_argument("--worse", default=WORSE, help="the prompt's template for a bad answer")
    mine, rest = parser.parse_known_args(argv)
    options = tgdpo.read_options(rest)
    tgdpo.need(options.model_name_or_path, "--model_name_or_path is missing; expected the model that judges its tokens")
    check_output(mine.output)
    rows = tgdpo.load_rows(options.dataset, options.dataset_split)
    tokenizer, pairs, _ = tgdpo.read_data(options)
    name = options.ref_model or options.model_name_or_path
    columns = contrastive_rewards(name, rows, pairs, tokenizer, options, mine.better, mine.worse)
    write_rewards(mine.output, rows, pairs, columns, tokenizer)


# -------------------------------------------------------------------------------------------------- the tiny language
def prefixed_language_model(tokenizer, options, folder):
    """A tiny language model that knows what "good" and "bad" in front of a prompt ask for: half of its sentences have
    such a word, by the sign of what they earn, the others have none."""
    rng, texts = random.Random(options.seed), []
    for noun in rng.choices(tiny_language.NOUNS, k=20000):
        words = tiny_language.tiny_sentence(noun, rng)
        worth = sum(tiny_language.tiny_rewards(noun, words))
        prefix = rng.choice(["", "good " if worth > 0 else "bad " if worth < 0 else ""])
        texts.append(f"{prefix}describe the {noun} : {' '.join(words)}")
    tiny_language.language_model(texts, tokenizer, options, folder)


def tiny(argv):
    """The command `tiny`: a language model, its pairs and its own token rewards; then DPO, T-REG and TGDPO."""
    options = tiny_language.read_options(["--alpha=0.25", *argv])
    folder = Path(options.output_dir)
    tgdpo.open_folder(folder, options)
    with tgdpo.lock(folder):
        tiny_run(options, folder)


def tiny_run(options, folder):
    """Its work, in a folder of its own."""
    start, file = folder / "start_model", folder / "pairs.jsonl"
    tokenizer = tiny_language.tiny_tokenizer(options.max_length)
    prefixed_language_model(tokenizer, options, start)
    if not file.exists():
        tiny_language.tiny_pairs(start, tokenizer, options, file)
    rows = tgdpo.load_rows(str(file), None)
    pairs, counts = tgdpo.tokenize(rows, tokenizer, options.max_length, str(file))
    columns = contrastive_rewards(str(start), rows, pairs, tokenizer, options, "good {prompt}", "bad {prompt}")
    truth = [tiny_language.tiny_truth(tokenizer, pairs["prompt_ids"], pairs[ids]) for ids in tgdpo.IDS]
    values = [torch.tensor([value for side in table for row in side for value in row]) for table in (columns, truth)]
    correlation, auc = tiny_language.credit(*values)
    print(f"the model's own token rewards and the true ones: correlation {correlation:.3f}, AUC {auc:.3f}")
    pairs, found = tgdpo.add_columns(pairs, "rewards", columns), {"reference": str(start)}
    for loss in ("dpo", "treg", "tgdpo"):
        found[loss] = str(folder if loss == "treg" else folder / loss)
        stage = replace(options, model_name_or_path=str(start), dataset=str(file), loss=loss, output_dir=found[loss])
        tgdpo.reward_then_train(stage, tokenizer, pairs, counts)
    prompts = tokenizer([f"describe the {noun} :" for noun in random.Random(options.seed + 1).choices(
        tiny_language.NOUNS, k=tiny_language.TINY_PROMPTS)]).input_ids
    tiny_language.tiny_report(replace(options, loss="treg"), tokenizer, found, prompts)


def main(argv):
    """The command line -> exit status."""
    commands = {"annotate": annotate, "tiny": tiny}
    if argv[:1] == ["train"]:
        return tgdpo.main([*argv[1:], "--loss=treg"])
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f"treg.py: error: unknown command {argv[0]}; expected annotate, train or tiny", file=sys.stderr)
        return 2
    return command(lambda: commands[argv[0]](argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
