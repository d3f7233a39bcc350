#!/usr/bin/env python3
"""Answers of a trained model to a file of prompts, in the forms that AlpacaEval 2, Arena-Hard and MT-Bench read.

    python scripts/chat_outputs.py --model_name_or_path RUN --prompts prompts.txt --output answers.json
    python scripts/chat_outputs.py --model_name_or_path RUN --format alpaca_eval --prompts alpaca_eval.json \\
        --output outputs.json
    python scripts/chat_outputs.py --model_name_or_path RUN --format arena_hard --prompts question.jsonl \\
        --output data/arena-hard-v2.0/model_answer
    python scripts/chat_outputs.py --model_name_or_path RUN --format mt_bench --prompts question.jsonl \\
        --output data/mt_bench/model_answer

Prompts become tokens by tgdpo.py's own code, so the model is asked as it was trained: its chat template with a fixed
date, one BOS, the prompt cut at its left end where it is too long. Answers are kept as they come, in
OUTPUT.answers.jsonl; the same command goes on from there after a kill, and gives what it would have given without.
Each prompt has random numbers of its own, by the seed, its number and the turn, whatever it is batched with. Only
rounding depends on the batch: in bfloat16 another --batch_size may still change an answer. Single process.

A .txt file has a prompt a line. Its answers get AlpacaEval's form, which can be judged against another model's.
--format alpaca_eval also takes rows {"prompt": text or messages} or {"messages": [...]}, and preference pairs.
Where the model has too few positions for the longest prompt and --max_new_tokens, answers may have fewer tokens, but at
least half of the positions: then it is the prompts that are cut.
"""
import hashlib
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
import transformers
from tqdm import tqdm

import tgdpo
from common import command, strict
from tgdpo import InputError, option


def required(text):
    """A field of Options without a default, with its line of --help."""
    return field(metadata={"help": text})


@dataclass
class Options:
    """Where a benchmark has a setting of its own, that is the default."""
    model_name_or_path: str = required("model that answers: a run's directory or a hub name")
    prompts: str = required(".json or .jsonl file of prompts, as the benchmark publishes it; .txt: one a line")
    output: str = required("alpaca_eval, text: a new .json file; else the directory where GENERATOR.jsonl is written")
    format: Literal["alpaca_eval", "arena_hard", "mt_bench", "text"] | None = option(
        None, "whose form the answers get; text, that of alpaca_eval, goes with a .txt file and need not be said")
    generator: str | None = option(None, "name of the model in the answers; none: the name of its directory")
    max_new_tokens: int | None = option(None, "most tokens of an answer; none: 4096, for mt_bench 1024")
    temperature: float | None = option(None, "0: greedy; none: 0.9, arena_hard 0, mt_bench by the question's category")
    top_p: float = option(1.0, "draw from the likeliest tokens that have this share of the probability")
    batch_size: int = option(16, "prompts that are answered together")
    seed: int = option(42, "seed of what is drawn")
    dtype: Literal["bfloat16", "float32"] | None = option(None, "of the weights; none: bfloat16 on CUDA, else float32")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")


# AlpacaEval: tatsu-lab/alpaca_eval, models_configs/Llama-3-Instruct-8B-SimPO/configs.yaml (without its beam search).
# Arena-Hard: lmarena/arena-hard-auto, config/gen_answer_config.yaml of v0.1; v2.0 has no one setting for all models.
# MT-Bench: lm-sys/FastChat, fastchat/llm_judge: gen_model_answer.py (0.7 for categories unknown to common.py).
TEMPERATURES = {"alpaca_eval": 0.9, "arena_hard": 0.0, "mt_bench": 0.7, "text": 0.9}
NEW_TOKENS = {"alpaca_eval": 4096, "arena_hard": 4096, "mt_bench": 1024, "text": 4096}
# lm-sys/FastChat, fastchat/llm_judge/common.py, temperature_config.
CATEGORIES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
              "stem": 0.1, "humanities": 0.1}
EXPECTED = {"alpaca_eval": "an instruction, a prompt or messages that end with the user's",
            "arena_hard": "uid and prompt (Arena-Hard-Auto since v2.0; question_id and turns are its older form)",
            "mt_bench": "question_id, category and turns, a list of texts",
            "text": "a prompt"}
ONE_LIST = ("alpaca_eval", "text")   # forms whose answers are one list in a .json file


# ---------------------------------------------------------------------------------------------------- 1. the prompts
PAIR = {"chosen": " yes", "rejected": " no"}   # makes a prompt a pair, which tgdpo.py's functions read


def read_rounds(row, form):
    """A row of a prompt file -> the messages that go before the model's first answer, those before its second, ...
    Raises tgdpo.InputError."""
    if not isinstance(row, dict):
        raise tgdpo.InputError("no object")
    if form in ONE_LIST:
        rounds = [tgdpo.read_pair({"prompt": row.get("messages")} | PAIR | row)[0]]
    else:
        arena = form == "arena_hard"
        names, texts = ({"uid"}, [row.get("prompt")]) if arena else ({"question_id", "category"}, row.get("turns"))
        texts = texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else []
        if not names <= set(row) or not texts:
            raise tgdpo.InputError(f"an object with {', '.join(row) or 'nothing'}")
        rounds = [tgdpo.read_pair({"prompt": text} | PAIR)[0] for text in texts]
    if rounds[0][-1]["role"] != "user":
        raise tgdpo.InputError(f"messages that end with the {rounds[0][-1]['role']}'s")
    return rounds


def prompt_ids(tokenizer, turns, number):
    """Messages -> the prompt's token ids, those of tgdpo.tokenize for a pair with this prompt."""
    try:
        # With two answers, since some templates write more before an answer to come than before one that is there, and
        # training's prompt is what all have in common.
        texts, chat = tgdpo.pair_texts({"prompt": turns} | PAIR, tokenizer)
        with tgdpo.reading("the tokenizer"):   # one of words alone may refuse others
            ids = tokenizer(texts, add_special_tokens=False).input_ids
        return tgdpo.split_tokens(ids, tokenizer, not chat, sys.maxsize)[0]
    except tgdpo.InputError as e:
        raise InputError(f"row {number} (from 0) of --prompts, message {len(turns)}: {e}; training could not use such "
                         "a prompt either") from e


def read_questions(options, tokenizer):
    """-> (rows of the prompt file, their rounds)."""
    if not Path(options.prompts).is_file():
        raise InputError(f"--prompts {options.prompts}: no such file; expected a .json, .jsonl or .txt file")
    try:
        if options.format == "text":
            with tgdpo.reading(f"--prompts {options.prompts}"):
                lines = Path(options.prompts).read_text(encoding="utf-8-sig").split("\n")
            rows = [{"instruction": line} for line in lines if line.strip()]
        else:
            rows = tgdpo.load_rows(options.prompts, None)
    except InputError as e:
        raise InputError(str(e).replace("--dataset", "--prompts")) from e
    if not isinstance(rows, list) or not rows:
        raise InputError(f"--prompts {options.prompts}: no rows; expected {EXPECTED[options.format]} in each")
    questions = []
    for number, row in enumerate(rows):
        try:
            questions.append(read_rounds(row, options.format))
        except tgdpo.InputError as e:
            raise InputError(f"row {number} (from 0) of --prompts {options.prompts}: {e}; --format {options.format} "
                             f"expects {EXPECTED[options.format]}") from e
        prompt_ids(tokenizer, questions[-1][0], number)   # fails now, not when the model is loaded
    return rows, questions


# ---------------------------------------------------------------------------------------------------- 2. the answers
def load_model(options, tokenizer):
    """The model on the device, with a generation_config of ours alone: the temperature, top_k or repetition penalty of
    the one that it came with would go on counting."""
    model = tgdpo.read_model(options.model_name_or_path)
    for p in model.parameters():   # not model.to(dtype), which would round the rotary frequencies too
        p.data = p.data.to(getattr(torch, options.dtype))
    ends = model.generation_config.eos_token_id   # chat models: several, or another than the tokenizer's
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = next(i for i in (tokenizer.pad_token_id, *sorted(ends), 0) if i is not None)   # under a mask: any will do
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=options.max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad)
    return model.to(options.device)


def sampler(seeds, temperatures, top_p, device):
    """A logits processor for generate's argmax: it takes the likeliest token where a row's temperature is 0, else a
    draw, by the row's own random numbers. So rows that come and go beside it change nothing."""
    rngs = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    heat = torch.tensor(temperatures, device=device)[:, None]                           # (B, 1)

    def process(_, logits):
        warm = logits / heat.where(heat > 0, 1.0)                                       # (B, V), float32
        if top_p < 1:
            warm = transformers.TopPLogitsWarper(top_p)(None, warm)
        # argmax_v p_v / E_v with E_v ~ Exp(1) is a draw from p: so torch.multinomial does it too
        waits = torch.stack([torch.empty_like(row).exponential_(generator=rng) for row, rng in zip(warm, rngs)])
        return (warm - waits.log()).where(heat > 0, logits)
    return process


@torch.no_grad()
def respond(model, tokenizer, prompts, seeds, temperatures, top_p):
    """Prompts of a batch, as token ids -> (text, whether it ended before the limit) for each."""
    settings, width = model.generation_config, max(map(len, prompts))
    batch = {"input_ids": [[settings.pad_token_id] * (width - len(ids)) + ids for ids in prompts],
             "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]}
    batch = {name: torch.tensor(rows, device=model.device) for name, rows in batch.items()}
    draws = [sampler(seeds, temperatures, top_p, model.device)] * any(temperatures)
    drawn = model.generate(**batch, logits_processor=draws)
    answers = []
    for ids in drawn[:, width:].tolist():
        end = next((t for t, i in enumerate(ids) if i in (settings.eos_token_id or ())), len(ids))
        # as the model wrote it: clean_up would join "yes ." to "yes."
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers.append((text.strip(), end < len(ids)))
    return answers


def answer_all(questions, temperatures, model, tokenizer, options, length, file):
    """Ask all questions, round by round -> (conversations with the answers, the answers' records by round, counts).

    file holds a record for each answer so far, under a key of all that it depends on but the batch. Batches are those
    of the whole round, longest first, also when some of it is there already: nothing depends on where a run broke off.
    """
    facts = [tgdpo.model_fingerprint(options.model_name_or_path), model.generation_config.eos_token_id,
             options.top_p, options.seed, options.dtype]
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []   # the last may be half a line
    tgdpo.write(file, "".join(line + "\n" for line in lines))
    known = {record["key"]: record for record in map(json.loads, lines)}
    talks, found, cut, fewest = [[] for _ in questions], [[] for _ in questions], 0, options.max_new_tokens
    with open(file, "a", encoding="utf-8") as log:
        for turn in range(max(map(len, questions))):
            whole, prompts, keys = {}, {}, {}
            for i in [i for i, rounds in enumerate(questions) if turn < len(rounds)]:
                talks[i] = talks[i] + questions[i][turn]
                whole[i] = prompt_ids(tokenizer, talks[i], i)
            longest = max(map(len, whole.values()))
            most = min(options.max_new_tokens, max(length // 2, length - longest))
            if most < options.max_new_tokens:
                print(f"turn {turn + 1}: answers of at most {most} tokens, not {options.max_new_tokens}: the model has "
                      f"{length} positions, the longest prompt {longest} tokens")
            model.generation_config.max_new_tokens, fewest = most, min(fewest, most)
            for i, ids in whole.items():
                prompts[i] = tgdpo.cut_left(ids, length - most, tokenizer.bos_token_id)
                cut += len(prompts[i]) < len(ids)
                facts_here = [*facts, most, i, turn, temperatures[i], prompts[i]]
                keys[i] = hashlib.sha256(json.dumps(facts_here).encode()).hexdigest()[:32]
            order = sorted(prompts, key=lambda i: -len(prompts[i]))
            bar = tqdm(total=len(order), desc=f"answers, turn {turn + 1}", disable=None)
            for group in [order[k:k + options.batch_size] for k in range(0, len(order), options.batch_size)]:
                if any(keys[i] not in known for i in group):
                    seeds = [random.Random(f"{options.seed} {i} {turn}").getrandbits(63) for i in group]
                    answers = respond(model, tokenizer, [prompts[i] for i in group], seeds,
                                      [temperatures[i] for i in group], options.top_p)
                    for i, (text, ended) in zip(group, answers):
                        record = {"key": keys[i], "text": text, "ended": ended, "time": time.time()}
                        if known.setdefault(keys[i], record) is record:
                            log.write(json.dumps(record) + "\n")   # in ASCII, so that a kill leaves no half letter
                    log.flush()
                bar.update(len(group))
            bar.close()
            for i in order:
                found[i].append(known[keys[i]])
                talks[i] = [*talks[i], {"role": "assistant", "content": known[keys[i]]["text"]}]
    records = [record for answers in found for record in answers]
    return talks, found, {"cut": cut, "unfinished": sum(not record["ended"] for record in records), "fewest": fewest}


# ------------------------------------------------------------------------------------------------------ 3. the output
def alpaca_eval(row, talk, answers, generator):
    """AlpacaEval 2: an object in one list. It meets the baseline's by its instruction, so that stays as it is."""
    # tatsu-lab/alpaca_eval: README, src/alpaca_eval/main.py (evaluate, and what evaluate_from_model writes) and
    # annotators/pairwise_evaluator.py (the merge on instruction).
    instruction = row["instruction"] if isinstance(row.get("instruction"), str) else talk[-2]["content"]
    dataset = {"dataset": row["dataset"]} if "dataset" in row else {}
    return dataset | {"instruction": instruction, "output": answers[0]["text"], "generator": generator}


def arena_hard(row, talk, answers, generator):
    """Arena-Hard-Auto v2.0: a line of model_answer/<model>.jsonl."""
    # lmarena/arena-hard-auto as of v2.0: gen_answer.py (what is written), gen_judgment.py (what is read: uid, model and
    # messages[-1]["content"]["answer"]). Its style control also reads metadata, which utils/add_markdown_info.py adds.
    messages = [*talk[:-1], {"role": "assistant", "content": {"answer": answers[0]["text"]}}]
    return {"uid": row["uid"], "ans_id": answers[0]["key"], "model": generator, "messages": messages,
            "tstamp": answers[0]["time"]}


def mt_bench(row, talk, answers, generator):
    """MT-Bench: a line of model_answer/<model>.jsonl."""
    # lm-sys/FastChat, fastchat/llm_judge: gen_model_answer.py (what is written), common.py (what is read: the file's
    # name, question_id and choices[0]["turns"]).
    return {"question_id": row["question_id"], "answer_id": answers[-1]["key"], "model_id": generator,
            "choices": [{"index": 0, "turns": [answer["text"] for answer in answers]}], "tstamp": answers[-1]["time"]}


FORMS = {"alpaca_eval": alpaca_eval, "arena_hard": arena_hard, "mt_bench": mt_bench, "text": alpaca_eval}


def output_file(options):
    """The file to write, which must not be there yet."""
    file = Path(os.path.expanduser(options.output))
    if options.format in ONE_LIST and file.suffix != ".json":
        raise InputError(f"--output {file}; --format {options.format} expects the name of a new .json file")
    if options.format not in ONE_LIST:
        if file.suffix in (".json", ".jsonl") or file.is_file():
            raise InputError(f"--output {file}; --format {options.format} expects a directory, such as "
                             "data/.../model_answer, since the judge reads the model's name from the file in it")
        file = file / f"{options.generator}.jsonl"
    if file.exists():
        raise InputError(f"{file} is finished already; give another --output, or --generator, or remove it")
    with tgdpo.reading(f"--output {options.output}"):
        file.parent.mkdir(parents=True, exist_ok=True)
    return file


def read_options(argv):
    """Command line -> Options, with every default filled in but the temperature."""
    parser = strict(transformers.HfArgumentParser(Options, prog="chat_outputs.py", allow_abbrev=False))
    o = Options(**vars(parser.parse_args(argv)))
    o.format = o.format or ("text" if o.prompts.endswith(".txt") else None)
    if (o.format == "text") != o.prompts.endswith(".txt") or not o.format:
        raise InputError(f"--format is {o.format} for --prompts {o.prompts}; expected text, or nothing, for a .txt "
                         "file, and alpaca_eval, arena_hard or mt_bench for another")
    shared = {name: getattr(o, name) for name in ("model_name_or_path", "dtype", "device", "seed")}
    base = tgdpo.read_options([f"--{name}={value}" for name, value in shared.items() if value is not None]
                              + [f"--dataset={o.prompts}"])
    o.model_name_or_path, o.dtype, o.device, o.prompts = base.model_name_or_path, base.dtype, base.device, base.dataset
    o.max_new_tokens = NEW_TOKENS[o.format] if o.max_new_tokens is None else o.max_new_tokens
    o.generator = o.generator or Path(o.model_name_or_path).resolve().name
    for name, good, expected in (("max_new_tokens", o.max_new_tokens > 0, "a number above 0"),
                                 ("batch_size", o.batch_size > 0, "a number above 0"),
                                 ("top_p", 0 < o.top_p <= 1, "a share above 0 and at most 1"),
                                 ("temperature", 0 <= (o.temperature or 0) < math.inf, "a number, 0 or above"),
                                 ("generator", "/" not in o.generator, "a name without /, since a file gets it")):
        if not good:
            raise InputError(f"--{name} is {getattr(o, name)}; expected {expected}")
    return o


def run(options):
    """Answer the prompts and write the file."""
    file, name = output_file(options), options.model_name_or_path
    length = getattr(tgdpo.load_config(name), "max_position_embeddings", None) or sys.maxsize
    tokenizer = tgdpo.load_tokenizer(name)
    rows, questions = read_questions(options, tokenizer)
    temperatures = [TEMPERATURES[options.format]] * len(rows)
    if options.temperature is not None:
        temperatures = [options.temperature] * len(rows)
    elif options.format == "mt_bench":
        temperatures = [CATEGORIES.get(row.get("category"), TEMPERATURES["mt_bench"]) for row in rows]
    kept = file.with_name(file.name + ".answers.jsonl")
    model = load_model(options, tokenizer)
    talks, answers, counts = answer_all(questions, temperatures, model, tokenizer, options, length, kept)
    forms = [FORMS[options.format](*parts, options.generator) for parts in zip(rows, talks, answers)]
    if options.format in ONE_LIST:
        tgdpo.write(file, json.dumps(forms, indent=1, ensure_ascii=False) + "\n")
    else:
        tgdpo.write(file, "".join(json.dumps(form, ensure_ascii=False) + "\n" for form in forms))
    kept.unlink()
    capped = counts["fewest"] < options.max_new_tokens
    limit = f"{counts['fewest']} tokens" if capped else f"--max_new_tokens {options.max_new_tokens}"
    said = [f"{file}: {len(forms)} prompts answered by {options.generator}"]
    if counts["cut"]:
        said.append(f"{counts['cut']} prompts lost their left end: the model has {length} positions")
    if counts["unfinished"]:
        said.append(f"{counts['unfinished']} answers were cut at {limit}")
    print("; ".join(said))


def main(argv):
    """The command line -> exit status."""
    def work():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"{os.environ['WORLD_SIZE']} processes; expected one: start chat_outputs.py without "
                             "torchrun")
        run(read_options(argv))
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
