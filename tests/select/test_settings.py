"""Settings of selections and groupings: alone, mixed into a trainer's arguments, and as the selector takes them."""

import inspect
from dataclasses import asdict, dataclass, fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from helpers.feature_tables import world
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import DataSelector, GroupingSettings, SelectionSettings

SETTINGS = [SelectionSettings, GroupingSettings]


@dataclass
class MixedArguments(SelectionSettings, GroupingSettings, TrainingArguments):
    pass


def test_settings_mix_into_training_arguments(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--max_auxiliary", "3", "--num_groups", "2"]
    (parsed,) = HfArgumentParser(MixedArguments).parse_args_into_dataclasses(flags)
    assert parsed.max_auxiliary == 3 and parsed.num_groups == 2 and parsed.affinity_subsets == 400
    # TrainingArguments' own checks ran as well.
    assert parsed.device.type == "cpu" and parsed.report_to == []
    with pytest.raises(ConfigurationError, match="grouping_method has to be one of"):
        MixedArguments(output_dir=str(tmp_path), use_cpu=True, grouping_method="kmeans")


@pytest.mark.parametrize("settings", SETTINGS)
def test_fields_explain_themselves_and_are_not_training_arguments(settings):
    own = fields(settings)
    assert own and all(field.metadata["help"] for field in own)
    assert not {field.name for field in own} & {field.name for field in fields(TrainingArguments)}
    (parsed,) = HfArgumentParser(settings).parse_args_into_dataclasses([])
    assert parsed == settings()


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (SelectionSettings, {"selection_method": "best"}, r"selection_method has to be one of \('forward'"),
        (SelectionSettings, {"selection_metric": "f1"}, "selection_metric has to be one of"),
        (SelectionSettings, {"max_examples": -1}, "max_examples has to be an integer of at least 0 or None, found -1"),
        (SelectionSettings, {"max_tokens": 1.5}, "max_tokens has to be an integer of at least 0 or None, found 1.5"),
        (GroupingSettings, {"grouping_method": "kmeans"}, "grouping_method has to be one of"),
        (GroupingSettings, {"max_groups": True}, "max_groups has to be a positive integer or None, found True"),
        (GroupingSettings, {"affinity_subsets": 0}, "affinity_subsets has to be a positive integer, found 0"),
        (GroupingSettings, {"group_cost": -0.1}, "group_cost has to be a finite number of at least 0, found -"),
        (
            GroupingSettings,
            {"group_cost": float("nan")},
            "group_cost has to be a finite number .* found nan",
        ),
    ],
)
def test_values_out_of_range_are_refused(settings, values, message):
    with pytest.raises(ConfigurationError, match=message):
        settings(**values)


@pytest.mark.parametrize(
    ("settings", "value"),
    [(SelectionSettings, "max_auxiliary"), (GroupingSettings, "num_groups"), (GroupingSettings, "max_groups")],
)
def test_numbers_above_the_number_of_tasks_are_refused(settings, value):
    settings(**{value: 3}).check_tasks(3)
    settings().check_tasks(1)
    with pytest.raises(ConfigurationError, match=f"{value}=4 is more than the 3 tasks"):
        settings(**{value: 4}).check_tasks(3)


@pytest.mark.parametrize(("settings", "method"), [(SelectionSettings, "select"), (GroupingSettings, "group")])
def test_the_selector_has_the_same_arguments_and_defaults(settings, method):
    parameters = inspect.signature(getattr(DataSelector, method)).parameters
    names = {"selection_method": "method", "selection_metric": "metric", "grouping_method": "method"}
    for name, default in asdict(settings()).items():
        # How long trainings go on is the selector's own.
        if name != "continued_length":
            assert parameters[names.get(name, name)].default == default, name


def test_settings_are_what_the_selector_takes():
    selector = DataSelector(SubsetEstimator(*world()))
    settings = SelectionSettings("backward", max_auxiliary=1, max_examples=500, selection_metric="accuracy")
    selection = selector.select("a", **settings.select_arguments())
    assert selection.method == "backward" and len(selection.auxiliary) <= 1
    own = {key: value for key, value in selection.settings.items() if key not in ("estimator", "include", "exclude")}
    assert own == {"metric": "accuracy", "max_auxiliary": 1, "max_examples": 500, "search_rows": 50_000}
    grouping = selector.group(**GroupingSettings(2, grouping_method="spectral", affinity_subsets=20).group_arguments())
    assert len(grouping.groups) == 2 and grouping.method == "spectral" and grouping.settings["affinity_subsets"] == 20
