#!/usr/bin/env python3
"""TGDPO in one file: direct preference optimization guided by token-level rewards (arXiv 2506.14574, ICML 2025).

    python tgdpo.py                                  a tiny language with known token rewards, from scratch, on a laptop
    python tgdpo.py --dataset pairs.jsonl            a tiny GPT-2, from scratch, on your own preference pairs
    python tgdpo.py --model_name_or_path MODEL --dataset pairs.jsonl               first a DPO reward model, then TGDPO
    python tgdpo.py --model_name_or_path MODEL --dataset pairs.jsonl --reward_model DIR                   TGDPO at once
    python tgdpo.py run.yaml --alpha 1.0             options from a file; flags override it
    torchrun --nproc_per_node 8 tgdpo.py scripts/llama3_8b_instruct_pairrm.yaml              sharded over 8 GPUs (FSDP2)

The method, for a prompt x, a chosen response y_w and a rejected one y_l, token by token:

    ℓ_t  = log π_θ(y_t|s_t) - log π_ref(y_t|s_t)            how far the policy has moved at this token
    r̂_t  = β [ log π_rm(y_t|s_t) - log π_ref(y_t|s_t) ]     the token's reward; π_rm is a DPO-trained model, fixed
    φ    = Σ_t β (1 + α r̂_t) ℓ_t over y_w  -  Σ_t β (1 - α r̂_t) ℓ_t over y_l
    loss = -log σ(φ)                                        α = 0 is DPO

Token rewards are columns of the data set: `annotate` runs a frozen model once over the pairs and writes what it says of
each token; `train` reads the columns. Only one model is in memory at a time, and the loss never asks where a reward
came from: a DPO or SimPO model, a person, or (in the tiny language) the truth.

                     paper                       official code                     here
    β in r̂           the reward model's          this run's                        --reward_beta; default this run's
    f > 0            assumed (Assumption 4.2)    not enforced                      counted in the log, --guidance_floor
    models held      not said                    policy, reference, reward model   one
    pairs a device   not said                    1; more raise an error            any number
    batch of 128     not said                    1 x 16 accumulated x 8 GPUs       any split gives the same gradient

Theorems and assumptions are cited by the paper's numbers; official code: github.com/dvlab-research/TGDPO.

Shapes stand beside tensors: B pairs; N sequences (the chosen ones first, then the rejected ones, N = 2B); T tokens of a
padded sequence; R tokens of a padded response; M response tokens in all; H hidden size; V vocabulary.
"""
import difflib
import gc
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import datasets
import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import yaml
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_scheduler


# ------------------------------------------------------------------------------------------- 1. errors and processes
class InputError(Exception):
    """What the user gave cannot be used; command() prints it as one line and returns 2."""


@contextmanager
def reading(what):
    """Whatever a library raises while it reads `what` becomes one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:   # yaml, pyarrow, the hub client and transformers raise dozens of kinds
        raise InputError(f"{what} cannot be used: {' '.join(f'{type(e).__name__}: {e}'.split())[:300]}") from e


def rank():
    """The number of this process among those that torchrun started, 0 of 1 without it; rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------------------- 2. the options
def option(default, text):
    """A field of Options with its line of --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    """Names follow transformers and TRL where these have one."""
    model_name_or_path: str | None = option(None, "model to train, a hub name or a directory; none: a tiny GPT-2")
    ref_model: str | None = option(None, "reference model; none: the model to train")
    reward_model: str | None = option(None, "model whose log-ratios are the token rewards; none: one is trained by DPO")
    dataset: str | None = option(None, "pairs: .json, .jsonl, .jsonl.gz, .parquet, a saved data set or a hub name")
    dataset_split: str = option("train", "split of a hub data set or of a saved DatasetDict")
    loss: str = option("tgdpo", "the loss: tgdpo, dpo or simpo")
    beta: float = option(0.1, "strength of the pull towards the reference; SimPO: scale of the mean log-prob")
    alpha: float = option(0.5, "TGDPO: weight of the token rewards in f = 1 +- alpha rhat; 0 is DPO")
    reward_beta: float | None = option(None, "the beta inside rhat, and of a reward model trained here; none: beta")
    gamma: float = option(0.5, "SimPO: target margin")
    guidance_floor: float | None = option(None, "TGDPO: smallest value that f may take; none: f is not bounded")
    max_length: int = option(2048, "tokens of prompt and response; a longer prompt loses its left end")
    learning_rate: float = option(7e-7, "peak learning rate of AdamW")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = option("cosine", "schedule")
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    num_train_epochs: float = option(1.0, "passes over the pairs")
    max_steps: int = option(-1, "optimizer steps, instead of epochs; -1: epochs")
    per_device_train_batch_size: int = option(1, "most pairs in a forward pass of a process")
    gradient_accumulation_steps: int = option(1, "forward passes in one optimizer step")
    eval_size: float = option(0, "pairs held out for evaluation; below 1: a share of all pairs")
    eval_steps: int | None = option(None, "evaluate each so many steps; none: at the end only")
    logging_steps: int = option(1, "write a row of metrics each so many steps")
    save_steps: int = option(0, "save a checkpoint each so many steps; 0: none")
    resume: bool = option(False, "continue the run in output_dir from its newest complete checkpoint")
    dtype: Literal["bfloat16", "float32"] | None = option(None, "compute type; none: bfloat16 on CUDA, else float32")
    shared_prompt: bool = option(True, "compute a pair's prompt once for both responses, where the model can")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    hsdp: bool = option(False, "torchrun on several machines: shard inside each of them, replicate across them")
    seed: int = option(42, "seed of the order of the pairs and of everything drawn")
    output_dir: str | None = option(None, "where the run is written, new or empty; none: runs/<time>")
    cache_dir: str = option("~/.cache/tgdpo", "where annotations are kept for later runs")


# The tiny mode's own defaults, before file and flags. Measured: README, "What the tiny mode shows".
TINY = dict(beta=0.5, alpha=0.05, max_length=256, learning_rate=3e-4, num_train_epochs=2.0,
            per_device_train_batch_size=32, eval_size=0.1)
NEW_TOKENS = 32   # the longest response that the tiny mode draws
# Numbers that may be 0; all others must be above it (but gamma and max_steps, which have rules of their own).
ZERO_IS_FINE = "alpha learning_rate warmup_ratio weight_decay max_grad_norm eval_size save_steps seed".split()
# What a --resume may change: where and how it computes and what is reported, not what is learned.
MAY_CHANGE = ("resume output_dir cache_dir device hsdp shared_prompt gradient_checkpointing "
              "save_steps eval_steps logging_steps "
              "per_device_train_batch_size gradient_accumulation_steps").split()   # of the last two the product stays


def read_options(argv):
    """Command line -> Options. A first argument that is no flag names a .yaml or .json file; flags override it."""
    tiny = ", ".join(f"--{name} {value}" for name, value in TINY.items())
    parser = HfArgumentParser(Options, prog="tgdpo.py", usage="tgdpo.py [FILE.yaml] [--OPTION VALUE ...]",
                              allow_abbrev=False, epilog=f"Without --model_name_or_path: {tiny}")

    def fail(message):
        raise InputError(message)   # argparse itself would print two lines
    parser.error = fail
    if argv and not argv[0].startswith("-"):
        if not argv[0].endswith((".yaml", ".yml", ".json")):
            fail(f"{argv[0]}: expected a flag or a .yaml or .json file of options; data goes behind --dataset")
        with reading(f"{argv[0]}, taken for a file of options,"):
            values = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))   # JSON is YAML
        if not isinstance(values, dict) or any(isinstance(value, (dict, list)) for value in values.values()):
            fail(f"{argv[0]}: expected a file that maps option names to values, one a line, such as 'beta: 0.1'")
        argv = [f"--{key}={value}" for key, value in values.items() if value is not None] + argv[1:]
    if not any(arg.split("=")[0].replace("-", "_") == "__model_name_or_path" for arg in argv):
        batch = TINY["per_device_train_batch_size"] // world()   # the same steps on 2, 4, 8, 16 or 32 processes
        parser.set_defaults(**TINY | {"per_device_train_batch_size": max(1, batch)})
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{f.name}" for f in fields(Options)], 1)
        fail(f"unknown option {unknown[0]}; {f'did you mean {near[0]}? ' if near else ''}--help lists all"
             + "; a file of options goes first" * (not unknown[0].startswith("-")))
    o = Options(**vars(values))
    for name in ("model_name_or_path", "ref_model", "reward_model", "dataset", "output_dir", "cache_dir"):
        setattr(o, name, getattr(o, name) and os.path.expanduser(getattr(o, name)))   # in a file no shell does it
    mps = torch.backends.mps.is_available() and not dist.is_initialized()
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    check_options(o, here)
    o.device = here[0] if o.device == "auto" else o.device
    o.dtype = o.dtype or ("bfloat16" if o.device == "cuda" else "float32")
    o.output_dir = o.output_dir or time.strftime("runs/%Y-%m-%d_%H%M%S")
    return o


def check_options(o, devices):
    """Raise InputError for the first value that makes no sense."""
    def need(name, good, expected):
        if not good:
            raise InputError(f"--{name} is {getattr(o, name)}; expected {expected}")
    for name, value in vars(o).items():
        if isinstance(value, (int, float)) and name not in ("gamma", "max_steps"):
            need(name, 0 <= value < math.inf, "a number, 0 or above")
            if name not in ZERO_IS_FINE:
                need(name, value > 0 or isinstance(value, bool), "a number above 0")
    losses = [*GUIDED, "dpo", "simpo"]   # GUIDED: section 4
    need("loss", o.loss in losses, f"one of {', '.join(losses)}")
    need("gamma", math.isfinite(o.gamma), "a number")
    need("warmup_ratio", o.warmup_ratio <= 1, "at most 1")
    need("max_length", o.max_length >= (2 if o.model_name_or_path else 2 * NEW_TOKENS),
         f"at least 2, and {2 * NEW_TOKENS} without --model_name_or_path")
    need("max_steps", o.max_steps == -1 or o.max_steps > 0, "-1 or a number above 0")
    need("seed", o.seed < 2**32, "below 2**32")
    need("eval_size", o.eval_size < 1 or o.eval_size == int(o.eval_size), "a share below 1 or a whole number")
    need("device", o.device in ["auto", *devices], f"auto or {' or '.join(devices)}, which is what torch finds here")
    need("dataset", o.dataset or not o.model_name_or_path, "preference pairs for --model_name_or_path")
    need("output_dir", o.output_dir or not o.resume, "the directory of the run that --resume shall continue")


def batch_size(options):
    """Pairs in one optimizer step."""
    return options.per_device_train_batch_size * options.gradient_accumulation_steps * world()


# ------------------------------------------------------------------------------------------------ 3. the mathematics
# Token-level PPO on tables: log-probs and rewards are (S, A), f is a number or (S, A). Tags such as (4.3a) are those of
# derivation.md, which proves the equations; a tag with a dot belongs to the paper's theorem of that number.
def token_ppo_objective(log_policy, ref_logps, reward, beta, f=1.0):
    """What guided token-level PPO maximises in each state, (6a) -> (S,), in units of β; its maximum is log Z."""
    policy = log_policy.exp()
    # (6a)  E_{a~π}[ r / (β f) - log π / π_ref ]; an action that the policy never takes counts 0
    gain = reward / (beta * f) - (log_policy - ref_logps)
    return (policy * gain).where(policy > 0, 0.0).sum(-1)


def closed_form_policy(ref_logps, reward, beta, f=1.0):
    """The maximiser of token_ppo_objective, each state for itself (Theorem 4.3) -> (log_policy (S, A), log_Z (S,))."""
    log_weights = ref_logps + reward / (beta * f)
    # (4.3b)  log Z = log Σ_a π_ref exp(r / (β f))
    log_Z = log_weights.logsumexp(-1)
    # (4.3a)  π* = π_ref exp(r / (β f)) / Z
    return log_weights - log_Z[..., None], log_Z


def implicit_reward(log_policy, ref_logps, beta, f=1.0, log_Z=0.0):
    """The reward for which a policy is the closed form, (4.3c); elementwise, log_Z (S, 1). With f = 1 and log Z = 0 it
    is what a DPO-trained model thinks of each token: the r̂ that training uses, (8a)."""
    # (4.3c)  r = β f [ log π* / π_ref + log Z ]
    return beta * f * (log_policy - ref_logps + log_Z)


def guidance(token_rewards, alpha, side, floor=None):
    """f of the guided token-level PPO in the paper's practical choice: how much a token counts.

        f_w(r̂) = 1 + α r̂    on the chosen response (side +1): a good token of the winner counts more
        f_l(r̂) = 1 - α r̂    on the rejected response (side -1): a bad token of the loser counts more

    Any shape in, the same shape out. The paper assumes f > 0 (Assumption 4.2); floor, if given, enforces it.
    """
    # (8b)  f = 1 ± α r̂
    f = 1 + side * alpha * token_rewards
    return f if floor is None else f.clamp(min=floor)


# ------------------------------------------------------------------------------------------------------ 4. the losses
def tgdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_rewards, rejected_rewards, beta, alpha, floor=None):
    """The TGDPO loss of B pairs; alpha = 0 is DPO. Source: the paper's loss, which follows from its Theorem 4.4.

    All tensors are (B, T), one value for each response token and zero elsewhere; chosen and rejected may differ in T.
    Rewards are the token rewards r̂_t (the paper's: β times the reward model's log-ratio); they get no gradient.
    Returns (losses (B,), chosen_scores (B,), rejected_scores (B,)). A score is β Σ_t ℓ_t, detached and without f: what
    the official code and TRL log as rewards.
    """
    chosen_ratios = policy_chosen_logps - ref_chosen_logps                              # ℓ_t of y_w, (B, T)
    rejected_ratios = policy_rejected_logps - ref_rejected_logps                        # ℓ_t of y_l, (B, T)
    chosen_weights = guidance(chosen_rewards.detach(), alpha, +1, floor)                # f_w, (B, T)
    rejected_weights = guidance(rejected_rewards.detach(), alpha, -1, floor)            # f_l, (B, T)
    # (4.4a)  φ = Σ_t β f_w(r̂_t) ℓ_t over y_w  -  Σ_t β f_l(r̂_t) ℓ_t over y_l
    phi = beta * (chosen_weights * chosen_ratios).sum(-1) - beta * (rejected_weights * rejected_ratios).sum(-1)
    # (8c)  loss = -log σ(φ): Bradley-Terry's P(y_w beats y_l) = σ(φ + δ) without δ, which π_θ cannot change
    losses = -F.logsigmoid(phi)
    return losses, beta * chosen_ratios.sum(-1).detach(), beta * rejected_ratios.sum(-1).detach()


# Losses that read token rewards, by the name in --loss. Yours, with the same arguments, needs one more entry.
GUIDED = {"tgdpo": tgdpo_loss}


def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta, gamma):
    """The SimPO loss of B pairs (arXiv 2405.14734): mean log-probs, no reference, and a target margin gamma.

    Log-probs and masks are (B, T), a mask true on response tokens; chosen and rejected may differ in T. Returns the
    triple of tgdpo_loss; a score is β times the mean log-prob.
    """
    chosen_means = (policy_chosen_logps * chosen_mask).sum(-1) / chosen_mask.sum(-1)                    # (B,)
    rejected_means = (policy_rejected_logps * rejected_mask).sum(-1) / rejected_mask.sum(-1)            # (B,)
    # (3d)  φ = β mean_t log π(y_t|s_t) over y_w  -  the same over y_l  -  γ
    phi = beta * chosen_means - beta * rejected_means - gamma
    return -F.logsigmoid(phi), beta * chosen_means.detach(), beta * rejected_means.detach()


# ------------------------------------------------------------------------------------------------ 5. token log-probs
LOGITS_BYTES = 2**27   # logits that exist at one time, counted with 4 bytes each: 128 MiB
BLOCK_BYTES = 2**22    # on a CPU the softmax over them goes in blocks that stay in its cache: twice as fast


def collate(rows, device, shared=False):
    """Columns of B pairs, as lists -> a batch of padded tensors.

    input_ids are prompt + response, (N, T). Shared, they are prompt + chosen + rejected, (B, T), and the prompt is
    computed once: positions (B, T) of both responses go on from the prompt's; segments (B, T), 0 for the prompt, 1 and
    2 for the responses, say who sees whom; parts (B, 3) are the three lengths. Response n lies in row n modulo their
    number; from column 0 on, labels (N, R) are its tokens, mask (N, R) says which count, states (N, R) are the columns
    of input_ids that predict them. ref_logps and rewards (N, R) come along if the rows have them. Not shared, rows
    without a rejected side will do.

    Padding is on the right, where a causal model never looks; what it holds does not matter.
    """
    sides = [side for side in ("chosen", "rejected") if f"{side}_ids" in rows]

    def stack(name):
        return [values for side in sides for values in rows[f"{side}_{name}"]]
    responses = stack("ids")
    lines = [[*prompt] for prompt in rows["prompt_ids"] * (1 if shared else len(sides))]
    prompts = [len(line) for line in lines]
    positions, segments, states = [[*range(n)] for n in prompts], [[0] * n for n in prompts], []
    for n, ids in enumerate(responses):
        row = n % len(lines)
        # The one shift: a column's state predicts the token after it, the prompt's last one both first tokens.
        states.append([prompts[row] - 1, *range(len(lines[row]), len(lines[row]) + len(ids) - 1)])
        lines[row] += ids
        positions[row] += range(prompts[row], prompts[row] + len(ids))
        segments[row] += [1 + n // len(lines)] * len(ids)
    columns = {"input_ids": lines, "labels": responses, "states": states}
    columns |= {"mask": [[True] * len(ids) for ids in responses]}
    if shared:
        parts = [[*lengths] for lengths in zip(prompts, *[map(len, rows[f"{side}_ids"]) for side in sides])]
        columns |= {"positions": positions, "segments": segments, "parts": parts}
    columns |= {name: stack(name) for name in ("ref_logps", "rewards") if f"chosen_{name}" in rows}
    return {name: pad_sequence([torch.tensor(row) for row in column], batch_first=True).to(device)
            for name, column in columns.items()}


def attention_mask(segments):
    """What each token of shared rows sees: before it, the prompt and its own response; segments (B, T) -> (B, 1, T, T),
    added to attention's scores: 0 is seen, the least float32 is not. pair_attention does not read it."""
    own = segments[:, :, None] == segments[:, None, :]                                  # (B, T, T)
    seen = (own | (segments == 0)[:, None, :]).tril()[:, None]                          # (B, 1, T, T)
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo().min)


def pair_attention(module, query, key, value, attention_mask, parts=None, **kwargs):
    """transformers' sdpa, (B, heads, T, D) -> (B, T, heads, D). Shared rows, known by their parts, take two calls each,
    prompt and chosen response, then the rejected one: under one mask most would be computed in vain. Where a model
    has an attention of its own, or an eager one, attention_mask does the same."""
    attend = transformers.integrations.sdpa_attention.sdpa_attention_forward
    if parts is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    rows = []
    for n, part in enumerate(parts):
        q, k, v = [x[n:n + 1, :, :sum(part)].split(part, 2) for x in (query, key, value)]   # prompt, chosen, rejected
        seen = torch.ones(part[2], part[0] + part[2], dtype=torch.bool, device=query.device).tril(part[0])
        calls = [[torch.cat(x[:2], 2) for x in (q, k, v)] + [None],   # without a mask: causal
                 [q[2]] + [torch.cat(x[::2], 2) for x in (k, v)] + [seen[None, None]]]
        rows.append(torch.cat([attend(module, *call, **kwargs)[0][0] for call in calls]))
    return pad_sequence(rows, batch_first=True), None


def head_logits(model, hidden, output_class):
    """Hidden states (M, H) -> logits (M, V) by the model's own forward, its body replaced by `hidden` for this call.

    So whatever a family does behind its body (logit scaling, soft-capping, a bias) is done here too.
    """
    body = model.get_decoder()
    body.forward = lambda *args, **kwargs: output_class(last_hidden_state=hidden[None])
    try:
        return type(model).forward(model, inputs_embeds=hidden[None], use_cache=False).logits.squeeze(0)
    finally:
        del body.forward   # uncovers the class's forward again


class LabelLogps(torch.autograd.Function):
    """Logits (M, V) and labels (M,) -> float32 log-probs of the labels, (M,). The backward pass writes the gradient
    over the logits, so that there is one (M, V) tensor where autograd would hold several; it runs once only."""

    @staticmethod
    def forward(ctx, logits, labels):
        """Keeps the logits themselves."""
        ctx.size = size = max(1, BLOCK_BYTES // (4 * logits.shape[-1])) if logits.device.type == "cpu" else len(logits)
        ctx.save_for_backward(logits, labels)
        # (1a)  log π(a|s) = z_a - log Σ_v exp z_v, in float32
        return torch.cat([block.log_softmax(-1, dtype=torch.float32).gather(-1, label)
                          for block, label in zip(logits.split(size), labels[:, None].split(size))])[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """g (M,) -> g (1[v = label] - π(v|s)), (M, V)."""
        logits, labels = ctx.saved_tensors
        for block, g in zip(logits.split(ctx.size), grad[:, None].split(ctx.size)):
            block.copy_(block.softmax(-1, dtype=torch.float32).mul_(-g))                # -g π(v|s)
        return logits.scatter_add_(-1, labels[:, None], grad[:, None].to(logits.dtype)), None


def token_logps(model, batch, dtype="float32"):
    """log π(y_t | s_t) of each response token of a batch of `collate` -> float32 (N, R).

    The head runs on response positions only, in chunks of LOGITS_BYTES; where there are several, the backward pass
    computes them again, so memory does not grow with tokens times vocabulary. Log-softmax is in float32.
    """
    def logps_of(hidden, labels):
        return LabelLogps.apply(head_logits(model, hidden, type(output)), labels)

    ids, mask, extra = batch["input_ids"], batch["mask"], {}
    if "segments" in batch:
        extra = {"position_ids": batch["positions"], "attention_mask": attention_mask(batch["segments"])}
        extra |= {"parts": batch["parts"].tolist()} if "parts" in batch else {}
    with torch.autocast(ids.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        output = model.get_decoder()(input_ids=ids, use_cache=False, **extra)
        rows = torch.arange(len(mask), device=ids.device)[:, None].expand_as(mask) % len(ids)           # (N, R)
        hidden = output.last_hidden_state[rows[mask], batch["states"][mask]]            # (M, H)
        labels = batch["labels"][mask]                                                  # (M,)
        size = max(1, LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size))
        if len(labels) <= size:
            flat = logps_of(hidden, labels)                                             # (M,)
        else:
            flat = torch.cat([checkpoint(logps_of, h, y, use_reentrant=False)
                              for h, y in zip(hidden.split(size), labels.split(size))])
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)


# -------------------------------------------------------------------------------------------- 6. data: rows -> tokens
class Unusable(Exception):
    """A pair that cannot be trained on; its text is the reason that it is counted under."""


FORMATS = ("chosen and rejected (text or messages) beside prompt, instruction or conversations, or whole conversations "
           "in chosen and rejected")
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}   # other names -> ours
# Some chat templates ask for today's date, which would change tokens and caches every day: here it stands still.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"


def load_rows(name, split):
    """The rows of a data set, in order: from a file, a directory saved by `datasets`, or the hub."""
    file = Path(name)
    with reading(f"--dataset {name}"):
        if file.is_file() and re.search(r"\.jsonl?(\.gz)?$", file.name):   # by json: pyarrow fails all for one odd row
            with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as stream:
                text = stream.read().strip()
            lines = [line for line in text.split("\n") if line.strip()]
            return json.loads(text if text.startswith("[") else "[" + ",\n".join(lines) + "]")
        if file.is_file() and file.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=name, split="train").to_list()
        if file.is_file() or re.search(r"\.(jsonl?|gz|parquet|csv|tsv|txt)$", file.name):
            raise InputError(f"--dataset {name}: {'unknown kind' if file.is_file() else 'no such file'}; expected "
                             ".json, .jsonl, .jsonl.gz, .parquet, a directory saved by datasets or a hub name")
        data = datasets.load_from_disk(name) if file.is_dir() else datasets.load_dataset(name, split=split)
        return (data[split] if isinstance(data, datasets.DatasetDict) else data).to_list()


def read_messages(value):
    """A message or a list of them, with role/content or from/value -> [{"role", "content"}]."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("a field is missing" if value is None else "a field is neither text nor messages")

    def first(message, *names):   # parquet fills the fields that a row lacks with None
        return next((message[name] for name in names if message.get(name) is not None), None)
    pairs = [(first(m, "role", "from"), first(m, "content", "value")) for m in value]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise Unusable("a message without a role or without text")
    return [{"role": ROLES.get(role, role), "content": content} for role, content in pairs]


def read_response(value, chat):
    """A chosen or rejected field -> (the messages before the response, the response's text)."""
    if isinstance(value, str):
        if not (value.startswith("\n\nHuman:") and "\n\nAssistant:" in value):
            return [], value
        if not chat:   # an Anthropic HH transcript stays as it is, up to its last answer
            before, response = value.rsplit("\n\nAssistant:", 1)
            return [{"role": "user", "content": before + "\n\nAssistant:"}], response
        parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
        value = [{"role": who, "content": text.strip()} for who, text in zip(parts[::2], parts[1::2])]
    messages = read_messages(value)
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable("chosen or rejected does not end with an assistant's message")
    return messages[:-1], messages[-1]["content"]


def read_pair(row, chat):
    """A row in any known format -> (the prompt's messages, chosen text, rejected text). Raises Unusable.

    chat: whether the tokenizer has a chat template; only then is a transcript in one string taken apart.
    """
    if not isinstance(row, dict):
        raise Unusable("a row is no object")
    if isinstance(row.get("instruction"), str) and not row.get("prompt"):
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(turn, list) for turn in history):
            raise Unusable("a history that is no list of pairs")
        if not isinstance(row.get("input") or "", str):
            raise Unusable("an input that is no text")
        texts = [text for turn in history for text in turn]
        texts.append(row["instruction"] + (f"\n{row['input']}" if row.get("input") else ""))
        turns = read_messages([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)])
    elif isinstance(row.get("prompt"), str):
        turns = [{"role": "user", "content": row["prompt"]}]
    else:
        turns = read_messages(row.get("prompt") or row.get("conversations") or row.get("instruction") or [])
    before, chosen = read_response(row.get("chosen"), chat)
    rejected_before, rejected = read_response(row.get("rejected"), chat)
    if before != rejected_before:
        raise Unusable("chosen and rejected differ before their last message")
    if "user" in [turn["role"] for turn in before]:   # whole conversations; they repeat the prompt
        repeated = isinstance(row.get("prompt"), str) or all(turn in before for turn in turns)
        turns = before if repeated else turns + before
    if row.get("system") and isinstance(row["system"], str) and "system" not in [turn["role"] for turn in turns]:
        turns = [{"role": "system", "content": row["system"]}] + turns
    if not turns or not chosen.strip() or not rejected.strip():
        raise Unusable("an empty response" if turns else "no prompt")
    if re.search("[\ud800-\udfff]", "".join([chosen, rejected] + [turn["content"] for turn in turns])):
        raise Unusable("a text with half a character")   # a lone surrogate, which no tokenizer takes
    return turns, chosen, rejected


def render(tokenizer, turns, responses):
    """(messages, responses) -> (prompt text, response texts with their end tokens), as the chat template has it."""
    def apply(turns, **kwargs):
        template = FIXED_DATE + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template, **kwargs)
    try:
        try:
            prompt = apply(turns, add_generation_prompt=True)
        except jinja2.TemplateError:   # some refuse a system turn; it then opens the first user turn
            if turns[0]["role"] != "system" or len(turns) == 1:
                raise
            turns = [{**turns[1], "content": turns[0]["content"] + "\n\n" + turns[1]["content"]}] + turns[2:]
            prompt = apply(turns, add_generation_prompt=True)
        asked, full = apply(turns), [apply(turns + [{"role": "assistant", "content": text}]) for text in responses]
    except Exception as e:   # a template is a program: it may raise anything
        raise Unusable(f"the chat template refuses it: {e}") from e
    prompt = os.path.commonprefix([prompt, *full])   # some templates write more before an answer that is to come
    if not prompt.startswith(asked):
        raise Unusable("the chat template writes the prompt differently once it is answered")
    return prompt, [text[len(prompt):] for text in full]


def encode(tokenizer, turns, responses):
    """(messages, responses) -> (prompt ids, response ids): one BOS, one end token, the prompt a true prefix."""
    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    prompt = "\n".join(turn["content"] for turn in turns)
    chat = tokenizer.chat_template is not None
    if chat and len(turns) == 1:   # a text that begins as the template's own do is formatted already
        own = [text for text in special if text in str(tokenizer.chat_template) or text == tokenizer.bos_token]
        chat = not prompt.startswith(tuple(own))
    if chat:   # the template itself writes the end token
        end = re.escape(tokenizer.eos_token or "") + r"\s*$"
        responses = [re.sub(end, "", text) if tokenizer.eos_token else text for text in responses]
        prompt, responses = render(tokenizer, turns, responses)
    prompt_ids, response_ids = ids(prompt), []
    for text in responses:
        # Together where that leaves the prompt's tokens alone, as they are when the model generates; else apart.
        both = ids(prompt + text)
        response_ids.append(both[len(prompt_ids):] if both[:len(prompt_ids)] == prompt_ids else ids(text))
        if eos is not None and not text.rstrip().endswith(special):
            response_ids[-1].append(eos)
    if not prompt_ids or (not chat and prompt_ids[0] != bos and tokenizer("a").input_ids[:1] == [bos]):
        first = bos if bos is not None else eos   # something must come before the first response token
        if first is None:
            raise Unusable("an empty prompt, and neither BOS nor EOS to begin with")
        prompt_ids = [first] + prompt_ids
    return prompt_ids, response_ids


def truncate(prompt_ids, response_ids, max_length, bos):
    """Cut the prompt's left end (a BOS stays, and at least one token), then the responses' right ends."""
    room = max(1, max_length - max(map(len, response_ids)))
    if len(prompt_ids) > room:
        kept = prompt_ids[:1] if prompt_ids[0] == bos else []
        prompt_ids = kept + prompt_ids[len(prompt_ids) - room + len(kept):]
    return prompt_ids, [ids[:max_length - len(prompt_ids)] for ids in response_ids]


def read_rewards(row, response_ids, index):
    """The token rewards that a row brings itself, as {column: values}, checked against its tokens."""
    rewards = {}
    for name, ids in zip(("chosen_rewards", "rejected_rewards"), response_ids):
        try:
            values = torch.tensor(row.get(name), dtype=torch.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            values = torch.tensor(math.nan)
        if values.ndim != 1 or not values.isfinite().all() or len(values) != len(ids):
            found = f"{len(values)} values" if values.ndim == 1 else "no list of numbers"
            raise InputError(f"row {index}: {name} has {found}; expected {len(ids)} finite numbers, one for each token "
                             "of the response, its end token included")
        rewards[name] = values.tolist()
    return rewards


def tokenize(rows, tokenizer, max_length, source):
    """Rows -> (Dataset, counts). Columns: index (the row's number, from 0), prompt_ids, chosen_ids, rejected_ids, and
    chosen_rewards, rejected_rewards where the rows bring them. Unusable rows are dropped, counted and reported."""
    found = sorted({str(name) for row in rows if isinstance(row, dict) for name in row})
    columns = f"columns: {', '.join(found) or 'none'}; expected {FORMATS}"
    if not {"chosen", "rejected"} <= set(found):
        raise InputError(f"{source}: {len(rows)} rows with the {columns}")
    used, cuts, reasons = [], Counter(), Counter()
    for index, row in enumerate(tqdm(rows, desc="tokenize", disable=None)):
        try:
            turns, *texts = read_pair(row, tokenizer.chat_template is not None)
            whole_prompt, whole = encode(tokenizer, turns, texts)
            prompt_ids, cut = truncate(whole_prompt, whole, max_length, tokenizer.bos_token_id)
            if cut[0] == cut[1]:
                raise Unusable("identical responses" + " up to --max_length" * (whole[0] != whole[1]))
        except Unusable as e:
            reasons[str(e)] += 1
            continue
        used.append({"index": index, "prompt_ids": prompt_ids, "chosen_ids": cut[0], "rejected_ids": cut[1]})
        if "chosen_rewards" in found or "rejected_rewards" in found:
            rewards = read_rewards(row, whole, index)
            used[-1] |= {name: values[:len(ids)] for (name, values), ids in zip(rewards.items(), cut)}
        cuts["prompts"] += len(prompt_ids) < len(whole_prompt)
        cuts["responses"] += sum(len(short) < len(ids) for short, ids in zip(cut, whole))
    report = f"{source}: {len(rows)} pairs read, {len(used)} used"
    report += "".join(f"; dropped {n}: {reason}" for reason, n in reasons.items())
    if not used:
        raise InputError(f"{report}; {columns}")
    print(report + "".join(f"; {n} {what} cut to {max_length} tokens" for what, n in cuts.items() if n))
    counts = {"read": len(rows), "used": len(used), "dropped": dict(reasons), "cut": dict(cuts)}
    return datasets.Dataset.from_list(used), counts


# --------------------------------------------------------------------------------------------------- 7. the tiny world
NOUNS, VERBS = "cat dog bird fish horse king queen child".split(), "is was seems".split()
GOOD, BAD = "good kind happy brave wise calm".split(), "bad cruel sad weak lazy loud".split()
TINY_STEPS, TINY_PAIRS, TINY_PROMPTS = 400, 4000, 1000   # language model steps, pairs, fresh prompts to judge on


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


def tiny_tokenizer(texts, max_length, size=4096):
    """For the tiny language a tokenizer of words; for texts a byte-level BPE of `size` tokens, trained on them, with a
    chat template."""
    special = ["<unk>", "<pad>", "<eos>"] + ["<|system|>", "<|user|>", "<|assistant|>"] * (texts is not None)
    if texts is None:
        words = special + "describe : the it not very and .".split() + NOUNS + VERBS + GOOD + BAD
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        core.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    template = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=max_length,
        additional_special_tokens=special[3:], chat_template=template if texts is not None else None)


def tiny_language_model(sequences, tokenizer, options, folder):
    """A two-layer GPT-2, trained from scratch on lists of token ids and saved in folder."""
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=options.max_length, n_embd=128, n_layer=2, n_head=4, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = prepare_model(transformers.GPT2LMHeadModel(config), options).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = get_scheduler("cosine", optimizer, TINY_STEPS // 10, TINY_STEPS)
    size = max(4, 1600 * len(sequences) // sum(map(len, sequences)))   # about 1600 tokens a step
    for _ in (bar := tqdm(range(TINY_STEPS), desc="language model", disable=None)):
        batch = [torch.tensor(ids[:options.max_length]) for ids in rng.choices(sequences, k=size)]
        ids, labels = [pad_sequence(batch, batch_first=True, padding_value=pad).to(model.device) for pad in (0, -100)]
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    write_model(model, tokenizer, folder)


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
    return generate(read_model(path).to(options.device).eval(), prompts, tokenizer, title)


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
    write(file, "".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------- 8. processes, models and runs: shard, load, save, resume
@lru_cache
def patient_group():
    """All ranks, for waiting on rank 0: tokenizing, or writing a model, takes longer than a collective may. The first
    call makes the group and is itself a collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def once(work, *args, **kwargs):
    """work(*args, **kwargs), done by rank 0 alone -> its result, on all ranks. Where it fails, the others leave."""
    if not dist.is_initialized():
        return work(*args, **kwargs)
    box, error = [None, None], None   # the result, or the exit status
    if rank() == 0:
        try:
            box[0] = work(*args, **kwargs)
        except (Exception, SystemExit) as e:   # SystemExit is --help's; after Ctrl-C nobody waits any more
            error, box[1] = e, {InputError: 2, SystemExit: 0}.get(type(e), 1)
    dist.broadcast_object_list(box, src=0, group=patient_group())
    if error:
        raise error
    if box[1] is not None:
        raise SystemExit(box[1])   # rank 0 says why
    return box[0]


def gather(value):
    """What each rank has -> the list of it by rank, on all ranks."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=patient_group())
    return values


def check_same(what, value):
    """Raise InputError, on all ranks, where a rank has another value than rank 0."""
    values = gather(value)
    for other, theirs in enumerate(values):
        if theirs != values[0]:
            raise InputError(f"rank {other} has other {what} than rank 0: {theirs} and {values[0]}; expected the same "
                             "on all ranks")


def check_processes(options):
    """Raise InputError, on all ranks, where the options ask for GPUs or machines that are not there; say what is."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    for other, (local, gpus) in enumerate(gather(here)):
        if options.device == "cuda" and gpus < local:
            raise InputError(f"rank {other} finds {gpus} GPUs for the {local} processes of its machine; expected one "
                             "for each: fewer with --nproc_per_node, or --device cpu")
        if options.hsdp and (world() == local or world() % local):
            raise InputError(f"--hsdp with {world()} processes, {local} of them on rank {other}'s machine; expected "
                             "several machines with as many each, such as --nnodes 2 --nproc_per_node 8")
    if dist.is_initialized():
        print(f"{world()} processes on {options.device}, computing in {options.dtype}")


def start_processes():
    """Join the others, if torchrun started this process: NCCL between GPUs, gloo between CPUs -> whether it did."""
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return False
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local < gpus:
        torch.cuda.set_device(local)   # from here on "cuda" is this one
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    return True


def finish_processes():
    """Leave together: a process that ends while another still talks to it can abort that one at exit."""
    dist.monitored_barrier(patient_group(), timedelta(seconds=30))
    dist.destroy_process_group()


@lru_cache
def device_mesh(device, hsdp):
    """All ranks in a row; with hsdp a row for each machine: weights are sharded along rows and equal in all of them."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if hsdp:
        return dist.init_device_mesh(device, (world() // local, local), mesh_dim_names=("replicate", "shard"))
    return dist.init_device_mesh(device, (world(),))


def shard(model, options):
    """FSDP2: each rank keeps a part of every weight, of its gradient and of AdamW's state, in float32. The weights of a
    block are gathered in the compute type while the block runs, gradients are averaged over ranks in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, options.dtype), reduce_dtype=torch.float32)
    mesh = device_mesh(options.device, options.hsdp)
    for module in [*model.modules()]:
        if type(module).__name__ in (model._no_split_modules or ()):   # the transformer's blocks
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # What is left is one unit: embedding and head, which may be one and the same tensor, and the last norm.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.token_logps = partial(token_logps, model, dtype="float32")   # no autocast: the policy does the casting
    register_fsdp_forward_method(model, "token_logps")   # gathers the last unit when this method runs


def model_folder(name):
    """The local directory of a model; a hub name is downloaded once, weights as safetensors only."""
    if os.path.isdir(name):
        return Path(name)
    with reading(f"model {name}: no such directory, and on the hub it"):
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))


def load_tokenizer(name):
    """The tokenizer of a model."""
    with reading(f"the tokenizer of model {name}"):
        return AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=False)


def load_config(name):
    """The configuration of a model's text part."""
    with reading(f"the configuration of model {name}"):
        return AutoConfig.from_pretrained(model_folder(name), trust_remote_code=False).get_text_config()


def read_model(name):
    """A causal language model from safetensors, in float32, on the CPU."""
    with reading(f"model {name}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            model_folder(name), dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    if missing := sorted(report["missing_keys"]):   # transformers would go on with random ones
        raise InputError(f"model {name} lacks the weights {missing[:3]}; expected a causal language model")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:   # a temperature without sampling, say: published so, but save_pretrained would refuse it
        model.generation_config.do_sample = True
    return model


def prepare_model(model, options):
    """Put a model into train mode (gradient checkpointing asks for it) with every dropout at 0, so that the policy and
    the reference run the same forward, GPT-2's gelu in one kernel, and attention by pair_attention. Dropout sits in
    nn.Dropout modules and in float attributes."""
    transformers.AttentionInterface.register("sdpa", pair_attention)   # for all models; without parts it is what it was
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, transformers.activations.NewGELUActivation):
                setattr(module, name, transformers.activations.GELUTanh())   # the same function
        dropouts = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in dropouts + ["p"] * isinstance(module, torch.nn.Dropout):
            setattr(module, name, 0.0)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def load_model(name, options):
    """A model with the method token_logps, weights in float32: on the device, or sharded over the ranks of torchrun.

    Only rank 0 reads the weights, into host memory; tensor by tensor each rank takes its part of them.
    """
    gc.collect()   # models hold themselves in cycles: the one before goes now
    torch.cuda.empty_cache()
    if not dist.is_initialized():
        model = prepare_model(read_model(name), options).to(options.device)
        model.token_logps = partial(token_logps, model, dtype=options.dtype)
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    weights = {}   # filled on rank 0 alone

    def read():
        """What the other ranks need to build the same model, empty. Some buffers are in no file: they travel here."""
        model = read_model(name)
        weights.update(model.state_dict())
        return model.config, model.generation_config, dict(model.named_buffers())
    config, generation_config, buffers = once(read)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = generation_config
    shard(prepare_model(model, options), options)
    model.to_empty(device=options.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for key, buffer in model.named_buffers():
        buffer.copy_(buffers[key])
    return model


def check_models(names, tokenizer, pairs):
    """Two models' log-probs compare only token by token: every token of the pairs must mean the same to all models."""
    used = sorted({i for name in ("prompt_ids", "chosen_ids", "rejected_ids") for ids in pairs[name] for i in ids})
    for name in names:
        size, known = load_config(name).vocab_size, any(model_folder(name).glob("tokenizer*"))
        if not known:
            print(f"model {name} comes without a tokenizer: its tokens are taken to be those of the model to train")
        theirs = (load_tokenizer(name) if known else tokenizer).get_vocab()
        for i, token in zip(used, tokenizer.convert_ids_to_tokens(used)):
            if theirs.get(token) != i or i >= size:
                raise InputError(f"model {name} has another vocabulary than the tokenized pairs: {token!r} is {i} "
                                 f"here and {theirs.get(token)} there, of {size}; expected a model of the same family")


def write(file, text):
    """Write a file beside and rename it: it is there whole or not at all."""
    beside = file.with_name(file.name + ".saving")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def record(folder, **values):
    """Set values in folder/run.json."""
    file = folder / "run.json"
    write(file, json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values, indent=1) + "\n")


def write_model(model, tokenizer, folder, weights=None):
    """Write a Hugging Face directory: beside, then moved in; config.json comes last and marks it complete."""
    beside = folder / "model.saving"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside, state_dict=weights, max_shard_size="5GB")
    tokenizer.save_pretrained(beside)
    for file in sorted(beside.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    beside.rmdir()


def save_model(model, tokenizer, folder):
    """write_model; the weights of a sharded model are gathered on rank 0, in host memory."""
    weights = None
    if dist.is_initialized():
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        twice = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
        weights = {name: value for name, value in weights.items() if name not in twice}   # second names of tied ones
    once(write_model, model, tokenizer, folder, weights)


def training_state(model, optimizer, scheduler, step, window):
    """All that the next step depends on. The data position is the step itself (pairs_of_step); window holds what
    summarize has not yet written: the metrics of the pairs since the last row. rng is one rank's: training itself
    draws nothing, a loss that somebody writes may."""
    from torch.distributed.checkpoint.state_dict import get_state_dict   # half a second that only checkpoints need
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "rng": torch.get_rng_state(),
            "trainer": json.dumps({"scheduler": scheduler.state_dict(), "step": step, "window": window})}


def save_checkpoint(folder, *state):
    """Write training_state(*state) beside and rename it, so that a kill at any moment leaves a usable checkpoint."""
    import torch.distributed.checkpoint as dcp
    beside = folder.with_name(folder.name + ".saving")
    once(shutil.rmtree, beside, ignore_errors=True)
    dcp.save(training_state(*state), checkpoint_id=beside, no_dist=not dist.is_initialized())
    once(beside.rename, folder)


def newest_checkpoint(folder):
    """The complete checkpoint of the largest step in a run's folder, or None."""
    complete = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def load_checkpoint(folder, model, optimizer, scheduler):
    """Restore the newest checkpoint -> (step, window), and cut the metrics after it; (0, {}) where there is none."""
    path, trainer = once(newest_checkpoint, folder), {"step": 0, "window": {}}
    if path is not None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict
        state = training_state(model, optimizer, scheduler, **trainer)   # the shapes to load into
        with reading(f"{path}"):
            try:
                dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
            except dcp.api.CheckpointException as e:   # not a subclass of Exception; raised on all ranks
                why = {repr(error) for error, _ in e.failures.values()}
                raise OSError(f"{'; '.join(why)} (without it, the one before serves)") from e
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        torch.set_rng_state(state["rng"])
        trainer = json.loads(state["trainer"])
        scheduler.load_state_dict(trainer["scheduler"])
    once(cut_metrics, folder / "metrics.jsonl", trainer["step"])
    return trainer["step"], trainer["window"]


def cut_metrics(file, step):
    """Drop the rows after a step, and what is left of a row that was being written."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write(file, "".join(row + "\n" for row in rows))


def open_folder(folder, options):
    """Refuse an output directory that holds something, unless it is a run's and --resume asks for it."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name] * folder.exists()
    if found and not options.resume:
        raise InputError(f"--output_dir {folder} is not empty; give a new one, or --resume to continue the run in it")
    if found and not {"run.json", "start_model", "reward_model"} & set(found):   # a run begins with one of these
        raise InputError(f"--resume: {folder} holds no run of tgdpo.py but {', '.join(found[:5])}")


def open_run(folder, options, facts):
    """Begin folder/run.json -> False; with --resume, check that the run there is this one -> whether it is finished."""
    mine = json.loads(json.dumps(asdict(options) | facts))
    if options.resume and (folder / "run.json").exists():
        run = json.loads((folder / "run.json").read_text())
        theirs = run["options"] | run
        for name in [name for name in mine if name not in MAY_CHANGE and theirs.get(name) != mine[name]]:
            raise InputError(f"--resume: {name} was {theirs.get(name)} in {folder} and is {mine[name]} now; resume "
                             "with what the run began with, or begin another in a new --output_dir")
        return run["finished"]
    folder.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True).stdout.decode().strip() if shutil.which("git") else ""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    record(folder, options=asdict(options), **facts, versions={"python": sys.version.split()[0]} | versions,
           git_commit=commit, finished=False)
    return False


# -------------------------------------------------------------------------------------- 9. annotate, train, evaluate
CPU_TOKENS = 1024   # of a forward pass on the CPU: with more it takes memory and is not faster (README)


@lru_cache
def file_digest(path, size, mtime_ns):
    """Of a file's content; the last two arguments only let the cache notice a change."""
    sha = hashlib.sha256()
    with reading(path), open(path, "rb") as stream:
        while block := stream.read(2**24):
            sha.update(block)
    return sha.hexdigest()


def model_fingerprint(name):
    """Of a model's content: its configuration and its weights."""
    folder = model_folder(name)
    files = sorted(folder.glob("*.safetensors")) + [file for file in [folder / "config.json"] if file.exists()]
    digests = [file_digest(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:32]


def pairs_fingerprint(pairs):
    """Of the pairs' tokens, and of the per-token columns that were joined to them."""
    table, sha = pairs.with_format("arrow")[:], hashlib.sha256()
    for name in sorted(set(table.column_names) - {"index"}):
        column = table[name].combine_chunks()   # one value for the same rows, however they lie in memory
        sha.update(name.encode())
        for part in (column.value_lengths(), column.flatten()):
            sha.update(part.to_numpy(zero_copy_only=False).tobytes())
    return sha.hexdigest()[:32]


def pair_lengths(pairs):
    """Tokens of each pair's prompt and responses."""
    names = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in pairs.column_names]
    return [sum(map(len, parts)) for parts in zip(*[pairs[name] for name in names])]


def passes(pairs, options):
    """The rows of pairs, longest first, in groups that go through the model together, on all ranks: at most
    per_device_train_batch_size pairs each, on the CPU at most CPU_TOKENS. What a step learns does not depend on it."""
    lengths = pair_lengths(pairs)
    order, groups = sorted(range(len(pairs)), key=lambda i: -lengths[i]), []
    while order:
        fit = max(1, CPU_TOKENS // lengths[order[0]]) if options.device == "cpu" else len(order)
        size = min(fit, options.per_device_train_batch_size) * world()
        groups.append(order[:size])
        order = order[size:]
    return groups


@torch.no_grad()
def share_prompts(model, pairs, options):
    """Whether a pair can be one row, prompt + chosen + rejected (`collate`) -> bool, on all ranks the same.

    The pair with the longest sequence is tried. Its log-probs must be those of the plain layout; the yardstick is what
    differs if the rejected response sees the chosen one, since rounding depends on model and type (measured: of that
    1e-4 in float32 and 0.01 in bfloat16 where masks are honoured, 0.2 and more where not). On CUDA, where the rejected
    response's mask rules flash attention out, it must not take longer either.
    """
    if not options.shared_prompt or "rejected_ids" not in pairs.column_names:
        return False
    parts = zip(*[map(len, pairs[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")])
    lengths = [prompt + max(chosen, rejected) for prompt, chosen, rejected in parts]   # of the longer sequence
    rows = pairs[[lengths.index(max(lengths))]]
    plain, shared = [collate(rows, model.device, layout) for layout in (False, True)]
    sharded, mask = dist.is_initialized(), plain["mask"]
    logps = model.token_logps if sharded else partial(token_logps, model)   # the latter in float32
    window, longest = getattr(model.config.get_text_config(), "sliding_window", None), plain["input_ids"].shape[1]
    why = f"its sliding window is {window} tokens, a sequence {longest}" if window and window < longest else ""
    try:
        blind = shared | {"segments": torch.zeros_like(shared["segments"])}
        del blind["parts"]
        want, *found = [logps(batch)[mask] for batch in (plain, shared, blind)]                         # (M,) each
        apart, much = [(values - want).abs().mean().item() for values in found]
        if not apart <= (0.1 if sharded and options.dtype == "bfloat16" else 1e-3) * much + 1e-6:
            why = why or f"it does not honour the mask, log-probs would differ by {apart:.1g}"
    except Exception as e:   # a family with masks of its own may raise anything
        why = f"with a mask it raises {type(e).__name__}: {' '.join(str(e).split())[:100]}"
    if not why and options.device == "cuda":
        seconds = []
        for batch in (plain, shared) * 3:
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.token_logps(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        why = "that is faster here" * (min(seconds[::2]) < min(seconds[1::2]))
    why = gather(why)[0]
    if why:
        print(f"{model.config.name_or_path} gets each prompt twice, once for each response: {why}")
    return not why


@torch.no_grad()
def token_columns(name, pairs, options, title):
    """Token log-probs of a frozen model by training's own forward: for each side, one array of floats a pair."""
    model = load_model(name, options)
    shared = share_prompts(model, pairs, options)
    sides = [side for side in ("chosen_ids", "rejected_ids") if side in pairs.column_names]
    share = {}   # pairs of this rank -> the log-probs of their sides
    for group in tqdm(passes(pairs, options), desc=title, disable=rank() > 0 or None):
        mine = group[rank()::world()]
        rows = pairs[mine or group[:1]]   # all ranks run equally often, if need be for nothing
        logps = model.token_logps(collate(rows, model.device, shared)).cpu().double().numpy()           # (N, R)
        for k, i in enumerate(mine):
            share[i] = [logps[k + j * len(mine), :len(rows[side][k])] for j, side in enumerate(sides)]
    found = {i: values for part in gather(share) for i, values in part.items()}
    for i in range(len(pairs)):
        if not all(math.isfinite(values.sum()) for values in found[i]):
            raise FloatingPointError(f"{title}: a log-prob of model {name} for pair {i} is not finite")
    return [[found[i][j] for i in range(len(pairs))] for j in range(len(sides))]


def annotate(name, pairs, options, title):
    """token_columns, kept in cache_dir under the content of the model and of the pairs, and the dtype.

    What is kept are raw log-probs, without any beta: no option of the loss can make them stale.
    """
    pairs = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    kind = options.dtype
    if kind == "bfloat16":   # FSDP rounds elsewhere than autocast does, and so do the layouts: not the same numbers
        kind += "-sharded" * dist.is_initialized() + "-plain" * (not options.shared_prompt)
    store = Path(options.cache_dir) / f"{once(model_fingerprint, name)}-{pairs_fingerprint(pairs)}-{kind}"
    saved = once(lambda: datasets.load_from_disk(str(store), keep_in_memory=True) if store.is_dir() else None)
    if saved is not None:
        print(f"{title}: log-probs from the cache, {store}")
        return [list(saved.with_format("numpy", dtype="float64")[side]) for side in ("chosen", "rejected")]
    columns = token_columns(name, pairs, options, title)
    once(write_columns, store, columns)
    return columns


def write_columns(store, columns):
    """Keep what token_columns returned as a data set, float32, written beside and renamed."""
    kinds = datasets.Features({side: datasets.List(datasets.Value("float32")) for side in ("chosen", "rejected")})
    beside = store.with_name(f"{store.name}.{os.getpid()}.saving")
    datasets.Dataset.from_dict(dict(zip(kinds, columns)), kinds).save_to_disk(str(beside))
    try:
        beside.rename(store)
    except OSError:   # another run has just written the same
        shutil.rmtree(beside)


def add_columns(pairs, name, columns):
    """Join per-token columns to the pairs, as chosen_<name> and rejected_<name>."""
    for side, column in zip(("chosen", "rejected"), columns):
        pairs = pairs.add_column(f"{side}_{name}", column, feature=datasets.List(datasets.Value("float32")))
    return pairs


def forward(model, batch, options):
    """A batch through the policy and the loss -> (losses (B,), {metric: (B,), detached})."""
    logps, mask = model.token_logps(batch), batch["mask"]                                               # (N, R) each
    chosen_logps, rejected_logps = logps.chunk(2)                                                       # (B, R) each
    if options.loss == "simpo":
        losses, chosen, rejected = simpo_loss(chosen_logps, rejected_logps, *mask.chunk(2),
                                              options.beta, options.gamma)
    else:   # DPO is r̂ = 0, and so f = 1
        rewards = batch["rewards"] if options.loss in GUIDED else torch.zeros_like(logps)               # r̂, (N, R)
        bound = {"floor": options.guidance_floor} if options.loss == "tgdpo" else {}
        losses, chosen, rejected = GUIDED.get(options.loss, tgdpo_loss)(
            chosen_logps, rejected_logps, *batch["ref_logps"].chunk(2), *rewards.chunk(2),
            options.beta, options.alpha, **bound)
    metrics = {"loss": losses.detach(), "rewards/chosen": chosen, "rewards/rejected": rejected,
               "rewards/margins": chosen - rejected,
               "rewards/accuracies": (chosen - rejected > 1e-5).float(),   # at the start all are 0, but for rounding
               "logps/chosen": chosen_logps.detach().sum(-1), "logps/rejected": rejected_logps.detach().sum(-1)}
    if options.loss == "tgdpo":   # f of both responses of a pair, side by side
        sides = torch.tensor([1.0, -1.0], device=logps.device).repeat_interleave(len(losses))[:, None]  # (N, 1)
        f = torch.cat(guidance(rewards, options.alpha, sides, **bound).chunk(2), dim=-1)                # (B, 2R)
        inside = torch.cat(mask.chunk(2), dim=-1)                                                       # (B, 2R)
        metrics |= {"guidance/sum": (f * inside).sum(-1), "guidance/tokens": inside.sum(-1),
                    "guidance/min": f.where(inside, math.inf).amin(-1),
                    "guidance/max": f.where(inside, -math.inf).amax(-1),
                    "guidance/nonpositive": ((f <= 0) & inside).sum(-1)}
    return losses, metrics


def pass_over(model, pairs, options, learn):
    """Pairs through the loss, in `passes`, each rank its share -> {metric: one value a pair}, on all ranks; with learn,
    their gradient accumulates.

    A pass's losses are divided by the number of all pairs here, so any split gives one large batch's gradient.
    """
    table, done = {}, []   # what this rank finds, and for which pairs
    for group in passes(pairs, options):
        mine = group[rank()::world()]
        rows = pairs[mine or group[:1]]   # all ranks must run equally often, if need be for nothing
        with torch.set_grad_enabled(learn):
            losses, metrics = forward(model, collate(rows, model.device, options.shared_prompt), options)
        if learn:   # times world, since FSDP averages over ranks; times 0 where the pair is not this rank's
            (losses.sum() * (world() / len(pairs) if mine else 0)).backward()
        done += mine
        for name, values in metrics.items():
            table.setdefault(name, []).append(values[:len(mine)])
    whole = {name: [None] * len(pairs) for name in table}
    for places, part in gather((done, {name: torch.cat(values).tolist() for name, values in table.items()})):
        for name, values in part.items():
            for i, value in zip(places, values):
                whole[name][i] = value
    return whole


def summarize(table):
    """{metric: one value a pair} -> one row: means over pairs; for f its mean, range and count over response tokens."""
    row = {name: math.fsum(values) / len(values) for name, values in table.items() if not name.startswith("guidance/")}
    if "guidance/sum" in table:
        row |= {"guidance/mean": math.fsum(table["guidance/sum"]) / sum(table["guidance/tokens"]),
                "guidance/min": min(table["guidance/min"]), "guidance/max": max(table["guidance/max"]),
                "guidance/nonpositive": sum(table["guidance/nonpositive"])}
    return row


def split_rows(n, options):
    """Seeded split of n pairs by --eval_size -> (rows to train on, rows held out), both in data order."""
    size = options.eval_size
    held = int(size) if size >= 1 or not size else max(1, round(size * n))
    if held >= n:
        raise InputError(f"--eval_size {size:g} would hold out {held} of {n} usable pairs and leave none to train on")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(options.seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def pairs_of_step(n, step, options):
    """Rows of an optimizer step (from 0): each epoch is a seeded shuffle of all n, and its last step may be smaller."""
    size = batch_size(options)
    epoch, k = divmod(step, math.ceil(n / size))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(options.seed + epoch)).tolist()
    return order[k * size:(k + 1) * size]


def make_optimizer(model, n, options):
    """AdamW and its schedule for n pairs -> (optimizer, scheduler, number of steps)."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]   # biases and norms
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    epoch = math.ceil(n / batch_size(options))
    steps = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * epoch)
    warmup = min(math.ceil(options.warmup_ratio * steps), steps - 1)   # else a run of one step would learn nothing
    return optimizer, get_scheduler(options.lr_scheduler_type, optimizer, warmup, steps), steps


def train(options, pairs, tokenizer, facts):
    """Train options.model_name_or_path on annotated pairs. Everything goes into options.output_dir: the model, its
    tokenizer, metrics.jsonl, checkpoints and run.json (README, "What a run leaves behind")."""
    folder = Path(options.output_dir)
    model = once(model_fingerprint, options.model_name_or_path)
    facts = {"model": model, "pairs_per_step": batch_size(options)} | facts
    if once(open_run, folder, options, facts):
        return print(f"{folder}: finished already")
    check_same("pairs (their fingerprint)", pairs_fingerprint(pairs))
    every = pairs
    pairs, held_out = [every.select(rows) for rows in split_rows(len(every), options)]
    torch.manual_seed(options.seed)
    model = load_model(options.model_name_or_path, options)
    optimizer, scheduler, steps = make_optimizer(model, len(pairs), options)
    step, window = load_checkpoint(folder, model, optimizer, scheduler) if options.resume else (0, {})
    options = replace(options, shared_prompt=share_prompts(model, every, options))
    seconds, tokens, scores = 0.0, 0, {}
    bar = tqdm(total=steps, initial=step, desc=f"train {folder.name}: {options.loss}", disable=rank() > 0 or None)
    with bar, open(os.devnull if rank() else folder / "metrics.jsonl", "a") as log:
        while step < steps:
            began, batch = time.perf_counter(), pairs.select(pairs_of_step(len(pairs), step, options))
            table = pass_over(model, batch, options, learn=True)
            norm = clip_gradients(model, options.max_grad_norm or math.inf)
            check_finite(table["loss"], norm, batch, step + 1, folder)
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step, seconds = step + 1, seconds + time.perf_counter() - began
            tokens += sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in batch)
            for name, values in table.items():
                window.setdefault(name, []).extend(values)
            bar.set_postfix(loss=f"{math.fsum(table['loss']) / len(batch):.4f}", refresh=False)
            bar.update()
            rows = []
            if step % options.logging_steps == 0 or step == steps:
                rows.append(summarize(window) | {"grad_norm": norm, "learning_rate": rate,
                                                 "tokens_per_second": tokens / seconds})
                seconds, tokens, window = 0.0, 0, {}
            if len(held_out) and (step == steps or (options.eval_steps and step % options.eval_steps == 0)):
                table = pass_over(model, held_out, options, learn=False)
                check_finite(table["loss"], 0.0, held_out, step, folder)
                scores = {f"eval_{name}": value for name, value in summarize(table).items()}
                rows.append(scores)
            log.write("".join(json.dumps({"step": step} | row) + "\n" for row in rows))
            log.flush()
            if options.save_steps and step % options.save_steps == 0 and step < steps:
                save_checkpoint(folder / f"checkpoint-{step}", model, optimizer, scheduler, step, window)
    save_model(model, tokenizer, folder)
    once(record, folder, steps=steps, evaluation=scores, finished=True)


def clip_gradients(model, max_norm):
    """Scale all gradients so that their norm, over all ranks, is at most max_norm -> the norm before.

    It is taken row by row first: over a large tensor at once torch's float32 norm is inexact on the CPU (measured:
    7e-4 off for 16 million numbers), and would depend on the number of ranks.
    """
    weights = [p for p in model.parameters() if p.grad is not None]
    rows = [torch.linalg.vector_norm(p.grad, dim=-1) if p.ndim > 1 else p.grad for p in weights]
    norm = torch.nn.utils.get_total_norm(rows)
    norm = norm.full_tensor() if dist.is_initialized() else norm
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm.item()


def check_finite(losses, norm, pairs, step, folder):
    """Stop a run whose loss or gradient is no number, before it reaches the weights."""
    bad = [i for i, loss in zip(pairs["index"], losses) if not math.isfinite(loss)]
    if bad or not math.isfinite(norm):
        what = f"loss of pairs {bad}" if bad else f"gradient of pairs {list(pairs['index'])}"
        raise FloatingPointError(f"step {step}: the {what} (rows of the data set, from 0) is not finite; newest "
                                 f"checkpoint: {newest_checkpoint(folder) or 'none'}")


# ------------------------------------------------------------------------------------------------------------ 10. main
def check_run(options, tokenizer, pairs):
    """Raise InputError now for what would otherwise fail when hours have passed."""
    needed = [options.model_name_or_path]
    needed += [options.ref_model] * bool(options.loss != "simpo" and options.ref_model)
    needed += [options.reward_model] * bool(
        options.loss in GUIDED and options.reward_model and "chosen_rewards" not in pairs.column_names)
    check_models(needed, tokenizer, pairs)
    split_rows(len(pairs), options)
    if options.eval_steps and not options.eval_size:
        print("--eval_steps has no effect without --eval_size: no pairs are held out")
    for name in ("output_dir", "cache_dir"):
        with reading(f"--{name} {getattr(options, name)}"):
            Path(getattr(options, name)).mkdir(parents=True, exist_ok=True)


def run(options, tokenizer, pairs, counts):
    """Annotate the pairs with what the loss needs, then train -> {role: directory} of the models involved."""
    once(check_run, options, tokenizer, pairs)
    reference, folder = options.ref_model or options.model_name_or_path, Path(options.output_dir)
    if options.save_steps and not all(gather(folder.is_dir())):
        raise InputError(f"--output_dir {folder} is not there on all machines; expected a file system that they share, "
                         "since each rank writes its part of a checkpoint")
    own_rewards = "chosen_rewards" in pairs.column_names
    found, facts = {"reference": reference}, {"data": pairs_fingerprint(pairs), "pairs": counts}
    if options.loss != "simpo":
        facts["reference"] = once(model_fingerprint, reference)
        ref_logps = annotate(reference, pairs, options, "annotate: reference")
        pairs = add_columns(pairs, "ref_logps", ref_logps)
    if options.loss in GUIDED and own_rewards:
        print("token rewards: the data set's own" + "; --reward_model is not used" * bool(options.reward_model))
    elif options.loss in GUIDED:
        beta = options.reward_beta or options.beta
        judge = options.reward_model or str(folder / "reward_model")
        found["reward model" if options.reward_model else "dpo"] = judge
        if not options.reward_model:
            print(f"no --reward_model: one is trained first, by DPO on the same pairs, in {judge}")
            train(replace(options, loss="dpo", beta=beta, output_dir=judge), pairs, tokenizer, facts)
        facts["reward_model_fingerprint"] = once(model_fingerprint, judge)
        rm_logps = annotate(judge, pairs, options, "annotate: reward model")
        # (8a)  r̂_t = β [ log π_rm - log π_ref ]: β comes in here, so the cached log-probs serve every β
        pairs = add_columns(pairs, "rewards", [[implicit_reward(*row, beta) for row in zip(*side)]
                                               for side in zip(rm_logps, ref_logps)])
    train(options, pairs, tokenizer, facts)
    return found | {options.loss: str(folder)}


def read_data(options):
    """-> (tokenizer, pairs, counts) for a model to train."""
    rows = load_rows(options.dataset, options.dataset_split)
    tokenizer = load_tokenizer(options.model_name_or_path)
    names = {options.model_name_or_path, options.ref_model, options.reward_model} - {None}
    positions = [getattr(load_config(name), "max_position_embeddings", None) for name in sorted(names)]
    length = min([options.max_length] + [n for n in positions if n])
    if length < options.max_length:
        print(f"--max_length {options.max_length} is lowered to {length}: a model has no more positions")
    return tokenizer, *tokenize(rows, tokenizer, length, options.dataset)


def tiny_data(options, start, file):
    """The tiny mode's language model, trained and saved in start, and its pairs, in file unless the user brings some
    -> (tokenizer, pairs, counts, prompts to judge on)."""
    rng = random.Random(options.seed)
    if options.dataset:
        rows = load_rows(options.dataset, options.dataset_split)
        texts = [json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() for row in rows]
        tokenizer = tiny_tokenizer(texts, options.max_length)
        pairs, counts = tokenize(rows, tokenizer, options.max_length, options.dataset)
        train_rows, held_out = split_rows(len(pairs), options)
        texts = [r["prompt_ids"] + r[side] for r in pairs.select(train_rows) for side in ("chosen_ids", "rejected_ids")]
        prompts = [ids[NEW_TOKENS - options.max_length:] for ids in pairs.select(held_out or train_rows)["prompt_ids"]]
    else:
        tokenizer = tiny_tokenizer(None, options.max_length)
        texts = []
        for noun in rng.choices(NOUNS, k=20000):
            texts.append(tokenizer(f"describe the {noun} : {' '.join(tiny_sentence(noun, rng))}").input_ids)
        prompts = tokenizer([f"describe the {noun} :" for noun in rng.choices(NOUNS, k=TINY_PROMPTS)]).input_ids
    with reading(f"--output_dir {start.parent}"):
        start.mkdir(parents=True, exist_ok=True)
    if not (start / "config.json").exists():
        tiny_language_model(texts, tokenizer, options, start)
    if not options.dataset:
        if not file.exists():
            tiny_pairs(start, tokenizer, options, file)
        pairs, counts = tokenize(load_rows(str(file), None), tokenizer, options.max_length, str(file))
    return tokenizer, pairs, counts, prompts


def run_tiny(options):
    """From nothing to a table: a language model, pairs, a reward model, TGDPO, and what each of them is worth."""
    folder, known = Path(options.output_dir), not options.dataset
    start, file = folder / "start_model", folder / "pairs.jsonl"
    tokenizer, pairs, counts, prompts = once(tiny_data, options, start, file)
    options = replace(options, model_name_or_path=str(start), dataset=options.dataset or str(file))
    found = run(options, tokenizer, pairs, counts)
    if known and options.loss in GUIDED:   # the same with the true token rewards: what a perfect reward model would do
        truth = [tiny_truth(tokenizer, pairs["prompt_ids"], pairs[side]) for side in ("chosen_ids", "rejected_ids")]
        stage = replace(options, output_dir=str(folder / "true_rewards"))
        run(stage, tokenizer, add_columns(pairs, "rewards", truth), counts)
        found[f"{options.loss}, truth"] = stage.output_dir
    tiny_report(options, tokenizer, found, prompts, known)


def tiny_report(options, tokenizer, found, prompts, known):
    """Every model's responses to the same prompts: a table and a few responses, for the terminal and run.json."""
    def interval(values):   # mean and half of its 95 % interval
        values = torch.tensor(values, dtype=torch.float64)
        return values.mean().item(), 1.96 * values.std(correction=0).item() / len(values) ** 0.5

    reference = found["reference"]
    judge = found.get("reward model", found.get("dpo", found[options.loss]))   # whose r̂ is shown
    draws, truth, rhat, table = {}, {}, {}, {}
    for name, path in found.items():
        draws[name] = once(sample, path, prompts, options, tokenizer, f"sample: {name}")
        rows = datasets.Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": draws[name]})
        judges = dict.fromkeys((path, reference, judge))   # each once, in the same order on all ranks
        logps = {p: token_columns(p, rows, options, f"judge: {name}")[0] for p in judges}
        rhat[name] = [implicit_reward(*row, options.reward_beta or options.beta)
                      for row in zip(logps[judge], logps[reference])]
        table[name] = {"KL": interval([sum(a) - sum(b) for a, b in zip(logps[path], logps[reference])]),
                       "length": interval([float(len(ids)) for ids in draws[name]])}
        if known:
            truth[name], legal = [tiny_truth(tokenizer, prompts, draws[name], of) for of in (tiny_rewards, tiny_legal)]
            table[name]["ungrammatical"] = interval([float(not all(row)) for row in legal])
            table[name]["true reward"] = interval([sum(row) for row in truth[name]])
            for other in [other for other in ("reference", "dpo", "reward model") if other in truth]:
                totals = [(sum(mine), sum(theirs)) for mine, theirs in zip(truth[name], truth[other])]
                table[name][f"wins over {other}"] = interval([(a > b) + 0.5 * (a == b) for a, b in totals])
    print(f"\n{len(prompts)} {'fresh' if known else 'held-out'} prompts, means ± half of the 95 % interval")
    columns = list(table[options.loss])
    print(" " * 14 + "".join(f"{column:>{max(17, len(column) + 3)}}" for column in columns))
    for name, row in table.items():
        cells = [f"{row[column][0]:.2f} ± {row[column][1]:.2f}" if column in row else "" for column in columns]
        print(f"{name:14}" + "".join(f"{cell:>{max(17, len(column) + 3)}}" for column, cell in zip(columns, cells)))
    report = {"table": table}
    if known:   # does r̂ find the tokens that truly matter, in what the reference says?
        values, worth = [torch.tensor([v for row in rows["reference"] for v in row]) for rows in (rhat, truth)]
        report["correlation"], report["AUC"] = credit(values, worth)
        print(f"r̂ and the true token rewards: correlation {report['correlation']:.3f}, AUC {report['AUC']:.3f}")
    once(record, Path(options.output_dir), **report)
    print("\nresponses, with the r̂ of their tokens")
    for k in range(min(2, len(prompts))):
        for name in found:
            words = [tokenizer.decode([i]) for i in draws[name][k]]
            print(f"{name:14}", *map(paint, words, rhat[name][k]), sep=" " if known else "")


def credit(values, worth):
    """Token rewards and the true ones, (M,) each -> (correlation, AUC: P(value of a good token > that of a bad))."""
    good, bad = values[worth > 0], values[worth < 0].sort().values
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)      # equal ones count half
    return torch.corrcoef(torch.stack([values, worth]))[0, 1].item(), (below / 2).mean().item() / max(1, len(bad))


def paint(text, value):
    """A token on a blue (r̂ > 0) or orange ground; where colours are not wanted, with r̂ behind it if that is large."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return f"{text}[{value:+.1f}]" if abs(value) >= 0.5 else text
    ground = ((255, 153, 111, 69, 33) if value > 0 else (255, 223, 216, 209, 202))[min(4, int(2 * abs(value) + 0.5))]
    return f"\033[38;5;16;48;5;{ground}m{text}\033[0m"


def command(argv):
    """One command line, on each rank -> exit status: 0; 2 for input that cannot be used; 1 for a run that broke off;
    130 for Ctrl-C. Rank 0 says why."""
    folder = None
    try:
        check_same("command line", argv)
        options = once(read_options, argv)
        folder = Path(options.output_dir)
        check_processes(options)
        once(open_folder, folder, options)
        if options.model_name_or_path is None:
            run_tiny(options)
        else:
            run(options, *once(read_data, options))
        print(f"done: {folder}")
        return 0
    except SystemExit as e:   # --help, and the ranks that leave because rank 0 failed
        return e.code
    except InputError as e:
        status, text = 2, f"error: {e}"
    except FloatingPointError as e:
        status, text = 1, f"stopped at {e}"
    except KeyboardInterrupt:
        status, text = 130, f"interrupted; the same command with --resume --output_dir {folder} continues"
    if not rank():
        print(f"tgdpo.py: {text}", file=sys.stderr)
    return status


def quiet():
    """Leave the terminal to what this script says itself."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")   # dcp says so of a single process
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")   # r̂ and the tokens, on a terminal that lacks such letters


def main(argv):
    """The command line -> exit status, as `command` has it. Under torchrun all ranks join for it."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")   # Linux: large pages for large tensors on the CPU (README)
    quiet()
    joined = start_processes()
    try:
        status = command(argv)
        if joined and status != 130:   # after Ctrl-C the others may be anywhere; to leave at once ends their waiting
            finish_processes()
        return status
    except RuntimeError as e:   # what gloo and NCCL raise when another process is gone
        if not (dist.is_initialized() and re.search("gloo|NCCL|monitoredBarrier", str(e))):
            raise
        print(f"tgdpo.py: rank {rank()} cannot reach another rank, which was killed or has failed, unless the network "
              "has; the same command with --resume and its --output_dir continues. What was reported: "
              + " ".join(str(e).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
