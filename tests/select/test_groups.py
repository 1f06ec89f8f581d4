"""Planted groups, and groups that overlap."""

import numpy as np
import pytest

from hf_ensemble.cli.tables import group_curve_table
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.select import DataSelector, coclustering, partition_loss
from hf_ensemble.select.groups.direct_search import add_helpers
from hf_ensemble.select.groups.group_losses import GroupLosses, group_masks
from hf_ensemble.store import FeatureTable

METHODS = ("direct", "spectral", "semidefinite", "coclustering")


def planted(seed=0, num_groups=3, size=4, rows=25, dim=90):
    """Tasks of a group want the same move, those of another group one against it; names tell the group."""
    rng = np.random.default_rng(seed)
    moves = rng.normal(size=(num_groups, dim)) / np.sqrt(dim)
    moves -= 1.2 * moves.mean(axis=0)
    order = rng.permutation(num_groups * size)
    groups = order % num_groups
    names = tuple(f"task_{index}_of_{group}" for index, group in enumerate(groups))

    def table(count):
        task = np.repeat(np.arange(len(names)), count)
        features = 0.6 * rng.normal(size=(len(task), dim)) / np.sqrt(dim) + moves[groups[task]]
        margin = rng.normal(size=len(task)).astype(np.float32)
        ids = np.array([str(index) for index in range(len(task))])
        return FeatureTable(features.astype(np.float32), margin, task, names, ids)

    train, validation = table(rows), table(rows)
    losses = np.logaddexp(0, -validation.margin)
    base = {name: float(losses[validation.task == index].mean()) for index, name in enumerate(names)}
    run = ObservedRun(dict.fromkeys(names, 1.0), {name: 0.97 * loss for name, loss in base.items()})
    return SubsetEstimator(train, validation, observed_runs=[run])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found_exactly(method, seed):
    grouping = DataSelector(planted(seed)).group(3, method)
    assert all(len({name[-1] for name in tasks}) == 1 for tasks in grouping.groups.values())
    assert len(grouping.groups) == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_falls_until_groups_are_torn(method):
    grouping = DataSelector(planted()).group(None, method)
    assert len(grouping.groups) == 3
    assert grouping.predicted_loss["1"] > grouping.predicted_loss["2"] > grouping.predicted_loss["3"]


def one_way(size=6, seed=0):
    """Tasks of two families; task 0 also helps the other family, which harms it."""
    effect = np.full((size, size), 0.3)
    effect[: size // 2, : size // 2] = effect[size // 2 :, size // 2 :] = -0.2
    effect[size // 2 :, 0] = -0.4
    np.fill_diagonal(effect, 0.0)
    effect += 1e-3 * np.random.default_rng(seed).normal(size=effect.shape)
    return effect


def test_helpers_serve_several_groups():
    effect = one_way()
    losses = GroupLosses(lambda mixtures: mixtures @ effect.T + 5.0)
    labels = np.array([0, 0, 0, 1, 1, 1])
    trained = add_helpers(losses, labels, group_masks(labels), np.random.default_rng(1).normal(size=(6, 4)), 6)
    expected = group_masks(labels)
    expected[1, 0] = True
    assert (trained == expected).all()
    assert losses.of_partition(labels, trained) < losses.of_partition(labels)
    # Nothing else would have helped either group.
    for group, mask in enumerate(group_masks(labels)):
        for other in np.flatnonzero(~trained[group]):
            larger = trained[group].copy()
            larger[other] = True
            assert losses([mask], [larger])[0] >= losses([mask], [trained[group]])[0]


def test_losses_of_groups_add_helpers_are_those_of_their_own_tasks():
    effect = one_way()
    losses = GroupLosses(lambda mixtures: mixtures @ effect.T + 5.0)
    mask, trained = np.array([True, True, False, False, False, False]), np.array([True, True, True, False, True, False])
    expected = sum(5.0 + effect[task, trained].sum() for task in (0, 1))
    assert losses([mask], [trained])[0] == pytest.approx(expected)
    # What was asked first is not mistaken for it.
    assert losses([mask])[0] == pytest.approx(sum(5.0 + effect[task, mask].sum() for task in (0, 1)))
    assert losses([mask], [trained])[0] == pytest.approx(expected)


def test_coclusters_share_helpers():
    affinity = -one_way(8)
    np.fill_diagonal(affinity, 0.0)
    labels, trained = coclustering(affinity, 2)
    assert len({tuple(labels[:4]), tuple(labels[4:])}) == 2 and len(set(labels[:4])) == len(set(labels[4:])) == 1
    assert (trained >= group_masks(labels)).all()
    for count, expected in ((1, np.ones((1, 8))), (8, np.eye(8))):
        assert (coclustering(affinity, count)[1] == expected).all()


@pytest.mark.parametrize("options", [{"method": "direct", "overlapping_groups": True}, {"method": "coclustering"}])
def test_a_grouping_tells_its_helpers(options):
    estimator = planted()
    grouping = DataSelector(estimator).group(3, **options)
    names = estimator.task_names
    assert sorted(task for tasks in grouping.groups.values() for task in tasks) == sorted(names)
    for group, tasks in grouping.groups.items():
        trained = grouping.trained_on(group)
        assert set(trained) == {*tasks, *grouping.helpers(group)}
        assert trained == sorted(trained, key=names.index)
        assert not set(tasks) & set(grouping.helpers(group))
    if any(map(grouping.helpers, grouping.groups)):
        loss = np.mean(
            [
                estimator.predict_subsets([grouping.trained_on(group)]).loss[0, names.index(task)]
                for group, tasks in grouping.groups.items()
                for task in tasks
            ]
        )
        assert f"{loss:.4f}" in grouping.summary


def test_one_group_is_spoken_of_in_the_singular():
    selector = DataSelector(planted(0))
    assert selector.group(1).summary.startswith("1 group was requested; the predicted loss of 1 group is ")
    assert selector.group(None, max_groups=1).summary.startswith("1 group has the least predicted loss, ")
    assert selector.group(2).summary.startswith("2 groups were requested; ")
    table = group_curve_table(selector.group(None, max_groups=2))
    assert {"1 group", "2 groups"} <= set(table.columns[0].cells)


def test_overlap_never_raises_the_predicted_loss():
    estimator = planted(1)
    plain, shared = (DataSelector(estimator).group(4, overlapping_groups=overlap) for overlap in (False, True))
    assert plain.groups == shared.groups and not any(map(plain.helpers, plain.groups))

    def loss(grouping):
        found = estimator.predict_subsets([grouping.trained_on(group) for group in grouping.groups]).loss
        index = {name: column for column, name in enumerate(estimator.task_names)}
        return sum(found[row, index[task]] for row, tasks in enumerate(grouping.groups.values()) for task in tasks)

    assert loss(shared) <= loss(plain)


def test_unknown_methods_are_named():
    with pytest.raises(ConfigurationError, match="coclustering"):
        DataSelector(planted()).group(2, "kmeans")


def test_groups_stand_beside_their_baselines():
    estimator = planted()
    grouping = DataSelector(estimator).group(3)
    names, found = estimator.task_names, grouping.baselines
    assert found["one group"] == pytest.approx(partition_loss(estimator, [names]))
    assert found["one per task"] == pytest.approx(partition_loss(estimator, [[name] for name in names]))
    assert grouping.predicted_loss["3"] < min(found.values())
    assert found["random"] > found["one per task"]


@pytest.mark.parametrize(
    ("method", "tried"), [("direct", 9), ("spectral", 4), ("coclustering", 4), ("semidefinite", 3)]
)
def test_of_many_numbers_of_groups_some_are_tried(method, tried, monkeypatch):
    monkeypatch.setattr(
        "hf_ensemble.select.groups.partition_groups._MAX_COUNTS", {"spectral": 4, "coclustering": 4, "semidefinite": 2}
    )
    grouping = DataSelector(planted()).group(None, method, max_groups=9)
    assert len(grouping.predicted_loss) == tried
    assert {"1", "9"} <= set(grouping.predicted_loss) or method == "coclustering"
