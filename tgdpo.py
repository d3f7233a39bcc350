#!/usr/bin/env python3
"""TGDPO in one file: DPO guided by token-level rewards (arXiv 2506.14574, ICML 2025).

    python tgdpo.py                  the method in numbers, then a tiny GPT-2 in a known world
    python tgdpo.py --model_name_or_path MODEL --dataset pairs.jsonl --reward_model DPO_MODEL
    python tgdpo.py --model_name_or_path MODEL --dataset pairs.jsonl   trains a DPO model first
    python tgdpo.py run.yaml --alpha 1.0             options from a file; flags override it
    torchrun --nproc_per_node 8 tgdpo.py scripts/configs/llama3_8b_instruct_pairrm.yaml

The loss, for a prompt x, a chosen response y_w and a rejected one y_l, token by token:

    ℓ_t  = log π_θ(y_t|s_t) - log π_ref(y_t|s_t)           how far the policy has moved
    r̂_t  = β [ log π_rm(y_t|s_t) - log π_ref(y_t|s_t) ]    the token's reward, by a DPO model π_rm
    f_w  = 1 + α r̂_t,   f_l = 1 - α r̂_t                    guidance: how much a token counts
    φ    = Σ_t β f_w ℓ_t over y_w  -  Σ_t β f_l ℓ_t over y_l
    loss = -log σ(φ)                                       α = 0 is DPO

The way of the data, with the function for each step; one model is in memory at a time:

    rows --tokenize--> pairs --annotate--> + ref_logps --annotate--> + rm_logps
         --add_token_rewards--> + rewards (r̂) --train--> a model directory

                  paper               official code                    here
    β in r̂        the reward model's  this run's                       --reward_beta
    f > 0         Assumption 4.2      not enforced                     logged; --guidance_floor
    models held   not said            policy, reference, reward model  one
    pairs a GPU   not said            1; more raise an error           any number

Official code: github.com/dvlab-research/TGDPO. A tag such as (4.3a) is that of an equation in
derivation.md, which derives it; with a dot it belongs to the paper's theorem of that number.

Shapes stand beside tensors: S states, A actions, Y responses of a small language; B pairs, N = 2B
sequences (the chosen ones first), T tokens of the longest sequence, R of the longest response, M
response tokens in all, H hidden size, V vocabulary. Sections 1 to 4 are the method.
"""
import gc, gzip, hashlib, inspect, json, math, os, random, re, shutil, subprocess, sys, time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial, reduce
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints
from unittest.mock import patch

import datasets, filelock, pyarrow.compute, pyarrow.parquet, torch, transformers, yaml
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SIDES, IDS = ("chosen", "rejected"), ("chosen_ids", "rejected_ids")
INTS, FLOATS = [datasets.List(datasets.Value(kind)) for kind in ("int32", "float32")]

# ------------------------------------------------------------ 1. from sequences to tokens
# A state s is the prompt and the tokens so far, an action a is the next token. In a small language
# both can be listed: a policy, a reward r(s, a) or an f(s, a) is a table (S, A). The language is
# (states, actions), (Y, T) each, of all its responses: the states that a response passes and the
# actions that it takes there, -1 after its end. show_decomposition, in section 7, prints numbers.
def along(table, language):
    """A table's entries at the tokens of every response, 0 after its end: (S, A) -> (Y, T)."""
    states, actions = language
    return table[states, actions].where(states >= 0, 0.0)

def sequence_ppo_objective(log_policy, ref_logps, reward, beta, language):
    """What sequence-level PPO maximises, over all responses: tables (S, A) -> J, a number ()."""
    # (1b)  J(π) = E_{y~π} Σ_t [ r(s_t, a_t) - β log π(a_t|s_t) / π_ref(a_t|s_t) ]
    probability = along(log_policy, language).sum(-1).exp()  # π(y), (Y,)
    gain = along(reward - beta * (log_policy - ref_logps), language).sum(-1)  # (Y,)
    return (probability * gain).where(probability > 0, 0.0).sum()  # what is never said counts 0

# Theorem 4.1 takes J apart into its sum over t: the maximum of a sum is at most the sum of the
# maxima. Term t charges nothing for the way: its best policy walks to the best state of depth t and
# takes a token there, worth β log Z(s) at most (closed_form_policy, with f = 1). D_t(π) is the
# distribution of s_t under π. A response that has ended is in a state of depth t, too: log Z = 0.
def theorem_4_1(ref_logps, log_Z, beta, language):
    """The bound of max J, and the same sum over the reference's states: log_Z (S,) -> (), ()."""
    states, _ = language
    value = beta * log_Z[states].where(states >= 0, 0.0)  # (Y, T)
    # (4.1)  max_π J(π) <= Σ_t max_π E_{s_t~D_t(π), a~π}[ r - β log π / π_ref ]
    #                    = Σ_t max_{s of depth t} β log Z(s)
    bound = value.amax(0).sum()
    # (4b)  Σ_t E_{s_t~D_t}[ β log Z(s_t) ] with D_t fixed, here the reference's. It may lie below
    # max J, but each state is now a problem of its own: the paper's step from sequences to tokens.
    fixed = (along(ref_logps, language).sum(-1).exp()[:, None] * value).sum()
    return bound, fixed

# The problem of one state is to maximise E_{a~π}[ r - β log π / π_ref ], or this divided by β.
# Guided, β f(s, a) with f > 0 (Assumption 4.2) divides the reward; the log-ratio keeps weight 1.
# (β f on the log-ratio would be another problem with another optimum: derivation.md, (6b).)
def token_ppo_objective(log_policy, ref_logps, reward, beta, f=1.0):
    """What guided token-level PPO maximises in each state: tables (S, A), f a number or (S, A) ->
    (S,). Its maximum is log Z (Theorem 4.3)."""
    # (6a)  E_{a~π(.|s)}[ r(s, a) / (β f(s, a)) - log π(a|s) / π_ref(a|s) ]
    policy, gain = log_policy.exp(), reward / (beta * f) - (log_policy - ref_logps)
    return (policy * gain).where(policy > 0, 0.0).sum(-1)  # an action never taken counts 0

def closed_form_policy(ref_logps, reward, beta, f=1.0):
    """The maximiser of token_ppo_objective in each state (Theorem 4.3): tables (S, A), f a number
    or (S, A) -> (log_policy (S, A), log_Z (S,))."""
    log_weights = ref_logps + reward / (beta * f)
    # (4.3b)  log Z(s) = log Σ_a π_ref(a|s) exp( r(s, a) / (β f(s, a)) )
    log_Z = log_weights.logsumexp(-1)
    # (4.3a)  π*(a|s) = π_ref(a|s) exp( r(s, a) / (β f(s, a)) ) / Z(s)
    return log_weights - log_Z[..., None], log_Z

def implicit_reward(log_policy, ref_logps, beta, f=1.0, log_Z=0.0):
    """The reward for which a policy is the closed form with this log Z: (4.3a) solved for r
    (Theorem 4.3). Elementwise; for tables (S, A), log_Z is (S, 1)."""
    # (4.3c)  r(s, a) = β f(s, a) [ log π*(a|s) / π_ref(a|s) + log Z(s) ]
    return beta * f * (log_policy - ref_logps + log_Z)

# Bradley-Terry: y_w beats y_l with probability σ( R(y_w) - R(y_l) ), R the sum of the rewards. With
# (4.3c) for each reward, R(y_w) - R(y_l) = φ + δ: φ holds the policy, δ the log Z. That is exact
# for one f. With f_w for the winner and another f_l for the loser it is the paper's definition.
def phi_and_delta(log_policy, ref_logps, log_Z, beta, f_w, f_l, language):
    """φ and δ of each response as y_w (rows) against each as y_l (columns): tables (S, A), log_Z
    (S,), f_w and f_l numbers or (S, A) -> (Y, Y), (Y, Y)."""
    def difference(table):
        """A table's sum with f_w along each winner, less the one with f_l along each loser."""
        winner, loser = [along(beta * f * table, language).sum(-1) for f in (f_w, f_l)]  # (Y,)
        return winner[:, None] - loser[None]
    # (4.4a)  φ = Σ_t β f_w ℓ_t over y_w - Σ_t β f_l ℓ_t over y_l,   ℓ_t = log π* / π_ref
    # (4.4b)  δ = Σ_t β f_w log Z(s_t) over y_w - Σ_t β f_l log Z(s_t) over y_l
    return difference(log_policy - ref_logps), difference(log_Z[:, None].expand_as(ref_logps))

# To learn from pairs, put π_θ for π* in φ and raise σ(φ + δ). Nobody knows δ. Theorem 4.4 drops it:
# it does not contain π_θ, so for one pair σ(φ) rises in the same directions. Over all pairs the
# minimiser of the loss changes. For f = 1: with δ it is each state's own closed form, without δ the
# maximiser of J, which looks ahead. For f(s, a) it looks ahead, too, but maximises neither. For an
# f that depends on the label, as below, neither is proved (derivation.md, section 7).

# For f the paper takes a DPO model's view of each token: (4.3c) with f = 1 and Z = 1.
def token_rewards(rm_logps, ref_logps, beta):
    """r̂ of tokens, from the log-probs of a reward model and of the reference; elementwise."""
    # (8a)  r̂_t = β [ log π_rm(y_t|s_t) - log π_ref(y_t|s_t) ]
    return implicit_reward(rm_logps, ref_logps, beta)

def guidance(token_rewards, alpha, side, floor=None):
    """f, the paper's practical choice: how much a token counts; elementwise.

        f_w = 1 + α r̂    chosen response (side +1): a good token of the winner counts more
        f_l = 1 - α r̂    rejected response (side -1): a bad token of the loser counts more

    The paper assumes f > 0 (Assumption 4.2); floor, if given, enforces it.
    """
    # (8b)  f = 1 ± α r̂
    f = 1 + side * alpha * token_rewards
    return f if floor is None else f.clamp(min=floor)

# ------------------------------------------------------------ 2. the losses
# Log-probs are (B, R): one for each response token, 0 after a response's end. A loss returns
# (losses, chosen_scores, rejected_scores), (B,) each; scores are only logged, as "rewards".
def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             beta):
    """The DPO loss of B pairs (arXiv 2305.18290). A score is β Σ_t ℓ_t."""
    chosen_ratios = policy_chosen_logps - ref_chosen_logps  # ℓ_t, (B, R)
    rejected_ratios = policy_rejected_logps - ref_rejected_logps
    # (3c)  φ = Σ_t β ℓ_t over y_w - Σ_t β ℓ_t over y_l;  loss = -log σ(φ)
    phi = beta * chosen_ratios.sum(-1) - beta * rejected_ratios.sum(-1)  # (B,)
    scores = [beta * ratios.sum(-1).detach() for ratios in (chosen_ratios, rejected_ratios)]
    return -F.logsigmoid(phi), *scores

def tgdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_rewards, rejected_rewards, beta, alpha, floor=None):
    """The TGDPO loss of B pairs, to which the paper's Theorem 4.4 leads; alpha = 0 is DPO.

    Rewards are r̂ (B, R), 0 after a response's end; they get no gradient. A score is β Σ_t ℓ_t,
    without f, as in the official code.
    """
    chosen_ratios = policy_chosen_logps - ref_chosen_logps  # ℓ_t, (B, R)
    rejected_ratios = policy_rejected_logps - ref_rejected_logps
    f_w = guidance(chosen_rewards.detach(), alpha, +1, floor)  # (B, R)
    f_l = guidance(rejected_rewards.detach(), alpha, -1, floor)
    # (4.4a)  φ = Σ_t β f_w ℓ_t over y_w - Σ_t β f_l ℓ_t over y_l;  (8c)  loss = -log σ(φ)
    phi = beta * (f_w * chosen_ratios).sum(-1) - beta * (f_l * rejected_ratios).sum(-1)  # (B,)
    scores = [beta * ratios.sum(-1).detach() for ratios in (chosen_ratios, rejected_ratios)]
    return -F.logsigmoid(phi), *scores

def simpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta, gamma):
    """The SimPO loss of B pairs (arXiv 2405.14734): mean log-probs, no reference, a margin gamma.
    Masks (B, R) are true on response tokens. A score is β times the mean log-prob."""
    chosen_means = (policy_chosen_logps * chosen_mask).sum(-1) / chosen_mask.sum(-1)  # (B,)
    rejected_means = (policy_rejected_logps * rejected_mask).sum(-1) / rejected_mask.sum(-1)
    # (3d)  φ = β mean_t log π(y_t|s_t) over y_w - the same over y_l - γ
    phi = beta * chosen_means - beta * rejected_means - gamma
    return -F.logsigmoid(phi), beta * chosen_means.detach(), beta * rejected_means.detach()

# By the name in --loss: functions of the policy's log-probs, the batch and the options. Log-probs
# and each column of the batch are pairs (chosen, rejected). Columns of your data, chosen_NAME and
# rejected_NAME with a number for each response token, are batch["NAME"].
LOSSES = {
    "tgdpo": lambda logps, batch, o: tgdpo_loss(
        *logps, *batch["ref_logps"], *batch["rewards"], o.beta, o.alpha, o.guidance_floor),
    "dpo": lambda logps, batch, o: dpo_loss(*logps, *batch["ref_logps"], o.beta),
    "simpo": lambda logps, batch, o: simpo_loss(*logps, *batch["mask"], o.beta, o.gamma)}
NO_REFERENCE, NO_REWARDS = {"simpo"}, {"dpo", "simpo"}  # losses that do without these columns

# ------------------------------------------------------------ 3. token log-probs
LOGITS_BYTES = 2**27  # of logits that exist at one time, 4 bytes each: 128 MiB

def logits_rows(model, device):
    """Response tokens whose logits exist at one time. A GPU gets 8 times as many, in fewer chunks,
    since each chunk reads the whole head, V H numbers."""
    most = LOGITS_BYTES if device.type == "cpu" else 8 * LOGITS_BYTES
    return max(1, most // (4 * model.config.get_text_config().vocab_size))

def collate(rows, device):
    """Columns of B pairs, as lists -> a batch, a dictionary of tensors.

    input_ids (N, T) are prompt + response, padded on the right, where a causal model never looks;
    mask (N, R) is true on response tokens. Columns chosen_NAME, rejected_NAME become NAME (N, R),
    0 after a response's end. Of the M response tokens, one response after the other, labels has the
    ids, states the places in input_ids of the states that predict them, places their own in mask,
    both flattened. Rows without a rejected side will do.
    """
    sides = [side for side in SIDES if f"{side}_ids" in rows]
    prompts = rows["prompt_ids"] * len(sides)  # N of them
    names = [name.removeprefix("chosen_") for name in rows if name.startswith("chosen_")]
    lists = {name: [row for side in sides for row in rows[f"{side}_{name}"]] for name in names}
    lists["mask"] = [[True] * len(response) for response in lists["ids"]]
    lists["input_ids"] = [prompt + response for prompt, response in zip(prompts, lists["ids"])]
    batch = {name: pad_sequence([torch.tensor(row) for row in column], batch_first=True)
             for name, column in lists.items()}
    mask, (N, T) = batch["mask"], batch["input_ids"].shape
    # The one shift: position len(prompt) - 1 + t predicts response token t = 0, 1, ...
    first = torch.tensor([[len(prompt) - 1] for prompt in prompts])  # (N, 1)
    states = T * torch.arange(N)[:, None] + first + torch.arange(mask.shape[1])  # (N, R)
    batch |= {"labels": batch.pop("ids")[mask], "states": states[mask],
              "places": mask.flatten().nonzero().squeeze(1)}
    return {name: tensor.to(device) for name, tensor in batch.items()}

def decoder(model):
    """The part of a model before its head. For a few families get_decoder() returns another part:
    all of the model, or a layer of the head. Then it is the attribute `model`."""
    named = model.get_decoder()
    if isinstance(named, transformers.PreTrainedModel) and not named.get_output_embeddings():
        return named
    return getattr(model, "model", model.base_model)

def head_logits(model, hidden, output_class):
    """Hidden states (M, H) -> logits (M, V), by what the model's own forward does after its body.

    For this one call the body is patched: it hands on `hidden`, as an output of its own class. So
    all that a family does behind its body is done: soft-capping, scaling, a bias.
    """
    def hand_on(*args, **kwargs):
        """What the body returns for this call."""
        return output_class(last_hidden_state=hidden[None])
    with patch.object(decoder(model), "forward", hand_on):
        # model.forward, not model(): a sharded model's weights are gathered already
        return model.forward(inputs_embeds=hidden[None], use_cache=False).logits.squeeze(0)

def token_logps(model, batch, dtype="float32"):
    """log π(y_t|s_t) of each response token of a batch of `collate` -> float32 (N, R).

    The head runs at response tokens only, in chunks of logits_rows. Where there are several, the
    backward pass computes them again: memory does not grow with tokens times vocabulary.
    """
    def label_logps(hidden, labels):
        """Of some of the M response tokens."""
        logits = head_logits(model, hidden, type(output))  # (M, V)
        # (1a)  log π(a|s) = z_a - log Σ_v exp z_v, in float32
        return logits.log_softmax(-1, dtype=torch.float32).gather(-1, labels[:, None])[:, 0]
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.autocast(ids.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        output = decoder(model)(input_ids=ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[batch["states"]]  # (M, H)
        size = logits_rows(model, ids.device)
        if len(labels) <= size:
            return in_rows(label_logps(hidden, labels), batch)
        return in_rows(torch.cat([checkpoint(label_logps, *chunk, use_reentrant=False)
                                  for chunk in zip(hidden.split(size), labels.split(size))]), batch)

def in_rows(values, batch):
    """A value for each response token, (M,) -> (N, R), 0 after a response's end."""
    return torch.zeros(batch["mask"].shape, device=values.device).put(batch["places"], values)

# ------------------------------------------------------------ 4. annotate and train
CPU_TOKENS = 1024  # in one pass on the CPU: with more it takes memory and is not faster

def microbatches(pairs, options):
    """The rows of pairs in groups that go through the model together -> [(rows, counted)].

    The longest come first. Under torchrun, where this is one of world() processes, these are its
    share. All must run as many groups: one without a row of its own runs another's, not counted.
    """
    lengths, groups = pair_lengths(pairs), []
    order = (-lengths).argsort(kind="stable").tolist()
    while order:
        most = options.per_device_train_batch_size
        if options.device == "cpu":
            most = max(1, min(most, CPU_TOKENS // lengths[order[0]]))
        group, order = order[:most * world()], order[most * world():]
        mine = group[rank()::world()]
        groups.append((mine or group[:1], bool(mine)))
    return groups

@torch.no_grad()
def frozen_logps(name, pairs, options, title):
    """Token log-probs of a frozen model -> [chosen, rejected], an array of floats for each pair."""
    model, mine = load_model(name, options), {}
    sides = [ids for ids in IDS if ids in pairs.column_names]
    for rows, _ in tqdm(microbatches(pairs, options), desc=title, disable=rank() > 0 or None):
        columns = pairs[rows]
        logps = iter(model.token_logps(collate(columns, model.device)).cpu().numpy())  # (N, R)
        for side in sides:  # the chosen responses come first
            mine |= {(side, row): next(logps)[:len(ids)] for row, ids in zip(rows, columns[side])}
    every = {place: values for share in gather(mine) for place, values in share.items()}
    for (_, row), values in every.items():
        need(math.isfinite(values.sum()), f"{title}: a log-prob of model {name} for pair "
             f"{pairs[row].get('index', row)} is not finite", Diverged)
    return [[every[side, row] for row in range(len(pairs))] for side in sides]

def annotate(pairs, column, name, options):
    """Pairs with a frozen model's log-probs as chosen_<column>, rejected_<column>.

    They are kept in cache_dir, under the content of the model and of the pairs. No β is in them:
    no option of the loss can make them stale.
    """
    file = annotation_file(pairs, name, options)
    logps = once(read_annotation, file, pairs)
    if logps is None:
        logps = frozen_logps(name, pairs, options, f"annotate: {column}")
        once(write_annotation, file, logps)
    else:
        print(f"{column} from the cache in {options.cache_dir}")
    return add_columns(pairs, column, logps)

def add_token_rewards(pairs, beta):
    """Pairs with r̂ of each response token as rewards, from their rm_logps and ref_logps."""
    rewards, arrays = [], pairs.with_format("numpy")
    for side in SIDES:
        both = zip(arrays[f"{side}_rm_logps"], arrays[f"{side}_ref_logps"])
        rewards.append([token_rewards(rm_logps, ref_logps, beta) for rm_logps, ref_logps in both])
    return add_columns(pairs, "rewards", rewards)

def losses_and_totals(model, batch, options):
    """A batch through the policy and the loss -> (losses (B,), {metric: sum over the B pairs})."""
    logps, mask = model.token_logps(batch), batch["mask"]  # (N, R)
    columns = {name: x.chunk(2) for name, x in batch.items() if x.shape == mask.shape}  # (B, R) x 2
    losses, chosen, rejected = LOSSES[options.loss](logps.chunk(2), columns, options)  # (B,) each
    chosen_logps, rejected_logps = logps.detach().sum(-1).chunk(2)
    values = {"loss": losses.detach(), "rewards/chosen": chosen, "rewards/rejected": rejected,
              "rewards/margins": chosen - rejected,  # all 0 at the start, but for rounding
              "rewards/accuracies": chosen - rejected > 1e-5,
              "logps/chosen": chosen_logps, "logps/rejected": rejected_logps}
    totals = {name: value.sum() for name, value in values.items()}
    if options.loss == "tgdpo":
        f = torch.cat([guidance(r, options.alpha, side, options.guidance_floor)
                       for r, side in zip(columns["rewards"], (+1, -1))])  # (N, R)
        plain, *_ = dpo_loss(*logps.detach().chunk(2), *columns["ref_logps"], options.beta)
        totals |= {"dpo_loss": plain.sum(),  # f = 1: comparable over runs of different alpha
                   "guidance/sum": (f * mask).sum(), "guidance/tokens": mask.sum(),
                   "guidance/min": f.where(mask, math.inf).min(),
                   "guidance/max": f.where(mask, -math.inf).max(),
                   "guidance/nonpositive": ((f <= 0) & mask).sum()}
    return losses, totals

def run_pairs(model, pairs, options, learn):
    """Pairs through the loss -> their totals, on all processes. With learn, gradients add up: each
    loss is divided by the number of these pairs, so any split gives one large batch's gradient."""
    mine, found, groups = [], [], microbatches(pairs, options)
    for n, (rows, counted) in enumerate(groups, 1):
        with torch.set_grad_enabled(learn):
            batch = collate(pairs[rows], model.device)
            losses, totals = losses_and_totals(model, batch, options)
        if learn:  # times world(), since FSDP takes the mean over processes
            weight = world() / len(pairs) if counted else 0.0
            if options.hsdp:  # across machines once a step
                model.set_requires_all_reduce(n == len(groups))
            (weight * losses.sum()).backward()
        if counted:
            mine.append((rows, losses.detach(), totals))
    for rows, losses, totals in mine:  # read at the end: a GPU need not wait between passes
        bad = [pairs[row]["index"] for row, loss in zip(rows, losses) if not loss.isfinite()]
        totals = {name: value.item() for name, value in totals.items()}
        found.append(totals | {"pairs": len(rows), "not finite": bad})
    return reduce(merge, chain(*gather(found)))

def merge(a, b):
    """The totals of some pairs and of others -> of both."""
    both = {"guidance/min": min, "guidance/max": max}  # all others are sums, or lists
    return {name: both[name](a[name], b[name]) if name in both else a[name] + b[name] for name in a}

def train(options, pairs, tokenizer, facts):
    """Train options.model_name_or_path on annotated pairs; all goes into options.output_dir."""
    folder, scores = Path(options.output_dir), {}
    if once(open_run, folder, options, facts):
        return print(f"{folder}: finished already")
    pairs, held_out = [pairs.select(rows) for rows in split_rows(len(pairs), options)]
    model = load_model(options.model_name_or_path, options)
    if options.device == "cuda":
        rehearse(model, pairs, options)
    torch.manual_seed(options.seed)
    optimizer, scheduler, steps = make_optimizer(model, len(pairs), options)
    step, window = load_checkpoint(folder, model, optimizer, scheduler)
    print(f"train {folder}: {options.loss}, {len(pairs)} pairs, {steps} steps")
    bar = tqdm(total=steps, initial=step, desc="train", disable=rank() > 0 or None)
    with bar, open(os.devnull if rank() else folder / "metrics.jsonl", "a", buffering=1) as log:
        while step < steps:
            began, rows = time.perf_counter(), []
            batch = pairs.select(pairs_of_step(len(pairs), step, options))
            totals = run_pairs(model, batch, options, learn=True)
            norm = clip_gradients(model, options.max_grad_norm)
            if not math.isfinite(norm):
                newest = (checkpoints(folder) or ["none"])[-1]
                raise Diverged(f"step {step + 1}: loss (of pairs {totals['not finite']}) or "
                               f"gradient is no number; newest checkpoint: {newest}")
            rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            totals |= {"tokens": int(pair_lengths(batch).sum()),
                       "seconds": time.perf_counter() - began}
            window = merge(window, totals) if window else totals  # since the last row of metrics
            bar.update()
            if step % options.logging_steps == 0 or step == steps:
                speed = window["tokens"] / window["seconds"]
                rows.append(means(window) | {"grad_norm": norm, "learning_rate": rate,
                                             "tokens_per_second": speed})
                window = {}
            if held_out and (step % (options.eval_steps or steps) == 0 or step == steps):
                totals = run_pairs(model, held_out, options, learn=False)
                scores = {f"eval_{name}": value for name, value in means(totals).items()}
                rows.append(scores)
            for row in rows:
                log.write(json.dumps({"step": step} | row) + "\n")
                bar.write(in_words(step, row))
            if options.save_steps and step % options.save_steps == 0 and step < steps:
                save_checkpoint(folder, model, optimizer, scheduler, step, window)
                once(drop_checkpoints, folder, options.save_total_limit)
    save_model(model, tokenizer, folder)
    once(record, folder, steps=steps, evaluation=scores, finished=True)
# ------------------------------------------------------------ The method ends here.

# ------------------------------------------------------------ 5. options and errors
class InputError(Exception):
    """What the user gave cannot be used: main prints it as one line and returns 2."""

class Diverged(Exception):
    """A loss, a gradient or a log-prob is no number: main prints it as one line and returns 1."""

def need(good, text, kind=InputError):
    """Raise an InputError, or another kind, unless good."""
    if not good:
        raise kind(text)

@contextmanager
def reading(what):
    """Whatever a library raises while it reads `what` becomes one InputError."""
    try:
        yield
    except Exception as e:  # yaml, pyarrow, the hub and transformers raise dozens of kinds
        text = " ".join(f"{what} cannot be used: {type(e).__name__}: {e}".split())[:400]
        known = isinstance(e, (InputError, torch.OutOfMemoryError))
        raise e if known else InputError(text) from e

def option(default, text, **more):
    """A field of Options with its line of --help."""
    return field(default=default, metadata={"help": text, **more})

# The type of an option that has bounds: what is expected, in words and as a test of the value.
Positive = Annotated[float, "a number above 0", lambda x: 0 < x < math.inf]
NotNegative = Annotated[float, "a number, 0 or above", lambda x: 0 <= x < math.inf]
Share = Annotated[float, "a share, 0 to at most 1", lambda x: 0 <= x <= 1]
Held = Annotated[float, "a share below 1 or a whole number", lambda x: 0 <= x < 1 or x % 1 == 0 < x]
Count = Annotated[int, "a whole number above 0", lambda x: x > 0]
CountOrZero = Annotated[int, "0 or above", lambda x: x >= 0]
Length = Annotated[int, "4 or more", lambda x: x >= 4]
Seed = Annotated[int, "0 to 2**32 - 1", lambda x: 0 <= x < 2**32]
Steps = Annotated[int, "-1 or a number above 0", lambda x: x == -1 or x > 0]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]

@dataclass
class Options:
    """Names follow transformers and TRL where these have one."""
    model_name_or_path: str | None = option(None, "model to train, a hub name or a directory")
    ref_model: str | None = option(None, "reference model; none: the model to train")
    reward_model: str | None = option(None, "gives the token rewards; none: one is trained by DPO")
    dataset: str | None = option(None, "pairs: .json, .jsonl(.gz), .parquet, directory or hub name")
    dataset_split: str = option("train", "split of a hub data set or of a saved DatasetDict")
    loss: str = option("tgdpo", "the loss", choices=LOSSES)
    beta: Positive = option(0.1, "pull towards the reference; SimPO: scale of the mean log-prob")
    alpha: NotNegative = option(0.5, "f = 1 +- alpha rhat; 0: DPO, 0.5: rhat as much as labels")
    reward_beta: Positive | None = option(None, "beta in rhat and for its DPO model; none: beta")
    gamma: Annotated[float, "a number", math.isfinite] = option(0.5, "SimPO: target margin")
    guidance_floor: Positive | None = option(None, "smallest value of f; none: not bounded")
    max_length: Length = option(2048, "tokens of a sequence")
    learning_rate: NotNegative = option(7e-7, "peak learning rate of AdamW")
    lr_scheduler_type: Schedule = option("cosine", "how the learning rate goes on")
    warmup_ratio: Share = option(0.1, "share of the steps in which the learning rate rises from 0")
    weight_decay: NotNegative = option(0.0, "AdamW's weight decay, on matrices only")
    max_grad_norm: NotNegative = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    num_train_epochs: Positive = option(1.0, "passes over the pairs")
    max_steps: Steps = option(-1, "optimizer steps, instead of epochs; -1: epochs")
    per_device_train_batch_size: Count = option(1, "most pairs in a forward pass of a process")
    gradient_accumulation_steps: Count = option(1, "forward passes in one optimizer step")
    eval_size: Held = option(0, "pairs held out for evaluation; below 1: a share of all pairs")
    eval_steps: Count | None = option(None, "evaluate each so many steps; none: at the end only")
    logging_steps: Count = option(1, "write a row of metrics each so many steps")
    save_steps: CountOrZero = option(0, "checkpoint each so many steps; 0: none")
    save_total_limit: Count | None = option(None, "keep so many newest checkpoints; none: all")
    resume: bool = option(False, "continue the run in output_dir from its newest checkpoint")
    dtype: Literal["bfloat16", "float32"] | None = option(None, "none: bfloat16 on CUDA")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    hsdp: bool = option(False, "torchrun: shard inside each machine, replicate across them")
    seed: Seed = option(42, "of what is drawn")
    output_dir: str | None = option(None, "where the run is written, new or empty; none: in runs")
    cache_dir: str = option("~/.cache/tgdpo", "where annotations are kept for later runs")

# Defaults without --model_name_or_path.
TINY = dict(beta=1.0, alpha=0.1, max_length=8, learning_rate=1e-3, num_train_epochs=2.0,
            per_device_train_batch_size=32, eval_size=0.1, logging_steps=20)
# What --resume may change: where and how it computes and what it reports, not what is learned.
MAY_CHANGE = ("resume output_dir cache_dir device hsdp gradient_checkpointing save_steps "
              "save_total_limit logging_steps eval_steps per_device_train_batch_size "
              "gradient_accumulation_steps").split()

def read_options(argv):
    """Command line -> Options. A first argument that is no flag is a .yaml or .json file, or the
    run.json of a run."""
    tiny = ", ".join(f"--{name} {value}" for name, value in TINY.items())
    parser = transformers.HfArgumentParser(
        Options, prog="tgdpo.py", usage="tgdpo.py [FILE.yaml] [--OPTION VALUE ...]",
        allow_abbrev=False, epilog=f"Without --model_name_or_path, three words are learned: {tiny}")
    parser.error = lambda text: need(False, f"{text}; --help lists all options")  # in one line
    if argv and not argv[0].startswith("-"):
        with reading(f"{argv[0]}, taken for a file of options (data goes behind --dataset),"):
            text = Path(argv[0]).read_text(encoding="utf-8")
            values = yaml.safe_load(text)  # JSON is YAML
            need(isinstance(values, dict), f"{argv[0]}: expected lines such as 'beta: 0.1'")
            twice = [key for key in values if len(re.findall(f"^{key}:", text, re.M)) > 1]
            need(not twice, f"{argv[0]}: {', '.join(twice)} more than once; expected one value")
            values = values.get("options", values)  # a run.json's
        argv = [f"--{key}={value}" for key, value in values.items() if value is not None] + argv[1:]
    if not parser.parse_args(argv).model_name_or_path:
        batch = max(1, TINY["per_device_train_batch_size"] // world())  # 32 on all together
        parser.set_defaults(**TINY | {"per_device_train_batch_size": batch})
    o = Options(**vars(parser.parse_args(argv)))
    for name, kind in get_type_hints(Options, include_extras=True).items():
        value = getattr(o, name)
        for bound in (kind, *get_args(kind)):  # get_args: of Positive | None
            expected, holds = getattr(bound, "__metadata__", ("", lambda value: True))
            need(value is None or holds(value), f"--{name} is {value}; expected {expected}")
        setattr(o, name, os.path.expanduser(value) if isinstance(value, str) else value)
    need(bool(o.model_name_or_path) == bool(o.dataset), "--model_name_or_path and --dataset: "
         "expected both or none; scripts/start_model.py makes a tiny model from your text")
    need(o.output_dir or not o.resume, "--output_dir is None; expected the run to --resume")
    need(o.eval_size or not o.eval_steps, "--eval_steps without --eval_size: no pairs are held out")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    best = "mps" if torch.backends.mps.is_available() and world() == 1 else best
    need(o.device in ("auto", "cpu", best), f"--device is {o.device}; torch finds {best} here")
    o.device = best if o.device == "auto" else o.device
    o.dtype = o.dtype or ("bfloat16" if o.device == "cuda" else "float32")
    o.output_dir = o.output_dir or time.strftime(f"runs/%Y-%m-%d_%H%M%S_{os.getpid()}")
    return o

def batch_size(options):
    """Pairs in one optimizer step."""
    return options.per_device_train_batch_size * options.gradient_accumulation_steps * world()

# ------------------------------------------------------------ 6. data: rows -> tokens
LAYOUTS = ("chosen and rejected, text or messages, beside prompt, instruction or conversations, or "
           "whole conversations in both; scripts/convert.py writes this from other layouts")
NOT_READ = "question history system tools images videos audios".split()  # columns that say more
NAMES = {"from": "role", "value": "content", "human": "user", "gpt": "assistant"}
# Some chat templates print today's date, which would change tokens every day: here it stands still.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro +%}"

def load_rows(name, split):
    """The rows of a data set, in order: from a file, a directory saved by `datasets` or the hub."""
    with reading(f"--dataset {name}"):
        if re.search(r"\.jsonl?(\.gz)?$", name):  # by json: for one odd row pyarrow fails them all
            opened = (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8-sig")
            with opened as stream:
                text = stream.read().strip()
            try:
                rows = json.loads(text)
            except json.JSONDecodeError:  # an object a line
                rows = json.loads("[" + ",\n".join(filter(str.strip, text.split("\n"))) + "]")
            return rows if isinstance(rows, list) else [rows]
        if name.endswith(".parquet"):  # not by load_dataset, whose cache may be older
            return datasets.Dataset(pyarrow.parquet.read_table(name))
        here = os.path.exists(name)
        saved = any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json"))
        need(saved or not here, f"--dataset {name}: neither .json, .jsonl(.gz), .parquet nor saved "
             "by `datasets`; scripts/convert.py reads .csv and clones of the hub's data sets, too")
        data = datasets.load_from_disk(name) if here else datasets.load_dataset(name)
        if not isinstance(data, datasets.DatasetDict):
            return data
        need(split in data, f"--dataset_split {split}: {name} has {', '.join(data)}")
        return data[split]

def read_messages(value, role):
    """Text (of a role), a message or a list of messages -> [{"role", "content", ...}]."""
    if isinstance(value, str):
        written = re.match(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]|\n\nHuman:", value)
        need(not written, "messages written as one text: scripts/convert.py")
        value = {"role": role, "content": value}
    turns = []
    for message in value if isinstance(value, list) else [value]:
        need(message is not None, "a field is missing")
        need(isinstance(message, dict), "a field is neither text nor messages")
        turn = {NAMES.get(key, key): part for key, part in message.items() if part is not None}
        role, content = turn.get("role"), turn.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            kinds = {part.get("type", "text") for part in content} - {"text"}
            need(not kinds, f"an {' and '.join(kinds)} in a message")
            content = "".join(part.get("text") or part.get("value") or "" for part in content)
        need(isinstance(role, str) and isinstance(content, str) and not turn.get("tool_calls"),
             "a message without a role or without text, or with a tool call")
        role = NAMES.get(role.lower(), role.lower())  # other keys go on to the chat template
        turns.append(turn | {"role": role, "content": content})
    return turns

def read_pair(row):
    """A row in a known layout -> (the turns before the answer, [chosen, rejected] messages)."""
    need(isinstance(row, dict), "a row is no object")
    given = next((n for n in ("prompt", "conversations", "instruction") if row.get(n)), "prompt")
    prompt, more, unread = row.get(given), row.get("input") or "", [*NOT_READ]
    if given == "instruction" and isinstance(prompt, str) and isinstance(more, str):
        prompt = f"{prompt}\n{more}" if more else prompt
    elif more:
        unread.append("input")
    turns = read_messages([] if prompt is None else prompt, "user")
    both = [read_messages(row.get(side), "assistant") for side in SIDES]
    need(all(messages and messages[-1]["role"] == "assistant" for messages in both),
         "chosen or rejected does not end with an assistant's message")
    (*before, chosen), (*others, rejected) = both
    need(before == others, "chosen and rejected differ before their last message")
    if "user" in [turn["role"] for turn in before]:  # whole conversations, the prompt in both
        said = [(turn["role"], turn["content"].strip()) for turn in before]
        turns = [t for t in turns if (t["role"], t["content"].strip()) not in said]
        need(all(turn["role"] == "system" for turn in turns),
             "a prompt that the conversations in chosen and rejected do not repeat")
    need(turns + before, "no prompt")
    for name in unread:
        need(not row.get(name), f"a column {name} that only scripts/convert.py reads")
    need(chosen["content"].strip() and rejected["content"].strip(), "an empty response")
    return turns + before, [chosen, rejected]

@lru_cache
def special_tokens(tokenizer):
    """{id: text} of a tokenizer's special tokens."""
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}

def place_after(text, turns, eos, start=0):
    """The place in text behind what turns say, in their order; InputError if one is missing."""
    for turn in turns:
        content = turn["content"].strip().removesuffix(eos or "")
        system = turn["role"] == "system"
        found = text.find(content, 0 if system else start)
        need(found >= 0 and (turn.get("reasoning_content") or "").strip() in text,
             f"the chat template leaves out a part of what {turn['role']} says")
        start = start if system else found + len(content)
    return start

def render(turns, answers, tokenizer, chat):
    """-> three texts: the prompt that asks for an answer, prompt + chosen, prompt + rejected.
    chat: by the tokenizer's template; else turns are joined by newlines and the answer follows.
    What follows an answer's end token is cut. Raises InputError where something said is missing."""
    prompt, eos = "\n".join(turn["content"] for turn in turns), tokenizer.eos_token
    texts = [prompt] + [prompt + answer["content"] for answer in answers]
    if chat:
        template = FIXED_DATE + tokenizer.get_chat_template()
        try:
            texts = [tokenizer.apply_chat_template(
                talk, chat_template=template, tokenize=False, add_generation_prompt=talk is turns)
                for talk in (turns, *[[*turns, answer] for answer in answers])]
        except Exception as e:  # a template is a program: it may raise anything
            raise InputError(f"the chat template refuses it: {e}") from e
    prompt = os.path.commonprefix(texts)
    turns_end = place_after(prompt, turns, eos)
    for k, answer in enumerate(answers, 1):
        first = max(turns_end, len(prompt) - len(answer["content"]))
        end = place_after(texts[k], [answer], eos, first)
        tail = texts[k][end:]  # the end token is the tokenizer's, or else the first special one
        ends = [eos] if eos and eos in tail else special_tokens(tokenizer).values()
        cuts = [end + tail.index(token) + len(token) for token in ends if token in tail]
        texts[k] = texts[k][:min(cuts, default=None)]
    need(not re.search("[\ud800-\udfff]", "".join(texts)), "a text with half a character")
    return texts

def pair_texts(row, tokenizer):
    """A row -> (the three texts of `render`, whether the chat template made them)."""
    (turns, answers), template = read_pair(row), str(tokenizer.chat_template or "")
    # A single text that begins as the template's own do is formatted already.
    own = [token for token in special_tokens(tokenizer).values()
           if token in template or token == tokenizer.bos_token]
    chat = bool(template) and not (len(turns) == 1 and turns[0]["content"].startswith(tuple(own)))
    try:
        return render(turns, answers, tokenizer, chat), chat
    except InputError:  # some templates refuse or lose a system turn: it opens the first user turn
        if len(turns) < 2 or turns[0]["role"] != "system":
            raise
        opened = turns[1] | {"content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        return render([opened, *turns[2:]], answers, tokenizer, chat), chat

def cut_left(ids, room, bos):
    """At most `room` ids, those at the right end; a BOS stays."""
    kept = ids[:1] if len(ids) > room and ids[0] == bos else []
    return kept + ids[max(0, len(ids) - room) + len(kept):]

def split_tokens(ids, tokenizer, with_bos, max_length):
    """Ids of the three texts -> (prompt, [chosen, rejected], the prompt cut, the responses cut).

    The prompt is the longest common prefix of tokens. There is one BOS (with_bos: if the tokenizer
    begins so) and one end token. Over max_length the prompt loses its left end (not a BOS, and not
    below max_length // 2 tokens), then the responses their right ends.
    """
    prompt, bos, eos = os.path.commonprefix(ids), tokenizer.bos_token_id, tokenizer.eos_token_id
    responses = [answered[len(prompt):] for answered in ids[1:]]
    first = bos if bos is not None else eos  # something must come before the first response token
    need(all(responses), "an empty response")
    need(prompt or first is not None, "an empty prompt, and neither BOS nor EOS to begin")
    for response in responses:
        if eos is not None and response[-1] not in special_tokens(tokenizer):
            response.append(eos)
    if not prompt or with_bos and prompt[0] != bos and tokenizer("").input_ids[:1] == [bos]:
        prompt = [first, *prompt]
    short = cut_left(prompt, max(max_length // 2, max_length - max(map(len, responses))), bos)
    return prompt, responses, short, [ids[:max_length - len(short)] for ids in responses]

def is_numbers(value):
    """Whether a field is a list of numbers."""
    return isinstance(value, list) and {type(x) for x in value} in ({int}, {float}, {int, float})

def own_numbers(row, index, name, ids, tokenizer):
    """A row's own numbers for the tokens of a response, checked: finite, one for each token."""
    values = row.get(name)
    found = f"{len(values)} values" if is_numbers(values) else "no list of numbers"
    need(is_numbers(values) and len(values) == len(ids) and all(abs(x) < 3e38 for x in values),
         f"row {index}: {name} has {found}; expected {len(ids)} finite numbers, one for each token "
         f"of the response; the last ones are {tokenizer.convert_ids_to_tokens(ids[-3:])}; "
         "scripts/show_tokens.py lists all")  # 3e38: as float32, and no NaN
    return values

def tokenize(rows, tokenizer, max_length, source):
    """Rows -> (Dataset, counts). Columns: index (the row's number, from 0), prompt_ids, chosen_ids,
    rejected_ids, and chosen_NAME, rejected_NAME where the rows have lists of numbers. Unusable rows
    are dropped, counted by reason and reported."""
    objects = [row for row in rows if isinstance(row, dict)]
    found = sorted({str(name) for row in objects for name in row})
    layout = f"columns: {', '.join(found) or 'none'}; expected {LAYOUTS}"
    need({*SIDES} <= {*found}, f"{source}: {len(rows)} rows with the {layout}")
    numbers = [name for name in found if re.match("(chosen|rejected)_.", name) and (
        name.endswith("_rewards") or any(is_numbers(row.get(name)) for row in objects))]
    own = [f"{side}_{name}" for name in sorted({name.split("_", 1)[1] for name in numbers})
           for side in SIDES]  # a name on one side is expected on the other
    kinds = {"index": datasets.Value("int64")} | dict.fromkeys(["prompt_ids", *IDS], INTS)
    used, reasons, cuts = [], Counter(), Counter()
    for index, row in enumerate(tqdm(rows, desc="tokenize", disable=None)):
        try:
            texts, chat = pair_texts(row, tokenizer)
            ids = tokenizer(texts, add_special_tokens=False).input_ids
            prompt, whole, short, cut = split_tokens(ids, tokenizer, not chat, max_length)
            limit = "" if whole[0] == whole[1] else " up to --max_length"
            need(cut[0] != cut[1], f"identical responses{limit}")
        except InputError as e:
            reasons[str(e)] += 1
            continue
        pair = {"index": index, "prompt_ids": short} | dict(zip(IDS, cut))
        for name in own:
            side = SIDES.index(name.split("_")[0])
            pair[name] = own_numbers(row, index, name, whole[side], tokenizer)[:len(cut[side])]
        used.append(pair)
        cuts["prompts"] += len(short) < len(prompt)
        cuts["responses"] += sum(len(a) < len(b) for a, b in zip(cut, whole))
    dropped = "".join(f"; dropped {n}: {reason}" for reason, n in reasons.items())
    report = f"{source}: {len(rows)} pairs read, {len(used)} used{dropped}"
    print(report + "".join(f"; {n} {of} cut to {max_length} tokens" for of, n in cuts.items() if n))
    need(used, f"{report}; {layout}")
    pairs = datasets.Dataset.from_list(used, datasets.Features(kinds | dict.fromkeys(own, FLOATS)))
    counts = {"read": len(rows), "used": len(used), "dropped": dict(reasons), "cut": dict(cuts)}
    return pairs, counts

# ------------------------------------------------------------ 7. a language of three words
# Words: not, bad and the full stop, which ends a response. State 0: nothing said yet, 1: "not" was
# said, 2: "bad" was. The reference takes all words for equally likely.
SMALL_LANGUAGE = (torch.tensor([[0, -1], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]),
                  torch.tensor([[2, -1], [0, 2], [0, 0], [0, 1], [1, 2], [1, 0], [1, 1]]))
RESPONSES = [".", "not .", "not not", "not bad", "bad .", "bad not", "bad bad"]  # Y = 7
SMALL_REF = torch.full((3, 3), 1 / 3).log()  # log π_ref(a|s), (S, A)
SMALL_REWARD = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 0.0]])  # r(s, a)
SMALL_R, SMALL_REF_Y = [along(x, SMALL_LANGUAGE).sum(-1) for x in (SMALL_REWARD, SMALL_REF)]  # (Y,)
TINY_PAIRS = 2000  # of responses

def show_decomposition():
    """Print what section 1 computes on this language, with β = 1."""
    ref, reward, language, R, ref_y = SMALL_REF, SMALL_REWARD, SMALL_LANGUAGE, SMALL_R, SMALL_REF_Y
    # (2a)  With whole responses as the actions of one state, the closed form is PPO's optimum.
    best_y, best = closed_form_policy(ref_y, R, 1.0)  # log π*(y) (Y,), max J ()
    alone, log_Z = closed_form_policy(ref, reward, 1.0)  # each state by itself, f = 1
    J_ref, J_alone = [sequence_ppo_objective(p, ref, reward, 1.0, language) for p in (ref, alone)]
    bound, fixed = theorem_4_1(ref, log_Z, 1.0, language)
    rhat = token_rewards(alone, ref, 1.0)  # (S, A)
    f_w, f_l = guidance(rhat, 0.25, +1), guidance(rhat, 0.25, -1)
    guided, guided_Z = closed_form_policy(ref, reward, 1.0, f_w)
    others = torch.randn(1000, 3, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tried = token_ppo_objective(others, ref, reward, 1.0, f_w).amax(0)  # (S,)
    missed = (implicit_reward(guided, ref, 1.0, f_w, guided_Z[:, None]) - reward).abs().max()
    phi, delta = [x[3, 4] for x in phi_and_delta(alone, ref, log_Z, 1.0, 1.0, 1.0, language)]
    ahead = (best_y - ref_y)[3] - (best_y - ref_y)[4]  # φ of the optimum for the same pair
    print(f"""The decomposition in numbers. A language of three words: not, bad, full stop;
"not bad" earns 2, "bad" alone -1; beta is 1.
(1b)   sequence-level PPO: J is {J_ref:.3f} for the reference, at most {best:.3f}
(4.1)  Theorem 4.1, the best of each step added up: {best:.3f} <= {bound:.3f}
(4b)   the same over the reference's states: {fixed:.3f}, below max J: no bound
(4.3a) each state by itself: J = {J_alone:.3f}; P("not") = {alone[0, 0].exp():.2f}, at the optimum
       {best_y[1:4].exp().sum():.2f}: a state by itself does not see what "not" leads to
(6a)   guided by f = 1 + 0.25 r̂, first state: the closed form reaches {guided_Z[0]:.3f},
       the best of 1000 other policies {tried[0]:.3f}
(4.3c) the reward read off the guided policy misses r by {missed:.3f}
(4.4a) "not bad" over "bad .": R_w - R_l = {R[3] - R[4]:.2f} = φ {phi:.2f} + δ {delta:.2f} there;
       without δ, φ must do it alone: the optimum has φ = {ahead:.2f}, it looks ahead
(8b)   "bad" after "not": r̂ = {rhat[1, 1]:.2f}, f_w = {f_w[1, 1]:.2f}, f_l = {f_l[1, 1]:.2f}
""")

def small_data(options, start, file):
    """Write the reference, a tiny GPT-2, to start and pairs of its responses to file, labelled by
    Bradley-Terry on their rewards -> (tokenizer, pairs, counts)."""
    core = Tokenizer(models.WordLevel({"not": 0, "bad": 1, ".": 2}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    torch.manual_seed(options.seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=3, n_positions=options.max_length, n_embd=128, n_layer=2, n_head=4,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None))
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits are 0: the model is SMALL_REF
    write_model(model, tokenizer, start)
    draw, lines = random.Random(options.seed), []
    while len(lines) < TINY_PAIRS:
        y, z = draw.choices(range(7), SMALL_REF_Y.exp().tolist(), k=2)
        # (3b)  P(y beats z) = σ( R(y) - R(z) )
        w, l = (y, z) if draw.random() < torch.sigmoid(SMALL_R[y] - SMALL_R[z]) else (z, y)
        if y != z:
            row = {"prompt": ". ", "chosen": RESPONSES[w], "rejected": RESPONSES[l]}
            lines.append(json.dumps(row) + "\n")
    text = "".join(lines)
    need(not file.exists() or file.read_text() == text, f"--resume: {file} has other pairs; "
         "expected the --seed and --max_length that the run began with")
    write(file, text)
    rows = load_rows(str(file), None)
    return tokenizer, *tokenize(rows, tokenizer, options.max_length, str(file))

def small_policy(name, tokenizer, options):
    """log π(a|s) of a model of this language, (S, A): its responses have each action somewhere."""
    states, actions = [x[SMALL_LANGUAGE[0] >= 0] for x in SMALL_LANGUAGE]  # of all their tokens
    rows = datasets.Dataset.from_dict({"prompt_ids": [tokenizer(".").input_ids] * 7,
                                       "chosen_ids": tokenizer(RESPONSES).input_ids})
    (logps,) = frozen_logps(name, rows, options, f"judge: {name}")
    return torch.zeros(3, 3).index_put((states, actions), torch.tensor([*chain(*logps)]))

def run_small(options):
    """Pairs, a DPO model, TGDPO with its r̂ and with the true rewards; then J of each, exactly."""
    folder, beta = Path(options.output_dir), options.beta
    start, file = folder / "start_model", folder / "pairs.jsonl"
    print(f"Now a tiny GPT-2 learns from {TINY_PAIRS} pairs of responses of this language, in\n"
          "half a minute on 2 cores. The table at the end says how near to max J it comes.\n")
    tokenizer, pairs, counts = once(small_data, options, start, file)
    options = replace(options, model_name_or_path=str(start), dataset=str(file))
    reward_then_train(options, tokenizer, pairs, counts)
    found = {"reference": str(start), options.loss: options.output_dir}
    if options.loss not in NO_REWARDS:
        rewards, ids = along(SMALL_REWARD, SMALL_LANGUAGE).tolist(), tokenizer(RESPONSES).input_ids
        truth = [[rewards[ids.index(y)][:len(y)] for y in pairs[side]] for side in IDS]
        stage = replace(options, output_dir=str(folder / "true_rewards"))
        reward_then_train(stage, tokenizer, add_columns(pairs, "rewards", truth), counts)
        found["reward model"] = options.reward_model or str(folder / "reward_model")
        found[f"{options.loss}, true r"] = stage.output_dir
    policies = {name: small_policy(path, tokenizer, options) for name, path in found.items()}
    policies["each state alone"], _ = closed_form_policy(SMALL_REF, SMALL_REWARD, beta)
    table, columns = {}, ("J", "reward", "KL", '"not bad"')
    for name, policy in policies.items():
        J, reward = [sequence_ppo_objective(policy, SMALL_REF, SMALL_REWARD, b, SMALL_LANGUAGE)
                     for b in (beta, 0.0)]
        not_bad = along(policy, SMALL_LANGUAGE)[3].sum().exp()
        table[name] = [x.item() for x in (J, reward, (reward - J) / beta, not_bad)]
    table["optimum"] = [beta * closed_form_policy(SMALL_REF_Y, SMALL_R, beta)[1].item()]
    print(f"\nall 7 responses, beta = {beta:g}\n{'':18}", *[f"{name:>10}" for name in columns])
    for name, row in table.items():
        print(f"{name:18}", *[f"{value:10.3f}" for value in row])
    best = max(found, key=lambda name: table[name][0])
    print(f"J is reward - beta KL. Nearest to the optimum is the model \"{best}\":\n"
          f"{table['optimum'][0] - table[best][0]:.3f} below it.")
    once(record, folder, table=table)

# ------------------------------------------------------------ 8. pairs, processes, models, files
def pair_lengths(pairs):
    """Tokens of both sequences of each pair -> numpy (B,)."""
    table = pairs.with_format("arrow")[:]
    tokens = {name: pyarrow.compute.list_value_length(table[name]).to_numpy()
              for name in ("prompt_ids", *IDS) if name in table.column_names}
    return sum(tokens["prompt_ids"] + tokens[ids] for ids in IDS if ids in tokens)

def add_columns(pairs, name, columns):
    """Pairs with chosen_<name> and rejected_<name>: for both sides a list of numbers a pair."""
    for side, column in zip(SIDES, columns):
        pairs = pairs.add_column(f"{side}_{name}", column, feature=FLOATS)
    return pairs

def means(totals):
    """Totals of run_pairs -> a row of metrics: means over pairs; of f, over response tokens."""
    row = {name: total / totals["pairs"] for name, total in totals.items()
           if re.match("loss|rewards|logps|dpo_loss", name)}
    if "guidance/sum" in totals:
        row["guidance/mean"] = totals["guidance/sum"] / totals["guidance/tokens"]
        row |= {f"guidance/{x}": totals[f"guidance/{x}"] for x in ("min", "max", "nonpositive")}
    return row

def in_words(step, row):
    """A row of metrics in a line of the terminal."""
    names = ("loss", "rewards/margins", "rewards/accuracies")
    told = [f"{name.replace('rewards/', '')} {value:.3f}" for name, value in row.items()
            if name.removeprefix("eval_") in names]
    if row.get("guidance/nonpositive"):  # Assumption 4.2
        told.append(f"f <= 0 at {row['guidance/nonpositive']} tokens")
    return f"step {step}: {', '.join(told)}"

def shuffled(n, seed):
    """The numbers below n in a seeded order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()

def split_rows(n, options):
    """Seeded split of n pairs by eval_size -> (rows to train on, rows held out), in data order."""
    size, order = options.eval_size, shuffled(n, options.seed)
    held = int(size) if size >= 1 or not size else max(1, round(size * n))
    need(held < n, f"--eval_size {size:g} would hold out {held} of {n} usable pairs")
    return sorted(order[held:]), sorted(order[:held])

def pairs_of_step(n, step, options):
    """Rows of a step: an epoch is a seeded shuffle of all n, whose last step may be smaller."""
    size = batch_size(options)
    epoch, k = divmod(step, math.ceil(n / size))
    return shuffled(n, options.seed + epoch)[k * size:(k + 1) * size]

def make_optimizer(model, n, options):
    """AdamW and its schedule for n pairs -> (optimizer, scheduler, number of steps)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, options.learning_rate, fused=True,
                                  weight_decay=options.weight_decay)
    steps = math.ceil(options.num_train_epochs * math.ceil(n / batch_size(options)))
    steps = options.max_steps if options.max_steps > 0 else steps
    warmup = min(math.ceil(options.warmup_ratio * steps), steps - 1)  # a single step has none
    kind = options.lr_scheduler_type
    return optimizer, transformers.get_scheduler(kind, optimizer, warmup, steps), steps

def clip_gradients(model, max_norm):
    """Scale the gradients to a norm, over all ranks, of at most max_norm (0: any) -> norm before.
    Row by row first: torch's float32 norm of a large tensor is inexact on the CPU (7e-4)."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:  # unused: AdamW keeps a state of it for --resume
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    rows = [torch.linalg.vector_norm(grad, dim=-1) if grad.ndim > 1 else grad for grad in grads]
    norm = torch.nn.utils.get_total_norm(rows)
    norm = norm.full_tensor() if dist.is_initialized() else norm
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm or math.inf, norm)
    return norm.item()

def rehearse(model, pairs, options):
    """The run's longest pass, forward and backward, beside AdamW's two moments to come: what does
    not fit in a GPU's memory fails in the first minute, not at step 700."""
    moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
    most = options.per_device_train_batch_size * world()
    run_pairs(model, pairs.select((-pair_lengths(pairs)).argsort()[:most]), options, learn=True)
    model.zero_grad()
    del moments

def rank():
    """The number of this process among those that torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1

def once(work, *args, **kwargs):
    """work(...) by rank 0 alone -> its result, on all. If it raises, torchrun ends the others."""
    box = [None if rank() else work(*args, **kwargs)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0, group=PATIENT)
    return box[0]

def gather(value):
    """What each rank has -> the list of it by rank, on all ranks."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

PATIENT = None  # the group in which the others wait for what rank 0 does alone

def start_processes():
    """Join the others, if torchrun started this process: NCCL between GPUs, gloo between CPUs."""
    if dist.is_initialized() or "RANK" not in os.environ:
        return False
    missing = {"LOCAL_RANK", "WORLD_SIZE"} - os.environ.keys()
    need(not missing, f"the environment has RANK but no {', '.join(sorted(missing))}; expected all "
         "of them, as torchrun sets them, or none")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    need(not gpus or local < gpus, f"process {local} (from 0) on a machine with {gpus} GPUs; "
         "expected one for each: fewer with --nproc_per_node, or CUDA_VISIBLE_DEVICES= for the CPU")
    if gpus:
        torch.cuda.set_device(local)  # from here on "cuda" is this one
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    global PATIENT  # in a step nobody waits longer than torch's own limit
    PATIENT = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
    sys.stdout = open(os.devnull, "w") if rank() else sys.stdout  # rank 0 speaks for all
    return True

@lru_cache
def device_mesh(device, hsdp):
    """All ranks in a row, along which weights are sharded; with hsdp a row for each machine."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    need(not hsdp or world() > local and world() % local == 0, f"--hsdp with {world()} processes, "
         f"{local} of them on this machine; expected several machines with as many each")
    if not hsdp:
        return dist.init_device_mesh(device, (world(),))
    return dist.init_device_mesh(device, (world() // local, local), mesh_dim_names=("all", "part"))

def shard(model, options):
    """FSDP2: each rank keeps a part of every weight, its gradient and AdamW's state, in float32. A
    block's weights are gathered in the compute type while it runs."""
    from torch.distributed import fsdp
    mesh, dtype = device_mesh(options.device, options.hsdp), getattr(torch, options.dtype)
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    kinds = model._no_split_modules or ()
    times = Counter(p for _, p in model.named_parameters(remove_duplicate=False))  # 2: tied
    blocks = [module for module in model.modules() if type(module).__name__ in kinds
              and all(times[p] == 1 for p in module.parameters())]
    blocks.reverse()  # a block inside another one must be sharded first
    if not blocks:
        print(f"{type(model).__name__} has no known blocks: each GPU gathers all of it at once")
    for unit in [*blocks, model]:  # the last one has the rest: embedding, head, norm, tied weights
        fsdp.fully_shard(unit, mesh=mesh, mp_policy=policy)
    model.token_logps = partial(token_logps, model)  # no autocast: the policy does the casting
    fsdp.register_fsdp_forward_method(model, "token_logps")  # gathers the last unit when it runs

@lru_cache  # the hub is asked once
def model_folder(name):
    """The local directory of a model; a hub name is downloaded once, weights as safetensors."""
    if os.path.isdir(name):
        return Path(name)
    with reading(f"model {name}: no such directory, and on the hub it"):
        return Path(snapshot_download(name, allow_patterns=[
            "*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors"]))

def load_tokenizer(name):
    """The tokenizer of a model."""
    with reading(f"the tokenizer of model {name}"):
        # by tokenizer.json also where mistral-common is installed, whose class lacks what is used
        return AutoTokenizer.from_pretrained(model_folder(name), mistral_format=False)

def load_config(name):
    """The configuration of a model's text part."""
    folder = model_folder(name)
    need((folder / "config.json").exists() or not (folder / "adapter_config.json").exists(),
         f"model {name} is a LoRA adapter; expected a whole model: merge it into its base first")
    with reading(f"the configuration of model {name}"):
        config = AutoConfig.from_pretrained(folder)
    need(type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING, f"model {name} is a "
         f"{config.model_type}; expected a causal language model, not one for vision or encoding")
    return config.get_text_config()

def read_model(name):
    """A causal language model from safetensors, in float32, on the CPU."""
    with reading(f"model {name}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            model_folder(name), dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(report["missing_keys"])[:3]  # transformers would go on with random ones
    need(not missing, f"model {name} lacks the weights {missing}; expected a causal language model")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is not embedding.weight:  # whatever the configuration says
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # published with a temperature but no sampling, it could not be saved
        model.generation_config.do_sample = True
    return model

def prepare_model(model, options):
    """Eval mode: policy and reference run the same forward, without dropout and noise. What stands
    beside the decoder, such as a vision tower, gets no gradient and is frozen."""
    model.eval()
    trained = {*decoder(model).parameters()}
    if model.base_model is not model:  # the base model is all but the head
        for parameter in model.base_model.parameters():
            parameter.requires_grad_(parameter in trained)
    if options.gradient_checkpointing:
        with reading("--gradient_checkpointing for this model"):
            model.activation_checkpointing_enable()
        for block in model.modules():
            # a block recomputes only in training mode; what is inside it stays in eval mode
            block.training = hasattr(block, "gradient_checkpointing")
    return model

@torch.no_grad()
def try_model(name, model):
    """Raise InputError unless token_logps is right for a model, on one short sequence: twice the
    same, equal to the model's own logits, and without a look at later tokens."""
    config = model.config.get_text_config()
    size = min(8, getattr(config, "max_position_embeddings", None) or 8)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (size,), generator=draw).tolist()
    rows = {"prompt_ids": [ids[:2]], "chosen_ids": [ids[2:]]}
    other = rows | {"chosen_ids": [[*ids[2:-1], (ids[-1] + 1) % config.vocab_size]]}
    with reading(f"model {name}, tried on {size} tokens,"):
        found, again, changed = [token_logps(model, collate(x, "cpu")) for x in (rows, rows, other)]
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits  # (1, T, V)
    need(found.isfinite().all(), f"the trial: a log-prob of model {name} is not finite", Diverged)
    own = logits[:, 1:-1].log_softmax(-1).gather(-1, torch.tensor([ids[2:]])[..., None])[..., 0]
    for what, difference, most in (("answers at random", again - found, 1e-5),
                                   ("has other log-probs by its own logits", own - found, 1e-3),
                                   ("looks at later tokens", (changed - found)[:, :-1], 1e-5)):
        off = difference.abs().max().item()  # not <=, so that no number is refused, too
        need(off <= most, f"model {name} {what} (log-probs differ by {off:.1g}); expected a causal "
             "language model, its head behind its decoder")

def load_model(name, options):
    """A model with the method token_logps, in float32: on the device, or sharded over the ranks.
    Rank 0 alone reads the weights, into host memory; tensor by tensor each rank takes its part."""
    gc.collect()  # models hold themselves in cycles: the one before goes now
    torch.cuda.empty_cache()
    if not rank():
        model = prepare_model(read_model(name), options)
        try_model(name, model)
    if not dist.is_initialized():
        model.to(options.device)
        model.token_logps = partial(token_logps, model, dtype=options.dtype)
        return model
    from torch.distributed.checkpoint import state_dict as sharded
    weights = {} if rank() else model.state_dict()
    # What the others need to build the model empty; some buffers are in no file.
    config, generation_config, buffers = once(
        lambda: (model.config, model.generation_config, dict(model.named_buffers())))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = generation_config
    shard(prepare_model(model, options), options)
    model.to_empty(device=options.device)
    deal = sharded.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    sharded.set_model_state_dict(model, weights, options=deal)
    for key, buffer in model.named_buffers():
        buffer.copy_(buffers[key])
    return model

def write(file, text):
    """Write a file beside and rename it: it is there whole or not at all."""
    beside = file.with_name(file.name + ".saving")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)

def record(folder, **values):
    """Set values in folder/run.json."""
    file = folder / "run.json"
    known = read_record(folder) if file.exists() else {}
    write(file, json.dumps(known | values, indent=1) + "\n")

def read_record(folder):
    """What run.json in a folder says."""
    with reading(folder / "run.json"):
        return json.loads((folder / "run.json").read_text())

TOKENIZER_FILES = ("tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt "
                   "*.model chat_template* additional_chat_templates/*").split()

def write_model(model, tokenizer, folder, weights=None):
    """Write a Hugging Face directory. The tokenizer comes last and completes it: its files as they
    are, where it was read from some, so that older releases of transformers can read them, too."""
    with reading(f"the directory {folder}"):
        model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
        os.umask(umask := os.umask(0))  # it can only be read by setting it
        for file in folder.glob("*.safetensors"):
            file.chmod(0o666 & ~umask)  # safetensors lets only its owner read it
        source = Path(tokenizer.name_or_path)
        files = [file for name in TOKENIZER_FILES for file in source.glob(name)]
        if not (tokenizer.name_or_path and files):
            tokenizer.save_pretrained(folder)
        elif source.resolve() != folder.resolve():
            for file in files:
                (folder / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, folder / file.relative_to(source))

def save_model(model, tokenizer, folder):
    """write_model; the weights of a sharded model are gathered on rank 0, in host memory."""
    weights = None
    if dist.is_initialized():
        from torch.distributed.checkpoint import state_dict as sharded
        whole = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        own = dict(model.named_parameters())  # not the second names of tied weights
        twice = dict(model.named_parameters(remove_duplicate=False)).keys() - own.keys()
        weights = sharded.get_model_state_dict(model, options=whole)
        weights = {name: value for name, value in weights.items() if name not in twice}
    once(write_model, model, tokenizer, folder, weights)

def training_state(model, optimizer, scheduler, step, window):
    """All that the next step depends on: step says which pairs are next, window has the totals
    since the last row of metrics, rng is for a loss of yours that draws."""
    from torch.distributed.checkpoint import state_dict as sharded  # takes a second
    weights, moments = sharded.get_state_dict(model, optimizer)
    trainer = json.dumps({"scheduler": scheduler.state_dict(), "step": step, "window": window})
    rng = torch.get_rng_state()
    return {"model": weights, "optimizer": moments, "trainer": trainer, "rng": rng}

def save_checkpoint(folder, model, optimizer, scheduler, step, window):
    """Write training_state beside and rename it: a kill leaves a usable checkpoint."""
    from torch.distributed import checkpoint as dcp
    beside = folder / f"checkpoint-{step}.saving"
    once(shutil.rmtree, beside, ignore_errors=True)
    state = training_state(model, optimizer, scheduler, step, window)
    with in_one_line(f"checkpoint {beside} cannot be written"):
        dcp.save(state, checkpoint_id=beside, process_group=PATIENT,
                 no_dist=not dist.is_initialized())
    once(beside.rename, beside.with_suffix(""))

@contextmanager
def in_one_line(what):
    """What goes wrong with a checkpoint on any rank becomes one InputError, but for a Ctrl-C."""
    from torch.distributed import checkpoint as dcp
    try:
        yield
    except dcp.api.CheckpointException as e:  # it is no Exception
        errors = [error for error, _ in e.failures.values()]
        if any(isinstance(error, KeyboardInterrupt) for error in errors):
            raise KeyboardInterrupt from e
        reasons = {" ".join(repr(error).split()) for error in errors}
        raise InputError(f"{what}: {'; '.join(reasons)}") from e

def checkpoints(folder):
    """The complete checkpoints in a run's folder, the newest one last."""
    complete = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(complete, key=lambda path: int(path.name[11:]))

def drop_checkpoints(folder, keep):
    """Delete all but the newest checkpoints; with None, none."""
    for path in checkpoints(folder)[:-keep] if keep else []:
        shutil.rmtree(path.rename(path.with_suffix(".saving")))  # a kill leaves no half of one

def load_checkpoint(folder, model, optimizer, scheduler):
    """Restore the newest checkpoint, drop later metrics -> (step, window); (0, {}) without one."""
    complete, trainer = once(checkpoints, folder), {"step": 0, "window": {}}
    if complete:
        path = complete[-1]
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint import state_dict as sharded
        state = training_state(model, optimizer, scheduler, **trainer)  # the shapes to load into
        with in_one_line(f"{path} cannot be used (the one before serves, too)"):
            dcp.load(state, checkpoint_id=path, process_group=PATIENT,
                     no_dist=not dist.is_initialized())
        sharded.set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        torch.set_rng_state(state["rng"])
        trainer = json.loads(state["trainer"])
        scheduler.load_state_dict(trainer["scheduler"])
    once(cut_metrics, folder / "metrics.jsonl", trainer["step"])
    return trainer["step"], trainer["window"]

def cut_metrics(file, step):
    """Drop the rows after a step, and what is left of a row that was being written."""
    lines = file.read_text().splitlines() if file.exists() else []
    with reading(file):
        rows = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write(file, "".join(row + "\n" for row in rows))

def open_folder(folder, options):
    """Refuse an output directory that holds something, unless a run to --resume."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    found = sorted(names - {"run.lock"})
    need(not found or options.resume, f"--output_dir {folder} is not empty; expected a new one, or "
         "--resume to continue the run in it")
    need(not found or names & {"run.lock", "run.json", "start_model", "reward_model"},
         f"--resume: {folder} holds no run of tgdpo.py but {', '.join(found[:5])}")

def make_folder(folder):
    """Make a directory, unless it is there."""
    with reading(f"the directory {folder}"):
        os.makedirs(folder, exist_ok=True)

def lock(folder):
    """A context in which rank 0 keeps other runs out of a folder, which is made."""
    if rank():
        return nullcontext()
    make_folder(folder)
    with reading(f"--output_dir {folder}: another process is at work there, or it"):
        return filelock.FileLock(f"{folder}/run.lock").acquire(timeout=0)

def code_fingerprint(loss):
    """Of this file and of the loss and the guidance in use, which may come from another one."""
    own = [inspect.getsource(function) for function in (guidance, LOSSES[loss])]
    return hashlib.sha256("".join([Path(__file__).read_text(), *own]).encode()).hexdigest()[:32]

def open_run(folder, options, facts):
    """Begin folder/run.json -> False; or check that the one there is this run's -> finished?"""
    mine = json.loads(json.dumps(asdict(options) | facts))
    if options.resume and (folder / "run.json").exists():
        run = read_record(folder)
        for name in [name for name in mine if name not in MAY_CHANGE]:
            theirs = (run["options"] | run).get(name)
            need(theirs == mine[name], f"--resume: {name} was {theirs} and is {mine[name]} now; "
                 f"expected what the run in {folder} began with")
        return run["finished"]
    folder.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    versions["python"] = sys.version.split()[0]
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    record(folder, options=asdict(options), **facts, finished=False, versions=versions,
           git_commit=git.stdout.strip() if git else "")
    return False

@lru_cache  # a run asks several times for the same model; another time of change is another file
def file_digest(file, nanoseconds):
    """Of a file's content, as it was at that time of its last change."""
    sha = hashlib.sha256()
    with reading(file), open(file, "rb") as stream:
        while block := stream.read(2**24):
            sha.update(block)
    return sha.digest()

def model_fingerprint(name):
    """Of a model's content: its configuration and its weights."""
    folder = model_folder(name)
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    with reading(f"model {name}"):
        digests = [file_digest(file, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]

def pairs_fingerprint(pairs):
    """Of the pairs' tokens and of all numbers that were joined to them."""
    names = sorted({*pairs.column_names} - {"index"})
    table = pairs.with_format("arrow")[:].select(names).combine_chunks()
    return hashlib.sha256(b"".join(x.serialize() for x in table.to_batches())).hexdigest()[:32]

def annotation_file(pairs, name, options):
    """Where a model's log-probs of pairs are kept: under the content of all that they depend on."""
    pairs, kind = pairs_fingerprint(pairs.select_columns(["prompt_ids", *IDS])), options.dtype
    if dist.is_initialized() and kind == "bfloat16":  # FSDP rounds elsewhere than autocast does
        kind += "-sharded"
    return Path(options.cache_dir) / f"{once(model_fingerprint, name)}-{pairs}-{kind}.parquet"

def write_annotation(file, logps):
    """Keep what frozen_logps returned, written beside and renamed."""
    beside = file.with_name(f"{file.name}.{os.getpid()}.saving")
    datasets.Dataset.from_dict(dict(zip(SIDES, logps))).to_parquet(str(beside))
    beside.replace(file)

def read_annotation(file, pairs):
    """What write_annotation wrote; None without a whole file of one log-prob a token."""
    try:
        table = datasets.Dataset(pyarrow.parquet.read_table(file)).with_format("numpy")
        logps = [[*table[side]] for side in SIDES]
    except (OSError, KeyError, pyarrow.ArrowInvalid):
        return None
    whole = all(list(map(len, column)) == list(map(len, pairs[ids]))
                for column, ids in zip(logps, IDS))
    return logps if whole else None

# ------------------------------------------------------------ 9. main
def reward_then_train(options, tokenizer, pairs, counts):
    """Annotate pairs with what the loss needs, then train; all goes into options.output_dir."""
    split_rows(len(pairs), options)  # raises now what training would raise later
    once(make_folder, options.output_dir)
    once(make_folder, options.cache_dir)
    need(once(os.access, options.cache_dir, os.W_OK), f"--cache_dir {options.cache_dir} cannot be "
         "written to")
    shared = all(gather(os.path.isdir(options.output_dir)))
    need(shared or not options.save_steps, f"--output_dir {options.output_dir} is not there on all "
         "machines; expected a file system that they share")
    facts = {"data": pairs_fingerprint(pairs), "pairs_per_step": batch_size(options),
             "pairs": counts, "code": code_fingerprint(options.loss),
             "model": once(model_fingerprint, options.model_name_or_path)}
    judge = options.reward_model or f"{options.output_dir}/reward_model"
    columns, beta = pairs.column_names, options.reward_beta or options.beta
    needs_reference = options.loss not in NO_REFERENCE and "chosen_ref_logps" not in columns
    needs_rewards = options.loss not in NO_REWARDS and "chosen_rewards" not in columns
    trains_judge = needs_rewards and not options.reward_model
    number, last = count(1), 1 + needs_reference + needs_rewards + trains_judge

    def begin(stage):
        """Say which stage begins."""
        print(f"{next(number)}/{last} {stage}")
    if needs_reference:
        begin("log-probs of the reference")
        reference = options.ref_model or options.model_name_or_path
        facts["reference"] = once(model_fingerprint, reference)
        pairs = annotate(pairs, "ref_logps", reference, options)
    if trains_judge:
        begin("reward model, since none is given: DPO on the same pairs")
        train(replace(options, loss="dpo", beta=beta, output_dir=judge), pairs, tokenizer, facts)
    if needs_rewards:
        begin("log-probs of the reward model")
        facts["reward_model_fingerprint"] = once(model_fingerprint, judge)
        pairs = add_token_rewards(annotate(pairs, "rm_logps", judge, options), beta)
    elif options.loss not in NO_REWARDS:
        unused = "; --reward_model is not used" if options.reward_model else ""
        print(f"token rewards: the columns chosen_rewards, rejected_rewards{unused}")
    begin(f"policy: {options.loss}")
    train(options, pairs, tokenizer, facts)

def check_vocabulary(name, tokenizer):
    """Raise InputError unless a model knows all tokens of a tokenizer, under the same numbers."""
    own, size = tokenizer.get_vocab(), load_config(name).vocab_size
    known = own
    if any(model_folder(name).glob("tokenizer*")):
        known = load_tokenizer(name).get_vocab()
    else:
        print(f"model {name} comes without a tokenizer: it is taken to know the same tokens")
    other = [token for token, i in own.items() if known.get(token) != i or i >= size]
    need(not other, f"model {name} has another vocabulary: {len(other)} of the tokenizer's "
         f"{len(own)} tokens are not among its {size}, such as {other[:3]}")

def read_data(options):
    """-> (tokenizer, pairs, counts) for a model to train; all models must know the same tokens."""
    rows, length = load_rows(options.dataset, options.dataset_split), options.max_length
    tokenizer = load_tokenizer(options.model_name_or_path)
    for name in filter(None, (options.model_name_or_path, options.ref_model, options.reward_model)):
        check_vocabulary(name, tokenizer)
        config = load_config(name)
        length = min(length, getattr(config, "max_position_embeddings", None) or length)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # its angles jump where a batch is longer than this
            length = min(length, rope.get("original_max_position_embeddings", length))
    if length < options.max_length:
        print(f"--max_length {options.max_length} is lowered to {length}: a model has no more, or "
              "other positions behind it")
    if getattr(load_config(options.model_name_or_path), "router_aux_loss_coef", None):
        print("a mixture of experts: its auxiliary loss, which balances them, is not trained")
    return tokenizer, *tokenize(rows, tokenizer, length, options.dataset)

def run(argv):
    """A whole command line, on each rank."""
    need(all(theirs == argv for theirs in gather(argv)), "ranks with other command lines; expected "
         "the same on all machines")
    options = read_options(argv)
    options = once(lambda: options)  # rank 0's, which has the time and a process number in it
    once(open_folder, Path(options.output_dir), options)
    data = once(read_data, options) if options.model_name_or_path else None
    with lock(options.output_dir):
        if data:
            reward_then_train(options, *data)
        else:
            once(show_decomposition)
            run_small(options)
    print(f"done: {options.output_dir}")

def quiet():
    """Leave the terminal to what is said here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp, of one process
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a terminal without the letter φ

def main(argv):
    """The command line -> exit status: 0; 2 for input that cannot be used; 1 for a run that broke
    off; 130 for Ctrl-C. Under torchrun all ranks come here, and the one that fails says why."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux: large pages for large tensors
    quiet()
    status, text = 0, "the same command with --resume and its --output_dir continues"
    try:
        joined = start_processes()
        run(argv)
        if joined:  # leave together: who still talks to one that has gone can abort at exit
            dist.barrier()
            dist.destroy_process_group()
    except InputError as e:
        status, text = 2, f"error: {e}"
    except Diverged as e:
        status, text = 1, f"stopped at {e}"
    except KeyboardInterrupt:
        status, text = 130, f"interrupted; {text}"
    except torch.OutOfMemoryError as e:
        status, text = 1, (f"out of memory: {str(e).split('. ')[0]}; try a smaller "
                           "--per_device_train_batch_size, --gradient_checkpointing or more GPUs")
    except RuntimeError as e:  # what gloo and NCCL raise when another process is gone
        if not dist.is_initialized() or not re.search("gloo|NCCL", str(e)):
            raise
        status, text = 1, f"another rank cannot be reached, it has failed or was killed; {text}"
    if status and not rank():  # where rank 0 has failed, the others only notice
        print(f"tgdpo.py: {text}", file=sys.stderr)
    return status

def leave(status):
    """End the process with a status. After a failure under torchrun the other ranks may be gone.
    Python's own exit would then wait for gloo's threads, which abort; so it ends at once."""
    sys.stdout.flush()
    if status and dist.is_initialized():
        os._exit(status)
    sys.exit(status)

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
