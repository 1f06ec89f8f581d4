"""Help of the command and of its commands, printed without importing what they run."""

import shutil
import textwrap
from collections.abc import Collection
from dataclasses import fields

from .command import COMMANDS, Command
from .options import Option, options_of

DESCRIPTION = (
    "Fine-tune a language model on many datasets at once: group them, train an adapter per group, ship the ensemble."
)
EXIT_CODES = {
    0: "done",
    1: "an error in one line: arguments, data, model or files",
    2: "no such command",
    75: "other processes have to end first; the same command works later",
    130: "stopped by Ctrl-C",
    143: "stopped by SIGTERM; the same command goes on where it stopped",
}
# Of the parents' arguments, those that are used most; --help-all has the others.
MOST_USED = (
    Option("model_name_or_path", "str", None, "Hub id or folder of the base model."),
    Option("output_dir", "str", None, "Folder of the run."),
    Option("lora_target_modules", "list[str]", None, "Layers that adapters are put on, such as all-linear."),
    Option("lora_r", "int", None, "Rank of the adapters."),
    Option("num_train_epochs", "float", None, "Epochs of each training."),
    Option("per_device_train_batch_size", "int", None, "Rows of a batch in training."),
    Option("max_length", "int", None, "Tokens of a row at most; not for text with labels, which the tokenizer cuts."),
    Option("use_cpu", "bool", None, "Train without a GPU."),
    Option("load_in_4bit", "bool", None, "Quantize the base model (QLoRA), of decoder layers alone."),
    Option("report_to", "list[str]", None, "Trackers, such as wandb; none by default."),
)
# Options of every command.
GENERAL = (
    Option("config", "str", None, "YAML file of options; those on the command line win."),
    Option("json", "bool", False, "Print the result as JSON on stdout, and everything else on stderr."),
    Option("debug", "bool", False, "Show the traceback of an error."),
    Option("help", "bool", False, "This help."),
)
ALL = Option("help-all", "bool", False, "This help, with all arguments of trl's and transformers' trainers.")


def groups_of(command: Command) -> dict[str, list[Option]]:
    """A command's own options by the title of their group, each once."""
    seen: set[str] = set()
    groups: dict[str, list[Option]] = {}
    for title, places in command.options:
        own = [option for place in places for option in options_of(place) if option.name not in seen]
        seen |= {option.name for option in own}
        if own:
            groups[title] = own
    return groups


def main_help() -> str:
    """The commands, the general options and the exit codes."""
    width = _width()
    lines = ["usage: hf-ensemble COMMAND [options]", "", *textwrap.wrap(DESCRIPTION, width), "", "Commands:"]
    lines += [_line(command.name, command.help, width) for command in COMMANDS]
    lines += ["", "hf-ensemble COMMAND --help says what a command takes.", "", "Exit codes:"]
    lines += [_line(str(code), meaning, width) for code, meaning in EXIT_CODES.items()]
    lines += ["", "hf-ensemble --version prints the version.", ""]
    return "\n".join(lines)


def command_help(command: Command, with_parents: bool = False) -> str:
    """A command's options in groups, what it needs first; those of the parents' trainers only if asked for."""
    width = _width()
    about = f"{command.help[0].upper()}{command.help[1:]}."
    lines = [f"usage: hf-ensemble {command.name} [options]", "", *textwrap.wrap(about, width)]
    lines += ["", "Example:", "", *(f"  {line}" for line in _wrapped_command(command.example, width)), ""]
    if command.required:
        needed = ", ".join(f"--{name}".replace(" or ", " or --") for name in command.required)
        lines += [f"Needed: {needed}", ""]
    groups = groups_of(command)
    if command.has_parents:
        data = groups.pop("Data")
        groups = {"Data": data, "Model and training": list(MOST_USED), **groups}
        if with_parents:
            groups |= parents_groups({option.name for own in groups.values() for option in own})
    for title, options in groups.items():
        lines += [f"{title}:", *(_described(option, width) for option in options), ""]
    general = (*GENERAL, ALL) if command.has_parents else GENERAL
    lines += ["General:", *(_described(option, width) for option in general), ""]
    if command.has_parents and not with_parents:
        lines += textwrap.wrap(
            "It also takes trl's other model arguments, and those of SFTConfig, or of TrainingArguments for text with "
            "labels: see --help-all.",
            width,
        )
        lines.append("")
    return "\n".join(lines)


def parents_groups(seen: Collection[str]) -> dict[str, list[Option]]:
    """The arguments of the parents' trainers and models that were not `seen`, from the classes themselves."""
    taken = {*seen, *(option.name for option in GENERAL)}
    groups: dict[str, list[Option]] = {}
    for title, kind in _parents().items():
        groups[title] = [Option.of(own) for own in fields(kind) if own.init and own.name not in taken]
        taken |= {option.name for option in groups[title]}
    return groups


def names_of(command: Command) -> set[str]:
    """Names of a command's options, those of its parents' trainers among them."""
    names = {option.name for own in groups_of(command).values() for option in own}
    if command.has_parents:
        names |= {own.name for kind in _parents().values() for own in fields(kind) if own.init}
    return names


def _parents() -> dict[str, type]:
    """The classes of the parents' arguments, by the title of their group."""
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig

    return {
        "Model, of trl.ModelConfig": ModelConfig,
        "Training, of transformers.TrainingArguments": TrainingArguments,
        "Training on prompts, chats and texts, of trl.SFTConfig": SFTConfig,
    }


def _described(option: Option, width: int) -> str:
    is_switch = option in (*GENERAL[1:], ALL)
    default = "" if option.default in (None, "", False, [], {}) or is_switch else f" Default: {_shown(option.default)}."
    return _line(f"--{option.name}{'' if is_switch else f' {option.metavar}'}", f"{option.help}{default}", width)


def _shown(value: object) -> str:
    value = getattr(value, "value", value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(name: str, text: str, width: int) -> str:
    column = 28
    head = f"  {name}"
    body = textwrap.wrap(text, width - column) or [""]
    if len(head) >= column - 1:
        return "\n".join([head, *(" " * column + line for line in body)])
    return "\n".join([head.ljust(column) + body[0], *(" " * column + line for line in body[1:])])


def _wrapped_command(line: str, width: int) -> list[str]:
    parts = textwrap.wrap(line, width - 6, break_long_words=False, break_on_hyphens=False)
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:]


def _width() -> int:
    return min(max(shutil.get_terminal_size((100, 20)).columns, 60), 120)
