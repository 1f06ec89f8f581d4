"""Flags of the commands that choose from captured gradients."""

from dataclasses import dataclass, field

from .._settings import check_at_least, check_device
from ..select import GroupingSettings, SelectionSettings
from ..select.settings import SEARCH_ROWS, SEARCH_ROWS_HELP


@dataclass
class ChoiceArguments:
    """Where the gradients are that a choice is made from, and where it goes."""

    store: str | None = field(
        default=None,
        metadata={
            "help": "Folder of captured gradients, or the output_dir of a run, whose fine-tunings then calibrate the "
            "predictions."
        },
    )
    output_dir: str = field(default="choice", metadata={"help": "Where the choice and its pictures go."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks of the store to use; all by default."})
    num_components: int = field(default=400, metadata={"help": "Principal components that estimates are solved in."})
    estimate_device: str | None = field(
        default=None, metadata={"help": "Device that estimates are solved on, such as 'cuda'. The CPU by default."}
    )

    def __post_init__(self):
        check_at_least("num_components", self.num_components, 1)
        check_device("estimate_device", self.estimate_device)


@dataclass
class SelectArguments(SelectionSettings, ChoiceArguments):
    """What `hf-ensemble select` takes."""

    target: list[str] | None = field(default=None, metadata={"help": "Tasks to do well on; all by default."})
    include: list[str] | None = field(
        default=None, metadata={"help": "Tasks that are always trained on; the targets by default."}
    )
    exclude: list[str] | None = field(default=None, metadata={"help": "Tasks that are never trained on."})
    clusters: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Split tasks into clusters to choose among, as JSON: '{\"mr\": 5}'."}
    )
    score_examples: bool = field(default=False, metadata={"help": "Also score every training row."})


@dataclass
class MixtureArguments(ChoiceArguments):
    """What `hf-ensemble mixture` takes."""

    target: list[str] | None = field(default=None, metadata={"help": "Tasks to do well on; all by default."})
    caps: str | None = field(
        default=None,
        metadata={
            "help": "Maximum weight of a row of any auxiliary task, from 0 to 1; or JSON by task: '{\"mr\": 0.5}'."
        },
    )
    max_iterations: int = field(default=100, metadata={"help": "Maximum number of iterations of the search."})
    search_rows: int | None = field(default=SEARCH_ROWS, metadata=SEARCH_ROWS_HELP)


@dataclass
class GroupArguments(GroupingSettings, ChoiceArguments):
    """What `hf-ensemble group` takes."""

    target: list[str] | None = field(
        default=None,
        metadata={"help": "With --grouping_method mixtures: tasks to do well on; all by default."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of random subsets and clustering."})

    def __post_init__(self):
        super().__post_init__()
        check_at_least("seed", self.seed, 0)
