#!/usr/bin/env python3
"""Exercises: write the mathematics of tgdpo.py yourself, and be graded by the tests that grade tgdpo.py.

    python scripts/exercises.py list                     the exercises: difficulty, minutes, what to read
    python scripts/exercises.py make student.py          a copy of tgdpo.py in which these functions are blank
    python scripts/exercises.py make student.py guidance tgdpo_loss                     ... only these
    python scripts/exercises.py check student.py         grade it: a table, with the slip that a wrong result looks like
    python student.py                                    train with your own functions: is your loss near the optimum?
    TGDPO_UNDER_TEST=student.py pytest tests -m exercises                               the same, in pytest's words
    python scripts/exercises.py questions                open questions for a report, with their commands

The copy is made from the sources themselves, so exercise and solution are one text: tgdpo.py without the bodies, and
behind it the loss of scripts/treg.py. `check tgdpo.py` grades the reference. Needs pytest.
"""
import ast
import os
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import tgdpo
from common import command
from tgdpo import InputError

ROOT = Path(__file__).resolve().parent.parent
BORROWED = {"scripts/treg.py": ["treg_loss"]}   # exercises that the copy takes from elsewhere


# ------------------------------------------------------------------------------------------------------ the exercises
@dataclass
class Exercise:
    """A function to write; difficulty is 1 to 5."""
    function: str
    tags: str
    difficulty: int
    minutes: int
    read: str      # what to read first
    hint: str      # shapes that the docstring does not have, and what to mind

    @property
    def file(self):
        """The source that holds the solution."""
        return next((file for file, names in BORROWED.items() if self.function in names), "tgdpo.py")


EXERCISES = [   # in the order of derivation.md; the closed form is the lemma of its section 1
    Exercise("collate", "(1a)", 4, 45, "derivation.md, section 1", """
        Lists in, padded tensors out; pad_sequence(..., batch_first=True) pads. The state that predicts a token is the
        position before it: which one is that for the first token of a response? states and places count through the
        flattened tensors: position p of row n of input_ids is n * T + p."""),
    Exercise("token_logps", "(1a)", 3, 30, "derivation.md, section 1; collate, in_rows", """
        model(input_ids=...).logits is (N, T, V) and log_softmax in float32 does the rest: no chunks and no head_logits
        are needed to be right. batch["states"] are places in the flattened N * T positions, batch["labels"] the tokens
        that these predict. in_rows puts M values into rows, 0 where batch["mask"] is False."""),
    Exercise("sequence_ppo_objective", "(1b)", 2, 20, "derivation.md, section 1; along", """
        along gives the entries of a table at the tokens of every response, (Y, T). π(y) is a product over the tokens,
        so log π(y) is a sum. The objective is a mean under π, of a sum over tokens."""),
    Exercise("closed_form_policy", "(4.3a), (4.3b)", 2, 15, "derivation.md, sections 1 and 6", """
        ref_logps and reward (S, A), f a number or (S, A). Stay in log space: logsumexp, not exp and log. What must the
        probabilities of a state sum to?"""),
    Exercise("simpo_loss", "(3d)", 2, 15, "derivation.md, section 3", """
        Log-probs may be anything where a mask is False. How many tokens does each response have? F.logsigmoid."""),
    Exercise("theorem_4_1", "(4.1), (4b)", 4, 40, "derivation.md, section 4; along", """
        language = (states, actions), each (Y, T): what each of the Y responses passes and takes, -1 after its end. An
        ended response is worth 0 at each further depth. In (4.1) the policy chooses which state of a depth it is in, in
        (4b) the reference does: once a maximum over states, once a mean."""),
    Exercise("implicit_reward", "(4.3c), (8a)", 1, 5, "derivation.md, sections 3 and 6", """
        Solve (4.3a) for r. It must also take plain numbers: training calls it token by token."""),
    Exercise("guidance", "(8b)", 1, 10, "derivation.md, section 8", """
        One line and the floor. side is +1 or -1; the line needs no if."""),
    Exercise("tgdpo_loss", "(4.4a), (8c)", 3, 25, "derivation.md, sections 7 and 8; guidance", """
        Call guidance. All that is 0 on padding stays 0, so sums need no mask. Which of the inputs may have a gradient?
        log(sigmoid(φ)) is no number where a pair is very wrong; F.logsigmoid is."""),
    Exercise("treg_loss", "(9a), (9c)", 3, 20, "derivation.md, section 9", """
        All tensors (B, T), as in tgdpo_loss. Its gradient must be TGDPO's times one positive number for each pair: that
        fixes both signs, and what is detached."""),
]


# ----------------------------------------------------------------------------------------------------- a student's copy
def find(source, name):
    """A function of a source -> its node."""
    return next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)


def blank(source, node, exercise):
    """The source with an exercise's body left out: signature and docstring stay, but for displayed formulas."""
    lines = source.split("\n")
    text = [part for part in ast.get_docstring(node).split("\n\n") if not part.startswith(" ")]
    number = EXERCISES.index(exercise) + 1
    task = [f"Exercise {number} of {len(EXERCISES)}, {exercise.tags}: difficulty {exercise.difficulty} of 5, about "
            f"{exercise.minutes} minutes. Read {exercise.read}.", "Hint: " + " ".join(exercise.hint.split())]
    text += ["\n".join(textwrap.fill(part, 112) for part in task)]
    text = textwrap.indent("\n\n".join(text), "    ").strip()
    missing = f'    raise NotImplementedError("{exercise.function}, {exercise.tags}: not written yet")'
    head = lines[:node.body[0].lineno - 1]
    return "\n".join([*head, f'    """{text}', '    """', missing, *lines[node.end_lineno:]])


HEADER = """\
# Grade it:             python scripts/exercises.py check FILE    (FILE is this one)
# Train with your loss: python FILE    The tiny training of tgdpo.py, half a minute, by the functions that stand here.
#                                      How near does your loss come to the optimum, the last line of its table?"""


def student_source(functions):
    """The text of a student's copy, with these functions blank; with none it is the solution."""
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in ["tgdpo.py", *BORROWED]}
    start = 'if __name__ == "__main__":'
    before, after = sources["tgdpo.py"].rsplit(start, 1)
    parts = [before.rstrip()]
    for file, names in BORROWED.items():
        parts.append(f"# {'-' * (110 - len(file))} from {file}")
        parts[-1] += "\n" + "\n\n\n".join(ast.get_source_segment(sources[file], find(sources[file], name))
                                          for name in names)
    source = "\n\n\n".join([*parts, start + after])
    # Log-probs that a wrong token_logps gave must not be found again, by tgdpo.py or by a later version of the copy.
    source = source.replace('option("~/.cache/tgdpo",',
                            'option(f"~/.cache/tgdpo-student/{os.stat(__file__).st_mtime_ns}",\n       ')
    shebang, rest = source.split("\n", 1)
    head = [shebang, "# A student's copy of tgdpo.py."]
    if functions:
        names = "To write: " + ", ".join(functions)
        head.append(textwrap.fill(names, 110, initial_indent="# ", subsequent_indent="#   "))
    source = "\n".join([*head, HEADER, rest])
    chosen = [(find(source, e.function), e) for e in EXERCISES if e.function in functions]
    for node, exercise in sorted(chosen, key=lambda pair: -pair[0].lineno):   # from below: lines above stay in place
        source = blank(source, node, exercise)
    return source


def to_write(file):
    """The functions that were blank in a student's copy; all of them where the file does not say."""
    found = re.search(r"^# To write: (.*(?:\n#   .*)*)", Path(file).read_text(encoding="utf-8"), re.M)
    return re.findall(r"\w+", found[1]) if found else [exercise.function for exercise in EXERCISES]


def make(file, functions):
    """The command `make`."""
    known = [exercise.function for exercise in EXERCISES]
    if unknown := [name for name in functions if name not in known]:
        raise InputError(f"no exercise is called {unknown[0]}; expected some of {', '.join(known)}")
    functions = [*dict.fromkeys(functions)] or known
    source = student_source(functions)
    with tgdpo.reading(f"{file}"):
        try:
            with open(file, "x", encoding="utf-8") as stream:
                stream.write(source)
        except FileExistsError:
            raise InputError(f"{file} is there already and stays as it is; expected the name of a new file") from None
    print(f"{file}: {len(functions)} to write; then: python scripts/exercises.py check {shlex.quote(file)}\n"
          f"When all pass, train with your own loss: python {shlex.quote(file)}")


# ---------------------------------------------------------------------------------------------------------- the grading
def load(path):
    """The module under test, under no name that others import; of tgdpo.py itself, with the scripts' functions."""
    path = Path(path)
    with tgdpo.reading(f"{path}"):
        if path.samefile(ROOT / "tgdpo.py"):
            return SimpleNamespace(**{e.function: getattr(import_module(Path(e.file).stem), e.function)
                                      for e in EXERCISES})
        module = ModuleType("under_test")
        module.__file__ = str(path.resolve())
        exec(compile(path.read_text(encoding="utf-8"), module.__file__, "exec"), vars(module))
    return module


class Grades:
    """A pytest plugin: {function: [first line of what went wrong, or "note: ...", or None, for each test]}."""

    def __init__(self):
        self.found = {exercise.function: [] for exercise in EXERCISES}

    def pytest_runtest_makereport(self, item, call):
        """Called by pytest after each part of each test; it goes on with its own report, since None comes back."""
        function = item.get_closest_marker("exercises").args[0]
        if call.excinfo:
            kind, text = call.excinfo.typename, (str(call.excinfo.value).splitlines() or [""])[0]
            self.found[function].append(text if kind in ("AssertionError", "Failed", "XFailed") else f"{kind}: {text}")
        elif call.when == "call":
            self.found[function].append(None)


def grade(file):
    """Run the graded tests on a file -> Grades.found."""
    try:
        import pytest
    except ImportError:
        raise InputError("pytest is missing; expected it here: pip install -r tests/requirements.txt") from None
    load(file)   # what does not import has one line, and no table
    os.environ["TGDPO_UNDER_TEST"] = str(Path(file).resolve())
    os.environ.pop("PYTEST_ADDOPTS", None)
    grades = Grades()
    status = pytest.main([str(ROOT / "tests" / "test_exercises.py"), "-m", "exercises", f"--rootdir={ROOT}",
                          "-p", "no:terminal", "-p", "no:cacheprovider"], plugins=[grades])
    if status not in (0, 1) or not all(grades.found.values()):
        raise InputError(f"the tests did not run to their end (pytest's exit status {int(status)})")
    return grades.found


def check(file):
    """The command `check` -> whether all is right. What was given is only shown where it has become wrong."""
    found, mine, passed, right = grade(file), to_write(file), 0, True
    print(f"{'exercise':24}{'tag':16}{'difficulty':>10}{'minutes':>9}  {'result':9}first message")
    for e in EXERCISES:
        said = [text for text in found[e.function] if text is not None]
        wrong, given = [text for text in said if not text.startswith("note: ")], e.function not in mine
        if given and not wrong:
            continue
        result = "passed" if not wrong else "not yet" if "not written yet" in wrong[0] else "failed"
        passed, right = passed + (not wrong), right and not wrong
        row = f"{e.function:24}{e.tags:16}{e.difficulty:10}{e.minutes:9}  {result:9}"
        row += "given; it calls one of yours, or was changed: " if given else ""
        print((row + (wrong or said or [""])[0]).rstrip())
    print(f"{passed} of {len(mine)} passed")
    return right


# ------------------------------------------------------------------------------------------------------- the questions
QUESTIONS = r"""
Open questions for a report. Run the commands in the repository, from the top: the later ones use runs/base. A run of
scripts/tiny_language.py takes two minutes on a laptop; --max_steps 20 shows that it works. Say what you expect before
you look.

0. The base of all comparisons: a world, DPO, TGDPO with the DPO model's rhat, TGDPO with the true rewards.

    python scripts/tiny_language.py --output_dir runs/base

1. Another f. Five lines; keep one of the three, or write a fourth. The rank, in [-1, 1], is among the tokens of the
   same response, which are those with rhat != 0.

    cat > other_f.py <<'END'
    import sys; sys.path += [".", "scripts"]
    import tgdpo, tiny_language
    def rank(r): return ((r[..., :, None] - r[..., None, :]).sign() * (r != 0)[..., None, :]).mean(-1)
    forms = {"exponential": lambda r, a, side, floor=None: (side * a * r).exp(),
             "clipped": lambda r, a, side, floor=None: (1 + side * a * r).clamp(0.5, 2.0),
             "rank": lambda r, a, side, floor=None: 1 + side * a * rank(r)}
    tgdpo.guidance = forms[sys.argv.pop(1)]; sys.exit(tiny_language.main(sys.argv[1:]))
    END
    python other_f.py exponential --alpha 0.2 --output_dir runs/exponential
    python other_f.py clipped --alpha 0.2 --output_dir runs/clipped
    python other_f.py rank --alpha 0.2 --output_dir runs/rank
    python scripts/tiny_language.py --alpha 0.2 --output_dir runs/linear

   Look at: the rows "tgdpo" of the four tables, true reward and KL; guidance/min, guidance/max and guidance/nonpositive
   in metrics.jsonl. Which f is the same as the linear one to first order, and where does it part from it? Does f > 0
   (Assumption 4.2) prevent the collapse of section 10?

2. rhat from the wrong language: a reward model that never saw the word "not", and one that wants the opposite.

    mkdir -p runs/plain runs/opposite
    cp -r runs/base/start_model runs/plain
    cp -r runs/base/start_model runs/opposite
    grep -v " not " runs/base/pairs.jsonl > runs/plain/pairs.jsonl
    sed 's/"chosen"/"x"/; s/"rejected"/"chosen"/; s/"x"/"rejected"/' runs/base/pairs.jsonl > runs/opposite/pairs.jsonl
    python scripts/tiny_language.py --loss dpo --resume --output_dir runs/plain
    python scripts/tiny_language.py --loss dpo --resume --output_dir runs/opposite
    python scripts/tiny_language.py --reward_model runs/plain --output_dir runs/guided_by_plain
    python scripts/tiny_language.py --reward_model runs/opposite --output_dir runs/guided_by_opposite

   Look at: correlation and AUC of rhat against the truth, then "true reward" of tgdpo and of "tgdpo, truth" beside
   runs/base. How wrong may rhat be before TGDPO falls behind DPO? scripts/lab.py asks the same of many sources.

3. Noise on the labels: a fifth of the pairs turned round (beside the noise that Bradley-Terry has already).

    mkdir -p runs/noisy
    cp -r runs/base/start_model runs/noisy
    awk 'BEGIN { srand(1) } rand() < 0.2 { sub(/"chosen"/, "\"x\""); sub(/"rejected"/, "\"chosen\"");
         sub(/"x"/, "\"rejected\"") } 1' runs/base/pairs.jsonl > runs/noisy/pairs.jsonl
    python scripts/tiny_language.py --resume --output_dir runs/noisy

   Look at: what dpo, tgdpo and "tgdpo, truth" lose against runs/base. The reward model saw the same noise: does rhat
   (AUC) suffer as much as the policy? With noisy labels, does guidance help more or less?

4. Length. phi sums over tokens, so a long response can count more; SimPO takes means. TGDPO with means is four lines.

    cat > mean_f.py <<'END'
    import sys; sys.path += [".", "scripts"]
    import tgdpo, tiny_language
    def mean_loss(logps, batch, o):
        columns = [*logps, *batch["ref_logps"]]
        means = [x / mask.sum(-1, keepdim=True) for x, mask in zip(columns, batch["mask"] * 2)]
        return tgdpo.tgdpo_loss(*means, *batch["rewards"], o.beta, o.alpha)
    tgdpo.LOSSES["mean"] = mean_loss; sys.exit(tiny_language.main(["--loss", "mean", *sys.argv[1:]]))
    END
    python mean_f.py --beta 5 --reward_beta 0.5 --output_dir runs/mean
    python scripts/tiny_language.py --loss simpo --beta 2 --output_dir runs/simpo

   Look at: length, KL and true reward in the tables beside runs/base. Which tokens have a negative rhat in every
   response (the samples below the table show them), and what does derivation.md, section 8, say is done to these?

5. The exact optimum against the policy that was trained, where all 81 responses can be counted.

    python scripts/explain.py --seed 3
    cat > counted.py <<'END'
    import sys; sys.path.insert(0, "scripts")
    from explain import *
    w, draws = world(int(sys.argv[1])), torch.Generator().manual_seed(0)
    rhat = implicit_reward(w.exact, w.ref, w.beta)
    for pairs, alpha in itertools.product((100, 1000, 10000), (0.0, 0.01, 0.1)):
        drawn = torch.multinomial(w.weights.flatten(), pairs, True, generator=draws)
        share = drawn.bincount(minlength=81 * 81).view(81, 81) / pairs
        found, _ = minimise(lambda p: (share * pair_losses(p, w.ref, rhat, 1.0, alpha, w.tree)).sum(), w.ref, 1e-4)
        print(f"{pairs:6} pairs, alpha {alpha}: J {J(w, found):7.3f} of {J(w, w.exact):.3f}, "
              f"apart {apart(found, w.exact):.3f}")
    END
    python counted.py 3

   Look at: how fast J comes near the optimum as pairs grow, for DPO (alpha 0) and for guided losses, though rhat is
   exact here. Which part of section 10 does the table show? Put the shaped reward (5c), or a wrong one, for rhat.
"""


def listing():
    """The command `list`."""
    for number, e in enumerate(EXERCISES, 1):
        print(f"{number}  {e.function}  {e.tags}  difficulty {e.difficulty} of 5, {e.minutes} minutes; read {e.read}")


def main(argv):
    """The command line -> exit status; of `check` 1 where something is not right yet."""
    result = []

    def work():
        name, *rest = argv
        if name == "make" and rest:
            make(rest[0], rest[1:])
        elif name == "check" and len(rest) == 1:
            result.append(check(rest[0]))
        elif name == "list" and not rest:
            listing()
        elif name == "questions" and not rest:
            print(QUESTIONS.strip("\n"))
        else:
            raise InputError(f"cannot read '{' '.join(argv)}'; expected list, make FILE [FUNCTION ...], check FILE or "
                             "questions")
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0 if argv else 2
    return command(work) or int(result == [False])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
