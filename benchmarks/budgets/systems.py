"""Trainings, and the systems that are made of them, at several training budgets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
MERGING = ("ties", "tsv", "knots")
ONE_FOR_ALL, ONE_PER_TASK, RANDOM = "one adapter for all", "one per task", "random groups"
SEEDS, WIDER = f"2 seeds of {ONE_FOR_ALL}", f"{ONE_FOR_ALL}, 2 times as long and wide"
CHOSEN_WIDE = "one for all, then what is chosen, twice as wide, at 2"


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
        self._chosen: dict[float, System] = {}

    def __call__(self, wanted: Sequence[str] | None = None) -> list[System]:
        """Systems by their labels in [`SYSTEMS`], all by default; those first that the others are compared with.

        Choices take minutes, and are made where they are asked for.
        """
        kept = [label for label in SYSTEMS if wanted is None or label == ONE_FOR_ALL or label in wanted]
        return [SYSTEMS[label](self) for label in kept]

    def _for_all(self, length: float) -> System:
        part = Part(self.all.mixture, length=length, cost=length)
        return System(_for_all(length), [part], dict.fromkeys(self.names, 0))

    def _finetuned(self, budget: float) -> System:
        """MTL-FT: the adapter for all tasks, then each task on its own."""
        length = round(budget - 1.0, 6)
        predicted = self.going_on([length]).estimator.predict(np.eye(len(self.names))).loss.diagonal()
        parts = [Part({name: 1.0}, length, True, length * self._share(name), is_own=True) for name in self.names]
        own = {name: number for number, name in enumerate(self.names, start=1)}
        return System(_each(budget), [self.all, *parts], own, dict(zip(self.names, predicted.tolist())))

    def _continued(self, budget: float) -> System:
        """The adapter for all tasks, then what the search chooses from there on, mixtures or tasks alone."""
        if budget not in self._chosen:
            self._chosen[budget] = self._choose(budget)
        return self._chosen[budget]

    def _choose(self, budget: float) -> System:
        selector = self.going_on(LENGTHS)
        grouping = selector.group(None, "mixtures", compute_budget=budget, group_initialization="baseline")
        return self._of_grouping(_chosen(budget), grouping, selector.estimator, goes_on=True)

    def _chosen_wide(self) -> System:
        """A choice's adapters with twice the rank; those that go on begin at an adapter for all tasks of that rank."""
        chosen = self._continued(2.0)
        return System(CHOSEN_WIDE, [replace(part, widening=2) for part in chosen.parts], chosen.own)

    def _mixtures(self, budget: float, has_baseline: bool) -> System:
        grouping = self.selector.group(None, "mixtures", compute_budget=budget, has_baseline=has_baseline)
        return self._of_grouping(_fresh(budget, has_baseline), grouping, self.estimator)

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
        return System(ONE_PER_TASK, self._alone(), own)

    def _alone(self) -> list[Part]:
        return [Part({name: 1.0}, cost=self._share(name), is_own=True) for name in self.names]

    def _random(self) -> System:
        return self._groups(RANDOM, random_groups(self.names, NUM_GROUPS, self.seed))

    def _clusters(self) -> System:
        return self._groups("clusters of gradients", gradient_clusters(self.estimator, NUM_GROUPS))

    def _groups(self, label: str, groups: Sequence[Sequence[str]]) -> System:
        parts = [Part(dict.fromkeys(group, 1.0), cost=sum(map(self._share, group))) for group in groups]
        return System(label, parts, {name: number for number, group in enumerate(groups) for name in group})

    def _seeds(self) -> System:
        parts = [Part(self.all.mixture, seed=number) for number in range(2)]
        return System(SEEDS, parts, dict.fromkeys(self.names, 0), together=True)

    def _wider(self) -> System:
        part = Part(self.all.mixture, length=2.0, cost=2.0, widening=2)
        return System(WIDER, [part], dict.fromkeys(self.names, 0))

    def _merged(self, method: str, weight: float | None) -> System:
        """The adapters of single tasks as one, each by its weight; equal parts of it by default."""
        # The cost is that of the adapters it is made of.
        part = Part(
            dict.fromkeys((part.name for part in self._alone()), weight or 1.0 / len(self.names)), merging=method
        )
        return System(_merged(method, weight), [part], dict.fromkeys(self.names, 0))

    def _share(self, name: str) -> float:
        counts = self.estimator.counts
        return float(counts[self.names.index(name)] / counts.sum())


def parts_without_choice(names: Sequence[str], seed: int, wanted: Sequence[str] | None = None) -> dict[str, Part]:
    """Trainings of systems, of all by default, that no prediction chooses, by name; their costs are not known here."""
    everything = dict.fromkeys(names, 1.0)
    found = {_for_all(length): [Part(everything, length=length)] for length in TOGETHER_LENGTHS}
    found |= {SEEDS: [Part(everything, seed=1)], WIDER: [Part(everything, length=2.0, widening=2)]}
    found |= {ONE_PER_TASK: [Part({name: 1.0}, is_own=True) for name in names]}
    for budget in BUDGETS:
        found[_each(budget)] = [Part({name: 1.0}, round(budget - 1.0, 6), True, is_own=True) for name in names]
    found |= {RANDOM: [Part(dict.fromkeys(group, 1.0)) for group in random_groups(names, NUM_GROUPS, seed)]}
    found |= {CHOSEN_WIDE: [Part(everything, widening=2)]}
    kept = [ONE_FOR_ALL, *(found if wanted is None else wanted)]
    return {part.name: part for label, parts in found.items() if label in kept for part in parts}


def _for_all(length: float) -> str:
    return ONE_FOR_ALL if length == 1 else f"{ONE_FOR_ALL}, {length:g} times as long"


def _chosen(budget: float) -> str:
    return f"one for all, then what is chosen, at {budget:g}"


def _each(budget: float) -> str:
    return f"one for all, then each task, at {budget:g}"


def _fresh(budget: float, has_baseline: bool) -> str:
    return f"{'one for all and ' if has_baseline else ''}mixtures, at {budget:g}"


def _merged(method: str, weight: float | None) -> str:
    return f"{ONE_PER_TASK}, merged: {method}{f' of {weight:g} each' if weight else ''}"


def _systems() -> dict[str, Callable[[SystemBuilder], System]]:
    make = SystemBuilder
    found = {_for_all(length): partial(make._for_all, length=length) for length in TOGETHER_LENGTHS}
    found |= {_chosen(budget): partial(make._continued, budget=budget) for budget in BUDGETS}
    found |= {_each(budget): partial(make._finetuned, budget=budget) for budget in BUDGETS}
    found |= {_fresh(own, True): partial(make._mixtures, budget=own, has_baseline=True) for own in FRESH_BUDGETS}
    found |= {ONE_PER_TASK: make._per_task, "partition": make._partition, RANDOM: make._random}
    found |= {"clusters of gradients": make._clusters, SEEDS: make._seeds, WIDER: make._wider}
    found |= {_fresh(2.0, False): partial(make._mixtures, budget=2.0, has_baseline=False)}
    mergings = [*(("sum", own) for own in SCALINGS), *((method, None) for method in MERGING)]
    found |= {_merged(method, own): partial(make._merged, method=method, weight=own) for method, own in mergings}
    return found | {_chosen(3.0): partial(make._continued, budget=3.0), CHOSEN_WIDE: make._chosen_wide}


# What makes each system, by its label.
SYSTEMS = _systems()


def parts_of(systems: Sequence[System]) -> dict[str, Part]:
    """All parts by name, in the order of the systems."""
    return {part.name: part for system in systems for part in system.parts}


def needs(part: Part, parts: Mapping[str, Part]) -> list[str]:
    """Names of the parts that a part is made of, or begins at."""
    if part.goes_on and part.widening > 1:
        return [name for name, own in parts.items() if own == Part(own.mixture, widening=part.widening)]
    return [name for name in part.mixture if name in parts] if part.merging else []
