"""Cards that other libraries write where a model is saved: nobody's text, in contrast to a card that someone wrote."""

import re
from functools import cache
from importlib import resources

# trl's trainers write the first beside every checkpoint; PEFT's `save_pretrained` writes the second.
_TEMPLATES = (("trl", "templates/lm_model_card.md"), ("huggingface_hub", "templates/modelcard_template.md"))
_BEGINNING = "# Model Card for "
# What PEFT's `save_pretrained` puts below a card that is there.
_PEFT_VERSION = re.compile(r"\s*^### Framework versions\n\n- PEFT \S+\s*\Z", re.MULTILINE)
# Whose citation stands in a block of its own, behind "Cite NAME as:": of trl, and of the trainer where it has one.
_TRAINER = re.compile(r"^This model was trained with (.+?)(?:[.,]|\{%)", re.MULTILINE)
_DEFAULT = re.compile(r"\{\{[^}]*default\(\"([^\"]*)\", true\)\s*\}\}")
_CONDITIONAL = re.compile(r"\{%\s*if\b[^%]*%\}.*?\{%\s*endif\s*%\}")
_CONDITION = re.compile(r"\{%.*?%\}")
_FILLED = re.compile(r"\{\{.*?\}\}")


def is_draft(text: str) -> bool:
    """Whether a card's text, without its metadata, is a draft of trl or PEFT that nobody has written into.

    A line that no template has, or an entry that was filled in, makes it someone's own.
    """
    if not text.lstrip().startswith(_BEGINNING):
        return False
    return all(any(line.fullmatch(own) for line in _lines()) for own in _own_lines(text))


def without_drafts(text: str) -> str:
    """A card's text without what nobody wrote: a whole draft, or the version that PEFT puts at its end."""
    return "" if is_draft(text) else _PEFT_VERSION.sub("", text)


def _own_lines(text: str) -> list[str]:
    """Lines that are not empty, without the citations that a template has."""
    text = text.replace("\r\n", "\n")
    for name in ("TRL", *_TRAINER.findall(text)[:1]):
        block = rf"^([^\n]*Cite {re.escape(name)} as:)\s*^```bibtex$.*?^```$"
        text = re.sub(block, r"\1", text, count=1, flags=re.DOTALL | re.MULTILINE)
    return [line.strip() for line in text.splitlines() if line.strip()]


@cache
def _lines() -> list[re.Pattern[str]]:
    """What each line of the templates may be filled to."""
    found = {r"- PEFT .*"}
    for package, name in _TEMPLATES:
        template = resources.files(package).joinpath(name).read_text(encoding="utf-8")
        # Blocks of citations end with the mark of a condition.
        for line in _own_lines(re.sub(r"^```\{% endif %\}$", "```", template, flags=re.MULTILINE)):
            written = _DEFAULT.sub(r"\1", line)
            for own in (_CONDITIONAL.sub("", written), _CONDITION.sub("", written)):
                fixed = _FILLED.split(own.strip())
                if any(part.strip() for part in fixed):
                    found.add(".*".join(map(re.escape, fixed)))
    return [re.compile(line) for line in sorted(found)]
