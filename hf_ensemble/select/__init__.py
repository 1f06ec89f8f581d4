"""Choices made from predictions: tasks for a target, shares of tasks, tasks in groups."""

from .affinity import affinity_matrix, predicted_affinity
from .examples import ExampleScores, score_examples
from .grouping import Grouping, group_tasks, partition_loss
from .methods import SELECTION_METHODS, mixture_selection, select_tasks
from .mixture import Mixture, optimise_mixture
from .partition import semidefinite_partition, spectral_partition
from .sampling import calibration_subsets, mixed_subsets, random_subsets
from .selection import Selection, forward_selection, random_ensemble_selection
from .selector import DataSelector

__all__ = [
    "SELECTION_METHODS",
    "DataSelector",
    "ExampleScores",
    "Grouping",
    "Mixture",
    "Selection",
    "affinity_matrix",
    "calibration_subsets",
    "forward_selection",
    "group_tasks",
    "mixed_subsets",
    "mixture_selection",
    "optimise_mixture",
    "partition_loss",
    "predicted_affinity",
    "random_ensemble_selection",
    "random_subsets",
    "score_examples",
    "select_tasks",
    "semidefinite_partition",
    "spectral_partition",
]
