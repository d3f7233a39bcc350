"""scripts/heatmap.py: its numbers, its page in a real browser, the terminal, what it refuses.

The browser is Chromium, spoken to over a pipe (--remote-debugging-pipe), so no package is needed: $TGDPO_BROWSER, one
on the PATH, or headless Chromium 147 out of the npm package @sparticuz/chromium, unpacked once into ~/.cache.
"""

import fcntl
import html
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers

import tgdpo
from common import whole_tokens
from conftest import eight_pairs, make_model, write_rows
from front_picture import BLUE, ORANGE
from start_model import train_tokenizer

import heatmap
import tiny_language

EVIL = '</script><script>window.planted = 1</script><img src="http://127.0.0.1:9/x.png" onerror="window.planted = 2">'
PACKAGE = "@sparticuz/chromium@147.0.0"
HINT = "to make it run: TGDPO_BROWSER=/path/to/chromium, or node and npm and a registry that they can reach"


# ----------------------------------------------------------------------------------------------------- the browser
def find_browser():
    """The path of a Chromium, fetched through npm if need be; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
    cache = Path.home() / ".cache" / "tgdpo-browser"
    found = os.environ.get("TGDPO_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if found or (cache / "chromium").exists():
        return found or str(cache / "chromium")
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip(f"no browser: none on the PATH, and npm or node is not there to fetch one; {HINT}")
    unpack = 'import("@sparticuz/chromium").then(package => package.default.executablePath())'
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TMPDIR": folder}  # where the package unpacks to
        for command in (["npm", "install", "--no-audit", "--no-fund", PACKAGE], ["node", "-e", unpack]):
            try:
                subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=40, check=True)
            except (subprocess.SubprocessError, OSError) as e:
                said = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip().splitlines()[:3]
                pytest.skip(f"no browser: {command[0]} could not fetch {PACKAGE} ({e}; {said}); {HINT}")
        cache.mkdir(parents=True, exist_ok=True)
        for file in Path(folder).iterdir():  # the binary last: it marks the folder complete
            if file.is_file() and file.name.startswith(("lib", "vk")):
                shutil.move(file, cache / file.name)
        shutil.move(Path(folder) / "chromium", cache / "chromium")
    return str(cache / "chromium")


class Browser:
    """One page of a headless Chromium; `events` holds all that it reported."""

    def __init__(self, path, folder):
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for pipe in (os.pipe(), os.pipe()) for fd in pipe]
        theirs, self.out, self.into, answers = ends
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]

        def pipes():  # Chromium reads commands from 3 and answers on 4
            os.dup2(theirs, 3)
            os.dup2(answers, 4)

        self.process = subprocess.Popen(
            [path, *flags, "about:blank"], preexec_fn=pipes, pass_fds=(3, 4), stderr=open(folder / "log", "wb")
        )
        os.close(theirs)
        os.close(answers)
        self.count, self.rest, self.events, self.session = 0, b"", [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)

    def read(self, until):
        """The next message."""
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.into, 2**20)
            if not part:
                raise OSError("the browser has ended")
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def __call__(self, method, **params):
        """One command of the DevTools protocol -> its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.read(time.monotonic() + 30)).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def js(self, expression):
        """An expression in the page -> its value."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, file):
        self.events.clear()
        self("Page.navigate", url=Path(file).resolve().as_uri())
        until = time.monotonic() + 30
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read(until))
        self.settle()

    def settle(self):
        """Two frames and the observers between them."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def mouse(self, selector, click=False):
        at, found = None, f"document.querySelector({json.dumps(selector)})"
        for _ in range(20):  # pairs that come near the window are built and move others
            self.js(f"{found}.scrollIntoView({{block: 'center'}})")
            self.settle()
            last, at = at, self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getClientRects()[0])")
            if last == at:
                break
        x, y = at
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") * click:
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def complaints(self):
        """Errors, violations of the policy, anything written to the console, requests but for the page itself."""
        kinds = "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"
        found = [event for event in self.events if event.get("method") in kinds]
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return found + asked[1:]

    def close(self):
        self.session = None
        try:
            self("Browser.close")
            self.process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.into)


KEYS = {"Tab": 9, "Escape": 27, "End": 35, "Home": 36}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path, folder = find_browser(), tmp_path_factory.mktemp("browser")
    try:
        page = Browser(path, folder)
    except (OSError, TimeoutError) as e:
        said = (folder / "log").read_text(errors="replace").strip().splitlines()[:2]
        pytest.skip(f"no browser: {path} does not start ({e}; {said}); {HINT}")
    yield page
    page.close()


# ------------------------------------------------------------------------------------------------------- material
ROWS = [
    dict(
        prompt="Say " + EVIL,
        chosen=f"first line\n\nsecond {EVIL} 日本語 😊 end\u2028.",
        rejected='a "b" & <b>c</b>\x1b[31m red \r\x9b \u202e',
    ),
    dict(prompt="How many moons? " * 40, chosen="One moon.\n", rejected="Two moons, or three."),
    dict(prompt="Why?", chosen="Because it is so and so it is. " * 6, rejected="Why not"),
]
NUMBERS = dict(beta=0.3, alpha=2.0, reward_beta=0.7, guidance_floor=0.25)


class Made:
    """Three models of one byte-level tokenizer, the pairs above, and their page with a policy."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = train_tokenizer([json.dumps(row) for row in ROWS] * 2, 300)
        sizes = dict(tokenizer=self.tokenizer, vocab_size=len(self.tokenizer), n_positions=1024, scale=4.0)
        self.reference, self.judge, self.policy = [
            make_model(folder / name, seed=seed, **sizes) for seed, name in enumerate(["reference", "judge", "policy"])
        ]
        self.data = write_rows(folder / "pairs.jsonl", ROWS)
        self.page = self.make("page.html", policy=self.policy)

    def argv(self, *flags, **changes):
        names = dict(model_name_or_path=self.reference, reward_model=self.judge, dataset=self.data, device="cpu")
        names |= NUMBERS | dict(cache_dir=self.folder / "cache", max_length=1024) | changes
        return [f"--{name}={value}" for name, value in names.items() if value is not None] + list(flags)

    def make(self, name, *flags, **changes):
        assert heatmap.main(self.argv(f"--output={self.folder / name}", *flags, **changes)) == 0
        return self.folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("made"))


def data_of(file):
    """A page's facts and pairs, read as a browser reads them: up to the first closing tag."""
    blocks = re.findall(r'<script type="application/json" ([^>]*)>(.*?)</script', Path(file).read_text("utf-8"), re.S)
    assert blocks[0][0] == 'id="facts"' and {kind for kind, _ in blocks[1:]} == {'class="pair"'}
    facts, *pairs = [json.loads(text) for _, text in blocks]
    assert len(facts["pairs"]) == len(pairs)
    return facts, pairs


def full_logps(path, prompt_ids, ids):
    """Log-probs of the response by the whole model's logits, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path).double().eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0].log_softmax(-1)
    at = range(len(prompt_ids) - 1, len(prompt_ids) + len(ids) - 1)
    return [logits[t, i].item() for t, i in zip(at, ids)]


def by_hand(made, row, reference, judge, policy=None):
    """The numbers of one row, from the formulas -> {"loss", (side, quantity): values}."""
    prompt_ids, both = whole_tokens(row, made.tokenizer)
    b, a, rb, floor = NUMBERS.values()
    want, phi, phi_dpo = {}, 0.0, 0.0
    for side, sign, ids in zip(("chosen", "rejected"), (1, -1), both):
        ref, rm, pi = [full_logps(path, prompt_ids, ids) for path in (reference, judge, policy or reference)]
        want[side, "rhat"] = [rb * (x - y) for x, y in zip(rm, ref)]
        want[side, "f"] = [max(floor, 1 + sign * a * r) for r in want[side, "rhat"]]
        want[side, "shift"] = [x - y for x, y in zip(pi, ref)]
        phi += sign * b * sum(f * x for f, x in zip(want[side, "f"], want[side, "shift"]))
        phi_dpo += sign * b * sum(want[side, "shift"])
    for side in ("chosen", "rejected"):  # σ(-φ) f over σ(-φ_DPO)
        want[side, "force"] = [f * (1 + math.exp(phi_dpo)) / (1 + math.exp(phi)) for f in want[side, "f"]]
    return want | {"loss": math.log1p(math.exp(-phi)), "dpo": b / (1 + math.exp(phi_dpo))}


def near(found, want):
    return len(found) == len(want) and all(abs(x - y) <= 2e-5 + 6e-4 * abs(y) for x, y in zip(found, want))


# ---------------------------------------------------------------------------------------------------- the numbers
def test_numbers_are_those_of_full_logits(made):
    """r̂, f, force, shift, loss and DPO's push, with a policy, by the formulas from whole models' logits."""
    facts, pairs = data_of(made.page)
    assert list(facts["quantities"]) == ["rhat", "f", "force", "shift"]
    assert facts["guidance"]["text"] == "f = 1 ± α r̂, α = 2, at least 0.25"
    assert facts["guidance"]["slider"] == {"alpha": 2.0, "floor": 0.25, "beta": 0.3, "top": 20.0}
    assert [pair["row"] for pair in pairs] == [0, 1, 2]
    for row, pair, about in zip(ROWS, pairs, facts["pairs"]):
        want = by_hand(made, row, made.reference, made.judge, made.policy)
        assert near([pair["loss"], about["loss"], pair["dpo"]], [want["loss"]] * 2 + [want["dpo"]])
        for name in facts["quantities"]:
            for side in ("chosen", "rejected"):
                assert near(pair[side][name], want[side, name]), (row, side, name)
            every = [abs(v - (name in ("f", "force"))) for side in ("chosen", "rejected") for v in want[side, name]]
            assert near([about["peaks"][name]], [max(every)])
    assert any(f == 0.25 for pair in pairs for f in pair["chosen"]["f"]), "the floor was never met: a weak test"
    ratio = [pair["chosen"]["force"][0] / pair["chosen"]["f"][0] for pair in pairs]
    assert max(abs(r - 1) for r in ratio) > 0.05, "force is f: a weak test"


def test_without_a_policy_the_force_is_that_at_the_reference(made):
    """σ(0) = 1/2 in both losses, so the force is f and DPO pushes by β/2; no shift; --pairs takes the first."""
    facts, pairs = data_of(made.make("none.html", "--pairs=2"))
    assert list(facts["quantities"]) == ["rhat", "f", "force"] and len(pairs) == 2
    for row, pair in zip(ROWS, pairs):
        want = by_hand(made, row, made.reference, made.judge)
        assert "shift" not in pair["chosen"] and near([pair["loss"]], [math.log(2)])
        assert pair["dpo"] == 0.15
        for side in ("chosen", "rejected"):
            assert near(pair[side]["force"], want[side, "f"])


def test_the_datas_own_rewards(made):
    """They are r̂ as they stand, without a reward model."""
    _, pairs = data_of(made.page)
    rows = []
    for row, pair in zip(ROWS, pairs):
        lengths = [len(pair[side]["tokens"]) for side in ("chosen", "rejected")]
        rows.append(row | {"chosen_rewards": [0.25] * lengths[0], "rejected_rewards": [-0.5] * lengths[1]})
    data = write_rows(made.folder / "own.jsonl", rows)
    facts, pairs = data_of(made.make("own.html", dataset=data, reward_model=None))
    assert "rewards by the data's own rewards" in facts["about"]
    for pair in pairs:
        assert set(pair["chosen"]["rhat"]) == {0.25} and set(pair["rejected"]["rhat"]) == {-0.5}
        assert set(pair["chosen"]["f"]) == {1.5} and set(pair["rejected"]["f"]) == {2.0}


def test_a_finished_run_is_read_from_its_folder(bench):
    """--run alone: its models, numbers and pairs, the reward model that it trained, itself as the policy; a flag
    overrides; a DPO run has f = 1."""
    _, out = bench.train(max_steps=2, beta=0.4, alpha=0.3, reward_beta=0.2, guidance_floor=0.9)
    files = [bench.folder / f"{name}.html" for name in ("run", "same", "other", "dpo")]
    assert heatmap.main(["--run", str(out), "--output", str(files[0])]) == 0
    flags = bench.argv(out=bench.folder / "none", beta=0.4, alpha=0.3, reward_beta=0.2, guidance_floor=0.9)
    flags += [f"--reward_model={out / 'reward_model'}", f"--policy={out}", f"--output={files[1]}"]
    assert heatmap.main(flags) == 0
    assert files[0].read_text() == files[1].read_text()
    facts, pairs = data_of(files[0])
    assert len(pairs) == 8 and any(pair["chosen"]["shift"][0] for pair in pairs)
    assert {"beta 0.4", "reward beta 0.2", f"policy {out}"} <= set(facts["about"])
    assert facts["guidance"]["text"] == "f = 1 ± α r̂, α = 0.3, at least 0.9"
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(run | {"code": "of another file"}))
    assert "another version of tgdpo.py" in heatmap.guidance_facts(tgdpo.Options(), out, 1.0)["text"]
    other = write_rows(bench.folder / "two.jsonl", eight_pairs()[:2])
    assert heatmap.main(["--run", str(out), "--dataset", other, "--alpha", "0", "--output", str(files[2])]) == 0
    facts, pairs = data_of(files[2])
    assert len(pairs) == 2 and {f for pair in pairs for f in pair["rejected"]["f"]} == {1.0}
    dpo = ["--run", str(out / "reward_model"), "--reward_model", bench.reward_model, "--output", str(files[3])]
    assert heatmap.main(dpo) == 0
    facts, pairs = data_of(files[3])
    assert {f for pair in pairs for f in pair["chosen"]["f"]} == {1.0}
    slider = facts["guidance"]["slider"]
    assert (slider["alpha"], slider["top"]) == (0, 2 / facts["quantities"]["rhat"]["scale"])


def exponential(rewards, alpha, side, floor=None):
    """Another guidance: always above 0."""
    return (side * alpha * rewards).exp()


def test_another_guidance(made, monkeypatch):
    """Put in the place of tgdpo's, it makes f and the force; the page shows its code, and has no slider."""
    monkeypatch.setattr(tgdpo, "guidance", exponential)
    facts, pairs = data_of(made.make("other_guidance.html"))
    assert facts["guidance"]["slider"] is None
    assert facts["guidance"]["text"].startswith("another function than f = 1 ± α r̂, so there is no slider. α = 2, ")
    assert "return (side * alpha * rewards).exp()" in facts["guidance"]["text"]
    for pair in pairs:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            want = [math.exp(sign * 2.0 * r) for r in pair[side]["rhat"]]
            assert pair[side]["f"] == pytest.approx(want, rel=3e-3) and near(pair[side]["force"], pair[side]["f"])
    monkeypatch.setattr(tgdpo, "guidance", lambda r, alpha, side, floor=None: 1 + side * alpha * r)
    assert heatmap.guidance_facts(tgdpo.Options(), None, 1.0)["slider"] is None, "it ignores the floor"
    monkeypatch.setattr(tgdpo, "guidance", eval("lambda r, alpha, side, floor=None: 1 + 0 * r"))
    assert "<lambda>" in heatmap.guidance_facts(tgdpo.Options(), None, 1.0)["text"]


# ------------------------------------------------------------------------------------------------------ the truth
SENTENCES = [
    ("cat", "the cat is not good .", [0, 0, 0, 0, -1, 0, 0], "the cat is very bad .", [0, 0, 0, 0, -2, 0, 0]),
    ("dog", "the dog was not very sad .", [0, 0, 0, 0, 0, 2, 0, 0], "the dog dog .", [0, 0, -1, -1, 0]),
    ("king", "the king is kind .", [0, 0, 0, 1, 0, 0], "kind .", [-1, 0, 0]),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Made of the tiny language: three pairs whose true rewards are worked by hand."""
    tiny = Made.__new__(Made)
    tiny.folder = tmp_path_factory.mktemp("tiny")
    tiny.tokenizer = tiny_language.tiny_tokenizer(64)
    sizes = dict(tokenizer=tiny.tokenizer, vocab_size=len(tiny.tokenizer), n_positions=64, scale=3.0)
    tiny.reference, tiny.judge, tiny.policy = [
        make_model(tiny.folder / name, seed=seed, **sizes) for seed, name in enumerate(["reference", "judge", "policy"])
    ]
    rows = [dict(prompt=f"describe the {n} :", chosen=f" {c}", rejected=f" {r}") for n, c, _, r, _ in SENTENCES]
    tiny.data = write_rows(tiny.folder / "pairs.jsonl", rows)
    tiny.page = tiny.make("page.html", policy=tiny.policy)
    return tiny


def test_the_truth_of_the_tiny_language(tiny):
    """It is a colour; by how much r̂ misses it stands with each pair; other prompts of the same words have none."""
    facts, pairs = data_of(tiny.page)
    assert list(facts["quantities"]) == ["rhat", "truth", "f", "force", "shift"]
    assert facts["quantities"]["truth"]["scale"] == 2
    for (_, _, chosen, _, rejected), pair, about in zip(SENTENCES, pairs, facts["pairs"]):
        assert (pair["chosen"]["truth"], pair["rejected"]["truth"]) == (chosen, rejected)
        off = [abs(r - t) for s in ("chosen", "rejected") for r, t in zip(pair[s]["rhat"], pair[s]["truth"])]
        assert about["peaks"]["differ"] == pytest.approx(max(off))
    rows = [dict(prompt="the cat :", chosen=" the cat is good .", rejected=" the cat .")]
    data = write_rows(tiny.folder / "others.jsonl", rows)
    assert "truth" not in data_of(tiny.make("others.html", dataset=data))[0]["quantities"]


def test_the_truth_in_place_of_rhat(tiny, capsys):
    """Without a reward model r̂ is the truth, in the data or not, and is shown once."""
    facts, pairs = data_of(tiny.make("truth.html", reward_model=None))
    assert list(facts["quantities"]) == ["rhat", "f", "force"] and "rewards by the true rewards" in facts["about"]
    assert facts["quantities"]["rhat"]["title"] == "true reward"
    assert [pair["chosen"]["rhat"] for pair in pairs] == [chosen for _, _, chosen, _, _ in SENTENCES]
    assert pairs[0]["rejected"]["f"] == [1, 1, 1, 1, 5, 1, 1]
    refused(capsys, tiny.argv("--terminal=truth", reward_model=None), "expected one of rhat, f, force")


def test_the_truth_in_the_terminal(tiny, capsys, monkeypatch):
    """r̂ and the truth on adjacent lines."""
    monkeypatch.setenv("NO_COLOR", "1")
    assert heatmap.main(tiny.argv("--terminal")) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  truth    the dog was not very sad[+2] . <eos>")
    assert lines[at - 1].startswith("chosen     the") and lines[at + 1].startswith("rejected   the")
    assert lines[at + 2] == "  truth    the dog dog[-1] .[-1] <eos>"


def test_a_run_of_three_words_from_anywhere(tmp_path, monkeypatch):
    """tgdpo.py's own run, made with relative paths: read from another directory and after a move; its truth; its
    true_rewards run."""
    monkeypatch.setattr(tgdpo, "TINY_PAIRS", 60)
    monkeypatch.chdir(tmp_path)
    assert tgdpo.main("--output_dir runs/a --max_steps 1 --cache_dir cache --device cpu".split()) == 0
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert heatmap.main("--run ../runs/a --output a.html".split()) == 0
    facts, pairs = data_of("a.html")
    worth = {".": [0], "not .": [0, -1], "not not": [0, -1], "not bad": [0, 2], "bad .": [-1, 0], "bad not": [-1, 0]}
    worth["bad bad"] = [-1, -1]
    for pair in pairs:
        for side in ("chosen", "rejected"):
            words = "".join(pair[side]["tokens"]).strip()
            assert pair[side]["truth"] == worth[words][: len(words.split())]
    assert not (tmp_path / "else" / "cache").exists(), "the run's own cache serves"
    assert heatmap.main("--run ../runs/a/true_rewards --output t.html".split()) == 0
    facts, true = data_of("t.html")
    assert [pair["chosen"]["rhat"] for pair in true] == [pair["chosen"]["truth"] for pair in pairs]
    assert any(pair["chosen"]["shift"][0] for pair in true), "the policy is the true_rewards run's"
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert heatmap.main("--run ../moved/a --output b.html".split()) == 0
    assert data_of("b.html")[1] == pairs


@pytest.mark.parametrize(
    "values, neutral, scale",
    [
        ([0.0] * 5, 0, 1.0),
        ([1.0, 1.3, 0.55], 1, 0.5),
        ([2.0, -1.0], 0, 2.0),
        ([0.0011], 0, 0.002),
        ([-7.0], 0, 10.0),
        ([0.3] * 99 + [50.0], 0, 0.5),
    ],
)
def test_colours_are_full_at_the_next_round_number(values, neutral, scale):
    """1, 2 or 5 times a power of ten, at least the distance that 98 % of the values stay within."""
    assert heatmap.colour_scale(values, neutral) == pytest.approx(scale)


# ------------------------------------------------------------------------------------------------------ the texts
def test_tokens_join_to_the_text(made):
    """With what a terminal would obey made visible; a character of several tokens stands whole at its last one."""
    _, pairs = data_of(made.page)
    for row, pair in zip(ROWS, pairs):
        for side in ("chosen", "rejected"):
            text = row[side] + "<eos>"
            for hidden, seen in (("\x1b", "␛"), ("\r", "␍"), ("\x9b", "\\x9b"), ("\u202e", "\\u202e")):
                text = text.replace(hidden, seen)
            assert "".join(pair[side]["tokens"]) == text
        assert pair["prompt"] == f"<|user|>{row['prompt']}<eos><|assistant|>"
    tokens = pairs[0]["chosen"]["tokens"]
    assert tokens.count("") >= 4 and tokens[tokens.index("😊") - 3 : tokens.index("😊")] == ["", "", ""]


def test_tokens_join_for_words_and_cut_characters(bench):
    """A tokenizer that joins words by blanks; a response cut within a character shows no broken one."""
    tokenizer = tgdpo.load_tokenizer(bench.model)
    pieces = heatmap.pieces(tokenizer, tokenizer("red cat ?").input_ids, tokenizer("yes no .").input_ids)
    assert pieces == [" yes", " no", " ."]
    tokenizer = train_tokenizer(["abc"], 262)
    ids = tokenizer("a😊", add_special_tokens=False).input_ids
    assert heatmap.pieces(tokenizer, ids[:1], ids[:-1]) == ["a"] + [""] * (len(ids) - 2)


def test_real_pairs(real_pairs, tmp_path):
    """A tokenizer from scratch on the 300 real pairs: every response's tokens join to its text."""
    rows = json.loads(real_pairs.read_text())
    tokenizer = train_tokenizer([json.dumps(row, ensure_ascii=False) for row in rows[:60]], 600)
    for row in rows[::6]:
        _, answers = tgdpo.read_pair(row)
        prompt_ids, both = whole_tokens(row, tokenizer)
        for ids, text in zip(both, [answer["content"] for answer in answers]):
            joined = "".join(heatmap.pieces(tokenizer, prompt_ids, ids))
            assert joined == text.translate(heatmap.VISIBLE) + "<eos>"


def test_nothing_in_a_text_is_markup(made):
    """The page has its own tags and no other, and its policy names the hash of its own style and script."""
    text = made.page.read_text("utf-8")
    scripts = re.findall(r"<script([^>]*)>", text)
    assert len(scripts) == 1 + len(ROWS) + 1 and scripts.count("") == 1 and text.count("</script") == len(scripts)
    assert "<img" not in text and "\u2028" not in text and "http-equiv" in text and "@POLICY@" not in text
    assert re.search(r"(src|href|url)\s*[=(]", re.sub(r"<script type.*", "", text)) is None, "something external"
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert heatmap.as_json("</s>&\u2028\u2029é") == '"\\u003c/s\\u003e\\u0026\\u2028\\u2029é"'
    assert "@DATA@" in heatmap.page(
        {"quantities": {}}, [{"row": 0, "loss": 1, "prompt": "@DATA@", "chosen": {}, "rejected": {}}]
    )


# ----------------------------------------------------------------------------------------------------- the colours
def css_colours(mode):
    """Of the light or the dark page -> {name: its linear red, green, blue}, of variables and of the levels -5 ... 5."""
    style = Path(heatmap.__file__).with_suffix(".html").read_text("utf-8")
    light, dark = [dict(re.findall(r"--(\w+): (#\w+)", line)) for line in re.findall(r"  --page: .*", style)]
    found = {name: value.ljust(7, value[-1]) for name, value in (light if mode == "light" else dark).items()}
    shares = {int(k): int(share) / 100 for k, share in re.findall(r"\.l(\d)[^{]*\{ --share: (\d+)%", style)}
    assert sorted(shares) == list(range(6)) and set(light) == set(dark)
    mixed = {}
    for k in range(-5, 6):
        names = ("orange" if k < 0 else "blue", "zero")
        hue, zero = [[int(found[name][i : i + 2], 16) for i in (1, 3, 5)] for name in names]
        share = shares[abs(k)]
        mixed[k] = "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(hue, zero))
    return found | mixed


def linear(colour):
    """#rrggbb -> its linear red, green, blue."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return torch.tensor([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts])


def contrast(one, other):
    """WCAG's, of two colours."""
    dark, light = sorted((linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722])).item() for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read_on_every_colour(mode):
    """A contrast of at least 4.5:1 for the tokens, and for the page and the box beside a token; 3:1 for lines."""
    found = css_colours(mode)
    for k in range(-5, 6):
        assert contrast(found["token"], found[k]) >= 4.5, k
    assert contrast(found["ink"], found["page"]) >= 4.5 and contrast(found["grey"], found["page"]) >= 3


def test_one_palette():
    """The light page has the two colours of the picture on the front page."""
    found = css_colours("light")
    assert (found["blue"], found["orange"]) == (BLUE, ORANGE) == (found[5], found[-5])


@pytest.mark.parametrize("mode, least", [("light", (0.08, 0.2, 0.4)), ("dark", (0.02, 0.05, 0.2))])
def test_the_two_hues_differ_for_the_colour_blind(mode, least):
    """Machado et al. 2009, no red, no green or no blue cones: k and -k stay apart."""
    kinds = [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    found = css_colours(mode)
    for kind in kinds:
        seen = {k: torch.tensor(kind) @ linear(found[k]) for k in range(-5, 6)}
        apart = [(seen[k] - seen[-k]).norm().item() for k in range(1, 6)]
        assert apart[0] > least[0] and min(apart[1:]) > least[1] and apart[4] > least[2], apart


# ------------------------------------------------------------------------------------------------------- the terminal
def test_terminal(made, capsys, monkeypatch):
    """In colour: blue above, orange below, nothing that the terminal would obey but the colours; the text stays."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert heatmap.main(made.argv("--terminal", policy=made.policy)) == 0
    out = capsys.readouterr().out
    plain = re.sub(r"\033\[38;5;16;48;5;\d+m|\033\[0m", "", out)
    assert "\033" not in plain and not set("\x9b\r\u202e") & set(plain) and "␛[31m red ␍" in plain
    assert "first line↵\n↵\nsecond </script><script>" in plain
    facts, pairs = data_of(made.page)
    scale, tokens, values = (
        facts["quantities"]["rhat"]["scale"],
        pairs[2]["chosen"]["tokens"],
        pairs[2]["chosen"]["rhat"],
    )
    for text, value in zip(tokens, values):
        grounds = (255, 153, 111, 69, 33) if value > 0 else (255, 223, 216, 209, 202)
        strength = min(4, int(4 * abs(value) / scale + 0.5))
        assert f"48;5;{grounds[strength]}m{text}\033" in out


def test_terminal_without_colours(made, capsys, monkeypatch):
    """NO_COLOR: the value behind each token that is far from neutral, of the quantity asked for."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert heatmap.main(made.argv("--terminal=f", "--pairs=3", policy=made.policy)) == 0
    out = capsys.readouterr().out
    assert "\033" not in out and "pair 2, loss" in out
    facts, pairs = data_of(made.page)
    scale, want = facts["quantities"]["f"]["scale"], ""
    for text, f in zip(pairs[2]["rejected"]["tokens"], pairs[2]["rejected"]["f"]):
        want += text + (f"[{f:+.2g}]" if abs(f - 1) >= scale / 4 else "")
    assert "[" in want and f"rejected  {want}\n" in out


# -------------------------------------------------------------------------------------------------- what it refuses
def refused(capsys, argv, *words):
    capsys.readouterr()
    assert heatmap.main([str(arg) for arg in argv]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(word in said for word in words), said


def test_what_cannot_be_used(made, bench, capsys, tmp_path):
    """One line each, exit status 2."""
    page, run = tmp_path / "x.html", tmp_path / "run"
    run.mkdir()
    refused(capsys, ["--run", run, "--output", page], "holds no run.json", "expected")
    (run / "run.json").write_text("{")
    refused(capsys, ["--run", run, "--output", page], "run.json cannot be used")
    (run / "run.json").write_text(json.dumps({"options": {}, "finished": False}))
    refused(capsys, ["--run", run, "--output", page], "not finished", "--resume")
    (run / "run.json").write_text(json.dumps({"options": {"loss": "simpo"}, "finished": True}))
    refused(capsys, ["--run", run, "--output", page], "simpo", "expected tgdpo")
    refused(capsys, made.argv(f"--output={made.page}"), "exists already")
    refused(capsys, made.argv(f"--output={tmp_path / 'x.txt'}"), "is no .html")
    refused(capsys, made.argv(), "neither --output nor --terminal")
    refused(capsys, made.argv(f"--output={page}", reward_model=None), "no reward model")
    both = "--model_name_or_path and --dataset: expected both or none"
    refused(capsys, made.argv(f"--output={page}", dataset=None), both)
    refused(capsys, made.argv(f"--output={page}", model_name_or_path=None), "expected both or none")
    refused(capsys, made.argv(f"--output={page}", "--pairs=0"), "--pairs is 0")
    refused(capsys, made.argv(f"--output={page}", "--pairs=many"), "--pairs", "many")
    refused(capsys, made.argv("--terminal=shift"), "needs a policy")
    refused(capsys, made.argv("--terminal=size"), "size")
    refused(capsys, made.argv(f"--output={page}", "--quantity=f"), "unrecognized arguments: --quantity")
    refused(capsys, made.argv(f"--output={page}", reward_model=bench.model), "another vocabulary")
    refused(capsys, made.argv(f"--output={page}", policy=bench.model), "another vocabulary")
    refused(capsys, made.argv(f"--output={page}", policy=tmp_path / "none"), "no such directory")
    assert not page.exists()


# ----------------------------------------------------------------------------------------------------- in the browser
TOKENS = "[...document.querySelectorAll('#pair-{row} [role=listbox]')[{side}].querySelectorAll('[role=option]')]"
TITLES = {"reward r̂": "rhat", "true reward": "truth", "guidance f": "f", "force": "force", "shift": "shift"}
SET = "(e => {{ e.value = '{}'; e.dispatchEvent(new Event('{}', {{bubbles: true}})) }})(document.getElementById('{}'))"


def status_numbers(browser):
    """What stands beside a token -> (where, {quantity: number}), the pushes by TGDPO and by DPO among them."""
    text = browser.js("document.getElementById('status').textContent")
    where, *lines = text.split("\n")
    found = {TITLES[title]: float(n) for title, n in (line.rsplit(" ", 1) for line in lines[:-1])}
    if lines:
        found["push"], found["dpo"] = map(float, re.fullmatch(r"push on log π (\S+), by DPO (\S+)", lines[-1]).groups())
    return where, found


def levels(values, quantity):
    """What a value's colour must be, -5 ... 5: rounded half up, as JavaScript does."""
    steps = [math.floor(5 * (v - quantity["neutral"]) / quantity["scale"] + 0.5) for v in values]
    return [f"l{max(-5, min(5, k))}" for k in steps]


CLASSES = ".map(e => e.className.split(' ')[0])"


def test_browser_page(browser, made):
    """Texts stand as they are, the planted scripts do not run, nothing is asked of a network, nobody complains."""
    browser.open(made.page)
    assert browser.js("document.querySelectorAll('article').length") == 3
    assert browser.js("[...document.querySelectorAll('#pair-0 [role=listbox]')].map(e => e.textContent)")[0] == (
        ROWS[0]["chosen"] + "<eos>"
    )
    assert EVIL in browser.js("document.querySelector('#pair-0 details p').textContent")
    assert browser.js("document.querySelectorAll('img, iframe, link, b').length") == 0
    assert browser.js("document.querySelectorAll('script:not([type])').length") == 1
    assert browser.js("window.planted") is None
    assert browser.js("[...document.querySelectorAll('article details')].map(e => e.open)") == [True, False, True]
    # The policy itself holds what gets past the escaping; the other direction of this test.
    assert not browser.complaints()
    browser.js("document.body.append(Object.assign(document.createElement('script'), {text: 'window.planted = 3'}))")
    browser.settle()
    assert browser.js("window.planted") is None and browser.complaints()


def test_browser_switch_hover_keys(browser, made):
    """The switch changes colours and legend; hover and arrow keys show the numbers of the formulas."""
    browser.open(made.page)
    want = by_hand(made, ROWS[0], made.reference, made.judge, made.policy)
    facts, pairs = data_of(made.page)
    for name in ("rhat", "force", "f", "shift"):
        browser.mouse(f"input[value={name}]", click=True)
        for row in (0, 2):
            for side, words in enumerate(("chosen", "rejected")):
                found = browser.js(TOKENS.format(row=row, side=side) + CLASSES)
                assert found == levels(pairs[row][words][name], facts["quantities"][name]), name
        legend = browser.js("[...document.querySelectorAll('#scale li')].map(e => e.textContent)")
        scale = facts["quantities"][name]["scale"]
        neutral = name in ("f", "force")
        assert len(legend) == 11 and float(legend[5]) == neutral and legend[0].startswith("≤ ")
        assert float(legend[8]) == pytest.approx(neutral + 0.6 * scale)
        assert browser.js("document.getElementById('meaning').textContent") == heatmap.QUANTITIES[name][2]
    browser.mouse("#pair-0 [role=option]:nth-child(5)")
    text, numbers = status_numbers(browser)
    assert text.startswith("Pair 0, chosen, token 5 of ")
    assert all(near([numbers[name]], [want["chosen", name][4]]) for name in facts["quantities"]), text
    assert near([numbers["push"], numbers["dpo"]], [want["dpo"] * want["chosen", "force"][4], want["dpo"]])
    browser.js("document.querySelector('#pair-0 summary').focus()")
    for keys, side, at in (["Tab", "ArrowRight", "ArrowRight"], 0, 2), (["End", "ArrowRight", "ArrowLeft"], 0, -2):
        for key in keys:
            browser.key(key)
        text, numbers = status_numbers(browser)
        assert all(near([numbers[name]], [want["chosen", name][at]]) for name in facts["quantities"]), text
    browser.key("Home")
    browser.key("ArrowDown")
    below = browser.js(
        "[document.activeElement.offsetTop > document.activeElement.parentNode.children[0].offsetTop,"
        "document.activeElement.offsetLeft]"
    )
    assert below == [True, browser.js(TOKENS.format(row=0, side=0) + "[0].offsetLeft")]
    browser.key("ArrowUp")
    assert browser.js(TOKENS.format(row=0, side=0) + ".indexOf(document.activeElement)") == 0
    browser.key("Tab")
    text, numbers = status_numbers(browser)
    assert text.startswith("Pair 0, rejected, token 1 of ")
    assert near([numbers["push"], numbers["dpo"]], [-want["dpo"] * want["rejected", "force"][0], -want["dpo"]])
    stops = browser.js(TOKENS.format(row=0, side=0) + ".filter(e => e.tabIndex === 0).length")
    assert stops == 1 and not browser.complaints()


def test_browser_accessible(browser, made):
    """Language, title, landmarks, headings, and a name for every control and token."""
    browser.open(made.page)
    assert browser.js("[document.documentElement.lang, document.title]") == ["en", "TGDPO, token by token"]
    nodes = [n for n in browser("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    named = {}
    for node in nodes:
        named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"main", "banner", "region", "heading", "status", "listbox", "option", "combobox", "spinbutton"} <= set(
        named
    )
    assert [name.strip() for name in named["slider"]] == ["α"]
    for role in ("region", "listbox", "option", "radio", "combobox", "spinbutton", "heading", "article"):
        assert all(name.strip() for name in named[role]), role
    assert len(named["radio"]) == 4 and named["group"].count("Colour") == 1
    assert "Pair 0, chosen response" in named["listbox"] and "line break" in named["option"]
    assert "part of a character" in named["option"]


def test_browser_order_and_jump(browser, made):
    """By the largest value of the shown quantity, by loss, as the data has it; a pair by its number."""
    browser.open(made.page)
    facts, _ = data_of(made.page)
    order = "[...document.querySelectorAll('article')].map(e => +e.id.slice(5))"

    def sorted_by(key):
        return [about["row"] for about in sorted(facts["pairs"], key=key)]

    browser.js(SET.format("peak", "change", "order"))
    assert browser.js(order) == sorted_by(lambda about: -about["peaks"]["rhat"])
    browser.mouse("input[value=shift]", click=True)
    assert browser.js(order) == sorted_by(lambda about: -about["peaks"]["shift"])
    browser.js(SET.format("loss", "change", "order"))
    assert browser.js(order) == sorted_by(lambda about: -about["loss"]) != [0, 1, 2]
    browser.js(SET.format("", "change", "order"))
    assert browser.js(order) == [0, 1, 2]
    browser.js(SET.format("7", "change", "jump"))
    assert status_numbers(browser)[0] == "There is no pair 7."
    assert not browser.complaints()


def test_browser_300_pairs(browser, made, tmp_path):
    """300 pairs of 1000 tokens with all four quantities load fast, since a pair is built only when it comes near the
    window. Measured for 10 MB on two busy cores: 0.1 to 0.9 s; 5 s is the alarm."""
    facts, pairs = data_of(made.page)
    sides = {}
    for side in ("chosen", "rejected"):
        columns = {name: values * 500 for name, values in pairs[2][side].items()}
        sides[side] = {name: values[:500] for name, values in columns.items()}
    many = [pairs[2] | sides | {"row": k} for k in range(300)]
    (tmp_path / "many.html").write_text(heatmap.page({key: facts[key] for key in facts if key != "pairs"}, many))
    browser.open(tmp_path / "many.html")
    seconds = browser.js("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") / 1e3
    built = "[...document.querySelectorAll('article')].filter(e => e.children.length).map(e => e.id)"
    first = browser.js(built)
    print(f"300 pairs, {(tmp_path / 'many.html').stat().st_size / 1e6:.1f} MB: {seconds:.2f} s, {len(first)} built")
    assert seconds < 5 and 1 <= len(first) < 30 and first[0] == "pair-0"
    browser.js(SET.format(250, "change", "jump"))
    browser.settle()
    assert "pair-250" in browser.js(built) and "pair-150" not in browser.js(built)
    assert len(browser.js(TOKENS.format(row=250, side=0) + CLASSES)) == 500
    assert not browser.complaints()


def test_browser_slider(browser, made):
    """Another α: f and the force at π_ref by hand, in colours, in the box and marked where f <= 0; and back."""
    page = made.make("no_floor.html", policy=made.policy, guidance_floor=None)
    facts, pairs = data_of(page)
    browser.open(page)
    before = browser.js(TOKENS.format(row=2, side=0) + CLASSES)
    assert browser.js("document.getElementById('alpha').value") == "2"
    assert browser.js("document.getElementById('reset').hidden") is True
    browser.js(SET.format(7.5, "input", "alpha"))
    assert browser.js("document.querySelector('#switch :checked').value") == "f"
    assert "7.5" in browser.js("document.getElementById('value').textContent")
    for name in ("f", "force"):
        browser.mouse(f"input[value={name}]", click=True)
        for side, (words, sign) in enumerate((("chosen", 1), ("rejected", -1))):
            want = [1 + sign * 7.5 * r for r in pairs[2][words]["rhat"]]
            found = browser.js(TOKENS.format(row=2, side=side) + ".map(e => e.className)")
            assert [c.split()[0] for c in found] == levels([float(f"{f:.4g}") for f in want], facts["quantities"][name])
            assert ["turned" in c for c in found] == [f <= 0 for f in want]
            assert any(f <= 0 for f in want), "no f turned: a weak test"
    assert browser.js("getComputedStyle(document.querySelector('.turned')).textDecorationStyle") == "dashed"
    assert "at π_ref" in browser.js("document.getElementById('meaning').textContent")
    browser.mouse("#pair-2 section:nth-of-type(2) [role=option]:nth-child(2)")
    f, (_, numbers) = 1 - 7.5 * pairs[2]["rejected"]["rhat"][1], status_numbers(browser)
    assert near([numbers[n] for n in ("f", "force", "push", "dpo")], [f, f, -0.15 * f, -0.15])
    assert numbers["shift"] == pairs[2]["rejected"]["shift"][1]
    browser.open(made.page)  # with its floor of 0.25
    browser.js(SET.format(20, "input", "alpha"))
    browser.mouse("#pair-2 [role=option]:nth-child(1)")
    rhat = pairs[2]["chosen"]["rhat"]
    low = min(range(len(rhat)), key=lambda k: rhat[k])
    browser.mouse(f"#pair-2 [role=option]:nth-child({low + 1})")
    assert status_numbers(browser)[1]["f"] == 0.25 and not browser.js("document.querySelectorAll('.turned').length")
    browser.mouse("#reset", click=True)
    browser.mouse("input[value=rhat]", click=True)
    assert browser.js(TOKENS.format(row=2, side=0) + CLASSES) == before
    browser.mouse(f"#pair-2 [role=option]:nth-child({low + 1})")
    assert near([status_numbers(browser)[1]["force"]], [data_of(made.page)[1][2]["chosen"]["force"][low]])
    assert not browser.complaints()


def test_browser_without_a_slider(browser, made, monkeypatch):
    """Another guidance: the page says so, shows its code and has no slider."""
    monkeypatch.setattr(tgdpo, "guidance", exponential)
    browser.open(made.make("sliderless.html"))
    assert browser.js("document.getElementById('slider').checkVisibility()") is False
    said = browser.js("document.getElementById('guidance').innerText")
    assert "no slider" in said and "return (side * alpha * rewards).exp()" in said
    assert browser.js("document.querySelectorAll('#scale li').length") == 11 and not browser.complaints()


def test_browser_truth(browser, tiny):
    """The page opens on the pair where r̂ and the truth differ most; under a word a line for r̂, one for the truth."""
    facts, pairs = data_of(tiny.page)
    browser.open(tiny.page)
    order = [about["row"] for about in sorted(facts["pairs"], key=lambda about: -about["peaks"]["differ"])]
    assert order != [0, 1, 2], "the order of the data: a weak test"
    assert browser.js("[...document.querySelectorAll('article')].map(e => +e.id.slice(5))") == order
    for quantity in ("rhat", "f"):
        browser.mouse(f"input[value={quantity}]", click=True)
        assert browser.js("document.querySelector('.names').dataset.value") == heatmap.QUANTITIES[quantity][0]
        for pair in pairs:
            for side, words in enumerate(("chosen", "rejected")):
                tokens, column = TOKENS.format(row=pair["row"], side=side), pair[words]
                assert browser.js(tokens + CLASSES) == levels(column[quantity], facts["quantities"][quantity])
                values = browser.js(tokens + ".map(e => +e.dataset.value)")
                assert values == pytest.approx(column[quantity], abs=0.0051)
                values = browser.js(tokens + ".map(e => [+e.lastChild.dataset.value, e.lastChild.className])")
                truth = column["truth"]
                assert values == [*map(list, zip(truth, levels(truth, facts["quantities"]["truth"])))]
    tops = browser.js(  # the word, its number, the truth: one below the other, as is what names the lines
        "['[role=option]', '.names'].map(s => document.querySelector(s)).map(e => [e, e.lastChild]"
        ".map(e => e.getBoundingClientRect().top))"
    )
    assert tops[0] == tops[1] and tops[0][1] - tops[0][0] > 30
    browser.js("document.querySelector('[role=option]').classList.add('turned')")
    style = "getComputedStyle(document.querySelector('[role=option]'), {}).textDecorationStyle"
    assert [browser.js(style.format(part)) for part in ("null", "'::after'")] == ["solid", "dashed"], "the number alone"
    browser.mouse("#pair-1 [role=option]:nth-of-type(7)")  # .names is the first span
    assert status_numbers(browser)[1]["truth"] == 2 and not browser.complaints()


@pytest.mark.parametrize("width", [1280, 500, 360])
def test_browser_fits(browser, made, tiny, width):
    """Nothing is wider than the window; the box stands beside its token, inside the window, until Escape."""
    browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)
    for page, token in ((tiny.page, "#pair-0 [role=option]"), (made.page, "#pair-2 [role=option]")):
        browser.open(page)
        for name in ("force", "f"):
            browser.mouse(f"input[value={name}]", click=True)
            assert browser.js("document.documentElement.scrollWidth") <= width
        for k in (1, 4, 6):
            browser.mouse(f"{token}:nth-of-type({k + 1})")
            box, at = browser.js(
                f"[document.getElementById('status').getBoundingClientRect(),"
                f"document.querySelectorAll('{token}')[{k - (page == tiny.page)}].getBoundingClientRect()]"
                ".map(r => [r.left, r.top, r.right, r.bottom])"
            )
            assert box[0] >= 0 and box[2] <= width and 0 <= box[1] and box[3] <= 900
            assert 0 <= box[1] - at[3] <= 10 or 0 <= at[1] - box[3] <= 10
            assert box[0] <= at[0] + 1 <= box[2]
        browser.key("Escape")
        assert browser.js("getComputedStyle(document.getElementById('status')).visibility") == "hidden"
    browser("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)


def test_browser_dark(browser, tiny):
    """The window's colour scheme is followed, and the colours are those that were tested above."""
    for mode in ("dark", "light"):
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
        browser.open(tiny.page)
        want, paint = css_colours(mode), "(e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color])"
        shown = browser.js(f"[document.body, ...document.querySelectorAll('#scale li')].map({paint})")
        names = [("page", "ink")] + [(k, "token") for k in range(-5, 6)]
        for found, of in zip(shown, names):
            for text, name in zip(found, of):
                numbers = [float(x) for x in re.findall(r"[\d.]+", text)]
                bytes_ = [255 * x for x in numbers] if text.startswith("color(") else numbers
                assert bytes_ == pytest.approx([int(want[name][i : i + 2], 16) for i in (1, 3, 5)], abs=1), (mode, name)
