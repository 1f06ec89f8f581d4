"""What the documents say is true: their links lead somewhere, and every public name is documented."""

import re
from pathlib import Path

import pytest

import hf_ensemble

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_names_the_make_targets(target):
    assert re.search(rf"^make {target}\b", README, flags=re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("name", hf_ensemble.__all__)
def test_public_names_are_documented(name):
    documentation = getattr(hf_ensemble, name).__doc__
    # A dataclass without a docstring gets its signature for one.
    assert documentation and not documentation.startswith(f"{name}("), f"{name} has no docstring"
    assert any(re.search(rf"\b{name}\b", text) for text in DOCUMENTS), f"{name} is in no document"


def test_relative_links_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_no_entry_of_the_changelog_stands_twice():
    # Merges that take both sides leave an entry's old form beside its new one.
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    beginnings = [line[:60] for line in lines if len(line) > 60]
    assert len(set(beginnings)) == len(beginnings), {own for own in beginnings if beginnings.count(own) > 1}
