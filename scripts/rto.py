#!/usr/bin/env python3
"""RTO, the same token reward as a return: PPO on dense rewards from a DPO model (arXiv 2404.18922, ICML 2025).

    python scripts/rto.py                        the tiny language of 31 words, from nothing to a table, on a laptop
    python scripts/rto.py --model_name_or_path MODEL --reward_model DPO_DIR --dataset pairs.jsonl --beta3 0
    python scripts/rto.py --model_name_or_path MODEL --reward_model DPO_DIR --dataset pairs.jsonl --end_reward_model DIR

Of the preference pairs only the prompts are used; the responses are drawn from the policy as it learns:

    r_t  = β₁ log π_dpo/π_ref (y_t|s_t)     the token's reward, clipped
         - β₂ log π_old/π_ref (y_t|s_t)     what holds the policy; π_old drew the response
         + β₃ r_end(x, y)                   on the last token only
    Â_t  = Σ_l (γ λ)^l δ_{t+l},   δ_t = r_t + γ V(s_{t+1}) - V(s_t)
    loss = -min(ρ_t Â_t, clip(ρ_t, 1 ± ε) Â_t),   ρ_t = π_θ/π_old (y_t|s_t)

β₁ = 0 is plain PPO with its reward at the end. derivation.md, section 11, sets RTO beside TGDPO. Where no end token was
drawn within --max_new_tokens, the response counts as finished there. Single process: all four models are in memory.

Shapes as in tgdpo.py: B responses; T tokens of a padded sequence; R tokens of a padded response.
"""
import json
import math
import os
import random
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import tgdpo
import tiny_language
from common import command, strict
from tgdpo import InputError, option


@dataclass
class Options:
    """From beta1 to value_clip the official code's values; steps, batches and learning rates are this script's."""
    model_name_or_path: str | None = option(None, "model to train, and the reference; none: the tiny language")
    reward_model: str | None = option(None, "DPO-trained model whose log-ratios are the token rewards")
    end_reward_model: str | None = option(None, "classifier with one label that scores prompt + response: r_end")
    dataset: str | None = option(None, "preference pairs, as for tgdpo.py; their prompts are used")
    dataset_split: str = option("train", "split of a hub data set or of a saved DatasetDict")
    beta1: float = option(0.05, "weight of the token rewards; 0: plain PPO")
    beta2: float = option(0.01, "weight of the KL to the reference")
    beta3: float = option(1.0, "weight of r_end")
    clip: float = option(0.05, "largest size of beta1 times a log-ratio; 0: not clipped")
    placement: Literal["tokens", "end"] = option("tokens", "end: all token rewards summed on the last token")
    gamma: float = option(1.0, "discount of later rewards")
    lam: float = option(0.95, "lambda of GAE: 1 sums rewards, 0 trusts the critic")
    ratio_clip: float = option(0.2, "a token whose ratio to the old policy is further from 1 learns no more")
    value_clip: float = option(0.2, "a value further from the old one learns no more")
    steps: int = option(100, "rollouts, each with one pass of PPO over it")
    rollouts: int = option(128, "responses drawn in a step")
    minibatches: int = option(8, "optimizer steps in a step, and forward passes")
    learning_rate: float = option(5e-7, "of the policy's Adam")
    critic_learning_rate: float = option(5e-6, "of the critic's Adam")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    max_new_tokens: int = option(512, "most tokens of a response")
    max_length: int | None = option(None, "tokens of prompt and response; none: tgdpo.py's default")
    dtype: Literal["bfloat16", "float32"] | None = option(None, "compute type; none: bfloat16 on CUDA, else float32")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "where to compute")
    seed: int = option(42, "seed of prompts, responses and minibatches")
    output_dir: str | None = option(None, "where the run is written, new or empty; none: runs/<time>")
    resume = gradient_checkpointing = False   # no options: tgdpo.py's functions ask for them


# Tried on the tiny language, one seed: true reward / KL / ungrammatical share of 500 samples. DPO: 2.5 / 4.9 / 54 %.
# beta1 0.5, whose optimum is the DPO model: 3.0 / 3.6 / 33 % after 20 steps, 2.0 / 4.1 / 47 % after 60 (with beta3 0.5:
# 3.0 / 4.6 / 44 %). beta1 0.25: 1.4 / 0.6 / 12 % after 40, with beta3 0.5 after 20 already 1.8 / 1.1 / 11 %: taken.
TINY = dict(beta1=0.25, beta2=0.5, beta3=0.5, clip=0.0, value_clip=1.0, steps=40, minibatches=4, learning_rate=3e-4,
            critic_learning_rate=1e-3, max_new_tokens=tiny_language.NEW_TOKENS)
POSITIVE = "steps rollouts minibatches learning_rate critic_learning_rate ratio_clip value_clip max_new_tokens".split()
SHARED = "model_name_or_path reward_model dataset dataset_split max_length dtype device seed output_dir".split()
SCORERS = {"sequence": transformers.AutoModelForSequenceClassification,   # one score, read at the last token
           "token": transformers.AutoModelForTokenClassification}         # one score a token
BT_STEPS, BT_PAIRS, BT_RATE = 300, 32, 3e-4   # of a reward model trained here: optimizer steps, pairs in one, peak rate


# ------------------------------------------------------------------------------------------------- 1. the mathematics
def dense_rewards(old_logps, ref_logps, dpo_logps, end_scores, mask, options):
    """RTO's reward of each token (arXiv 2404.18922): log-probs (B, R) of the policy that drew it, of the reference and
    of the DPO model; end_scores (B,); mask (B, R), true on the tokens, which begin each row -> (B, R), 0 on padding.

    options: beta1, beta2, beta3; clip, the limit of a token's beta1 part, 0 for none; placement: "end" sums these
    parts, once clipped, on the last token and leaves the KL where it is.
    """
    last = mask & ~F.pad(mask[:, 1:], (0, 1))                                           # (B, R)
    # r_t = β₁ log π_dpo/π_ref, clipped
    rewards = token_rewards(ref_logps, dpo_logps, mask, options)
    if options.placement == "end":
        rewards = last * rewards.sum(-1, keepdim=True)
    # - β₂ log π_old/π_ref + β₃ r_end on the last token
    return rewards - options.beta2 * mask * (old_logps - ref_logps) + options.beta3 * last * end_scores[:, None]


def token_rewards(ref_logps, dpo_logps, mask, options):
    """The β₁ part of the reward, where it arises: log-probs and mask (B, R) -> (B, R)."""
    rewards = options.beta1 * mask * (dpo_logps - ref_logps)
    return rewards.clamp(-options.clip, options.clip) if options.clip else rewards


def advantages(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438): rewards, V(s_t) and mask (B, R) -> (Â (B, R), returns Â + V
    (B, R)), both 0 where mask is False. Nothing is worth anything after the last token."""
    values, running, found = values * mask, torch.zeros_like(values[:, 0]), []
    following = F.pad(values[:, 1:], (0, 1))                                            # V(s_{t+1}), (B, R)
    for t in reversed(range(mask.shape[1])):
        # δ_t = r_t + γ V(s_{t+1}) - V(s_t);  Â_t = δ_t + γ λ Â_{t+1}
        delta = rewards[:, t] + gamma * following[:, t] - values[:, t]
        running = mask[:, t] * (delta + gamma * lam * running)
        found.append(running)
    found = torch.stack(found[::-1], dim=-1)                                            # (B, R)
    return found, found + values


def whiten(x, mask):
    """x (B, R) with mean 0 and variance 1 over the tokens of mask, 0 elsewhere."""
    mean = x[mask].mean()
    return mask * (x - mean) * (x[mask].var(correction=0) + 1e-8).rsqrt()


def policy_loss(logps, old_logps, adv, mask, clip):
    """PPO's clipped loss (arXiv 1707.06347), mean over tokens: log-probs, advantages and mask (B, R) -> a scalar."""
    # ρ = π_θ/π_old;  loss = -min(ρ Â, clip(ρ, 1 ± ε) Â)
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)[mask].mean()


def value_loss(values, old_values, returns, mask, clip):
    """PPO's value loss, mean over tokens: values, old values, returns and mask (B, R) -> a scalar."""
    # ½ max((V - R)², (V' - R)²),  V' = clip(V, V_old ± ε)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)[mask].mean()


# ------------------------------------------------------------------------------------------- 2. models with one score
def read_scorer(kind, name, options, new_head=False):
    """A model of SCORERS[kind] with one label from a directory (safetensors), float32, on the device, without dropout.

    With new_head the directory may be a causal language model's: the head that it lacks is zero, and so is every score
    at first. Raises InputError for missing weights or several labels.
    """
    with tgdpo.reading(f"model {name}"):
        model, report = SCORERS[kind].from_pretrained(
            tgdpo.model_folder(name), num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True)
    missing = report["missing_keys"]
    if lost := sorted(key for key in missing if not new_head or key.startswith(f"{model.base_model_prefix}.")):
        raise InputError(f"model {name} lacks the weights {lost[:3]}; expected a {kind} classifier with one label")
    with torch.no_grad():
        for key in missing:
            model.get_parameter(key).zero_()
    return tgdpo.prepare_model(model, options).to(options.device)


def make_critic(path, options):
    """A critic on the weights of the model in path: V(s) = 0 everywhere until it learns."""
    return read_scorer("token", path, options, new_head=True)


def token_scores(model, batch, ahead, options):
    """A token classifier's score of each response token -> float32 (N, R), 0 on padding: at the state that predicts
    it (ahead 0), or at the token itself, which stands one place after that (ahead 1)."""
    with torch.autocast(model.device.type, getattr(torch, options.dtype), enabled=options.dtype != "float32"):
        scores = model(input_ids=batch["input_ids"], use_cache=False).logits[..., 0]    # (N, T)
    return tgdpo.in_rows(scores.float().flatten()[batch["states"] + ahead], batch)


def state_values(critic, batch, options):
    """V(s_t) of the states that predict the response's tokens, before these are seen -> (N, R)."""
    return token_scores(critic, batch, 0, options)


def response_scores(kind, model, batch, options):
    """r_end of each response of a batch -> float32 (N,)."""
    if kind == "token":
        return token_scores(model, batch, 1, options).sum(-1)
    # The classifier's own forward looks for the last token by the padding id, which may be that of the end token.
    with torch.autocast(model.device.type, getattr(torch, options.dtype), enabled=options.dtype != "float32"):
        hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state      # (N, T, H)
        last = batch["states"][batch["mask"].sum(-1).cumsum(0) - 1] + 1   # places of the last tokens, (N,)
        return model.score(hidden.flatten(0, 1)[last])[:, 0].float()


def make_end_reward(kind, model, options):
    """-> a function of (prompts, responses), lists of token ids, that gives r_end (B,), without gradient."""
    @torch.no_grad()
    def end_reward(prompts, responses):
        batch = tgdpo.collate({"prompt_ids": prompts, "chosen_ids": responses}, model.device)
        return in_parts(batch, options, partial(response_scores, kind, model, options=options))
    return end_reward


def train_reward_model(kind, start, pairs, options, folder):
    """Fit a reward model of SCORERS[kind] to preference pairs by Bradley-Terry, from the weights of the language model
    in start, and save it in folder."""
    model, rng = read_scorer(kind, start, options, new_head=True), random.Random(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=BT_RATE)
    scheduler = transformers.get_scheduler("cosine", optimizer, BT_STEPS // 10, BT_STEPS)
    for _ in (bar := tqdm(range(BT_STEPS), desc=f"reward model, {kind}", disable=None)):
        batch = tgdpo.collate(pairs[[rng.randrange(len(pairs)) for _ in range(BT_PAIRS)]], model.device)
        chosen, rejected = response_scores(kind, model, batch, options).chunk(2)
        # -log P(y_w beats y_l) = -log σ(r(y_w) - r(y_l))
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        tgdpo.clip_gradients(model, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    tgdpo.write_model(model, tgdpo.load_tokenizer(start), Path(folder))


# ---------------------------------------------------------------------------------------------------------- 3. PPO
def rows_of(batch, rows):
    """Some rows of a batch; what collate keeps flat, one entry a response token, is made anew for them."""
    lengths, width = batch["mask"].sum(-1), batch["input_ids"].shape[1]
    first = batch["states"][lengths.cumsum(0) - lengths] % width                        # state before a response, (N,)
    part = {name: values[rows] for name, values in batch.items() if name not in ("labels", "states", "places")}
    mask, places = part["mask"], torch.arange(len(rows), device=first.device)[:, None]
    states = (width * places + first[rows][:, None] + torch.arange(part["mask"].shape[1], device=first.device))[mask]
    return part | {"states": states, "labels": part["input_ids"].flatten()[states + 1],
                   "places": mask.flatten().nonzero().squeeze(1)}


def in_parts(batch, options, score):
    """score(part) over a batch in parts of a minibatch's size, joined."""
    rows = torch.arange(len(batch["mask"])).split(options.rollouts // options.minibatches)
    return torch.cat([score(rows_of(batch, part)) for part in rows])


@torch.no_grad()
def roll_out(policy, critic, reference, dpo, end_reward, prompts, tokenizer, options):
    """Draw a response to each prompt and score its tokens -> (batch with old_logps, old_values, returns and whitened
    advantages, all (B, R); metrics)."""
    responses = tiny_language.generate(policy, prompts, tokenizer, new_tokens=options.max_new_tokens)
    batch = tgdpo.collate({"prompt_ids": prompts, "chosen_ids": responses}, policy.device)
    mask = batch["mask"]                                                                # (B, R)
    old, ref, theirs = [in_parts(batch, options, model.token_logps) for model in (policy, reference, dpo)]
    values = in_parts(batch, options, partial(state_values, critic, options=options))   # (B, R)
    ends = end_reward(prompts, responses) if end_reward else torch.zeros_like(old[:, 0])                # (B,)
    adv, returns = advantages(dense_rewards(old, ref, theirs, ends, mask, options), values, mask,
                              options.gamma, options.lam)
    spread = returns[mask].var(correction=0).clamp(min=1e-8)
    metrics = {"reward": token_rewards(ref, theirs, mask, options).sum(-1).mean(), "end_score": ends.mean(),
               "kl": (old - ref).sum(-1).mean(), "length": mask.sum(-1).float().mean(),
               "explained_variance": 1 - (returns - values)[mask].var(correction=0) / spread}
    batch |= {"old_logps": old, "old_values": values, "returns": returns, "adv": whiten(adv, mask)}
    return batch, {name: value.item() for name, value in metrics.items()}


def learn(policy, critic, optimizers, batch, options):
    """One pass of PPO over a rollout, in shuffled minibatches -> metrics."""
    losses, ratios = [], []
    for rows in torch.randperm(len(batch["mask"])).chunk(options.minibatches):
        part = rows_of(batch, rows)
        mask, logps = part["mask"], policy.token_logps(part)
        values = state_values(critic, part, options)
        both = (policy_loss(logps, part["old_logps"], part["adv"], mask, options.ratio_clip),
                value_loss(values, part["old_values"], part["returns"], mask, options.value_clip))
        for model, loss, optimizer in zip((policy, critic), both, optimizers):
            loss.backward()
            norm = tgdpo.clip_gradients(model, options.max_grad_norm)
            if not math.isfinite(norm):
                raise tgdpo.Diverged("the gradient is not finite; try smaller learning rates")
            optimizer.step()
            optimizer.zero_grad()
        losses.append([loss.item() for loss in both])
        ratios.append((logps.detach() - part["old_logps"]).exp()[mask])
    ratios, losses = torch.cat(ratios), torch.tensor(losses).mean(0).tolist()
    return {"policy_loss": losses[0], "value_loss": losses[1],
            "clip_fraction": ((ratios - 1).abs() > options.ratio_clip).float().mean().item(),
            "ratio_min": ratios.min().item(), "ratio_max": ratios.max().item()}


def train(policy, critic, reference, dpo, end_reward, prompts, tokenizer, options, judge=None, marks=()):
    """PPO for options.steps -> one row of metrics a step. policy, reference and dpo come from tgdpo.load_model, critic
    from make_critic; end_reward(prompts, responses) -> (B,), or None for 0. judge(step, row) is called after the steps
    in marks. The same seed gives the same run, whatever the judge draws.

    Means over responses: reward, the sum of token rewards; end_score; kl, Σ log π_old/π_ref; length, tokens. Means over
    minibatches: both losses. Over tokens: clip_fraction, the ratio's range, and explained_variance, the share of the
    returns' variance that the critic knew before it learned from them.
    """
    rng = random.Random(options.seed)
    optimizers = [torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95)) for model, rate in
                  ((policy, options.learning_rate), (critic, options.critic_learning_rate))]
    rows = []
    for step in (bar := tqdm(range(1, options.steps + 1), desc="train: rto", disable=None)):
        drawn = rng.choices(prompts, k=options.rollouts)
        torch.manual_seed(rng.getrandbits(63))   # anew each step: a judge may draw too
        batch, row = roll_out(policy, critic, reference, dpo, end_reward, drawn, tokenizer, options)
        rows.append({"step": step} | row | learn(policy, critic, optimizers, batch, options))
        bar.set_postfix({name: f"{row[name]:.3f}" for name in ("reward", "end_score", "kl")})
        if judge and step in marks:
            judge(step, rows[-1])
    return rows


# ------------------------------------------------------------------------------------------------------------ 4. main
def read_options(argv):
    """Command line -> (Options, tgdpo.Options with what both share, checked and filled in by tgdpo.py)."""
    parser = transformers.HfArgumentParser(Options, prog="rto.py", allow_abbrev=False,
                                           epilog=f"Without --model_name_or_path: {TINY}")

    strict(parser)
    tiny = not any(arg.split("=")[0].replace("-", "_") == "__model_name_or_path" for arg in argv)
    if tiny:
        parser.set_defaults(**TINY)
    o = Options(**vars(parser.parse_args(argv)))
    given = [name for name in ("dataset", "reward_model", "end_reward_model") if getattr(o, name)]
    if tiny and given:
        raise InputError(f"--{given[0]} without --model_name_or_path; expected both, or neither for the tiny language")
    shared = [f"--{name}={getattr(o, name)}" for name in SHARED if getattr(o, name) is not None]
    base = (tiny_language if tiny else tgdpo).read_options(shared)
    o = replace(o, **{name: getattr(base, name) for name in SHARED})
    o.end_reward_model = o.end_reward_model and os.path.expanduser(o.end_reward_model)
    check_options(o)
    return o, base


def check_options(o):
    """Raise InputError for the first value that makes no sense."""
    for f in fields(o):
        value = getattr(o, f.name)
        if isinstance(value, (int, float)) and not (0 <= value < math.inf and (value > 0 or f.name not in POSITIVE)):
            raise InputError(f"--{f.name} is {value}; expected a number, {'above 0' if f.name in POSITIVE else '>= 0'}")
    for name in ("gamma", "lam"):
        if getattr(o, name) > 1:
            raise InputError(f"--{name} is {getattr(o, name)}; expected at most 1")
    if o.rollouts % o.minibatches:
        raise InputError(f"--rollouts is {o.rollouts}; expected a multiple of --minibatches, which is {o.minibatches}")
    if o.max_new_tokens >= o.max_length:
        raise InputError(f"--max_new_tokens is {o.max_new_tokens}; expected less than --max_length, {o.max_length}, "
                         "which counts the prompt too")
    if o.model_name_or_path and o.beta1 and not o.reward_model:
        raise InputError(f"--beta1 is {o.beta1} without --reward_model; expected a DPO-trained model, or --beta1 0")
    if o.model_name_or_path and o.beta3 and not o.end_reward_model:
        raise InputError(f"--beta3 is {o.beta3} without --end_reward_model; expected a reward model, or --beta3 0")


def read_prompts(options, base):
    """-> (tokenizer, prompts cut at their left ends so that max_new_tokens fit, counts)."""
    tokenizer, pairs, counts = tgdpo.read_data(replace(base, ref_model=options.end_reward_model))
    names = [name for name in (options.model_name_or_path, options.reward_model, options.end_reward_model) if name]
    length = min([options.max_length] + [getattr(tgdpo.load_config(name), "max_position_embeddings", None)
                                         or options.max_length for name in names])
    room, bos = length - options.max_new_tokens, tokenizer.bos_token_id
    if room < 1:
        raise InputError(f"--max_new_tokens is {options.max_new_tokens}; expected less than {length}, the positions of "
                         "a model")
    return tokenizer, [tgdpo.cut_left(ids, room, bos) for ids in pairs["prompt_ids"]], counts


def run(options, tokenizer, prompts, counts):
    """Train options.model_name_or_path by RTO; the policy, metrics.jsonl and run.json go into options.output_dir."""
    folder = Path(options.output_dir)
    if tokenizer.pad_token is None:   # generate pads prompts on the left, under a mask
        tokenizer.pad_token = tokenizer.eos_token
    end_reward = None
    if options.end_reward_model and options.beta3:
        model = read_scorer("sequence", options.end_reward_model, options).requires_grad_(False)
        end_reward = make_end_reward("sequence", model, options)
    policy, reference = [tgdpo.load_model(options.model_name_or_path, options) for _ in range(2)]
    dpo = tgdpo.load_model(options.reward_model, options) if options.reward_model else reference
    for model in (reference, dpo):
        model.requires_grad_(False)
    critic = make_critic(options.model_name_or_path, options)
    facts = {"model": tgdpo.model_fingerprint(options.model_name_or_path), "pairs": counts}
    tgdpo.open_run(folder, options, facts)
    with open(folder / "metrics.jsonl", "w") as log:
        def judge(_, row):
            print(json.dumps(row), file=log, flush=True)
        every = range(1, options.steps + 1)
        train(policy, critic, reference, dpo, end_reward, prompts, tokenizer, options, judge, every)
    tgdpo.write_model(policy, tgdpo.load_tokenizer(options.model_name_or_path), folder)
    tgdpo.record(folder, finished=True)


def run_tiny(options, base):
    """From nothing to a table: a language model, pairs, a DPO model, an end reward, RTO, and what each is worth."""
    folder = Path(options.output_dir)
    start, dpo, end, file = [folder / name for name in ("start_model", "dpo", "end_reward_model", "pairs.jsonl")]
    tokenizer, pairs, counts, prompts = tiny_language.tiny_data(base, start, file)
    base = replace(base, loss="dpo", model_name_or_path=str(start), dataset=str(file))
    tgdpo.reward_then_train(replace(base, output_dir=str(dpo)), tokenizer, pairs, counts)
    if options.beta3:
        train_reward_model("sequence", start, pairs, options, end)
    options = replace(options, model_name_or_path=str(start), reward_model=str(dpo), end_reward_model=str(end),
                      dataset=str(file), output_dir=str(folder / "rto"))
    run(options, tokenizer, pairs["prompt_ids"], counts)
    found = {"reference": str(start), "dpo": str(dpo), "rto": options.output_dir}
    tiny_language.tiny_report(base, tokenizer, found, prompts)


def main(argv):
    """The command line -> exit status."""
    def work():
        options, base = read_options(argv)
        tgdpo.open_folder(Path(options.output_dir), options)
        found = read_prompts(options, base) if options.model_name_or_path else None
        with tgdpo.lock(options.output_dir):
            if found:
                run(options, *found)
            else:
                run_tiny(options, base)
        print(f"done: {options.output_dir}")
    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
