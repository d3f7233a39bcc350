"""The README names every option and every metric, and nothing that does not exist; its commands parse."""

import dataclasses
import re
from pathlib import Path

import pytest

import fast
import tgdpo
from test_train import GUIDANCE, METRICS

ROOT = Path(tgdpo.__file__).parent
README = (ROOT / "README.md").read_text()
OPTIONS, OPTIONS_OF_FAST = [{field.name for field in dataclasses.fields(script.Options)} for script in (tgdpo, fast)]
# A command may go on behind a backslash; what stands behind a # or several spaces explains it.
LINES = [re.sub(r" +#.*| {3,}.*", "", line.strip()) for line in re.sub(r"\\\n *", "", README).splitlines()]
FOUND = [re.match(r"(?:python|torchrun)\b.*?[ /]tgdpo\.py *(.*)$", line) for line in LINES]
COMMANDS = [found[1] for found in FOUND if found]


def test_every_option_and_metric_is_explained():
    named = set(re.findall(r"`--(\w+)`", README))
    assert OPTIONS <= named, f"not explained: {OPTIONS - named}"
    assert named <= OPTIONS | OPTIONS_OF_FAST, f"no such option: {named - OPTIONS - OPTIONS_OF_FAST}"
    for metric in ["step", *METRICS, *GUIDANCE]:
        assert f"`{metric}`" in README, metric


@pytest.mark.parametrize("command", sorted({*COMMANDS}))
def test_what_the_readme_shows_as_commands_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # the files of options that it names are read
    tgdpo.read_options(command.split())


def test_there_are_commands_with_pairs_with_a_file_and_with_nothing():
    assert any("--dataset" in command for command in COMMANDS)
    assert any(command.startswith("scripts/configs/") for command in COMMANDS)
    assert "" in COMMANDS


def test_files_of_options_parse(tmp_path):
    """The one in the README, and those that come with the project."""
    shown = re.findall(r"\n\n((?: {4}\w+: \S+\n)+)", README)
    assert shown, "the README shows a file of options"
    for text in shown:
        (tmp_path / "shown.yaml").write_text(re.sub("^ {4}", "", text, flags=re.M))
        tgdpo.read_options([str(tmp_path / "shown.yaml")])
    files = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        tgdpo.read_options([str(file)])


@pytest.mark.parametrize("name", ["README.md", "derivation.md", "tgdpo.py"])
def test_every_file_that_is_named_exists(name):
    for file in set(re.findall(r"\b(?:scripts|tests)/[\w/]+\.\w+", (ROOT / name).read_text())):
        assert (ROOT / file).exists(), file
