"""Arguments that say how often each of several tasks is trained on, and how much its loss counts."""

import json
from dataclasses import dataclass, field

from ..._settings import Settings, check_at_least, check_flag, check_number, check_one_of, checked_mapping
from ...errors import ConfigurationError
from ...tasks.sampling import LOSS_WEIGHTINGS, TASK_SAMPLINGS

# Orders of the rows that drawing them by weight leaves open.
ORDERS_OF_DRAWN_ROWS = ("random", "group_by_length")


@dataclass
class BalancingArguments(Settings):
    """How often each of several tasks is trained on, and how much its loss counts."""

    task_sampling: str = field(
        default="proportional",
        metadata={
            "help": "How often a training on several tasks draws rows of each: 'proportional' to its number of rows "
            "(all rows once an epoch), 'uniform' (each task equally often), or 'temperature' (in proportion to the "
            "number of rows to the power 1 / sampling_temperature). An epoch ends when the first task is exhausted."
        },
    )
    sampling_temperature: float = field(
        default=2.0,
        metadata={"help": "T of task_sampling='temperature': 1 is proportional, a large one uniform."},
    )
    sampling_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": "How much more often than that a task's rows are drawn, as JSON: '{\"gsm8k\": 2.0}'. 1 for tasks "
            "left out."
        },
    )
    sample_with_replacement: bool = field(
        default=False,
        metadata={
            "help": "Draw each row independently of the others. By default every row of a task is used before any is "
            "used again."
        },
    )
    task_loss_weighting: str = field(
        default="tokens",
        metadata={
            "help": "What a training step on several tasks averages its loss over: 'tokens' (rows, for a classifier), "
            "as the parent class does; 'tasks', the mean of the step's tasks, each averaged over its own tokens "
            "(MFTCoder); or 'convergence', the same with weights by how the tasks' evaluation losses converge (CoBa), "
            "which needs eval_strategy."
        },
    )
    coba_window: int = field(
        default=4,
        metadata={
            "help": "Last evaluations that task_loss_weighting='convergence' fits slopes to. Weights are equal for the "
            "first half of them."
        },
    )

    def __post_init__(self):
        check_one_of("task_sampling", self.task_sampling, TASK_SAMPLINGS)
        check_number("sampling_temperature", self.sampling_temperature, 0, above=True)
        check_flag("sample_with_replacement", self.sample_with_replacement)
        check_one_of("task_loss_weighting", self.task_loss_weighting, LOSS_WEIGHTINGS)
        check_at_least("coba_window", self.coba_window, 2)
        if isinstance(self.sampling_weights, str):
            try:
                self.sampling_weights = json.loads(self.sampling_weights)
            except ValueError as error:
                raise ConfigurationError(
                    f"Expected sampling_weights as JSON by task, found {self.sampling_weights!r:.80} ({error})."
                ) from error
        for task, weight in checked_mapping("sampling_weights", self.sampling_weights or {}).items():
            check_number(f"sampling_weights of {task!r}", weight, 0, above=True)
        super().__post_init__()

    def check_order(self, draws_by_weight: bool) -> None:
        """Refuse an order of all rows where rows are drawn.

        Args:
            draws_by_weight (`bool`): whether rows of some tasks are drawn more often than others'.

        Raises:
            `ConfigurationError`: for a sampling strategy that does not go with drawn rows.
        """
        draws = draws_by_weight or self.task_sampling != "proportional" or self.sample_with_replacement
        if draws and self.train_sampling_strategy not in ORDERS_OF_DRAWN_ROWS:
            raise ConfigurationError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} orders all rows, and rows are drawn by "
                "their task's weight or with replacement: expected one of "
                f"{ORDERS_OF_DRAWN_ROWS}. Leave it out, or task_sampling, the weights and sample_with_replacement."
            )
