"""What the two pages show and name exists: options, metrics, commands, files. Every option is explained by --help,
every metric by scripts/README.md. The front page stays short."""

import dataclasses
import re
from pathlib import Path

import pytest

import fast
import tgdpo
from test_train import GUIDANCE, METRICS

ROOT = Path(tgdpo.__file__).parent
README, COMPANIONS = [(ROOT / page / "README.md").read_text() for page in (".", "scripts")]
PAGES = README + "\n" + COMPANIONS
OPTIONS, OPTIONS_OF_FAST = [{field.name for field in dataclasses.fields(script.Options)} for script in (tgdpo, fast)]
# A command stands in a block or between backticks. It may go on behind a backslash; what stands behind a # or several
# spaces explains it.
LINES = re.sub(r"\\\n *", "", PAGES).splitlines() + re.findall(r"`([^`\n]+)`", PAGES)
LINES = [re.sub(r" +#.*| {3,}.*", "", line.strip()) for line in LINES]
FOUND = [re.match(r"(?:python|torchrun)\b.*?[ /](\w+)\.py *(.*)$", line) for line in LINES]
COMMANDS = sorted({(found[1], found[2]) for found in FOUND if found})  # (script, arguments)
OWN = [arguments for script, arguments in COMMANDS if script == "tgdpo" and arguments != "--help"]


def test_every_option_is_explained_by_help(capsys):
    with pytest.raises(SystemExit):
        tgdpo.read_options(["--help"])
    listed = re.split(r"\n  (?=-)", capsys.readouterr().out.split("\n\nWithout")[0])[1:]
    texts = {re.match(r"--(\w+)", entry)[1]: entry for entry in listed if entry.startswith("--")}
    assert texts.keys() == OPTIONS
    for name, entry in texts.items():
        meaning = re.split(r"\s{2,}|$", entry, maxsplit=1)[1].split("(default:")[0]
        assert len(meaning.split()) > 1, f"--{name} is not explained: {entry}"


def test_every_metric_is_explained():
    table = COMPANIONS.split("| metric | what it is |")[1].split("\n\n")[0]
    for metric in ["step", *METRICS, *GUIDANCE]:
        assert re.search(rf"^\|[^|]*`{metric}`[^|]*\| \w", table, re.M), metric


def words(script):
    return set(re.findall(r"\w+", ((ROOT if script == "tgdpo" else ROOT / "scripts") / f"{script}.py").read_text()))


def test_no_option_is_named_that_does_not_exist():
    named = set(re.findall(r"`--(\w+)`", PAGES))
    assert len(named & OPTIONS) > 20
    others = {"help": "tgdpo", "better": "treg", "worse": "treg", "grow": "benchmark"}
    assert all(name in words(script) for name, script in others.items())
    unknown = named - OPTIONS - OPTIONS_OF_FAST - others.keys()
    assert not unknown, f"no such option: {unknown}"


@pytest.mark.parametrize("command", sorted({*OWN}))
def test_what_the_pages_show_as_commands_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # the files of options that it names are read
    if command.startswith("run.yaml"):  # a file of the reader's own
        command = command.replace("run.yaml", "scripts/configs/llama3_8b_instruct_pairrm.yaml")
    tgdpo.read_options(command.split())


def test_the_companions_have_the_options_that_the_pages_show():
    assert len({script for script, _ in COMMANDS}) > 15
    for script, arguments in COMMANDS:
        assert {*re.findall(r"--(\w+)", arguments)} <= OPTIONS | words(script), (script, arguments)


def test_there_are_commands_with_pairs_with_a_file_and_with_nothing():
    assert any("--dataset" in command for command in OWN)
    assert any(command.startswith("scripts/configs/") for command in OWN)
    assert "" in OWN


def test_files_of_options_parse(tmp_path):
    """The one that is shown, and those that come with the project."""
    shown = re.findall(r"\n\n((?: {4}\w+: \S+\n)+)", PAGES)
    assert shown, "the pages show a file of options"
    for text in shown:
        (tmp_path / "shown.yaml").write_text(re.sub("^ {4}", "", text, flags=re.M))
        tgdpo.read_options([str(tmp_path / "shown.yaml")])
    files = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        tgdpo.read_options([str(file)])


@pytest.mark.parametrize("name", ["README.md", "scripts/README.md", "derivation.md", "tgdpo.py"])
def test_every_file_that_is_named_exists(name):
    for file in set(re.findall(r"\b(?:scripts|tests)/[\w/]+\.\w+", (ROOT / name).read_text())):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", ["README.md", "scripts/README.md"])
def test_links_lead_somewhere(name):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text()):
        path = re.sub(r"^\.\./\.\./actions/(workflows/\w+\.yml).*", r".github/\1", path)  # a page of GitHub's
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), path
        heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads], anchor


def test_every_companion_has_its_line():
    for file in (ROOT / "scripts").glob("*.[ps][yh]"):
        assert f"`{file.name}`" in COMPANIONS, file.name


def test_the_front_page_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120 and len(README.split()) <= 2300
    assert any("front.svg" in line for line in lines[:15]) and any("log σ(φ)" in line for line in lines[:40])


def test_the_reading_path_has_the_files_lines():
    lines = (ROOT / "tgdpo.py").read_text().splitlines()
    first = {title[:2]: n for n, title in enumerate((x.lstrip("# -") for x in lines), 1) if re.match(r"\d\. ", title)}
    end = next(n for n, line in enumerate(lines, 1) if "The method ends here" in line)
    assert f"sections 1 and 2 (lines 1 to {first['3.'] - 1})" in README
    assert f"sections 3 and 4 too (to line {end})" in README
    assert end <= 450 and first["1."] < first["2."] < first["3."] < first["4."] < end < first["5."]
