"""What a command of `hf-ensemble` is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_DATA = ("Data", ("cli.arguments:DataArguments",))
_SELECT = ("Selection", ("select.settings:SelectionSettings",))
_GROUP = ("Groups", ("select.settings:GroupingSettings",))
_ESTIMATE = ("Gradients and predictions", ("capture.config:FeatureSettings", "train.configs:RunArguments"))
_BALANCE = ("How often tasks are trained on", ("train.inputs.balancing_arguments:BalancingArguments",))
_CHOICE = ("Where the gradients are", ("cli.choice_arguments:ChoiceArguments",))
_ENSEMBLE = (
    ("Ensemble", ("train.configs:EnsembleArguments",)),
    ("Selection, with --target", ("train.configs:SelectionArguments", "select.settings:SelectionSettings")),
    _GROUP,
    ("Boosting", ("train.inputs.boosting:BoostingSettings",)),
    ("Text with labels", ("train.configs:ClassifierArguments",)),
)
# What every command over a model and data takes.
_RUN = (_DATA, *_ENSEMBLE, _ESTIMATE, _BALANCE)


@dataclass(frozen=True)
class Command:
    """A command of `hf-ensemble`.

    Args:
        name (`str`): what is typed.
        help (`str`): one line for the list of commands.
        module (`str`): module with a function `main(argv)`, which runs the command; imported when it is called.
        example (`str`, *optional*): a command line.
        options (`tuple`): its own options: a title and settings classes for each group, see [`options_of`].
        required (`tuple[str, ...]`): options that it does not work without.
        has_parents (`bool`): whether it takes the arguments of trl's and transformers' trainers as well.
        is_light (`bool`): whether it needs none of the libraries that take seconds to import.
    """

    name: str
    help: str
    module: str
    example: str = ""
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    required: tuple[str, ...] = ()
    has_parents: bool = False
    is_light: bool = False

    def load(self) -> Callable[[Sequence[str]], object]:
        """The function that runs the command."""
        import importlib

        return importlib.import_module(self.module, __package__).main


_MODEL_AND_DATA = ("data or datasets", "model_name_or_path", "output_dir")
_LINE = "--data data --model_name_or_path Qwen/Qwen3-0.6B --output_dir run --lora_target_modules all-linear"
COMMANDS = [
    Command(
        "run",
        "the whole flow: datasets and a model, to an ensemble or a selection",
        ".commands.run",
        f"hf-ensemble run {_LINE}",
        (("Run", ("cli.arguments:RunArguments", "cli.arguments:FlowArguments")), *_RUN),
        _MODEL_AND_DATA,
        True,
    ),
    Command(
        "capture",
        "capture gradients of all datasets, the first stage of a run",
        ".commands.capture",
        f"hf-ensemble capture {_LINE}",
        (("Capture", ("cli.arguments:CaptureArguments",)), ("Run", ("cli.arguments:FlowArguments",)), *_RUN),
        _MODEL_AND_DATA,
        True,
    ),
    Command(
        "select",
        "select datasets that help a target, from captured gradients",
        ".commands.select",
        "hf-ensemble select --store run --target gsm8k --output_dir choice",
        (("Choice", ("cli.choice_arguments:SelectArguments",)), _CHOICE, _SELECT),
        ("store",),
    ),
    Command(
        "mixture",
        "find sampling weights of the datasets for targets, from captured gradients",
        ".commands.mixture",
        "hf-ensemble mixture --store run --target gsm8k sciq --caps 0.5 --output_dir choice",
        (("Mixture", ("cli.choice_arguments:MixtureArguments",)), _CHOICE),
        ("store",),
    ),
    Command(
        "group",
        "group datasets to train an adapter each, from captured gradients",
        ".commands.group",
        "hf-ensemble group --store run --output_dir choice",
        (_GROUP, _CHOICE, ("Chance", ("cli.choice_arguments:GroupArguments",))),
        ("store",),
    ),
    Command(
        "train",
        "train a run's adapters; one stage alone with --stage, side by side with others",
        ".commands.train",
        f"hf-ensemble train {_LINE} --stage adapter:group_1",
        (("Training", ("cli.arguments:TrainArguments",)), ("Run", ("cli.arguments:FlowArguments",)), *_RUN),
        _MODEL_AND_DATA,
        True,
    ),
    Command(
        "eval",
        "score a finished run on rows of a split",
        ".commands.eval",
        f"hf-ensemble eval {_LINE} --split test",
        (("Evaluation", ("cli.arguments:EvalArguments",)), ("Run", ("cli.arguments:FlowArguments",)), *_RUN),
        _MODEL_AND_DATA,
        True,
    ),
    Command(
        "generate",
        "answer prompts, or label texts, with a saved ensemble",
        ".commands.generate",
        'hf-ensemble generate --ensemble run/ensemble --task gsm8k --prompts "2 + 2 ="',
        (
            ("Generation", ("cli.saved_arguments:GenerateArguments",)),
            ("Ensemble", ("cli.saved_arguments:SavedArguments",)),
        ),
        ("ensemble",),
    ),
    Command(
        "merge",
        "merge the adapters of one task into a plain PEFT adapter",
        ".commands.merge",
        "hf-ensemble merge --ensemble run/ensemble --task gsm8k --output_dir merged",
        (("Merging", ("cli.saved_arguments:MergeArguments",)), ("Ensemble", ("cli.saved_arguments:SavedArguments",))),
        ("ensemble", "task"),
    ),
    Command(
        "export",
        "write one adapter for each task, for vLLM and LoRAX, and the line that serves them with vLLM",
        ".commands.export",
        "hf-ensemble export --ensemble run/ensemble --output_dir served",
        (("Export", ("cli.saved_arguments:ExportArguments",)), ("Ensemble", ("cli.saved_arguments:SavedArguments",))),
        ("ensemble",),
    ),
    Command(
        "fidelity",
        "fine-tune random subsets to see how far predictions can be trusted",
        ".commands.fidelity",
        f"hf-ensemble fidelity {_LINE} --fidelity_subsets 10",
        (("Fidelity", ("cli.arguments:FidelityArguments",)), ("Run", ("cli.arguments:FlowArguments",)), *_RUN),
        _MODEL_AND_DATA,
        True,
    ),
    Command(
        "compare",
        "compare a run's ensemble with simpler systems of known cost",
        ".commands.compare",
        f"hf-ensemble compare {_LINE} --baselines longer per_task seeds",
        (("Comparison", ("cli.arguments:CompareArguments",)), ("Run", ("cli.arguments:FlowArguments",)), *_RUN),
        _MODEL_AND_DATA,
        True,
    ),
    Command(
        "status",
        "list the stages of a run: done, running, waiting for others",
        ".commands.status",
        "hf-ensemble status run",
        (("Status", ("cli.saved_arguments:StatusArguments",)),),
        ("run",),
    ),
    Command(
        "report",
        "write the page of a finished run: one HTML file",
        ".commands.report",
        "hf-ensemble report run",
        (("Report", ("cli.saved_arguments:ReportArguments",)),),
        ("run",),
    ),
    Command(
        "push",
        "upload the ensemble of a run to the Hub, with its card",
        ".commands.push",
        "hf-ensemble push --run run --repo_id user/my-ensemble",
        (("Upload", ("cli.saved_arguments:PushArguments",)),),
        ("run", "repo_id"),
    ),
    Command(
        "demo",
        "the whole flow on a small world of generated tasks, without a network",
        ".demo.flow",
        "hf-ensemble demo",
        (("Demo", ("cli.arguments:DemoArguments",)),),
    ),
    Command(
        "completion",
        "print a script that completes commands and options in a shell",
        ".commands.completion",
        'eval "$(hf-ensemble completion --shell bash)"',
        (("Completion", ("cli.commands.completion:CompletionArguments",)),),
        is_light=True,
    ),
]


def command_named(name: str) -> Command:
    return next(command for command in COMMANDS if command.name == name)
