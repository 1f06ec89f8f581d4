"""The final answer of a text that gives its reasons first: a number, a letter, yes or no, or what a pattern finds."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from ..errors import ConfigurationError

# From a text to its final answer; `None` where it gives none.
Extractor = Callable[[str], str | None]

# A minus behind a word or another number is a hyphen, and a comma within a number has three digits behind it.
_NUMBER = (
    r"(?:(?<![\w%)])[-+\u2212])?[$€£¥]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+\u2212]?\d+(?!\w))?"
)
_AFTER_HASHES = re.compile(rf"####\s*({_NUMBER}(?:/\d+)?)")
_ANYWHERE = re.compile(_NUMBER)
# A typographic minus is one; separators and currency signs are left out.
_PLAIN = str.maketrans({"\u2212": "-", **dict.fromkeys(",$€£¥")})
_MOST_DIGITS = 100
# Up to the end of the line or the sentence; a full stop within a number ends neither.
_ANSWER_IS = re.compile(
    r"\bthe (?:final |correct )?answer is\s*:?\s*(.+?)\s*(?:\.(?=\s|$)|$)", re.IGNORECASE | re.MULTILINE
)
_LABELLED = r"(?i:\banswer(?:\s+is)?\s*:?\s*)"
# "I think" and "I'm" are no choice of I, nor is "B-flat" one of B.
_LETTER = r"([A-HJ-Z]|I(?![^\S\n]+\w))(?![^\W_]|[_'’-]\w)"
_CHOICES = (
    # In bold, quotes, brackets or as it is.
    re.compile(r"(?i:\banswer[*_]*(?:\s+is)?)[\s:*_`\"'“‘$(\[]*" + _LETTER),
    re.compile(r"(?:\(|(?<![^\W_])[*_`\[])[*_`]*([A-Z])[.):]?[*_`]*[*_`)\]]"),
    # A letter that stands first on its line, with a mark behind it or nothing: "A train leaves" is no choice of A.
    re.compile(r"^[\s*_`]*([A-Z])[*_`]*\s*(?:[).:]|$)", re.MULTILINE),
)
_YES_NO = (
    re.compile(_LABELLED + r"\W*(yes|no)\b", re.IGNORECASE),
    re.compile(r"^\W*(yes|no)\b", re.IGNORECASE),
)
_ANY_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def number_after_hashes(text: str) -> str | None:
    """The number after `####`, as in GSM8K; a fraction as it stands there."""
    found = _AFTER_HASHES.search(text)
    return _plain_number(found[1]) if found else None


def last_number(text: str) -> str | None:
    """The last number of the text."""
    found = _ANYWHERE.findall(text)
    return _plain_number(found[-1]) if found else None


def the_answer_is(text: str) -> str | None:
    """What follows "the answer is", up to the end of the sentence."""
    found = _ANSWER_IS.search(text)
    if found is None:
        return None
    answer = found[1].strip("*\"'` ")
    return _plain_number(answer) if _ANYWHERE.fullmatch(answer) else answer


def choice(text: str) -> str | None:
    """The letter of a multiple choice: after "answer is" or "answer:", in brackets or bold, or at a line's start."""
    for pattern in _CHOICES:
        found = pattern.search(text)
        if found is not None:
            return found[1]
    return None


def yes_no(text: str) -> str | None:
    """`"yes"` or `"no"`: after "answer is" or "answer:", at the start of the text, or the last one."""
    for pattern in _YES_NO:
        found = pattern.search(text)
        if found is not None:
            return found[1].lower()
    everywhere = _ANY_YES_NO.findall(text)
    return everywhere[-1].lower() if everywhere else None


def whole_text(text: str) -> str | None:
    """The text itself, without white space around it."""
    return text.strip()


EXTRACTORS: dict[str, Extractor] = {
    own.__name__: own for own in (whole_text, number_after_hashes, the_answer_is, choice, yes_no, last_number)
}


def extractor(extract: str | Extractor) -> Extractor:
    """The function that finds the final answer.

    Args:
        extract (`str` or `Callable`):
            A name of [`EXTRACTORS`], a regular expression with one group, whose first match counts, or a function from
            a text to the answer, or to `None` where the text gives none.

    Raises:
        `ConfigurationError`: for an unknown name, and for an expression without exactly one group.
    """
    if callable(extract):
        return extract
    if isinstance(extract, str) and extract in EXTRACTORS:
        return EXTRACTORS[extract]
    expected = f"one of {tuple(EXTRACTORS)}, a regular expression with one group, or a function"
    if not isinstance(extract, str):
        raise ConfigurationError(f"extract has to be {expected}; found a {type(extract).__name__}.")
    try:
        pattern = re.compile(extract)
    except re.error as error:
        raise ConfigurationError(f"extract has to be {expected}; found {extract!r}: {error}.") from error
    if pattern.groups != 1:
        raise ConfigurationError(f"extract has to be {expected}; found {extract!r} with {pattern.groups} groups.")

    def first_group(text: str) -> str | None:
        found = pattern.search(text)
        return None if found is None or found[1] is None else found[1].strip()

    return first_group


def _plain_number(text: str) -> str:
    """A number without separators, currency, exponent and needless zeros, so that 1,000.50 equals 1000.5."""
    text = text.translate(_PLAIN)
    try:
        value = Decimal(text)
    except InvalidOperation:
        return text
    if not value:
        return "0"
    if abs(value.adjusted()) > _MOST_DIGITS:
        # In full it would be as long as its exponent says.
        return text
    plain = format(value, "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
