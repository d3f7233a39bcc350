#!/usr/bin/env python3
"""tgdpo.py with every speed trick: the same command line, files and numbers, in less time and memory.

    python scripts/fast.py --model_name_or_path MODEL --dataset pairs.jsonl            all options are tgdpo.py's
    python scripts/fast.py run.yaml --shared_prompt false                                           and this one
    torchrun --nproc_per_node 8 scripts/fast.py scripts/configs/llama3_8b_instruct_pairrm.yaml

It sets its own functions into tgdpo.py and calls tgdpo.main. Numbers differ by rounding only. What each trick changes:

    shared prompts    a pair is one row, prompt + chosen + rejected, and its prompt is computed once (collate). A
                      rejected token has its position behind the prompt and does not see the chosen response.
    two calls         attention of such a row: prompt and chosen response, then the rejected one against prompt and
                      itself (pair_attention). One call under a mask would compute what the mask then hides.
    block-wise        the softmax over the vocabulary goes in blocks that stay in the CPU's cache, and its gradient is
                      written over the logits: one tensor of them, where autograd holds three (LabelLogps).
    gelu              GPT-2's activation in one kernel instead of eight (prepare_model).

What each brings on your machine: python scripts/benchmark.py --without. On 2 cores, float32, a GPT-2 of 4 layers and
512 tokens, 40 real pairs, medians of two runs: without shared prompts annotating takes 1.07 times as long, training
1.10; without LabelLogps 1.08 and 1.07, and 138 MiB more; without its blocks 1.08 and 1.00, and 48 MiB more; without
gelu 0.99 and 0.93, which is noise, and 64 MiB more; with one attention call 1.00 and 0.97, since prompts were short
there.

Not every model can share prompts. A model that reads a row token by token (Mamba and its hybrids), that counts
distances instead of positions, or whose window is shorter than a sequence carries something of the chosen response
into the rejected one. So the model to train is tried first, on the pair with the longest sequence (refusal). The
choice holds for the whole run: it stands in run.json and in the name of the cached annotations.
"""
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy
import pyarrow.compute
import torch
import torch.distributed as dist
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tgdpo

# tgdpo.py's own functions, which the ones below call.
PLAIN = SimpleNamespace(**{name: getattr(tgdpo, name) for name in (
    "collate microbatches prepare_model load_model annotation_file open_run reward_then_train").split()})
# Of the current run: whether prompts are shared, the pair that models are tried on, the models that were, and the
# compute type of a sharded model's blocks.
RUN = SimpleNamespace(shared=False, trial={}, tried=set(), dtype=torch.float32)
COLUMNS = ("prompt_ids", *tgdpo.IDS)
BLOCK_BYTES = 2**22   # of logits in one block, 4 bytes each
LEAK, APART = 1e-5, 1e-3   # largest differences of log-probs that are rounding, all in float32: see refusal


@dataclass
class Options(tgdpo.Options):
    """tgdpo.py's, and one more."""
    shared_prompt: bool = tgdpo.option(True, "compute a pair's prompt once for both responses, where the model can")


# ------------------------------------------------------------------------------------------------------- shared prompts
def collate(rows, device):
    """tgdpo.collate; where prompts are shared, input_ids are (B, T), a row is prompt + chosen + rejected.

    states are places in these rows: both responses' first tokens are predicted by the prompt's last one. positions
    (B, T) of both responses go on from the prompt's. segments (B, T) are 0 in the prompt, 1 and 2 in the responses.
    parts (B, 3) are the three lengths.
    """
    batch = PLAIN.collate(rows, "cpu")
    if RUN.shared and "rejected_ids" in rows:
        columns = [rows[name] for name in COLUMNS]
        batch["parts"] = torch.tensor([[*map(len, pair)] for pair in zip(*columns)])
        lists = {"input_ids": [prompt + chosen + rejected for prompt, chosen, rejected in zip(*columns)],
                 "positions": [[*range(p + c), *range(p, p + r)] for p, c, r in batch["parts"].tolist()],
                 "segments": [[0] * p + [1] * c + [2] * r for p, c, r in batch["parts"].tolist()]}
        batch |= {name: pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
                  for name, rows in lists.items()}
        states, T = [], batch["input_ids"].shape[1]
        for begin in (0, 1):   # the chosen responses, then the rejected ones
            for row, (p, c, r) in enumerate(batch["parts"].tolist()):
                ids = range(p + begin * c, p + c + begin * r)   # its places in the row
                states += [row * T + place for place in (p - 1, *ids[:-1])]
        batch["states"] = torch.tensor(states)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def attention_mask(segments, implementation):
    """What each token of shared rows sees: before it, the prompt and its own response; (B, T) -> (B, 1, T, T).

    True is seen, for sdpa; other implementations add the mask to the scores, 0 where seen. Floats are of the compute
    type: FSDP would cast others for each layer, and gradient checkpointing would keep every copy.
    """
    own = segments[:, :, None] == segments[:, None, :]                                  # (B, T, T)
    seen = (own | (segments == 0)[:, None, :]).tril()[:, None]                          # (B, 1, T, T)
    if implementation == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=RUN.dtype).masked_fill(~seen, torch.finfo(RUN.dtype).min)


def pair_attention(module, query, key, value, attention_mask, parts=None, **kwargs):
    """transformers' sdpa, (B, heads, T, D) -> (B, T, heads, D). Shared rows, known by their parts, take two calls each.
    Where a model has an attention of its own, or an eager one, attention_mask does the same."""
    if parts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = []
    for n, (p, c, r) in enumerate(parts):
        q, k, v = [x[n:n + 1, :, :p + c + r] for x in (query, key, value)]
        first = sdpa_attention_forward(module, *[x[:, :, :p + c] for x in (q, k, v)], None, **kwargs)[0]   # causal
        k, v = [torch.cat([x[:, :, :p], x[:, :, p + c:]], 2) for x in (k, v)]
        seen = torch.ones(r, p + r, dtype=torch.bool, device=q.device).tril(p)[None, None]
        second = sdpa_attention_forward(module, q[:, :, p + c:], k, v, seen, **kwargs)[0]
        rows.append(torch.cat([first[0], second[0]]))
    return pad_sequence(rows, batch_first=True), None


def microbatches(pairs, options):
    """tgdpo.microbatches; a shared row is shorter than its two sequences, so that more of them go together."""
    if not RUN.shared or "rejected_ids" not in pairs.column_names:
        return PLAIN.microbatches(pairs, options)
    with patch.object(tgdpo, "pair_lengths", lambda pairs: lengths(pairs).sum(0)):
        return PLAIN.microbatches(pairs, options)


def lengths(pairs):
    """Tokens of prompts, chosen and rejected responses -> (3, B)."""
    table = pairs.with_format("arrow")[:]
    return numpy.stack([pyarrow.compute.list_value_length(table[name]).to_numpy() for name in COLUMNS])


# ------------------------------------------------------------------------------------------------------- the log-probs
class LabelLogps(torch.autograd.Function):
    """Logits (M, V) and labels (M,) -> float32 log-probs of the labels, (M,). The backward pass writes the gradient
    over the logits; so it runs once only."""

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
        """g (M,) -> g (1[v = label] - π(v|s)), (M, V). In float32 until it is whole: 1 - π is small for π near 1,
        and each of the two rounded to bfloat16 would leave little of it."""
        logits, labels = ctx.saved_tensors
        parts = [x.split(ctx.size) for x in (logits, labels[:, None], grad[:, None])]
        for block, label, g in zip(*parts):
            block.copy_(block.softmax(-1, dtype=torch.float32).mul_(-g).scatter_add_(-1, label, g))
        return logits, None


def token_logps(model, batch, dtype="float32"):
    """tgdpo.token_logps with LabelLogps, and with positions and a mask where prompts are shared."""
    def label_logps(hidden, labels):
        return LabelLogps.apply(tgdpo.head_logits(model, hidden, type(output)), labels)
    ids, labels, extra = batch["input_ids"], batch["labels"], {}
    if "segments" in batch:
        mask = attention_mask(batch["segments"], model.config._attn_implementation)
        extra = {"position_ids": batch["positions"], "attention_mask": mask}
        extra |= {"parts": batch["parts"].tolist()} if "parts" in batch else {}
    with torch.autocast(ids.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        output = tgdpo.decoder(model)(input_ids=ids, use_cache=False, **extra)
        hidden = output.last_hidden_state.flatten(0, 1)[batch["states"]]                # (M, H)
        size = tgdpo.logits_rows(model, ids.device)
        if len(labels) <= size:
            return tgdpo.in_rows(label_logps(hidden, labels), batch)
        return tgdpo.in_rows(torch.cat([checkpoint(label_logps, *chunk, use_reentrant=False)
                                        for chunk in zip(hidden.split(size), labels.split(size))]), batch)


def prepare_model(model, options):
    """tgdpo.prepare_model, with GPT-2's gelu in one kernel and attention by pair_attention."""
    transformers.AttentionInterface.register("sdpa", pair_attention)   # for all models; without parts it is what it was
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())   # the same function
    return PLAIN.prepare_model(model, options)


# ----------------------------------------------------------------------------------- one choice for all models of a run
def logps_and_taught(model, rows, shared, learn):
    """Log-probs of one pair (2, R) in a layout; with learn, the names of parameters to which they give a gradient."""
    with patch.object(RUN, "shared", shared), torch.set_grad_enabled(learn):
        logps, taught = model.token_logps(collate(rows, model.device)), set()
        if learn:
            logps.sum().backward()
            taught = {name for name, p in model.named_parameters() if p.grad is not None and here(p.grad).any()}
            model.zero_grad()
        return logps.detach(), set().union(*tgdpo.gather(taught))


def here(tensor):
    """The part of a tensor that this rank has."""
    return tensor.to_local() if dist.is_initialized() else tensor


def refusal(name, options, learn):
    """Why a model cannot share prompts -> one line, on all ranks the same; "" if it can.

    It is read once more, to compute in float32, and tried on the pair with the longest sequence. No log-prob of the
    rejected response may change when the chosen one does; all must be those of the plain layout, token by token; and
    with learn, every parameter that gets a gradient there must get one.
    """
    model, rows = PLAIN.load_model(name, replace(options, dtype="float32")), RUN.trial
    longest, text = max(len(rows["prompt_ids"][0] + rows[ids][0]) for ids in tgdpo.IDS), model.config.get_text_config()
    window, vocabulary = getattr(text, "sliding_window", None), text.vocab_size
    if window and window < longest:
        return f"its sliding window is {window} tokens, a sequence {longest}"
    other = rows | {"chosen_ids": [[(i + 1) % vocabulary for i in rows["chosen_ids"][0]]]}
    why = ""
    try:
        plain, taught = logps_and_taught(model, rows, False, learn)
        shared, also_taught = logps_and_taught(model, rows, True, learn)
        changed, _ = logps_and_taught(model, other, True, False)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:   # a family with masks of its own may raise anything
        why = f"with a mask it raises {type(e).__name__}: {' '.join(str(e).split())[:100]}"
    else:
        leak, apart = (changed - shared)[1].abs().max().item(), (shared - plain).abs().max().item()
        untaught = sorted(taught - also_taught)
        if not leak <= LEAK:   # so that no number is refused, too
            why = f"what the chosen response says changes log-probs of the rejected one, by {leak:.1g}"
        elif not apart <= APART:
            why = f"log-probs would differ by {apart:.1g}"
        elif untaught:
            why = f"{untaught[0]} would get no gradient"
    return tgdpo.gather(why)[0]


@torch.no_grad()
def slower(name, options):
    """Whether shared prompts take longer, measured: the mask of a rejected response rules flash attention out."""
    model, seconds = PLAIN.load_model(name, options), {False: [], True: []}
    for shared in (False, True) * 3:
        with patch.object(RUN, "shared", shared):
            batch = collate(RUN.trial, model.device)
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.token_logps(batch)
        torch.cuda.synchronize()
        seconds[shared].append(time.perf_counter() - began)
    return tgdpo.gather(min(seconds[False]) < min(seconds[True]))[0]


def choose(pairs, options):
    """Set RUN for pairs: what a run to --resume has recorded, or what the model to train can do."""
    prompt, *responses = lengths(pairs)
    longest = int((prompt + numpy.maximum(*responses)).argmax())
    RUN.trial, RUN.shared, RUN.tried = pairs[[longest]], options.shared_prompt, set()
    folder, name = Path(options.output_dir), options.model_name_or_path
    files = [file / "run.json" for file in (folder, folder / "reward_model") if options.resume]
    recorded = tgdpo.once(lambda: [json.loads(file.read_text()) for file in files if file.exists()])
    if recorded:
        RUN.shared = RUN.shared and recorded[0].get("prompts_shared", RUN.shared)
        return
    if RUN.shared:
        why = refusal(name, options, learn=True)
        if not why and options.device == "cuda" and slower(name, options):
            why = "that is faster here"
        RUN.shared, RUN.tried = not why, {name}
        if why:
            print(f"{name} gets each prompt twice, once for each response: {why}")


def load_model(name, options):
    """tgdpo.load_model; a model that cannot do as this run has chosen ends it."""
    if RUN.shared and name not in RUN.tried:
        RUN.tried.add(name)
        why = refusal(name, options, learn=name == options.model_name_or_path)
        tgdpo.need(not why, f"{name} cannot share prompts as other models of this run do: {why}; expected "
                   "--shared_prompt false, or tgdpo.py")
    RUN.dtype = getattr(torch, options.dtype) if dist.is_initialized() else torch.float32   # no autocast there
    return PLAIN.load_model(name, options)


def annotation_file(pairs, name, options):
    """tgdpo.annotation_file with the layout in its name: numbers of the two differ by rounding."""
    file = PLAIN.annotation_file(pairs, name, options)
    return file.with_stem(f"{file.stem}-fast-{'shared' if RUN.shared else 'plain'}")


def open_run(folder, options, facts):
    """tgdpo.open_run; whether prompts are shared is a fact that --resume compares."""
    return PLAIN.open_run(folder, options, facts | {"prompts_shared": RUN.shared})


def reward_then_train(options, tokenizer, pairs, counts):
    """tgdpo.reward_then_train, after the choice."""
    choose(pairs, options)
    PLAIN.reward_then_train(options, tokenizer, pairs, counts)


OWN = {f.__name__: f for f in (Options, collate, microbatches, token_logps, prepare_model, load_model,
                               annotation_file, open_run, reward_then_train)}


def faster():
    """A context in which tgdpo.py has the functions of this file."""
    return patch.multiple(tgdpo, **OWN)


def main(argv):
    """tgdpo.main with the functions of this file -> exit status."""
    with faster():
        return tgdpo.main(argv)


if __name__ == "__main__":
    tgdpo.leave(main(sys.argv[1:]))
