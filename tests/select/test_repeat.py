"""A saved choice can be made again from its JSON and the store, and from no other store."""

import json

import pytest

from helpers.captures import capture
from hf_ensemble.errors import RecordError, StoreMismatchError
from hf_ensemble.estimate import ObservedRun
from hf_ensemble.select import DataSelector, ExampleScores, Grouping, Mixture, Selection

CHOICES = {
    "forward": (Selection, lambda selector: selector.select("sums", max_auxiliary=1)),
    "random ensemble": (
        Selection,
        lambda selector: selector.select("sums", "random_ensemble", num_subsets=20, seed=3, metric="accuracy"),
    ),
    "several": (Selection, lambda selector: selector.select({"sums": 2.0, "diffs": 1.0}, "backward", include=["sums"])),
    "weights": (Selection, lambda selector: selector.select("sums", "mixture", caps=0.5)),
    "similarity": (Selection, lambda selector: selector.select("sums", "gradient_similarity", max_auxiliary=1)),
    "mixture": (Mixture, lambda selector: selector.mixture(["sums", "diffs"], caps={"more_sums": 0.5})),
    "groups": (Grouping, lambda selector: selector.group(None, affinity_subsets=20, seed=2)),
    "spectral": (Grouping, lambda selector: selector.group(2, "spectral", affinity_subsets=20)),
    "rows": (ExampleScores, lambda selector: selector.score_examples("sums", {"sums": 1.0, "diffs": 0.5})),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    store = capture(folder / "own")
    return store, capture(folder / "other", projection_seed=1)


def test_losses_that_are_unknown_stay_so(stores, tmp_path):
    store, _ = stores
    runs = [ObservedRun({"sums": 1.0, "diffs": 1.0}, {"sums": 2.0, "diffs": float("nan")}, {"diffs": float("nan")})]
    DataSelector.from_store(store, None, 20, runs).select("sums", max_auxiliary=1).save(tmp_path / "choice.json")
    choice = Selection.load(tmp_path / "choice.json")
    assert DataSelector.for_choice(store, choice).repeat(choice) == choice


@pytest.mark.parametrize("kind", CHOICES)
def test_a_choice_is_made_again_from_its_file(stores, tmp_path, kind):
    store, other = stores
    runs = [ObservedRun({"sums": 1.0, "diffs": 1.0}, {"sums": 2.0, "diffs": 2.5})]
    selector = DataSelector.from_store(store, None, 20, runs, {"sums": 2.0})
    choice_class, choose = CHOICES[kind]
    choice = choose(selector)
    choice.save(tmp_path / "choice.json")
    loaded = choice_class.load(tmp_path / "choice.json")
    assert loaded == choice
    again = DataSelector.for_choice(store.folder, loaded)
    assert again.repeat(loaded) == choice
    with pytest.raises(StoreMismatchError, match=r"made from other features: features.train: found"):
        DataSelector.for_choice(other, loaded)
    with pytest.raises(StoreMismatchError, match="made from other features"):
        DataSelector.from_store(other).repeat(loaded)


def test_other_tasks_of_the_same_store_are_other_features(stores):
    store, _ = stores
    choice = DataSelector.from_store(store).select("sums")
    with pytest.raises(StoreMismatchError, match="task_names"):
        DataSelector.from_store(store, ["sums", "diffs"]).repeat(choice)


@pytest.mark.parametrize("kind", ["forward", "mixture", "groups", "rows"])
def test_choices_are_versioned_records(stores, tmp_path, kind):
    choice_class, choose = CHOICES[kind]
    choice = choose(DataSelector.from_store(stores[0], None, 20))
    choice.save(tmp_path / "choice.json")
    data = json.loads((tmp_path / "choice.json").read_text())
    assert data["format"] == choice_class.format and data["format_version"] == choice_class.format_version
    assert choice.summary and choice.provenance["num_components"] == 20
    for other in {own for own, _ in CHOICES.values()} - {choice_class}:
        with pytest.raises(RecordError, match=f"has format '{choice_class.format}'; expected '{other.format}'"):
            other.load(tmp_path / "choice.json")
    newer = choice_class.format_version + 1
    (tmp_path / "choice.json").write_text(json.dumps({**data, "format_version": newer}))
    with pytest.raises(RecordError, match=f"has format version {newer}, this release reads up to {newer - 1}"):
        choice_class.load(tmp_path / "choice.json")
