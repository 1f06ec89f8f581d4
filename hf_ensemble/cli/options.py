"""The options of settings classes, read from their source: importing them takes seconds, and help must not."""

import ast
import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        name (`str`): the flag without dashes.
        kind (`str`): the annotation of its field.
        default (`Any`): its default.
        help (`str`): what it does.
    """

    name: str
    kind: str
    default: Any
    help: str

    @classmethod
    def of(cls, own: dataclasses.Field) -> "Option":
        """The option of a field of a settings class."""
        made = own.default_factory
        default = own.default if made is dataclasses.MISSING else made()
        kind = own.type.__name__ if isinstance(own.type, type) and not get_args(own.type) else str(own.type)
        return cls(own.name, kind, default, " ".join(str(own.metadata.get("help") or "").split()))

    @property
    def is_flag(self) -> bool:
        return self.kind.startswith("bool")

    @property
    def metavar(self) -> str:
        """What stands for the value in help."""
        kinds = {part.strip() for part in self.kind.split("|")} - {"None"}
        if self.is_flag:
            return "[true|false]"
        if kinds & {"int"}:
            return "N"
        if kinds & {"float"}:
            return "NUMBER"
        if kinds & {"dict"}:
            return "JSON"
        if "list[int]" in kinds:
            return "N ..."
        word = "FOLDER" if self.name.endswith("_dir") else "TEXT"
        return f"{word} ..." if any(kind.startswith("list") for kind in kinds) else word


@cache
def options_of(place: str) -> tuple[Option, ...]:
    """The options that a settings class adds to those of its bases.

    Args:
        place (`str`): module inside of the package and class, as in `"select.settings:SelectionSettings"`.
    """
    module, name = place.split(":")
    tree, names = _module(module)
    node = next(own for own in tree.body if isinstance(own, ast.ClassDef) and own.name == name)
    found = []
    for own in node.body:
        if not isinstance(own, ast.AnnAssign) or own.value is None or "ClassVar" in ast.unparse(own.annotation):
            continue
        value = _value(own.value, names)
        if isinstance(value, dataclasses.Field):
            default = value.default if value.default is not dataclasses.MISSING else value.default_factory()
            found.append(Option(own.target.id, ast.unparse(own.annotation), default, value.metadata.get("help", "")))
    return tuple(found)


@cache
def _module(module: str) -> tuple[ast.Module, Mapping[str, Any]]:
    """Syntax tree of a module, and those of its names whose values can be known without running it."""
    path = _PACKAGE / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"field": dataclasses.field, "Literal": Literal, "get_args": get_args}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if alias.name.isupper():
                    names[alias.asname or alias.name] = _constant(module, node, alias.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            # Constants that need more than literals and the names above are not for help.
            with suppress(NameError, TypeError, AttributeError):
                names[ast.unparse(target)] = _value(node.value, names)
    return tree, names


def _constant(module: str, node: ast.ImportFrom, name: str) -> Any:
    """The value of a constant that a module imports from another one."""
    parents = module.split(".")[: -node.level] if node.level <= module.count(".") + 1 else []
    source = ".".join([*parents, *(node.module.split(".") if node.module else ())])
    if not (_PACKAGE / f"{source.replace('.', '/')}.py").is_file():
        source += ".__init__"
    return _module(source)[1].get(name)


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression; the source is this package's own."""
    allowed = {"__builtins__": {"list": list, "dict": dict, "frozenset": frozenset, "set": set}, **names}
    return eval(compile(ast.Expression(node), "<settings>", "eval"), allowed)
