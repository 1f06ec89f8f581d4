"""What cannot be asked of captured gradients: said before anything is predicted."""

import numpy as np
import pytest

from helpers.feature_tables import RUNS, six_tasks
from hf_ensemble import DataSelector, SubsetEstimator, draw_choice
from hf_ensemble.errors import HfEnsembleError
from hf_ensemble.select.subsets import mixed_subsets, random_subsets

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def selector():
    return DataSelector(SubsetEstimator(*six_tasks(), observed_runs=RUNS))


SELECT = {
    "target is unknown": ({"target": "z"}, r"Unknown targets \['z'\]; the tasks are"),
    "target is a number": ({"target": 3}, "Expected targets as a list of names, found 3"),
    "targets are numbers": ({"target": [1, 2]}, "Expected targets as a list of names"),
    "targets repeat": ({"target": ["a", "a"]}, "Expected different targets.*Name each once"),
    "no target": ({"target": []}, "Expected at least one target, found none"),
    "weight of a target is text": ({"target": {"a": "1"}}, "weight of the target 'a' .* number above 0, found '1'"),
    "weight of a target is 0": ({"target": {"a": 0}}, "number above 0, found 0"),
    "weight of a target is NaN": ({"target": {"a": NAN}}, "number above 0, found nan"),
    "method is unknown": ({"method": "best"}, "selection_method has to be one of"),
    "method is None": ({"method": None}, "selection_method has to be one of .*found None"),
    "metric is unknown": ({"metric": "f1"}, "selection_metric has to be one of"),
    "budget is text": ({"max_auxiliary": "2"}, "max_auxiliary has to be an integer .* found '2'"),
    "budget is a float": ({"max_examples": 10.0}, "max_examples has to be an integer"),
    "budget is True": ({"max_tokens": True}, "max_tokens has to be an integer"),
    "budget is above the tasks": ({"max_auxiliary": 7}, "max_auxiliary=7 is more than the 6 tasks. Lower it"),
    "include is unknown": ({"include": ["z"]}, r"Unknown tasks to include \['z'\]"),
    "include is a number": ({"include": 3}, "Expected tasks to include as a list of names"),
    "exclude is unknown": ({"exclude": "z"}, r"Unknown tasks to exclude \['z'\]"),
    "exclude is None in a list": ({"exclude": [None]}, "Expected tasks to exclude as a list of names"),
    "both included and excluded": ({"include": ["b"], "exclude": ["b"]}, "both included and excluded"),
    "option is unknown": ({"speed": 1}, r"method='forward' takes no \['speed'\]; it takes no further arguments"),
    "option of another method": ({"method": "all", "num_subsets": 5}, r"method='all' takes no \['num_subsets'\]"),
    "no subsets": ({"method": "random_ensemble", "num_subsets": 0}, "num_subsets has to be a positive integer"),
    "subsets are text": ({"method": "random_ensemble", "num_subsets": "9"}, "num_subsets has to be a positive"),
    "subset size is 0": ({"method": "random_ensemble", "subset_size": 0}, "subset_size has to be a positive integer"),
    "seed is text": ({"method": "random_ensemble", "seed": "x"}, "seed has to be an integer of at least 0"),
    "seed is negative": ({"method": "random_ensemble", "seed": -1}, "seed has to be an integer of at least 0"),
    "threshold is text": ({"method": "random_ensemble", "threshold": "x"}, "threshold has to be a finite number"),
    "threshold is NaN": ({"method": "random_ensemble", "threshold": NAN}, "threshold has to be a finite number"),
    "size is text": ({"method": "random", "size": "2"}, "size has to be an integer of at least 0"),
    "size is negative": ({"method": "random", "size": -2}, "size has to be an integer of at least 0"),
    "random option is unknown": ({"method": "random", "speed": 1}, r"takes no \['speed'\]; it takes \['seed'\]"),
    "similarity without gradients": ({"method": "gradient_similarity"}, "needs the gradients.*from_store"),
    "cap is text": ({"method": "mixture", "caps": "x"}, "caps has to be a finite number"),
}
MIXTURE = {
    "target is unknown": (("z",), {}, r"Unknown targets \['z'\]"),
    "cap is text": (("a",), {"caps": "0.5"}, "cap of 'a'.* finite number of at least 0 and at most 1, found '0.5'"),
    "cap is NaN": (("a",), {"caps": NAN}, "found nan"),
    "cap is 2": (("a",), {"caps": 2}, "at most 1, found 2"),
    "cap of an unknown task": (("a",), {"caps": {"z": 1.0}}, r"Unknown tasks in caps \['z'\]"),
    "no iteration": (("a",), {"max_iterations": 0}, "max_iterations has to be a positive integer"),
    "option is unknown": (("a",), {"speed": 1}, r"mixture takes no \['speed'\]; it takes \['caps'"),
}
GROUP = {
    "no group": ({"num_groups": 0}, "num_groups has to be a positive integer or None"),
    "groups are text": ({"num_groups": "2"}, "num_groups has to be a positive integer or None, found '2'"),
    "more groups than tasks": ({"num_groups": 7}, "num_groups=7 is more than the 6 tasks"),
    "method is unknown": ({"method": "kmeans"}, "grouping_method has to be one of"),
    "cost is text": ({"group_cost": "x"}, "group_cost has to be a finite number"),
    "overlap is text": ({"overlapping_groups": "no"}, "overlapping_groups has to be True or False"),
    "no subsets": ({"affinity_subsets": 0}, "affinity_subsets has to be a positive integer"),
    "no row to search in": ({"search_rows": 0}, "search_rows has to be a positive integer or None"),
    "no candidates": ({"num_candidates": 0}, "num_candidates has to be a positive integer"),
    "subset size is 0": ({"subset_size": 0}, "subset_size has to be a positive integer or None"),
    "seed is negative": ({"seed": -1}, "seed has to be an integer of at least 0"),
    "option is unknown": ({"speed": 1}, r"group takes no \['speed'\]; it takes \['num_candidates'"),
}
SCORES = {
    "target is unknown": (("z",), r"Unknown targets \['z'\]"),
    "tasks are unknown": (("a", ["z"]), r"Unknown tasks \['z'\]"),
    "tasks are a number": (("a", 3), "Expected tasks as a list of names, found 3"),
    "no tasks": (("a", []), "not all zero"),
    "weight is text": (("a", {"a": "1"}), "weight of 'a' has to be a finite number, found '1'"),
    "weight is negative": (("a", {"a": 1.0, "b": -1.0}), "weights from 0 to 1"),
}
PREDICT = {
    "no subset": (([],), "Expected a list of subsets, each a list of task names, found"),
    "subsets are a name": (("abc",), "Expected a list of subsets"),
    "subsets are a number": ((3,), "Expected a list of subsets"),
    "subset is empty": (([["a"], []],), "Mixture 1 is empty"),
    "task is unknown": (([["z"]],), r"Unknown tasks \['z'\]"),
    "task is a number": (([[0]],), "Expected tasks as a list of names"),
    "task repeats": (([["a", "a"]],), "Expected different tasks"),
    "weight is NaN": (([{"a": NAN}],), "weight of 'a' has to be a finite number, found nan"),
    "weight is text": (([{"a": "1"}],), "weight of 'a' has to be a finite number, found '1'"),
    "weight is negative": (([{"a": -1.0}],), "Mixture 0 has a negative weight"),
}
ARRAYS = {
    "mixtures are text": (("abc",), "Expected mixtures as an array of numbers, found 'abc'"),
    "mixtures are ragged": (([[1, 0], [1]],), "Expected mixtures as an array of numbers"),
    "mixtures of other tasks": ((np.ones((1, 2)),), "mixtures over 6 tasks, found shape"),
    "mixtures hold NaN": ((np.full((1, 6), NAN),), "Expected finite mixture weights"),
    "scale is negative": ((np.ones((1, 6)), -1.0), "l2 has to be positive"),
    "scale is NaN": ((np.ones((1, 6)), NAN), "Expected finite l2"),
    "scale is text": ((np.ones((1, 6)), "1"), "l2_scale as a number or one for each mixture, found '1'"),
}
CALLS = [
    *((name, "select", (), {"target": "a", **given}, message) for name, (given, message) in SELECT.items()),
    *((name, "mixture", args, given, message) for name, (args, given, message) in MIXTURE.items()),
    *((name, "group", (), given, message) for name, (given, message) in GROUP.items()),
    *((name, "score_examples", args, {}, message) for name, (args, message) in SCORES.items()),
    *((name, "predict_subsets", args, {}, message) for name, (args, message) in PREDICT.items()),
    *((name, "predict", args, {}, message) for name, (args, message) in ARRAYS.items()),
    ("no subsets", "affinity", (), {"affinity_subsets": 0}, "affinity_subsets has to be a positive integer"),
    ("option is unknown", "affinity", (), {"speed": 1}, r"affinity takes no \['speed'\]"),
]


@pytest.mark.parametrize(
    ("method", "arguments", "options", "message"),
    [pytest.param(*call, id=f"{call[0]}-{name}") for name, *call in CALLS],
)
def test_questions_are_refused(selector, method, arguments, options, message):
    of = selector.estimator if method.startswith("predict") else selector
    with pytest.raises(HfEnsembleError, match=message):
        getattr(of, method)(*arguments, **options)


ESTIMATORS = {
    "no components": ({"num_components": 0}, "num_components has to be a positive integer"),
    "components are text": ({"num_components": "400"}, "num_components has to be a positive integer, found '400'"),
    "components are True": ({"num_components": True}, "num_components has to be a positive integer, found True"),
    "run is a dict": ({"observed_runs": [{"a": 1.0}]}, "observed_runs as a list of ObservedRun"),
    "runs are one run": ({"observed_runs": RUNS[0]}, "observed_runs as a list of ObservedRun"),
    "weights are a list": ({"sampling_weights": [1.0]}, "sampling_weights as a dict by name"),
    "weight is text": ({"sampling_weights": {"a": "1"}}, "sampling weight of 'a' .* number above 0, found '1'"),
    "weight is 0": ({"sampling_weights": {"a": 0.0}}, "number above 0, found 0.0"),
    "weight of an unknown task": ({"sampling_weights": {"z": 1.0}}, r"Unknown tasks \['z'\]"),
    "recipe is a dict": ({"recipe": {"batch_size": 4}}, "Expected recipe to be a TrainingRecipe"),
}


@pytest.mark.parametrize("bad", ESTIMATORS)
def test_estimators_are_refused(bad):
    options, message = ESTIMATORS[bad]
    with pytest.raises(HfEnsembleError, match=message):
        SubsetEstimator(*six_tasks(), **options)


@pytest.mark.parametrize(
    ("share", "tasks", "message"),
    [
        ("0.1", None, "share has to be a finite number of at least 0 and at most 1, found '0.1'"),
        (NAN, None, "found nan"),
        (2, None, "at most 1, found 2"),
        (0.1, ["z"], r"Unknown tasks \['z'\]"),
        (0.1, 3, "Expected tasks as a list of names"),
    ],
)
def test_shares_of_rows_are_refused(selector, share, tasks, message):
    with pytest.raises(HfEnsembleError, match=message):
        selector.score_examples("a").worst(share, tasks)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: mixed_subsets(4, 0), "num_subsets has to be a positive integer, found 0"),
        (lambda: mixed_subsets(4, "3"), "num_subsets has to be a positive integer, found '3'"),
        (lambda: mixed_subsets(4, 3, []), "sizes of subsets as a list of integers, found"),
        (lambda: mixed_subsets(4, 3, 2), "sizes of subsets as a list of integers, found 2"),
        (lambda: mixed_subsets(4, 3, [0]), "Each size of a subset has to be a positive integer, found 0"),
        (lambda: mixed_subsets(4, 3, ["2"]), "Each size of a subset has to be a positive integer, found '2'"),
        (lambda: mixed_subsets(4, 3, None, -1), "seed has to be an integer of at least 0"),
        (lambda: random_subsets(4, -1, 3), "size of a subset has to be an integer of at least 0"),
        (lambda: random_subsets(4, 2, 1.5), "number of subsets has to be an integer"),
        (lambda: draw_choice("choice.json", "pictures"), "Expected a Selection, Mixture, Grouping or ExampleScores"),
        (lambda: draw_choice(None, "pictures"), "Expected a Selection, Mixture, Grouping or ExampleScores"),
    ],
)
def test_draws_are_refused(draw, message):
    with pytest.raises(HfEnsembleError, match=message):
        draw()


def test_pictures_of_unknown_formats_are_refused(selector, tmp_path):
    with pytest.raises(HfEnsembleError, match="Each suffix of a picture has to be one of .*found 'exe'"):
        draw_choice(selector.select("a"), tmp_path, ("png", "exe"))
    assert list(tmp_path.iterdir()) == []


def test_one_name_stands_for_a_list(selector):
    assert selector.select("a", include="b", exclude="c").tasks[0] == "b"
