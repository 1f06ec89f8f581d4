"""Settings of another kind or out of range: refused when they are made."""

import pytest
from transformers import TrainingArguments

from helpers.trainers import SMALL
from hf_ensemble import (
    CaptureConfig,
    EnsembleConfig,
    EnsembleSFTConfig,
    GradientCaptureCallback,
    ObservedRun,
    SelectionConfig,
    SelectionSFTConfig,
    TaskSet,
    TrainingRecipe,
)
from hf_ensemble._settings import checked_shard
from hf_ensemble.capture import capture_gradients
from hf_ensemble.errors import ConfigurationError, HfEnsembleError
from hf_ensemble.select import GroupingSettings, SelectionSettings

NAN, INF = float("nan"), float("inf")
PAIR = [{"prompt": "1 + 1 =", "completion": " 2"}]
POSITIVE = "has to be a positive integer"

CAPTURE = {
    "projection_dim": ["abc", "64", 0, -1, 1.5, True, NAN, [64]],
    "projection_seed": ["0", -1, None, 0.5],
    "batch_size": ["8", 0, None, True, 2.0],
    "max_batch_tokens": ["8", 0, -5],
    "max_length": ["8", 0, False],
    "margin": ["x", None, 3],
    "preconditioner": ["lion", None, ["adam"]],
    "feature_dtype": ["int8", None],
    "non_finite": ["drop", True],
    "mixed_precision": ["fp8", None],
}
SELECTION = {
    "selection_method": ["best", None, 1],
    "selection_metric": ["f1", None],
    "max_auxiliary": ["2", -1, 1.5, True, NAN],
    "max_examples": ["2", -1, INF],
    "max_tokens": ["2", -1],
    "search_rows": ["20000", 0, -1, 1.5, True],
}
GROUPING = {
    "grouping_method": ["kmeans", None],
    "num_groups": ["2", 0, True, 2.0],
    "max_groups": ["2", 0],
    "group_cost": ["0.1", -0.1, NAN, INF, None, True],
    "overlapping_groups": ["yes", 1, None],
    "affinity_subsets": ["20", 0, None],
    "search_rows": ["20000", 0, NAN, True],
}
RUN = {
    "capture_batch_size": ["8", 0],
    "capture_batch_tokens": ["8", 0],
    "num_components": ["8", 0, None, True],
    "calibration_runs": ["1", -1, None],
    "task_sampling": ["equal", None],
    "sampling_temperature": [0.0, NAN, "2"],
    "sample_with_replacement": ["yes", 1, None],
    "task_loss_weighting": ["rows", None],
    "coba_window": [1, "4", None],
    "overwrite_run": ["yes", 1, None],
    "save_report": ["no", 0, None],
    "learning_rate": [NAN, INF, 0.0, -1e-3, "fast"],
    "num_train_epochs": [0, -1.0, NAN, "three"],
    "max_steps": ["10", 1.5],
    "per_device_train_batch_size": [0, -4, "4"],
    "per_device_eval_batch_size": [0, "4"],
    "gradient_accumulation_steps": [0, "2"],
    "seed": [-1, "0", None],
}
ENSEMBLE = {
    "train_baseline": ["no", 0, None],
    "sequential_groups": ["no", 0, None],
    "concurrent_groups": [0, "0", "-2", "all", None, True, 2.0],
    "ensemble_weights": ["x", None],
    "boosting_steps": ["1", -1, None, True],
    "boosting_method": ["lasso", None],
    "boosting_target": ["row", None],
}
CONFIGS = {
    CaptureConfig: CAPTURE,
    SelectionSettings: SELECTION,
    GroupingSettings: GROUPING,
    EnsembleConfig: {**RUN, **ENSEMBLE, "num_groups": ["2"], "projection_dim": ["abc"]},
    EnsembleSFTConfig: {"max_length": [0, "8"], **ENSEMBLE, "margin": ["x"]},
    SelectionConfig: {"meta_initialization": ["yes", 1], "max_auxiliary": ["2"]},
    SelectionSFTConfig: {"meta_initialization": [None], "selection_metric": ["f1"]},
}


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        pytest.param(config, name, value, id=f"{config.__name__}-{name}-{value!r}")
        for config, fields in CONFIGS.items()
        for name, values in fields.items()
        for value in values
    ],
)
def test_settings_are_refused(config, name, value, tmp_path):
    others = {}
    if issubclass(config, TrainingArguments):
        others = {**SMALL, "output_dir": str(tmp_path), "bf16": False}
    # transformers and trl check a few of their own arguments, by ValueErrors that name them.
    own = name not in ("learning_rate", "num_train_epochs", "max_steps", "seed") and not name.startswith("per_device")
    with pytest.raises(HfEnsembleError if own else (HfEnsembleError, ValueError, TypeError)) as caught:
        config(**{**others, name: value})
    said = str(caught.value)
    if isinstance(caught.value, HfEnsembleError):
        assert name.removeprefix("capture_").replace("batch_tokens", "max_batch_tokens") in said or name in said
        assert "has to be" in said and f"found {value!r}" in said


RUNS = {
    "no mixture": (({}, {"a": 1.0}), "at least one task, found the mixture {}"),
    "weights of 0": (({"a": 0.0}, {"a": 1.0}), "at least one task"),
    "weight is text": (({"a": "1"}, {"a": 1.0}), "weight of 'a' .* finite number of at least 0, found '1'"),
    "weight is NaN": (({"a": NAN}, {"a": 1.0}), "found nan"),
    "weight is negative": (({"a": -1.0}, {"a": 1.0}), "found -1.0"),
    "mixture is a list": ((["a"], {"a": 1.0}), "mixture of an observed run as a dict by name, found"),
    "losses are a list": (({"a": 1.0}, [0.5]), "losses of an observed run as a dict by name"),
    "loss is text": (({"a": 1.0}, {"a": "0.5"}), "loss of 'a' .* found '0.5'"),
    "loss is negative": (({"a": 1.0}, {"a": -0.5}), "loss of 'a' .* of at least 0, found -0.5"),
    "loss is infinite": (({"a": 1.0}, {"a": INF}), "found inf"),
}


@pytest.mark.parametrize("bad", RUNS)
def test_observed_runs_are_refused(bad):
    arguments, message = RUNS[bad]
    with pytest.raises(HfEnsembleError, match=message):
        ObservedRun(*arguments)


RECIPES = {
    "no step": (([], 4), "learning rate of at least one step"),
    "rates are text": ((["1e-3"], "4"), "positive integer, found '4'"),
    "rate is NaN": (([NAN], 4), "none negative and not all zero"),
    "rate is negative": (([-1e-3], 4), "none negative"),
    "rates are no numbers": ((["fast"], 4), "learning rate of at least one step"),
    "batch is 0": (([1e-3], 0), "batch_size has to be a positive integer, found 0"),
    "parameters are text": (([1e-3], 4, "9"), "num_parameters has to be a finite number above 0 or None"),
    "gain is NaN": (([1e-3], 4, None, NAN), "input_gain has to be a finite number of at least 0"),
}


@pytest.mark.parametrize("bad", RECIPES)
def test_recipes_are_refused(bad):
    arguments, message = RECIPES[bad]
    with pytest.raises(HfEnsembleError, match=message):
        TrainingRecipe(*arguments)


def tasks():
    return TaskSet.from_datasets({"a": PAIR}, {"a": PAIR})


CALLBACKS = {
    "tasks are a dict": (lambda: ({"a": PAIR}, "x"), {}, "Expected tasks to be a TaskSet, found a dict.*from_datasets"),
    "config is a dict": (lambda: (tasks(), "x"), {"config": {"batch_size": 2}}, "config to be a CaptureConfig"),
    "when is text": (lambda: (tasks(), "x"), {"when": "always"}, "when has to be 'train_begin'.*found 'always'"),
    "when is 0": (lambda: (tasks(), "x"), {"when": 0}, "positive number of steps, found 0"),
    "when is True": (lambda: (tasks(), "x"), {"when": True}, "found True"),
    "when is None": (lambda: (tasks(), "x"), {"when": None}, "found None"),
    "overwrite is text": (lambda: (tasks(), "x"), {"overwrite": "no"}, "overwrite has to be True or False"),
    "folder is None": (lambda: (tasks(), None), {}, "Expected output_dir as a path, found None"),
}


@pytest.mark.parametrize("bad", CALLBACKS)
def test_callbacks_are_refused(bad):
    arguments, options, message = CALLBACKS[bad]
    with pytest.raises(HfEnsembleError, match=message):
        GradientCaptureCallback(*arguments(), **options)


CAPTURES = {
    "model is a name": (lambda: ("gpt2", tasks()), {}, "Expected model to be a Module, found 'gpt2'"),
    "tasks are rows": (lambda: (None, PAIR), {}, "Expected (model|tasks) to be"),
    "config is text": (lambda: (None, tasks(), "x"), {}, "to be a"),
}


@pytest.mark.parametrize("bad", CAPTURES)
def test_captures_are_refused(bad, tmp_path):
    arguments, options, message = CAPTURES[bad]
    with pytest.raises(HfEnsembleError, match=message):
        capture_gradients(*arguments(), output_dir=tmp_path, **options)


@pytest.mark.parametrize(
    "shard", ["3/3", "-1/8", "0/8/2", "1", "a/b", 3, (0,), (0, 0), (-1, 2), (0.9, 8), (0, 8.0)], ids=repr
)
def test_parts_are_whole_numbers_that_are_counted_from_zero(shard):
    with pytest.raises(ConfigurationError, match="Expected shard as INDEX/COUNT, 0/8 to 7/8 .*found") as refused:
        checked_shard("shard", shard)
    assert str(refused.value).endswith(f"found {shard!r}.")
