#!/usr/bin/env python3
"""What a run needs, before a GPU is rented: memory on each GPU, operations, weights that move, hours.

    python scripts/plan.py scripts/configs/llama3_8b_instruct_pairrm.yaml
    python scripts/plan.py scripts/configs/llama3_8b_instruct_pairrm.yaml --gpus 4 --gradient_checkpointing false

Options of tgdpo.py override the file's, as they do there; the plan's own are in --help. It is for runs under torchrun,
with one GPU too (plain python computes under autocast, which keeps more). Of the model the configuration alone is read;
data and tokenizer are, for the lengths, if they are on this machine. Activations and operations are not guessed by a
formula: the model is built without weights (torch's meta device), its blocks run forwards and backwards on tensors
without content, and torch counts what autograd keeps and what would be multiplied. The rest is arithmetic on what
section 8 of tgdpo.py does: what is sharded, what is gathered and how often. scripts/fast.py takes less. It is an
estimate all the same: allocator, NCCL and CUDA's own memory are allowed for by filling a GPU to 90 % only.
"""
import argparse
import math
import sys
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
import yaml
from torch.utils.flop_counter import FlopCounterMode

import tgdpo

GIB, USABLE = 2**30, 0.9
# Numbers of weights, of blocks, ...; rest: the weights in no block.
Model = namedtuple("Model", "name weights block blocks rest hidden vocabulary config")
Cost = namedtuple("Cost", "activations one_block forward both")   # bytes kept, bytes of a block, operations


def flash_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What CUDA's attention kernel keeps and multiplies; on the meta device torch would take its slow one, which keeps
    a table of T x T. Tensors are (N, heads, T, size)."""
    groups = query.shape[1] // key.shape[1]
    key, value = [tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value)]
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scaling)[0]
    return out.transpose(1, 2), None


def empty_model(name, dtype, recompute):
    """A model of tgdpo.py on the meta device, in the compute type, as its blocks are when FSDP has gathered them."""
    transformers.AttentionInterface.register("flash_without_content", flash_attention)
    with tgdpo.reading(f"the configuration of model {name}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if model.config._attn_implementation == "sdpa":   # others, such as Gemma 2's, multiply plain tensors
        model.config.get_text_config()._attn_implementation = "flash_without_content"
    return tgdpo.prepare_model(model, tgdpo.Options(gradient_checkpointing=recompute))


def longest(name):
    """The positions that a model has."""
    with tgdpo.reading(f"the configuration of model {name}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None) or 10**9


def describe(name, model):
    """Counts of a model's weights -> Model."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    weights = sum(p.numel() for p in model.parameters())
    config = model.config.get_text_config()
    return Model(name, weights, max(sizes, default=0), len(blocks), weights - sum(sizes), config.hidden_size,
                 config.vocab_size, model.config)


@lru_cache
def measure_empty(name, dtype, recompute, sequences, tokens):
    """Run the body of an empty model on (sequences, tokens) -> (Model, Cost)."""
    model = empty_model(name, dtype, recompute)
    about = describe(name, model)
    mask = torch.zeros(sequences, 1, tokens, tokens, dtype=torch.bool, device="meta")   # so that nobody reads the ids
    own, kept = {tensor.untyped_storage()._cdata for tensor in [mask, *model.parameters()]}, {}

    def pack(tensor):
        """Note each storage that autograd keeps, once; weights are counted elsewhere, and training has no mask."""
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor
    ids = torch.zeros(sequences, tokens, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False)
    with counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = tgdpo.decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        forward = counter.get_total_flops()
        out.sum().backward()
    activations = sum(storage.nbytes() for storage in kept.values())
    return about, Cost(activations, activations / max(1, about.blocks), forward, counter.get_total_flops())


def costs(options, sequences, tokens):
    """-> (Model, Cost of training, with or without gradient checkpointing as the options say)."""
    name, dtype, recompute = options.model_name_or_path, options.dtype, options.gradient_checkpointing
    about, cost = measure_empty(name, dtype, recompute, sequences, tokens)
    if recompute:   # in the backward pass one block at a time has all that is its own
        cost = cost._replace(one_block=measure_empty(name, dtype, False, sequences, tokens)[1].one_block)
    return about, cost


def rows_at_once(options, about):
    """Response tokens whose logits exist at one time."""
    return tgdpo.logits_rows(about, torch.device("cpu" if options.device == "cpu" else "cuda"))


def memory(options, about, cost, responses, shards):
    """Bytes on each GPU at the moment that takes most -> {stage: {part: bytes}}; responses is the number of response
    tokens in a micro-batch."""
    size, cast = (2, 4) if options.dtype == "bfloat16" else (4, 0)   # bytes of a logit, and of its copy in float32
    logits = about.vocabulary * min(responses, rows_at_once(options, about))
    forward, backward = (size + cast + 4) * logits, 3 * 4 * logits   # with the log-softmax; this and two gradients
    weights = 4 * about.weights / shards
    # Gathered: the rest, once; a block and the one after it, fetched ahead.
    gathered = size * (about.rest + 2 * about.block)
    frozen = {"weights": weights, "gradients": 0, "AdamW": 0, "gathered": gathered,
              "activations": cost.one_block, "log-probs": forward}
    # While a block's gradient is reduced: the gradient, and its float32 copy. The rest's gradient waits for the end.
    during = {"gathered": gathered + size * (about.rest + about.block) + 4 * about.block,
              "activations": cost.activations + cost.one_block * options.gradient_checkpointing,
              "log-probs": backward + 2 * size * responses * about.hidden}
    end = {"gathered": (size + 4) * about.rest, "activations": 0, "log-probs": 0}
    train = {"weights": weights, "gradients": weights, "AdamW": 2 * weights} | max(during, end, key=total)
    return {"annotate": frozen, "train": train}


def stages_of(options, own_rewards=False):
    """-> [(stage, its model, whether it is trained)], in the order of the run. Data that bring their own token rewards
    need no reward model."""
    model, judge = options.model_name_or_path, options.reward_model
    found = [("annotate: reference", options.ref_model or model, False)] * (options.loss != "simpo")
    if options.loss == "tgdpo" and not own_rewards:
        found += [("train: reward model", model, True)] * (not judge)
        found += [("annotate: reward model", judge or model, False)]
    return found + [(f"train: {options.loss}", model, True)]


def total(parts):
    """Bytes of a stage."""
    return sum(parts.values())


def lengths_of(options, plan):
    """-> (pairs, longest sequence, mean of a pair's longer sequence, mean response, whether the data bring their token
    rewards, where all this is from)."""
    local = Path(options.dataset).exists() and Path(options.model_name_or_path).is_dir()
    if not local:
        longer = min(plan.prompt_tokens + plan.response_tokens, options.max_length)
        return (plan.pairs, options.max_length, longer, min(plan.response_tokens, longer), False,
                "lengths are assumed: --pairs, --prompt_tokens, --response_tokens")
    rows = tgdpo.load_rows(options.dataset, options.dataset_split)
    tokenizer = tgdpo.load_tokenizer(options.model_name_or_path)
    pairs, _ = tgdpo.tokenize(rows, tokenizer, options.max_length, options.dataset)
    prompts, chosen, rejected = [[*map(len, pairs[k])] for k in ("prompt_ids", "chosen_ids", "rejected_ids")]
    longer = [p + max(c, r) for p, c, r in zip(prompts, chosen, rejected)]
    return (len(pairs), max(longer), math.ceil(sum(longer) / len(pairs)),
            math.ceil(sum(chosen + rejected) / (2 * len(pairs))), "chosen_rewards" in pairs.column_names,
            "lengths are the data's")


def of_a_pair(options, tokens, response):
    """Operations for a pair of sequences of so many tokens -> (forwards, forwards and backwards). The body's are
    counted; the head takes 2 per weight and token forwards, 4 backwards, 2 again where log-probs come in chunks."""
    about, cost = costs(options, 2, tokens)
    head = 2 * 2 * response * about.hidden * about.vocabulary
    chunks = 2 * options.per_device_train_batch_size * response > rows_at_once(options, about)
    return cost.forward + head, cost.both + (3 + chunks) * head


def moved(options, about, trains, shards, machines):
    """Bytes that come to each GPU, around a ring in which as many leave it -> (in a pass, at the end of a step).

    FSDP2 gathers a block forwards and, in training, once more backwards, where gradient checkpointing finds it. The
    rest is gathered once a pass; a frozen model keeps it. Each pass reduces its gradients, in float32. With --hsdp, on
    several machines, their sums go from machine to machine at the end."""
    size = 2 if options.dtype == "bfloat16" else 4
    moves, end = size * (about.weights - about.rest), 0
    if trains:
        moves, end = 2 * moves + size * about.rest + 4 * about.weights, 2 * 4 * about.weights / shards
    return moves * (1 - 1 / shards), end * (1 - 1 / machines)


def a_step(options, plan, trains, tokens, response):
    """What a step's pairs take -> (operations, seconds of computing, seconds of moving weights)."""
    passes, shards, machines = options.gradient_accumulation_steps, plan.gpus, 1
    if options.hsdp:
        shards, machines = plan.gpus_per_machine, plan.gpus // plan.gpus_per_machine
    in_pass, end = moved(options, costs(options, 2, tokens)[0], trains, shards, machines)
    operations = plan.gpus * tgdpo.batch_size(options) * of_a_pair(options, tokens, response)[trains]
    moving = passes * in_pass / ring(plan, shards) + end / (plan.network * 1e9)
    return operations, operations / rate(plan), moving


def rate(plan):
    """Operations a second of all GPUs."""
    return plan.gpus * plan.peak * 1e12 * plan.fraction


def ring(plan, shards):
    """Bytes a second to each GPU of those that share a model. Between machines all network cards serve at once."""
    inside, between = plan.bandwidth, plan.gpus_per_machine * plan.network
    return 1e9 * (min(inside, between) if shards > plan.gpus_per_machine else inside)


def faster(options, plan, own_rewards, longest, shards, tokens, response):
    """For a step that waits for weights: the least change of its passes that lets it compute -> a line for the user."""
    pairs = tgdpo.batch_size(options)
    for passes in range(options.gradient_accumulation_steps - 1, 0, -1):
        size, rest = divmod(pairs, passes)
        changed = tgdpo.replace(options, per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        _, computing, moving = a_step(changed, plan, True, tokens, response)
        if not rest and moving <= computing:
            return (f"Computing would bound it with --per_device_train_batch_size {size} and "
                    f"--gradient_accumulation_steps {passes}, the same batch: "
                    f"{most_bytes(changed, own_rewards, longest, shards) / GIB:.0f} GiB.")
    return "No other split of the batch changes that; fewer GPUs or more pairs a step would."


def parts_of(options, name, trains, tokens, shards):
    """Bytes on each GPU of a stage with model `name`, with all of a micro-batch so long -> {part: bytes}."""
    options, sequences = tgdpo.replace(options, model_name_or_path=name), 2 * options.per_device_train_batch_size
    stages = memory(options, *costs(options, sequences, tokens), sequences * tokens, shards)
    return stages["train" if trains else "annotate"]


def most_bytes(options, own_rewards, tokens, shards):
    """Bytes on each GPU of the stage that takes most."""
    return max(total(parts_of(options, name, trains, tokens, shards))
               for _, name, trains in stages_of(options, own_rewards))


def remedies(options, own_rewards, longest, shards, usable):
    """The first of several changes that makes all stages fit, tried one after the other -> a line for the user."""
    small = dict(gradient_checkpointing=True, per_device_train_batch_size=1)
    both = "--gradient_checkpointing true and --per_device_train_batch_size 1 (with more --gradient_accumulation_steps)"
    tried = [("--gradient_checkpointing true", dict(gradient_checkpointing=True), longest, shards),
             ("--per_device_train_batch_size 1 (with more --gradient_accumulation_steps)",
              dict(per_device_train_batch_size=1), longest, shards),
             (both, small, longest, shards)]
    tried += [(f"{n} GPUs to shard over, {both}", small, longest, n) for n in (2, 4, 8, 16, 32, 64, 128) if n > shards]
    for text, changes, length, n in tried:
        needed = most_bytes(tgdpo.replace(options, **changes), own_rewards, length, n)
        if needed <= usable:
            return f"It would with {text}: {needed / GIB:.0f} GiB."
    for length in (longest // 2, longest // 4, longest // 8):
        if (needed := most_bytes(tgdpo.replace(options, **small), own_rewards, length, 128)) <= usable:
            return f"It would with 128 GPUs, --max_length {length}, {both}: {needed / GIB:.0f} GiB."
    return "None of the options helps: not 128 GPUs, shorter sequences and gradient checkpointing together."


def read_plan(argv):
    """-> (the plan's own options, those of tgdpo.py)."""
    parser = argparse.ArgumentParser(prog="plan.py", usage="plan.py CONFIG.yaml [--OPTION VALUE ...]",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     epilog="All other options are tgdpo.py's.")
    parser.add_argument("--gpus", type=int, default=8, help="processes, one GPU each")
    parser.add_argument("--gpus_per_machine", type=int, default=8, help="with --hsdp: shards of a weight")
    parser.add_argument("--gpu_memory", type=float, default=80, help="of a GPU, in GiB")
    parser.add_argument("--peak", type=float, default=989, help="of a GPU, in 10^12 operations a second; 989 is "
                        "NVIDIA's figure for an H100 SXM in bfloat16 (half of the 1979 it gives with sparsity), "
                        "nvidia.com/en-us/data-center/h100")
    parser.add_argument("--fraction", type=float, default=0.4, help="of the peak that is reached")
    parser.add_argument("--bandwidth", type=float, default=450, help="inside a machine, to each GPU, in GB/s; 450 is "
                        "half of the 900 that NVIDIA gives for an H100's NVLink, both directions together (same page). "
                        "Less is reached: 380 from one GPU to another in github.com/NVIDIA/nccl/issues/1264")
    parser.add_argument("--network", type=float, default=50, help="between machines, for each GPU, in GB/s; 50 is a "
                        "card of 400 Gb/s for each, as in NVIDIA's DGX H100")
    parser.add_argument("--pairs", type=int, default=60000, help="if the data is not here")
    parser.add_argument("--prompt_tokens", type=int, default=300, help="on average, if the data is not here")
    parser.add_argument("--response_tokens", type=int, default=400, help="on average, if the data is not here")
    plan, rest = parser.parse_known_args(argv)
    for name, value in vars(plan).items():
        if not 0 < value < math.inf:
            raise tgdpo.InputError(f"--{name} is {value}; expected a number above 0")
    options = tgdpo.read_options([*rest, "--device=cpu"])   # this machine may have no other
    options.device = "cuda"
    if not options.model_name_or_path:
        raise tgdpo.InputError("no --model_name_or_path; expected the model of the run that is planned")
    given = yaml.safe_load(Path(rest[0]).read_text(encoding="utf-8")) if not rest[0].startswith("-") else {}
    if "dtype" not in given and not any(arg.startswith("--dtype") for arg in rest):
        options.dtype = "bfloat16"   # what a GPU takes by default; this machine may have none
    if options.hsdp and (plan.gpus <= plan.gpus_per_machine or plan.gpus % plan.gpus_per_machine):
        raise tgdpo.InputError(f"--hsdp with {plan.gpus} GPUs on machines of {plan.gpus_per_machine}; expected several "
                               "full ones")
    return plan, options


def main(argv):
    """Print the plan -> exit status, as tgdpo.main's."""
    try:
        plan, options = read_plan(argv)
        report(plan, options)
    except tgdpo.InputError as e:
        print(f"plan.py: error: {e}", file=sys.stderr)
        return 2
    return 0


def report(plan, options):
    """Print the plan: what is trained on what, then memory, then hours."""
    options = tgdpo.replace(options, max_length=min(options.max_length, longest(options.model_name_or_path)))
    pairs, tokens, mean, response, own_rewards, source = lengths_of(options, plan)
    shards = plan.gpus_per_machine if options.hsdp else plan.gpus
    micro = options.per_device_train_batch_size
    about, _ = costs(options, 2 * micro, tokens)
    batch = tgdpo.batch_size(options) * plan.gpus
    recompute = "on" if options.gradient_checkpointing else "off"
    print(f"{about.name}: {about.weights / 1e9:.2f} billion weights, {about.blocks} blocks of {about.block / 1e6:.0f} "
          f"million, {about.rest / 1e6:.0f} million in embedding, head and last norm")
    print(f"GPUs: {plan.gpus} of {plan.gpu_memory:g} GiB, weights in {shards} shards, {options.dtype}, gradient "
          f"checkpointing {recompute}, sequences of up to {tokens} tokens")
    passes = options.gradient_accumulation_steps
    print(f"a step: {batch} pairs = {plan.gpus} GPUs x {micro} in a pass x {passes} passes")
    print(f"data: {pairs} pairs, {mean} tokens in a sequence on average ({source})")
    report_memory(plan, options, own_rewards, tokens, shards)
    report_hours(plan, options, own_rewards, tokens, shards, pairs, mean, response)


def report_memory(plan, options, own_rewards, tokens, shards):
    """Print the memory of each stage, and whether it fits."""
    print("\nestimated GiB on each GPU, all sequences at the longest")
    needed, usable = 0, USABLE * plan.gpu_memory * GIB
    for stage, name, trains in stages_of(options, own_rewards):
        parts = parts_of(options, name, trains, tokens, shards)
        if not needed:
            print(" " * 22 + "".join(f"{part:>12}" for part in [*parts, "total"]))
        print(f"{stage:22}" + "".join(f"{value / GIB:12.1f}" for value in [*parts.values(), total(parts)]))
        needed = max(needed, total(parts))
    if needed <= usable:
        print(f"fits: {needed / GIB:.0f} of {plan.gpu_memory:g} GiB")
    else:
        print(f"does not fit: {needed / GIB:.0f} GiB, and {100 * USABLE:.0f} % of {plan.gpu_memory:g} GiB are "
              f"{usable / GIB:.0f}")
        print(remedies(options, own_rewards, tokens, shards, usable))
    sequences = 2 * options.per_device_train_batch_size
    weights = {name: costs(tgdpo.replace(options, model_name_or_path=name), sequences, tokens)[0].weights
               for _, name, _ in stages_of(options, own_rewards)}
    largest, trained = max(weights.values()), weights[options.model_name_or_path]
    print(f"host memory of rank 0 while it loads or writes a model: {4 * largest / GIB:.0f} GiB; a checkpoint: "
          f"{12 * trained / GIB:.0f} GiB of disk")


def report_hours(plan, options, own_rewards, tokens, shards, pairs, mean, response):
    """Print the hours of computing and of moving weights of each stage, and which of the two bounds a step."""
    batch = tgdpo.batch_size(options) * plan.gpus
    epochs = math.ceil(options.num_train_epochs * math.ceil(pairs / batch))
    steps = options.max_steps if options.max_steps > 0 else epochs
    seen = pairs * steps / math.ceil(pairs / batch)   # the last step of an epoch may be smaller
    hours = 0
    print(f"\nhours of computing, recomputing included, at {100 * plan.fraction:g} % of the peak "
          f"({rate(plan):.2e} a second)")
    print(f"and of moving weights at {ring(plan, shards) / 1e9:g} GB/s to each GPU, of which less is reached")
    print(" " * 22 + "".join(f"{name:>12}" for name in ("operations", "computing", "moving")))
    for stage, name, trains in stages_of(options, own_rewards):
        own = tgdpo.replace(options, model_name_or_path=name)
        operations, computing, moving = a_step(own, plan, trains, mean, response)
        share = (seen if trains else pairs) / batch
        hours += share * max(computing, moving) / 3600
        each = f"   {steps} steps of {computing:.1f} and {moving:.1f} seconds" if trains else ""
        numbers = f"{operations * share:12.2e}{computing * share / 3600:12.2f}{moving * share / 3600:12.2f}"
        print(f"{stage:22}{numbers}{each}")
    print(f"the whole run: {hours:.2f} hours, since the two go on at the same time")
    if moving <= computing:
        print(f"Computing bounds a step; moving weights takes {100 * moving / computing:.0f} % of that time.")
    else:
        print(f"Moving weights bounds a step: it takes {moving / computing:.1f} times as long as computing.")
        print(faster(options, plan, own_rewards, tokens, shards, mean, response))
    print("Held-out pairs, loading, saving and unequal lengths in a pass are not counted.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
