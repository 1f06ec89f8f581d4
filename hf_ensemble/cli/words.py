"""What a command is given: the words of the command line, and the options of a `--config` file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError

_OPTION = re.compile(r"--\w[\w-]*")


@dataclass(frozen=True)
class Words:
    """The command line and the options of a file, which give way to it.

    Args:
        line (`list[str]`): the command line, without `--config`.
        options (`dict[str, list[str]]`): values of the file's options, by name.
        file (`str`, *optional*): the file.
    """

    line: list[str]
    options: Mapping[str, list[str]] = field(default_factory=dict)
    file: str | None = None

    @classmethod
    def of(cls, argv: Sequence[str]) -> "Words":
        """The words of a command line, and the options of the file that `--config` names.

        Raises:
            `ConfigurationError`: for a file that is missing or no mapping.
        """
        argv = [_named(word) for word in argv]
        argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        if "--config" not in argv:
            return cls(argv)
        position = argv.index("--config")
        if position + 1 == len(argv):
            raise ConfigurationError("--config takes a YAML file.")
        file, line = argv[position + 1], argv[:position] + argv[position + 2 :]
        if "--config" in line:
            raise ConfigurationError("Expected one --config, found several. Put all options into one file.")
        return cls(line, _options(Path(file)), file)

    def name(self, option: str) -> bool:
        """Whether the line or the file has an option."""
        return option in self.options or any(word.split("=")[0] == f"--{option}" for word in self.line)


def _options(path: Path) -> dict[str, list[str]]:
    """The options of a file, each with its values as the command line would have them."""
    if not path.is_file():
        raise ConfigurationError(f"No configuration file at {str(path)!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{str(path)!r} is no text: {error}. Expected YAML in UTF-8.") from error
    except yaml.YAMLError as error:
        # The parser's own message quotes the line, which may hold a token.
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}: {getattr(error, 'problem', None) or 'syntax error'}"
        raise ConfigurationError(f"{str(path)!r} is not YAML{where}. Mend the file.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{str(path)!r} has to map names to values, found {type(content).__name__}.")
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigurationError(f"{str(path)!r} has to map names to values, found the name {odd!r}.")
    names = {key: key.replace("-", "_") for key in content}
    twice = next((name for name in names.values() if list(names.values()).count(name) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"{str(path)!r} has {twice} in two spellings. Keep one of them.")
    return {
        names[key]: [_text(own) for own in (value if isinstance(value, list) else [value])]
        for key, value in content.items()
    }


def _named(word: str) -> str:
    """A word of the line, the name of an option with underscores: dashes do as well."""
    name, equals, value = word.partition("=")
    return f"{name[:2]}{name[2:].replace('-', '_')}{equals}{value}" if _OPTION.fullmatch(name) else word


def _text(value: Any) -> str:
    is_json = value is None or isinstance(value, (dict, list, bool))
    return json.dumps(value, default=str) if is_json else str(value)
