"""Options of the commands over a model and data."""

import json
from dataclasses import dataclass, field
from typing import Any

from .._settings import check_at_least, check_number, check_one_of, checked_shard
from ..errors import ConfigurationError
from ..runs.progress import check_stage
from ..tasks.task import SPLITS

_SIZES_HELP = "Numbers of tasks of the subsets, in turn; from one task to all by default."


@dataclass
class DataArguments:
    """Which tasks a command works on."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "A folder with NAME/{train,validation,test}.jsonl or NAME.jsonl for each dataset; or files, "
            "folders and ids of datasets on the Hub, each as PATH or NAME=PATH. JSON, JSONL, CSV, TSV and Parquet."
        },
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "The datasets by name, in a --config file: {NAME: {path, name, revision, split, validation, test, "
            "columns, template, weight, max_rows}}; or a list of them, as in trl's mixtures. JSON on the command line."
        },
    )
    dataset_mixture: str | None = field(
        default=None,
        metadata={"help": "A mixture of trl, in a --config file: {datasets: [...], test_split_size: ...}."},
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Share of the rows of each dataset without evaluation rows to hold out, above 0 and below 1, as in "
            "trl. Without it, --validation_fraction says how many."
        },
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Names of the datasets to use; all by default."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Maximum number of training rows per task."})
    max_validation_rows: int | None = field(
        default=None, metadata={"help": "Maximum number of validation rows per task, also where they are held out."}
    )

    def __post_init__(self):
        check_share("test_split_size", self.test_split_size)
        for name in ("max_train_rows", "max_validation_rows"):
            check_at_least(name, getattr(self, name), 1, optional=True)


@dataclass
class FlowArguments(DataArguments):
    """What every command over a run takes beside a trainer's own arguments and trl's model arguments."""

    target: str | None = field(
        default=None,
        metadata={
            "help": "Make one adapter for this task, trained with the datasets that help it, instead of an ensemble."
        },
    )
    answer_metrics: str | None = field(
        default=None,
        metadata={
            "help": "Also score generated answers: what to extract from them (the_answer_is, number_after_hashes, "
            'choice, yes_no, last_number, whole_text, or a regular expression), or JSON by task: \'{"gsm8k": '
            '{"extract": "number_after_hashes", "metrics": ["exact_match"], "max_new_tokens": 200}}\'.'
        },
    )


@dataclass
class RunArguments(FlowArguments):
    """What `hf-ensemble run` takes beside a trainer's own arguments and trl's model arguments."""

    fidelity_subsets: int = field(
        default=0, metadata={"help": "Random subsets to fine-tune, to compare predictions with the truth."}
    )
    fidelity_sizes: list[int] | None = field(default=None, metadata={"help": _SIZES_HELP})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("fidelity_subsets", self.fidelity_subsets, 0)
        _check_sizes(self.fidelity_sizes)


@dataclass
class CompareArguments(FlowArguments):
    """What `hf-ensemble compare` takes beside a trainer's own arguments and trl's model arguments."""

    baselines: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "What the ensemble is compared with: all, or some of scaled, longer, longer_scaled, wider, "
            "per_task, finetuned, random_groups, gradient_clusters, average, task_arithmetic, ties, tsv, knots, "
            "lorahub, arrow, seeds."
        },
    )
    finetuned_length: float = field(
        default=0.5,
        metadata={"help": "Length of each task's own training in finetuned, in multiples of a training."},
    )
    num_compared_groups: int | None = field(
        default=None,
        metadata={"help": "Number of random groups and of clusters; as many as the ensemble has by default."},
    )
    num_compared_seeds: int | None = field(
        default=None, metadata={"help": "Number of seeds; as many as the ensemble has adapters by default."}
    )
    group_seed: int = field(default=0, metadata={"help": "Seed of the random groups."})

    def __post_init__(self):
        super().__post_init__()
        if self.target is not None:
            raise ConfigurationError(
                f"compare is for an ensemble, and a selection trains once: found --target {self.target}. Leave it out."
            )
        check_number("finetuned_length", self.finetuned_length, 0, above=True)
        check_at_least("num_compared_groups", self.num_compared_groups, 2, optional=True)
        check_at_least("num_compared_seeds", self.num_compared_seeds, 2, optional=True)
        check_at_least("group_seed", self.group_seed, 0)


@dataclass
class FidelityArguments(FlowArguments):
    """What `hf-ensemble fidelity` takes beside a trainer's own arguments and trl's model arguments."""

    fidelity_subsets: int = field(default=20, metadata={"help": "Random subsets to fine-tune."})
    fidelity_sizes: list[int] | None = field(default=None, metadata={"help": _SIZES_HELP})
    num_repeated: int = field(
        default=0, metadata={"help": "Subsets to train with a second seed as well, for the noise ceiling."}
    )
    num_first_order: int = field(
        default=3,
        metadata={"help": "Subsets whose predicted parameters are put into the model, for the first-order error."},
    )
    subset_seed: int = field(default=0, metadata={"help": "Seed of the draw of subsets."})

    def __post_init__(self):
        super().__post_init__()
        least = {"fidelity_subsets": 1, "num_repeated": 0, "num_first_order": 0, "subset_seed": 0}
        for name, value in least.items():
            check_at_least(name, getattr(self, name), value)
        _check_sizes(self.fidelity_sizes)


def check_share(name: str, value: float | None) -> None:
    """Raise `ConfigurationError` for anything but a share of rows that leaves some, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < 1):
        raise ConfigurationError(
            f"{name} has to be a share of each dataset's rows, above 0 and below 1, found {value!r}. Give a dataset's "
            "own number of rows as its validation, in a --config file."
        )


def _check_sizes(sizes: list[int] | None) -> None:
    for size in sizes or ():
        check_at_least("Each of fidelity_sizes", size, 1)


@dataclass
class TrainArguments(FlowArguments):
    """What `hf-ensemble train` takes beside a trainer's own arguments and trl's model arguments."""

    stage: str | None = field(
        default=None,
        metadata={
            "help": "Run this stage alone, beside other processes with other stages, as `hf-ensemble status` lists "
            "them: baseline, group, adapter:group_0, evaluation, ...; adapter and calibration are all of that kind."
        },
    )
    shard: str | None = field(
        default=None,
        metadata={
            "help": "Of --stage gradients, gradients_at_baseline, calibration or adapter, this part: 0/8 to 7/8."
        },
    )
    wait: float = field(
        default=0.0,
        metadata={"help": "Seconds to wait for what --stage needs; without, the command ends with exit code 75."},
    )
    until: str = field(
        default="adapters",
        metadata={
            "help": "Last stage: 'groups' (gradients, one adapter for all, groups), or 'adapters'. `hf-ensemble run` "
            "goes on from either to weights and evaluation."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_one_of("until", self.until, ("groups", "adapters"))
        shard = checked_shard("shard", self.shard)
        check_number("wait", self.wait, 0)
        if self.stage is not None:
            check_stage(self.stage, shard)
        if self.stage is None and (self.shard is not None or self.wait):
            raise ConfigurationError("Expected --stage beside --shard and --wait, found none. Name a stage.")
        if self.stage is not None and self.until != "adapters":
            raise ConfigurationError(
                f"Expected --stage or --until, found --stage {self.stage} and --until {self.until}. Leave --until out: "
                "a stage runs alone."
            )
        if self.target is not None and self.stage is None:
            raise ConfigurationError(
                f"train is for the groups of an ensemble, and a selection trains once: found --target {self.target}. "
                "Use hf-ensemble run, or name one of its stages with --stage."
            )


@dataclass
class CaptureArguments(FlowArguments):
    """What `hf-ensemble capture` takes beside a trainer's own arguments and trl's model arguments."""

    shard: str | None = field(
        default=None,
        metadata={"help": "Capture this part of the rows, beside other processes with the others: 0/8 to 7/8."},
    )

    def __post_init__(self):
        super().__post_init__()
        checked_shard("shard", self.shard)


@dataclass
class EvalArguments(FlowArguments):
    """What `hf-ensemble eval` takes beside a trainer's own arguments and trl's model arguments."""

    split: str = field(default="test", metadata={"help": "Rows to score: 'test', 'validation' or 'train'."})

    def __post_init__(self):
        super().__post_init__()
        check_one_of("split", self.split, SPLITS)


@dataclass
class DemoArguments:
    """What `hf-ensemble demo` takes."""

    output_dir: str = field(default="demo_output", metadata={"help": "Where models, adapters and reports go."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of all trainings."})
    fidelity_subsets: int = field(
        default=4, metadata={"help": "Subsets to fine-tune, to check predictions; at most 5."}
    )

    def __post_init__(self):
        check_at_least("seed", self.seed, 0)
        check_at_least("fidelity_subsets", self.fidelity_subsets, 1)


def needed(command: str, **given: Any) -> None:
    """Raise `ConfigurationError` for flags that a command does not work without."""
    lacking = [f"--{name}" for name, value in given.items() if value is None]
    if lacking:
        raise ConfigurationError(f"Expected {' and '.join(lacking)}; see hf-ensemble {command} --help.")


def dtype_named(name: str | None) -> Any:
    """The type of torch that `dtype` names; `"auto"` and `None` as they are.

    Raises:
        `ConfigurationError`: for anything else.
    """
    if name in ("auto", None):
        return name
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"dtype has to be 'auto' or a type of torch such as 'bfloat16', found {name!r}.")
    return found


def answer_metrics(text: str | None) -> str | dict[str, Any] | None:
    """What `answer_metrics` says: settings by task where it is JSON, else what to extract from every task's answers.

    Raises:
        `ConfigurationError`: for what begins like JSON and is not.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f'answer_metrics has to be JSON like \'{{"gsm8k": "the_answer_is"}}\', found {text!r}: {error}.'
        ) from error
