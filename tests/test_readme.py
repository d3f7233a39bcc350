"""The README names every option and every metric, and nothing that does not exist."""

import dataclasses
import re
from pathlib import Path

import tgdpo
from test_train import GUIDANCE, METRICS

README = (Path(tgdpo.__file__).parent / "README.md").read_text()


def test_every_option_and_metric_is_explained():
    named = set(re.findall(r"`--(\w+)`", README))
    assert named == {field.name for field in dataclasses.fields(tgdpo.Options)}
    for metric in ["step", *METRICS, *GUIDANCE]:
        assert f"`{metric}`" in README


def test_what_the_readme_shows_as_commands_parses():
    for line in re.findall(r"^ +python tgdpo.py (--.*?)(?: +#.*)?$", README, re.M):
        tgdpo.read_options(line.replace("MODEL", "m").split())
