#!/usr/bin/env python3
"""One run for each value of an option, and their comparison. A reward model is trained once for all of them.

    python scripts/sweep.py --vary alpha 0.1 0.25 0.5 --model_name_or_path MODEL --dataset pairs.jsonl \\
        --output_dir runs/sweep
    python scripts/sweep.py --vary seed 42 43 44 --output_dir runs/seeds          on the language of three words
    python scripts/compare.py runs/sweep/*                                        the comparison again

All other options are tgdpo.py's. The runs are OUTPUT_DIR/alpha-0.1 and so on. Without --reward_model, the first one
trains a DPO model and the others take it, unless the option is one that this model depends on. The same command goes on
after a kill: runs that are there are continued with --resume.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import compare
import tgdpo
from common import command

# Options on which the DPO model of a run does not depend.
SHARES = {"alpha", "guidance_floor", "logging_steps", "eval_steps"}


def read(argv):
    """The command line -> (option, values, the other arguments, the folder of all runs)."""
    tgdpo.need(argv.count("--vary") == 1, "--vary: expected it once, with an option and its values")
    at = argv.index("--vary")
    end = next((n for n in range(at + 1, len(argv)) if argv[n].startswith("--")), len(argv))
    option, *values = argv[at + 1:end] or [""]
    rest = argv[:at] + argv[end:]
    tgdpo.need(len({*values}) == len(values) > 1, f"--vary {option} {' '.join(values)}: expected an option of tgdpo.py "
               "and at least two different values")
    folder = tgdpo.read_options([*rest, f"--{option}={values[0]}"]).output_dir
    for value in values:   # each must be good before the first is trained
        tgdpo.read_options([*rest, f"--{option}={value}"])
    tgdpo.need(option not in ("output_dir", "resume"),
               f"--vary {option}: each run has its own; expected another option")
    return option, values, rest, Path(folder)


def sweep(argv):
    """All runs, then compare.py's tables. Raises InputError where a run ends with another status than 0."""
    option, values, rest, folder = read(argv)
    judge, runs = None, []
    for value in values:
        run = folder / f"{option}-{value}"
        more = [f"--{option}={value}", f"--output_dir={run}"]
        more += ["--resume"] if run.exists() else []
        more += [f"--reward_model={judge}"] if judge else []
        print(f"\n{option} {value}")
        status = tgdpo.main([*rest, *more])
        tgdpo.need(status == 0, f"{run} ended with status {status}; the same command continues")
        if option in SHARES and (run / "reward_model" / "run.json").exists():
            judge = run / "reward_model"
        runs.append(str(run))
    print()
    tgdpo.need(compare.main(runs) == 0, "the runs are there, but cannot be compared")


def main(argv):
    """The command line -> exit status: 0; 2 for input that cannot be used or a run that ended."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    return command(lambda: sweep(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
