#!/usr/bin/env python3
"""A checkpoint of a run as a model directory, as the finished run would be one: on one process, without a GPU.

    python scripts/export.py runs/first/checkpoint-100 exported
    python scripts/chat_outputs.py --model_name_or_path exported --prompts prompts.txt --output answers.json

The run may have had any number of processes, and may be unfinished. Its run.json says which model it trains; weights
come from the checkpoint, the configuration and the tokenizer from that model. Only the weights are read, not AdamW's
state. Reading a checkpoint unpickles it: take checkpoints only from people you trust.
"""
import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import tgdpo
from common import command, strict
from tgdpo import need


def export(own):
    """Read the checkpoint's weights into the model that the run began with, and write it."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sharded
    source, folder = Path(own.checkpoint).resolve(), Path(own.output)
    need((source / ".metadata").is_file() and not source.name.endswith(".saving"), f"{own.checkpoint} is no complete "
         "checkpoint; expected a directory checkpoint-N in a run's, made with --save_steps")
    need(not folder.exists() or folder.is_dir() and not any(folder.iterdir()),
         f"{folder} exists already; expected the name of a new directory")
    run = tgdpo.read_record(source.parent)
    name = own.model_name_or_path or run["options"]["model_name_or_path"]
    need(tgdpo.model_fingerprint(name) == run["model"], f"model {name} is not what the run in {source.parent} began "
         "with; expected --model_name_or_path, where that one lies now")
    model, tokenizer = tgdpo.read_model(name), tgdpo.load_tokenizer(name)
    weights = {"model": sharded.get_model_state_dict(model)}   # those of the model, to be written over
    with tgdpo.in_one_line(f"{own.checkpoint} cannot be used"):
        dcp.load(weights, checkpoint_id=source, no_dist=True)
    sharded.set_model_state_dict(model, weights["model"])
    tgdpo.write_model(model, tokenizer, folder)
    print(f"{folder}: {name} after {source.name.removeprefix('checkpoint-')} steps of the run in {source.parent}")


def main(argv):
    """The command line -> exit status: 0, or 2 for input that cannot be used."""
    parser = strict(argparse.ArgumentParser(prog="export.py", description=__doc__, allow_abbrev=False,
                                            formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("checkpoint", help="a directory checkpoint-N in a run's directory")
    parser.add_argument("output", help="the model directory to write, new")
    parser.add_argument("--model_name_or_path", help="where the model that the run began with lies now (run.json's)")
    return command(lambda: export(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
