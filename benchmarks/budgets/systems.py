"""Trainings, and the systems that are made of them, at several training budgets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np

from hf_ensemble.estimate import SubsetEstimator
from hf_ensemble.select import DataSelector, Grouping, predicted_losses
from hf_ensemble.select.settings import LENGTHS
from hf_ensemble.train.comparison.groups import gradient_clusters, random_groups

# Lengths of one adapter for all tasks, in multiples of the recipe's.
TOGETHER_LENGTHS = (1.0, 1.1, 1.5, 2.0)
BUDGETS = (1.1, 1.5, 2.0)
# Budgets of mixtures that begin where the adapter for all tasks does.
FRESH_BUDGETS = (1.5, 2.0, 3.0)
# Random groups and clusters of gradients.
NUM_GROUPS = 4
SCALINGS = (0.2, 0.3, 0.5, 0.7, 1.0)
MERGING = ("sum", "ties", "tsv", "knots")
ONE_FOR_ALL = "one adapter for all"
# Lengths of a task's own trainings, and whether they go on from the adapter for all tasks.
_SHORT = [(1.0, False), *((round(budget - 1.0, 6), True) for budget in BUDGETS)]


@dataclass(frozen=True)
class Part:
    """An adapter: one training, or a merging of trained adapters.

    Args:
        mixture (`dict[str, float]`): weight of each task's rows, or of each merged adapter by its part's name.
        length (`float`): of the training, in multiples of the recipe's.
        goes_on (`bool`): whether it begins at the adapter for all tasks.
        cost (`float`): rows that are drawn, in multiples of one adapter for all.
        seed (`int`): what the recipe's seed is raised by.
        widening (`int`): what the adapter's rank is multiplied by.
        merging (`str`): the method; empty for a training.
        is_own (`bool`): whether it serves the task that it is trained on, and no other.
    """

    mixture: dict[str, float]
    length: float = 1.0
    goes_on: bool = False
    cost: float = 1.0
    seed: int = 0
    widening: int = 1
    merging: str = ""
    is_own: bool = False

    @property
    def name(self) -> str:
        """The same for equal parts."""
        weights = "_".join(f"{task}-{weight:.4f}" for task, weight in sorted(self.mixture.items()))
        options = f"{self.length:g}-{self.goes_on:d}-{self.seed}-{self.widening}-{self.merging}-{self.is_own:d}"
        return f"part-{blake2b(f'{weights}/{options}'.encode(), digest_size=6).hexdigest()}"


@dataclass
class System:
    """Adapters that serve all tasks.

    Args:
        label (`str`): what it is.
        parts (`list[Part]`): its adapters.
        own (`dict[str, int]`): number of the adapter that was made for each task.
        predicted (`dict[str, float]`): predicted validation loss of each task under its own adapter.
        together (`bool`): whether its adapters are members of equal standing, such as seeds.
    """

    label: str
    parts: list[Part]
    own: dict[str, int]
    predicted: dict[str, float] = field(default_factory=dict)
    together: bool = False

    @property
    def cost(self) -> float:
        """Of training, in multiples of one adapter for all."""
        return sum({part.name: part.cost for part in self.parts}.values())


class SystemBuilder:
    """Makes every system from the predictions of a run.

    Args:
        selector (`DataSelector`): predicts trainings from the start, calibrated by the adapter for all tasks.
        going_on (`Callable[[Sequence[float]], DataSelector]`):
            Predicts trainings of these lengths that go on from this adapter; the first is its own.
        seed (`int`): of random groups.
    """

    def __init__(self, selector: DataSelector, going_on: Callable[[Sequence[float]], DataSelector], seed: int):
        self.selector, self.going_on, self.seed = selector, going_on, seed
        self.estimator = selector.estimator
        self.names = list(self.estimator.task_names)
        self.all = Part(dict.fromkeys(self.names, 1.0))

    def __call__(self) -> list[System]:
        """All systems, those first that the others are compared with."""
        found = [self._for_all(length) for length in TOGETHER_LENGTHS]
        continued = {budget: self._continued(budget) for budget in (*BUDGETS, 3.0)}
        found += [continued[budget] for budget in BUDGETS]
        found += [self._finetuned(budget) for budget in BUDGETS]
        found += [self._mixtures(budget, has_baseline=True) for budget in FRESH_BUDGETS]
        found += [self._per_task(), self._partition(), self._random(), self._clusters(), self._seeds(2), self._wider(2)]
        found += [self._mixtures(2.0, has_baseline=False), *self._merged()]
        return [
            *found,
            continued[3.0],
            self._wide(continued[2.0], "one for all, then what is chosen, twice as wide, at 2"),
        ]

    def _for_all(self, length: float) -> System:
        part = Part(self.all.mixture, length=length, cost=length)
        label = ONE_FOR_ALL if length == 1 else f"{ONE_FOR_ALL}, {length:g} times as long"
        return System(label, [part], dict.fromkeys(self.names, 0))

    def _finetuned(self, budget: float) -> System:
        """MTL-FT: the adapter for all tasks, then each task on its own."""
        length = round(budget - 1.0, 6)
        predicted = self.going_on([length]).estimator.predict(np.eye(len(self.names))).loss.diagonal()
        parts = [Part({name: 1.0}, length, True, length * self._share(name), is_own=True) for name in self.names]
        own = {name: number for number, name in enumerate(self.names, start=1)}
        label = f"one for all, then each task, at {budget:g}"
        return System(label, [self.all, *parts], own, dict(zip(self.names, predicted.tolist())))

    def _continued(self, budget: float) -> System:
        """The adapter for all tasks, then what the search chooses from there on, mixtures or tasks alone."""
        selector = self.going_on(LENGTHS)
        grouping = selector.group(None, "mixtures", compute_budget=budget, group_initialization="baseline")
        label = f"one for all, then what is chosen, at {budget:g}"
        return self._of_grouping(label, grouping, selector.estimator, goes_on=True)

    def _wide(self, system: System, label: str) -> System:
        """A system's adapters with twice the rank; those that go on begin at an adapter for all tasks of that rank."""
        return System(label, [replace(part, widening=2) for part in system.parts], system.own)

    def _mixtures(self, budget: float, has_baseline: bool) -> System:
        grouping = self.selector.group(None, "mixtures", compute_budget=budget, has_baseline=has_baseline)
        label = f"{'one for all and ' if has_baseline else ''}mixtures, at {budget:g}"
        return self._of_grouping(label, grouping, self.estimator)

    def _partition(self) -> System:
        grouping = self.selector.group(has_baseline=False)
        return self._of_grouping("partition", grouping, self.estimator)

    def _of_grouping(self, label: str, grouping: Grouping, estimator: SubsetEstimator, goes_on: bool = False) -> System:
        names, parts = list(grouping.groups), []
        for name, mixture in grouping.mixtures.items():
            weights, length = np.array([[mixture.get(task, 0.0) for task in self.names]]), grouping.length_of(name)
            cost = float(estimator.training_cost(weights, np.array([length]))[0])
            # What a task's own adapter says of other tasks is not asked for.
            is_own = mixture == {grouping.groups[name][0]: 1.0} and len(grouping.groups[name]) == 1
            part = Part(mixture, length, goes_on, cost, is_own=is_own)
            parts.append(self.all if name == grouping.baseline_group else part)
        losses = predicted_losses(estimator, grouping)
        own = {task: number for number, name in enumerate(names) for task in grouping.groups[name]}
        predicted = {task: float(losses[own[task], self.names.index(task)]) for task in self.names}
        system = System(label, parts, own, predicted)
        if self.all not in parts and (goes_on or grouping.settings["has_baseline"]):
            system.parts = [*parts, self.all]
        return system

    def _per_task(self) -> System:
        own = {name: number for number, name in enumerate(self.names)}
        return System("one per task", self._alone(), own)

    def _alone(self) -> list[Part]:
        return [Part({name: 1.0}, cost=self._share(name), is_own=True) for name in self.names]

    def _random(self) -> System:
        return self._groups("random groups", random_groups(self.names, NUM_GROUPS, self.seed))

    def _clusters(self) -> System:
        return self._groups("clusters of gradients", gradient_clusters(self.estimator, NUM_GROUPS))

    def _groups(self, label: str, groups: Sequence[Sequence[str]]) -> System:
        parts = [Part(dict.fromkeys(group, 1.0), cost=sum(map(self._share, group))) for group in groups]
        return System(label, parts, {name: number for number, group in enumerate(groups) for name in group})

    def _seeds(self, count: int) -> System:
        parts = [Part(self.all.mixture, seed=number) for number in range(count)]
        return System(f"{count} seeds of {ONE_FOR_ALL}", parts, dict.fromkeys(self.names, 0), together=True)

    def _wider(self, widening: int) -> System:
        part = Part(self.all.mixture, length=2.0, cost=2.0, widening=widening)
        return System(f"{ONE_FOR_ALL}, 2 times as long and wide", [part], dict.fromkeys(self.names, 0))

    def _merged(self) -> list[System]:
        alone, found = self._alone(), []
        for method in MERGING:
            for weight in SCALINGS if method == "sum" else (1.0 / len(alone),):
                # The cost is that of the adapters it is made of.
                part = Part(dict.fromkeys((part.name for part in alone), weight), merging=method)
                label = f"one per task, merged: {method}{f' of {weight:g} each' if method == 'sum' else ''}"
                found.append(System(label, [part], dict.fromkeys(self.names, 0)))
        return found

    def _share(self, name: str) -> float:
        counts = self.estimator.counts
        return float(counts[self.names.index(name)] / counts.sum())


def parts_without_choice(names: Sequence[str], seed: int) -> dict[str, Part]:
    """Trainings that no prediction chooses, by name; their costs are not known here."""
    everything = dict.fromkeys(names, 1.0)
    found = [Part(everything, length=length) for length in TOGETHER_LENGTHS]
    found += [Part(everything, seed=1), Part(everything, length=2.0, widening=2)]
    found += [Part({name: 1.0}, length, goes_on, is_own=True) for name in names for length, goes_on in _SHORT]
    found += [Part(dict.fromkeys(group, 1.0)) for group in random_groups(names, NUM_GROUPS, seed)]
    return {part.name: part for part in found}


def parts_of(systems: Sequence[System]) -> dict[str, Part]:
    """All parts by name, in the order of the systems."""
    return {part.name: part for system in systems for part in system.parts}


def needs(part: Part, parts: Mapping[str, Part]) -> list[str]:
    """Names of the parts that a part is made of, or begins at."""
    if part.goes_on and part.widening > 1:
        return [name for name, own in parts.items() if own == Part(own.mixture, widening=part.widening)]
    return [name for name in part.mixture if name in parts] if part.merging else []
