"""Every command line that is written down is one that the commands take."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from trl import ModelConfig

from hf_ensemble.cli.command import COMMANDS
from hf_ensemble.cli.help import ALL, GENERAL, groups_of
from hf_ensemble.train import EnsembleConfig, EnsembleSFTConfig, SelectionConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
NAMED = {command.name: command for command in COMMANDS}


def written():
    """Where a line stands, and its words."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        lines = re.findall(r"^hf-ensemble .*$", text, flags=re.MULTILINE) + re.findall(r"`(hf-ensemble [^`]+)`", text)
        yield from ((path.name, line) for line in lines)
    yield from (("its help", command.example) for command in COMMANDS if command.example)


def test_there_are_lines_for_most_commands():
    found = {line.split()[1].strip(";") for _, line in written() if len(line.split()) > 1}
    assert len(found & set(NAMED)) >= len(NAMED) - 3, set(NAMED) - found


@pytest.mark.parametrize(("where", "line"), sorted(set(written())))
def test_command_lines_name_commands_and_options_that_there_are(where, line):
    words = shlex.split(line.split(" | ")[0].removeprefix('eval "$(').removesuffix(')"'), comments=True)[1:]
    if words[0].startswith("-") or words[0] == "COMMAND":
        return
    command = NAMED[words[0]]
    known = {option.name for own in groups_of(command).values() for option in own}
    known |= {option.name for option in (*GENERAL, ALL)}
    if command.has_parents:
        classes = (ModelConfig, EnsembleSFTConfig, EnsembleConfig, SelectionConfig)
        known |= {field.name for kind in classes for field in dataclasses.fields(kind)}
    flags = {word[2:].split("=")[0] for word in words if word.startswith("--")}
    assert flags <= known, f"{where}: {sorted(flags - known)}"
