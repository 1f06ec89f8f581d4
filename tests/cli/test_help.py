"""Help of the commands, and errors in their words."""

import dataclasses
import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from hf_ensemble.capture.config import FeatureSettings
from hf_ensemble.cli import arguments, choice_arguments, saved_arguments
from hf_ensemble.cli.command import COMMANDS
from hf_ensemble.cli.help import ALL, GENERAL, MOST_USED, groups_of
from hf_ensemble.cli.main import main
from hf_ensemble.cli.options import options_of
from hf_ensemble.cli.wording import in_terminal
from hf_ensemble.ensemble.forward.routing import ROUTINGS
from hf_ensemble.ensemble.merging.merge import METHODS
from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.select import settings
from hf_ensemble.train import configs
from hf_ensemble.train.inputs.boosting import METHODS as BOOSTING_METHODS


def test_help_says_what_the_classes_say():
    """Help is read from the source; these are the classes themselves."""
    for module, place in {
        arguments: "cli.arguments",
        choice_arguments: "cli.choice_arguments",
        saved_arguments: "cli.saved_arguments",
        configs: "train.configs",
        settings: "select.settings",
    }.items():
        for name, kind in vars(module).items():
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                own = [field for field in dataclasses.fields(kind) if field.name in kind.__annotations__]
                own = [field for field in own if field.name in kind.__dict__.get("__annotations__", {})]
                found = {option.name: option for option in options_of(f"{place}:{name}")}
                assert list(found) == [field.name for field in own], name
                for field in own:
                    assert found[field.name].help == field.metadata["help"], field.name
                    made = field.default_factory
                    default = field.default if made is dataclasses.MISSING else made()
                    assert found[field.name].default == default, field.name
    taken = {field.name for kind in (ModelConfig, configs.EnsembleSFTConfig) for field in dataclasses.fields(kind)}
    assert {option.name for option in MOST_USED} <= taken
    found = {option.name: option.help for option in options_of("capture.config:FeatureSettings")}
    assert found == {field.name: field.metadata["help"] for field in dataclasses.fields(FeatureSettings)}


def test_help_imports_nothing_that_takes_long():
    code = (
        "import sys; from hf_ensemble.cli.main import main\n"
        "for words in (['--help'], ['run', '--help'], ['generate', '--help'], ['completion']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--num_groups" in done.stdout and "Exit codes:" in done.stdout and "--help-all" in done.stdout


def printed_options(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    printed = capsys.readouterr().out
    return re.findall(r"^  --([\w-]+)", printed[printed.index("Needed:") :], flags=re.MULTILINE)


def test_help_has_every_option_in_one_group(capsys):
    own = {"train": "until", "eval": "split", "compare": "baselines", "fidelity": "num_repeated", "run": "target"}
    parents = {field.name for kind in (ModelConfig, TrainingArguments, SFTConfig) for field in dataclasses.fields(kind)}
    known = {
        field.name
        for kind in (configs.EnsembleConfig, configs.EnsembleSFTConfig, configs.SelectionConfig)
        for field in dataclasses.fields(kind)
    }
    for command in (command.name for command in COMMANDS if command.has_parents):
        short, full = (printed_options([command, flag], capsys) for flag in ("--help", "--help-all"))
        assert len(set(full)) == len(full) and set(short) < set(full)
        # What the trainers add to their parents is in the short help, and everything is in the full one.
        assert known - parents <= set(short) and known | parents <= set(full)
        assert own.get(command, "target") in short


def test_help_is_sentences(capsys):
    options = [option for command in COMMANDS for own in groups_of(command).values() for option in own]
    for option in (*options, *MOST_USED, *GENERAL, ALL):
        assert re.fullmatch(r"([A-Z0-9]|'\w+' ).*\.", option.help), (option.name, option.help)
    assert not [command.help for command in COMMANDS if command.help[0].isupper() or command.help.endswith(".")]
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    assert "Upload the ensemble of a run to the Hub, with its card." in capsys.readouterr().out


def test_help_names_every_choice():
    for kind, name, choices in (
        (saved_arguments.MergeArguments, "method", METHODS),
        (saved_arguments.GenerateArguments, "routing", ROUTINGS),
        (configs.EnsembleArguments, "boosting_method", BOOSTING_METHODS),
    ):
        told = kind.__dataclass_fields__[name].metadata["help"]
        assert set(choices) <= set(re.findall(r"\w+", told)), name


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigurationError("Set num_groups=2, or leave it."), "Set --num_groups 2, or leave it."),
        (ConfigurationError("Set projection_dim=None, or not."), "Set --projection_dim null, or not."),
        (ConfigurationError("Pass target_modules=['a', 'b']."), "Pass target_modules=['a', 'b']."),
        (ConfigurationError("Set lora_target_modules=['a', 'b']."), "Set --lora_target_modules a b."),
        (ConfigurationError("Pass peft_config=LoraConfig(r=2)."), "Pass --lora_r, --lora_target_modules, ...."),
        (TaskError("Found none.", python="Pass x.", terminal="Add --x."), "Found none. Add --x."),
        (ValueError("two\nlines"), "two lines"),
        # What the user has named stays as it is.
        (
            TaskError("No task in '/data/num_groups=2/x' of num_groups=3."),
            "No task in '/data/num_groups=2/x' of --num_groups 3.",
        ),
        (TaskError("No file /data/num_groups=2/x."), "No file /data/num_groups=2/x."),
        (TaskError("No file num_groups=20/x."), "No file num_groups=20/x."),
        (TaskError("found ['num_groups=2', \"it's num_groups=2\"]."), "found ['num_groups=2', \"it's num_groups=2\"]."),
        (TaskError("the task's num_groups='2', in 'my  folder'."), "the task's --num_groups 2, in 'my  folder'."),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(error, said):
    assert in_terminal(error, {"num_groups", "lora_target_modules", "projection_dim"}) == said
