"""Errors of the library in the words of the command line."""

import re
from collections.abc import Collection

from ..errors import HfEnsembleError

# Arguments of Python that flags of another name stand for.
_OTHERS = {
    "peft_config": "--lora_r, --lora_target_modules, ...",
    "train_dataset": "--data",
    "eval_dataset": "--data",
    "targets": "--target",
    "overwrite_run": "--overwrite_run",
    "TaskSet.with_validation": "--validation_fraction",
}
_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[\w+-]+(?:\.\w+)*(?:\([^)]*\))?|\.\.\."
_NAMED = rf"(?<![\w.(/\\~-])(?P<name>[a-z_]+)=(?P<value>{_VALUE})(?![\w/\\])"
# What stands in quotes, lists and dicts is the user's: it is matched first, to be left as it is.
_QUOTED = r"(?<!\w)(?:'[^']*'|\"[^\"]*\")(?!\w)"
_ARGUMENT = re.compile(rf"{_NAMED}|{_QUOTED}")


def in_terminal(error: BaseException, flags: Collection[str]) -> str:
    """What an error says on the command line, in one line: `name=value` reads `--name value` where it is a flag.

    Args:
        error (`BaseException`): the error.
        flags (`Collection[str]`): names of the command's flags.
    """
    text = error.in_terminal if isinstance(error, HfEnsembleError) else str(error)

    def flag(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if name is None or name not in flags:
            return _OTHERS.get(name, match[0])
        shown = " ".join(re.findall(r"[\w./-]+", value)) if value.startswith("[") else value.strip("'\"")
        shown = "null" if value == "None" else shown
        return f"--{name} {shown}"

    return re.sub(r"\s*[\r\n]+\s*", " ", _ARGUMENT.sub(flag, text)).strip()
