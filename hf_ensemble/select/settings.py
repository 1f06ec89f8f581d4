"""Settings of selections and groupings, as the trainers and the command line take them."""

from dataclasses import dataclass, field
from typing import Any

from .._settings import Settings, check_at_least, check_flag, check_number, check_one_of
from ..errors import ConfigurationError

SELECTION_METHODS = (
    "forward",
    "backward",
    "exhaustive",
    "random_ensemble",
    "mixture",
    "all",
    "alone",
    "random",
    "gradient_similarity",
)
SELECTION_METRICS = ("loss", "accuracy", "answers")
# Rows that searches look at: 50 of each of a thousand tasks, see benchmarks/search_rows.
SEARCH_ROWS = 50_000
SEARCH_ROWS_HELP = {
    "help": "Training rows of all tasks together, and validation rows, that a search looks at: where there are more, "
    "it looks at an equal number of each task, and what it comes to is predicted from all rows. By default "
    f"{SEARCH_ROWS:,}; null for all rows."
}
AUTO_LENGTH = "auto"
# Lengths of trainings that go on which are chosen among; the first is that of adapters for each task alone.
LENGTHS = (1.0, 0.25, 0.5, 2.0)
# Optimizer steps of a training, at least, that is shorter than a whole one: it is rounded up to whole steps.
LEAST_STEPS = 4
GROUP_INITIALIZATIONS = ("fresh", "baseline")
GROUPING_METHODS = ("mixtures", "direct", "spectral", "semidefinite", "coclustering")


@dataclass
class SelectionSettings(Settings):
    """How auxiliary tasks are selected for a target.

    Raises:
        `ConfigurationError`: for values out of range.
    """

    selection_method: str = field(
        default="forward",
        metadata={
            "help": f"One of {', '.join(SELECTION_METHODS)}. The last four are baselines that ignore the predictions."
        },
    )
    max_auxiliary: int | None = field(
        default=None, metadata={"help": "Maximum number of auxiliary tasks. No limit by default."}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Maximum number of training rows of all auxiliary tasks. No limit by default."}
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum number of answer tokens of all auxiliary training rows. No limit by default."},
    )
    selection_metric: str = field(
        default="loss",
        metadata={
            "help": "Metric of the target to optimize: the predicted 'loss' or 'accuracy', or 'answers', the metric of "
            "answers that are generated with the predicted parameters of the best candidates in the model."
        },
    )
    verified_candidates: int = field(
        default=3,
        metadata={"help": "With selection_metric='answers': candidates of each step whose answers are generated."},
    )
    max_verified: int | None = field(
        default=None,
        metadata={
            "help": "With selection_metric='answers': maximum number of candidates in all whose answers are generated. "
            "No limit by default."
        },
    )

    search_rows: int | None = field(default=SEARCH_ROWS, metadata=SEARCH_ROWS_HELP)

    def __post_init__(self):
        check_one_of("selection_method", self.selection_method, SELECTION_METHODS)
        check_one_of("selection_metric", self.selection_metric, SELECTION_METRICS)
        for name in ("max_auxiliary", "max_examples", "max_tokens"):
            check_at_least(name, getattr(self, name), 0, optional=True)
        check_at_least("search_rows", self.search_rows, 1, optional=True)
        check_at_least("verified_candidates", self.verified_candidates, 1)
        check_at_least("max_verified", self.max_verified, 1, optional=True)
        if self.selection_metric == "answers" and self.selection_method != "forward":
            raise ConfigurationError(
                f"selection_metric='answers' verifies the steps of forward selection; found selection_method="
                f"{self.selection_method!r}. Set selection_method='forward', or another metric."
            )
        others = set(self.budgets()) - {"max_auxiliary"}
        if self.selection_method == "mixture" and (self.selection_metric != "loss" or others):
            found = [f"selection_metric={self.selection_metric!r}"] if self.selection_metric != "loss" else []
            found += [f"{name}={self.budgets()[name]}" for name in sorted(others)]
            raise ConfigurationError(
                f"selection_method='mixture' minimizes the loss under max_auxiliary alone; found {', '.join(found)}. "
                "Select the tasks by another method, then weight them with DataSelector.mixture."
            )
        super().__post_init__()

    def budgets(self) -> dict[str, int]:
        """The limits that are set, by name."""
        limits = {name: getattr(self, name) for name in ("max_auxiliary", "max_examples", "max_tokens")}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def select_arguments(self) -> dict[str, Any]:
        """Keyword arguments for [`DataSelector.select`]."""
        return {
            "method": self.selection_method,
            "search_rows": self.search_rows,
            **self.metric_arguments(),
            **self.budgets(),
        }

    def metric_arguments(self) -> dict[str, Any]:
        """The metric, and how candidates are verified where it is one of generated answers."""
        if self.selection_metric != "answers":
            return {"metric": self.selection_metric}
        verified = {"verified_candidates": self.verified_candidates, "max_verified": self.max_verified}
        return {"metric": self.selection_metric, **verified}

    def check_tasks(self, num_tasks: int) -> None:
        """Raise `ConfigurationError` for limits above the number of tasks."""
        _check_not_above("max_auxiliary", self.max_auxiliary, num_tasks)


@dataclass
class GroupingSettings(Settings):
    """How tasks are grouped.

    Raises:
        `ConfigurationError`: for values out of range.
    """

    num_groups: int | None = field(
        default=None,
        metadata={"help": "Number of groups, one adapter each. Chosen by predicted loss by default."},
    )
    max_groups: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of groups when the number is chosen. The number of tasks by default; of mixtures "
            "eight, or one for each task."
        },
    )
    grouping_method: str = field(default="direct", metadata={"help": f"One of {', '.join(GROUPING_METHODS)}."})
    group_cost: float = field(
        default=0.0,
        metadata={"help": "Minimum reduction of the mean loss, in nats, for one more group when the number is chosen."},
    )
    overlapping_groups: bool = field(
        default=False, metadata={"help": "Also train a group on tasks of other groups that help its own tasks."}
    )
    affinity_subsets: int = field(
        default=400, metadata={"help": "Number of random subsets that the affinity matrix is estimated from."}
    )
    compute_budget: float | None = field(
        default=None,
        metadata={
            "help": "With grouping_method='mixtures': maximum training cost of all adapters, in multiples of one "
            "adapter for all tasks, which is included where it is trained. By default the cheapest set of mixtures "
            "that is not told apart from the best one."
        },
    )
    group_initialization: str = field(
        default="fresh",
        metadata={
            "help": "Where the training of a group's adapter begins: 'fresh' where the adapter for all tasks begins, "
            "'baseline' where that one has ended; it then goes on for continued_length."
        },
    )
    # With None among the types the parser takes texts; as a value it is refused.
    continued_length: float | str | None = field(
        default=AUTO_LENGTH,
        metadata={
            "help": "With group_initialization='baseline': length of the trainings, in multiples of a whole one. By "
            "default ('auto') mixtures each have the best one of 0.25, 0.5, 1 and 2; it is 1 for other methods, for "
            "groups that are chosen one after the other, and where the training cannot be replayed."
        },
    )

    search_rows: int | None = field(default=SEARCH_ROWS, metadata=SEARCH_ROWS_HELP)

    def __post_init__(self):
        check_one_of("grouping_method", self.grouping_method, GROUPING_METHODS)
        check_one_of("group_initialization", self.group_initialization, GROUP_INITIALIZATIONS)
        self.continued_length = checked_length(self.continued_length)
        check_number("compute_budget", self.compute_budget, 1, optional=True)
        if self.grouping_method == "mixtures" and self.overlapping_groups:
            raise ConfigurationError(
                "overlapping_groups=True adds helpers to a partition; mixtures overlap by themselves. Leave it out, or "
                "set grouping_method='direct'."
            )
        if self.grouping_method != "mixtures" and self.compute_budget is not None:
            raise ConfigurationError(
                f"compute_budget={self.compute_budget} limits mixtures; the groups of grouping_method="
                f"{self.grouping_method!r} cost as much as their rows. Set grouping_method='mixtures', or leave it out."
            )
        for name in ("num_groups", "max_groups"):
            check_at_least(name, getattr(self, name), 1, optional=True)
        if None not in (self.num_groups, self.max_groups) and self.num_groups > self.max_groups:
            raise ConfigurationError(
                f"num_groups={self.num_groups} is more than max_groups={self.max_groups}, which limits the number "
                "where it is chosen. Leave one of them out."
            )
        check_at_least("search_rows", self.search_rows, 1, optional=True)
        check_at_least("affinity_subsets", self.affinity_subsets, 1)
        check_number("group_cost", self.group_cost, 0)
        check_flag("overlapping_groups", self.overlapping_groups)
        super().__post_init__()

    def continued_lengths(self) -> tuple[float, ...]:
        """Lengths of trainings that go on from the adapter for all tasks: that of all, or those to choose among."""
        if self.continued_length != AUTO_LENGTH:
            return (self.continued_length,)
        return LENGTHS if self.grouping_method == "mixtures" else LENGTHS[:1]

    def group_arguments(self) -> dict[str, Any]:
        """Keyword arguments for [`DataSelector.group`]."""
        return {
            "num_groups": self.num_groups,
            "method": self.grouping_method,
            "max_groups": self.max_groups,
            "group_cost": self.group_cost,
            "overlapping_groups": self.overlapping_groups,
            "affinity_subsets": self.affinity_subsets,
            "compute_budget": self.compute_budget,
            "group_initialization": self.group_initialization,
            "search_rows": self.search_rows,
        }

    def check_tasks(self, num_tasks: int) -> None:
        """Raise `ConfigurationError` for numbers of groups above the number of tasks."""
        _check_not_above("num_groups", self.num_groups, num_tasks)
        _check_not_above("max_groups", self.max_groups, num_tasks)


def checked_length(value: float | str) -> float | str:
    """A length, which may be given as text, as on a command line, or `"auto"`."""
    if value == AUTO_LENGTH:
        return value
    try:
        found = float(value) if isinstance(value, str) else value
    except ValueError:
        raise ConfigurationError(f"continued_length has to be a number or 'auto', found {value!r}.") from None
    check_number("continued_length", found, 0, above=True)
    return found


def _check_not_above(name: str, value: int | None, num_tasks: int) -> None:
    if value is not None and value > num_tasks:
        raise ConfigurationError(f"{name}={value} is more than the {num_tasks} tasks. Lower it or leave it unset.")
