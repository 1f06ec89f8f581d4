"""Choices made from predictions: tasks for a target, sampling weights, groups of tasks, training rows."""

from .baselines import mean_cosines
from .choice import Choice
from .examples import ExampleScores, score_examples
from .groups.affinity import affinity_matrix, predicted_affinity
from .groups.grouping import Grouping, group_tasks, partition_loss, predicted_losses
from .groups.partition import coclustering, semidefinite_partition, spectral_partition
from .left_out import LeftOut
from .methods import mixture_selection, select_tasks
from .mixture import Mixture, optimize_mixture
from .problem import SelectionProblem
from .searches import backward_selection, exhaustive_selection, forward_selection, random_ensemble_selection
from .selection import Selection
from .selector import DataSelector
from .settings import GROUPING_METHODS, SELECTION_METHODS, GroupingSettings, SelectionSettings
from .subsets import calibration_subsets, mixed_subsets, random_subsets
from .verified_search import Verify, verified_selection

__all__ = [
    "GROUPING_METHODS",
    "SELECTION_METHODS",
    "Choice",
    "DataSelector",
    "ExampleScores",
    "Grouping",
    "GroupingSettings",
    "LeftOut",
    "Mixture",
    "Selection",
    "SelectionProblem",
    "SelectionSettings",
    "Verify",
    "affinity_matrix",
    "backward_selection",
    "calibration_subsets",
    "coclustering",
    "exhaustive_selection",
    "forward_selection",
    "group_tasks",
    "mean_cosines",
    "mixed_subsets",
    "mixture_selection",
    "optimize_mixture",
    "partition_loss",
    "predicted_losses",
    "predicted_affinity",
    "random_ensemble_selection",
    "random_subsets",
    "score_examples",
    "select_tasks",
    "semidefinite_partition",
    "spectral_partition",
    "verified_selection",
]
