"""Text of model cards: what is escaped, what is rendered, and how an existing card is updated."""

import json
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined

from ._card_drafts import is_draft, without_drafts
from ._files import write_atomically
from .errors import CardError
from .logging import get_logger

logger = get_logger(__name__)

CARD = "README.md"
BEGIN = "<!-- hf_ensemble: generated from here on. Text outside of these two marks is kept. -->"
END = "<!-- hf_ensemble: generated up to here -->"
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_MARKED = re.compile(rf"^{re.escape(BEGIN)}[ \t]*\r?$.*?^{re.escape(END)}[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# Whatever means something in Markdown, HTML, tables, mentions or formulas. References to characters never do.
_MEANINGFUL = re.compile(r"[&<>|*\[\]\\`~$#@]|(?<![^\W_])_|_(?![^\W_])|(?<=\bhttp):|(?<=\bhttps):|(?<=\bwww)\.")
_WRITTEN = re.compile(r"^<!-- metadata: (\{.*\}) -->[ \t]*\r?$", re.MULTILINE)
# Facts of what lies beside the card, which are never the author's.
_FACTS = ("library_name", "base_model", "base_model_relation")
_INDEX = "model-index"
# Metadata of several values, to which further ones are added.
_ADDED = ("tags", "datasets")
# What a note has of the metadata that a caller has given.
_GIVEN = "(given)"


class CardParts(NamedTuple):
    """What a card is made of: metadata, generated part, and metadata that a caller has given, see [`updated_card`]."""

    metadata: Mapping[str, Any]
    body: str
    given: Mapping[str, Any] = MappingProxyType({})


def text(value: Any) -> str:
    """A value as one line of plain text, in prose and in cells of tables."""
    line = " ".join(_printable(str(value)).split())
    return _MEANINGFUL.sub(lambda found: f"&#{ord(found[0])};", line)


def code(value: Any) -> str:
    """A value as code within a line, also in cells of tables."""
    line = " ".join(_printable(str(value)).split())
    if re.search(r"[`|<\\]", line):
        # Code spans take no references, and tables cut them at the bar.
        return f"<code>{text(line)}</code>"
    return f"`{line}`" if line else ""


def literal(value: Any) -> str:
    """A value as a Python literal on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(key)}: {literal(own)}' for key, own in value.items())}}}"
    return f'"{"".join(map(_escaped, value))}"' if isinstance(value, str) else repr(value)


def _escaped(character: str) -> str:
    if character == '"':
        return '\\"'
    is_plain = character.isprintable() and character != "\\"
    return character if is_plain else character.encode("unicode_escape").decode()


def as_json(value: Any) -> str:
    """A value as JSON, for a block of code."""
    return json.dumps(value, indent=2)


def _printable(value: str) -> str:
    """Without control characters, surrogates and marks that turn the direction of writing."""
    return "".join(" " if c.isspace() else c for c in value if c.isspace() or unicodedata.category(c)[0] != "C")


@cache
def _environment() -> Environment:
    folder = resources.files("hf_ensemble.model_cards")
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": text, "code": code, "literal": literal, "as_json": as_json}
    return environment


def render(template: str, **values: Any) -> str:
    """Fill a template of `model_cards/`."""
    filled = _environment().get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", filled).strip() + "\n"


def updated_card(
    existing: str | None, metadata: Mapping[str, Any], body: str, given: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """A card with a new generated part, and everything else as it was.

    The generated part notes which metadata were written, so that those an author has changed since can be told apart.

    Args:
        existing (`str`, *optional*):
            The card so far. Without marks, it is someone's own: the generated part follows. Drafts that trl and PEFT
            write when they save a model are replaced.
        metadata (`dict`):
            Entries of the metadata block. An author's entries stay, but for facts of the model (`library_name`,
            `base_model` and its relation) and results under the same name in `model-index`. What was written before
            and is no longer among them goes, unless an author has changed it.
        body (`str`): the generated part.
        given (`dict`, *optional*):
            Entries that the caller has given, which stay until others are given in their place. `tags` and `datasets`
            are added, and an author's own values are left, with a warning.

    Raises:
        `CardError`: for an existing card whose metadata cannot be read.
    """
    own, rest = split_card(existing or "")
    if is_draft(rest):
        # The misspelt entry is trl's placeholder.
        own = {key: value for key, value in own.items() if key != "licence"}
    rest = without_drafts(rest)
    marked = _MARKED.search(rest)
    written = _written(marked[0]) if marked else {}
    before = written.pop(_GIVEN, {})
    for key, value in given.items():
        if key in _ADDED:
            own[key] = _united(_listed(own.get(key)), _listed(value))
        elif own.get(key) in (None, "", before.get(key), written.get(key)):
            own[key] = value
            written.pop(key, None)
        elif own[key] != value:
            logger.warning("The card has %s: %s, which is kept in place of %s. Change it there.", key, own[key], value)
    kept = {key: value for key, value in {**before, **given}.items() if own.get(key) == value}
    note = {key: value for key, value in metadata.items() if key != _INDEX}
    # Of results, whose they are: these are never the author's.
    note |= {_INDEX: [entry["name"] for entry in _listed(metadata.get(_INDEX))]} if metadata.get(_INDEX) else {}
    note |= {_GIVEN: kept} if kept else {}
    # No text of a comment may end it.
    noted = json.dumps(note).replace("<", "\\u003c").replace(">", "\\u003e")
    generated = f"{BEGIN}\n<!-- metadata: {noted} -->\n\n{body.strip()}\n\n{END}"
    if marked:
        rest = rest[: marked.start()] + generated + rest[marked.end() :]
    else:
        rest = f"{rest.rstrip()}\n\n{generated}\n" if rest.strip() else f"{generated}\n"
    block = yaml.safe_dump(_merged(own, written, metadata), sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{block}---\n\n{rest.lstrip()}"


def _written(generated: str) -> dict[str, Any]:
    """The metadata that were written with a generated part."""
    found = _WRITTEN.search(generated)
    try:
        written = json.loads(found[1]) if found else {}
    except ValueError:
        return {}
    return written


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card.

    Raises:
        `CardError`: for metadata that are no YAML mapping.
    """
    card = card.removeprefix("\ufeff")
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1]) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that no calendar has
        raise CardError(
            f"The card's metadata block is not YAML ({_one_line(error)}). Mend it, or delete it."
        ) from error
    if not isinstance(metadata, dict):
        raise CardError(
            f"The card's metadata block has to be a mapping, found {metadata!r:.60}. Mend it, or delete it."
        )
    return metadata, card[found.end() :]


def given_metadata(card: str | None) -> dict[str, Any]:
    """What a caller has given for a card, see [`updated_card`]."""
    marked = _MARKED.search(card or "")
    return _written(marked[0]).get(_GIVEN, {}) if marked else {}


def own_text(card: str) -> str:
    """What a card holds beside its metadata and its generated part; nothing for a draft of trl or PEFT."""
    text = _MARKED.sub("", split_card(card)[1]).strip()
    return without_drafts(text)


def joined_cards(local: str | None, remote: str | None) -> str | None:
    """The card to update on the Hub, from the one of the folder that is pushed and the Hub's own.

    The text of the Hub's card stays unless the local one holds it too.

    Raises:
        `CardError`: for a card whose metadata cannot be read.
    """
    if local is None or remote is None:
        return local if remote is None else remote
    if own_text(remote) not in own_text(local):
        if own_text(local):
            logger.warning("The card on the Hub has a text of its own, which is kept in place of the local card's.")
        return remote
    metadata, rest = split_card(local)
    marked = _MARKED.search(rest)
    written = _written(marked[0]) if marked else {}
    given = given_metadata(local)
    authors = {
        key: value
        for key, value in metadata.items()
        if key != _INDEX and value not in (written.get(key), given.get(key))
    }
    there, remote_rest = split_card(remote)
    generated = _MARKED.search(remote_rest)
    of_the_hub = _written(generated[0]) if generated else {}
    for key in [own for own in authors if own in there and own not in _FACTS]:
        if isinstance(authors[key], list) and isinstance(there[key], list):
            there[key] = _united(there[key], [own for own in authors[key] if own not in _listed(written.get(key))])
        elif there[key] == of_the_hub.get(key):
            there[key] = authors[key]
        elif there[key] != authors[key]:
            logger.warning(
                "The card on the Hub has %s: %s, which is kept in place of the local card's %s. Change it there.",
                key,
                there[key],
                authors[key],
            )
    if marked and generated:
        rest = rest[: marked.start()] + generated[0] + rest[marked.end() :]
    block = yaml.safe_dump({**authors, **there}, sort_keys=False, allow_unicode=True)
    return f"---\n{block}---\n\n{rest.lstrip()}"


def _merged(own: Mapping[str, Any], written: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with what an author has added or changed since `written`."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys([*own, *new]):
        old, before, value = own.get(key), written.get(key), new.get(key)
        if key == _INDEX:
            merged[key] = _joined_results(_listed(old), _listed(before), _listed(value))
        elif key not in new:
            # What is no longer written goes, unless it is the author's.
            merged[key] = None if key in written and old == before else old
        elif key in _FACTS or old in (None, "", []) or old == before:
            merged[key] = value
        elif isinstance(value, list):
            added = [entry for entry in _listed(old) if entry not in _listed(before)]
            merged[key] = _united(value, added)
        else:
            merged[key] = old
    return {key: value for key, value in merged.items() if value is not None}


def _joined_results(old: list[Any], before: list[Any], new: list[Any]) -> list[Any] | None:
    """Results of a `model-index`: the new ones, and those of models of other names than these and those before."""
    names = [*before, *(entry["name"] for entry in new)]
    others = [entry for entry in old if not isinstance(entry, dict) or entry.get("name") not in names]
    return [*new, *others] or None


def _united(first: list[Any], second: list[Any]) -> list[Any]:
    return [*first, *(entry for entry in second if entry not in first)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def read_card(path: Path) -> str | None:
    """An existing card's text; `None` without one."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CardError(f"{str(path)!r} is not UTF-8 text. Save it as UTF-8, or move it away.") from error


def update_card_file(
    path: Path, metadata: Mapping[str, Any], body: str, given: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """Write a card, or renew the generated part of the one that is there.

    Raises:
        `CardError`: for an existing card that cannot be read; it stays as it is.
    """
    try:
        card = updated_card(read_card(path), metadata, body, given)
    except CardError as error:
        raise CardError(f"{str(path)!r} was left as it is: {error}") from error
    write_atomically(path, lambda file: file.write(card.encode()))
    return path
