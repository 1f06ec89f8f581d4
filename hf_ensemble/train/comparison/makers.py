"""Adapters of the systems that an ensemble is compared with: trained, or merged from trained ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from ..._files import write_folder_atomically
from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ...ensemble import PeftEnsembleModel
from ...ensemble.merging.merge import merge_adapters
from ...ensemble.weighting.sampling import spread_sample
from ...models.usage import measured_usage
from ...runs import SystemCost, TrainedAdapter
from ...runs.systems import BASELINE
from ..flows.assembly import fit_task
from ..flows.ensemble_flow import EnsembleFlow
from ..flows.evaluation import ensemble_scorer
from .adapters import loaded_adapters, train_widened
from .groups import gradient_clusters, random_groups

# Scalings of the sum of the tasks' adapters that validation rows choose from.
_SCALINGS = (0.2, 0.3, 0.5, 0.7, 1.0)
# LoRAHub's settings: weights in this range, with this penalty on their mean absolute value, on so many rows.
_RANGE, _PENALTY, _ROWS = 1.5, 0.05, 32
# Evaluations of the search for each task, besides two for each adapter.
_EVALUATIONS = 40


@dataclass
class MadeSystem:
    """A system that is ready to be scored.

    Args:
        serving (`dict[str, Path]`): the adapter's folder, by task; empty where several adapters run together.
        together (`dict[str, Path]`): adapters by name that all tasks share.
        scales (`dict[str, float]`): what their logits are multiplied by, by task.
        trainings (`list[TrainedAdapter]`): where they come from.
        search_flops (`float`): operations of a search for weights.
        note (`str`): what was chosen.
    """

    serving: Mapping[str, Path] = field(default_factory=dict)
    together: Mapping[str, Path] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    trainings: Sequence[TrainedAdapter] = ()
    search_flops: float = 0.0
    note: str = ""

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys([*self.serving.values(), *self.together.values()]))


class SystemMaker:
    """Makes each system's adapters within a run; what the run holds already is read.

    Args:
        flow (`EnsembleFlow`): a finished ensemble run.
        training_ratio (`float`): training cost of its ensemble, in multiples of one adapter for all.
        continued_length (`float`): length of a task's own training after the one for all, in multiples of a training.
        num_groups (`int`): of random groups and clusters.
        num_seeds (`int`): of the average over seeds.
        seed (`int`): of random groups.
    """

    def __init__(
        self,
        flow: EnsembleFlow,
        training_ratio: float,
        continued_length: float,
        num_groups: int,
        num_seeds: int,
        seed: int,
    ):
        self.flow = flow
        self.run = flow.context.run
        self.names = list(flow.context.tasks.names)
        self.training_ratio = training_ratio
        self.continued_length = continued_length
        self.num_groups = num_groups
        self.num_seeds = num_seeds
        self.seed = seed

    def settings(self, name: str) -> dict[str, float]:
        """What the system of this name depends on, beside the run."""
        used = {
            "finetuned": ("continued_length",),
            "random_groups": ("num_groups", "seed"),
            "gradient_clusters": ("num_groups",),
            "seeds": ("num_seeds",),
        }
        return {key: getattr(self, key) for key in used.get(name, ())}

    def make(self, name: str) -> MadeSystem:
        """The adapters of the system of this name."""
        return getattr(self, f"_{name}")()

    # Trained

    def _trained(self, name: str, mixture: Mapping[str, float] | Sequence[str], **options) -> TrainedAdapter:
        return self.flow.training.run(f"compared-{name}", mixture, self.run.compared(name), **options)

    def _longer(self) -> MadeSystem:
        trained = self._trained("longer", self.names, length=self.training_ratio)
        return self._for_all("longer", [trained], f"{self.training_ratio:.2f} times as long")

    def _scaled(self) -> MadeSystem:
        return self._with_scales(self.run.baseline, run_on_main(lambda: self.run.trained_adapter(BASELINE)))

    def _longer_scaled(self) -> MadeSystem:
        made = self._longer()
        return self._with_scales(made.folders[0], made.trainings[0])

    def _with_scales(self, folder: Path, trained: TrainedAdapter) -> MadeSystem:
        """One adapter, its logits scaled for each task as those of the ensemble are."""
        context, together = self.flow.context, {"scaled": folder}
        with measured_usage() as usage, loaded_adapters(self.flow, together) as members:
            ensemble = PeftEnsembleModel(context.model, members, label_space=context.label_space)
            fits = [fit_task(context, ensemble, task, {"scaled": 1.0}) for task in self.names]
        scales = {task: scale for fit in fits for task, scale in fit.scales.items()}
        values = [scales.get(task, 1.0) for task in self.names]
        note = f"logits times {min(values):.2f} to {max(values):.2f}, by task, fitted to evaluation rows"
        return MadeSystem(together=together, scales=scales, trainings=[trained], search_flops=usage.flops, note=note)

    def _wider(self) -> MadeSystem:
        factor, folder = max(len(self.flow.ensemble.adapter_names), 2), self.run.compared("wider")
        trained = train_widened(self.flow, factor, "compared-wider", self.names, folder, length=self.training_ratio)
        return self._for_all("wider", [trained], f"{factor} times the rank, {self.training_ratio:.2f} times as long")

    def _for_all(self, name: str, trainings: list[TrainedAdapter], note: str = "") -> MadeSystem:
        return MadeSystem(dict.fromkeys(self.names, self.run.compared(name)), trainings=trainings, note=note)

    def _per_task(self) -> MadeSystem:
        return self._groups("task", [[name] for name in self.names])

    def _finetuned(self) -> MadeSystem:
        options = {"start": self.run.baseline, "length": self.continued_length}
        made = self._groups("finetuned", [[name] for name in self.names], **options)
        baseline = run_on_main(lambda: self.run.trained_adapter(BASELINE))
        return replace(
            made, trainings=[baseline, *made.trainings], note=f"{self.continued_length:g} of a training each"
        )

    def _random_groups(self) -> MadeSystem:
        groups = random_groups(self.names, self.num_groups, self.seed)
        return self._groups(f"random-{self.seed}", groups, note=_listed(groups))

    def _gradient_clusters(self) -> MadeSystem:
        groups = run_on_main(lambda: gradient_clusters(self.flow.calibration.selector(0).estimator, self.num_groups))
        return self._groups("clusters", groups, note=_listed(groups))

    def _groups(self, name: str, groups: list[list[str]], note: str = "", **options) -> MadeSystem:
        """One adapter per group, which serves its tasks."""
        serving, trainings = {}, []
        for group in groups:
            # No other group has this task.
            own = f"{name}-{group[0]}"
            trainings.append(self._trained(own, group, **options))
            serving.update(dict.fromkeys(group, self.run.compared(own)))
        return MadeSystem({task: serving[task] for task in self.names}, trainings=trainings, note=note)

    def _seeds(self) -> MadeSystem:
        first = self.flow.context.args.seed
        baseline = run_on_main(lambda: self.run.trained_adapter(BASELINE))
        folders, trainings = {"seed_0": self.run.baseline}, [baseline]
        for number in range(1, self.num_seeds):
            name = f"seed-{number}"
            trainings.append(self._trained(name, self.names, seed=first + number))
            folders[f"seed_{number}"] = self.run.compared(name)
        return MadeSystem(together=folders, trainings=trainings, note=f"logits of {self.num_seeds} seeds")

    def _arrow(self) -> MadeSystem:
        made = self._per_task()
        return MadeSystem(together=self._by_member(made), trainings=made.trainings)

    # Merged

    def _average(self) -> MadeSystem:
        return self._merged("average", "sum", 1.0 / len(self.names))

    def _ties(self) -> MadeSystem:
        return self._merged("ties", "ties", 1.0 / len(self.names))

    def _tsv(self) -> MadeSystem:
        return self._merged("tsv", "tsv", 1.0 / len(self.names))

    def _knots(self) -> MadeSystem:
        return self._merged("knots", "knots", 1.0 / len(self.names))

    def _merged(self, name: str, method: str, weight: float) -> MadeSystem:
        made = self._per_task()
        with self._loaded(made) as members:
            self._save_merged(name, dict.fromkeys(members, weight), method)
        return self._for_all(name, list(made.trainings))

    def _save_merged(self, name: str, weights: Mapping[str, float], method: str) -> Path:
        folder = self.run.compared(name)
        if is_main_process() and not folder.is_dir():
            merged = merge_adapters(self.flow.context.model, weights, method=method)
            write_folder_atomically(folder, merged.save_pretrained)
        wait_for_everyone()
        return folder

    def _task_arithmetic(self) -> MadeSystem:
        made = self._per_task()
        with self._loaded(made) as members:
            folders = {
                scaling: self._save_merged(f"sum-{scaling:g}", dict.fromkeys(members, scaling), "sum")
                for scaling in _SCALINGS
            }
        with measured_usage() as usage:
            losses = {scaling: self._validation_loss(folder) for scaling, folder in folders.items()}
        best = min(losses, key=losses.get)
        return MadeSystem(
            dict.fromkeys(self.names, folders[best]),
            trainings=made.trainings,
            search_flops=usage.flops,
            note=f"scaling {best:g}, chosen on evaluation rows",
        )

    def _validation_loss(self, folder: Path) -> float:
        tables = self.flow.context.eval_tables
        scores = self.flow.evaluation.score_adapter(folder, tables, "Scaling", has_metrics=False, kind="sum")
        return float(np.mean([own.loss for own in scores.values()]))

    def _lorahub(self) -> MadeSystem:
        made, context = self._per_task(), self.flow.context
        serving = {}
        with measured_usage() as usage, self._loaded(made) as members:
            ensemble = PeftEnsembleModel(context.model, members, label_space=context.label_space, combination="weights")
            for task in self.names:
                folder = self.run.compared(f"lorahub-{task}")
                if not run_on_main(folder.is_dir):
                    weights = self._searched(ensemble, task)
                    self._save_merged(folder.name, weights, "sum")
                serving[task] = folder
        return MadeSystem(serving, trainings=made.trainings, search_flops=usage.flops)

    def _searched(self, ensemble: PeftEnsembleModel, task: str) -> dict[str, float]:
        """Weights of the adapters with the least loss on some evaluation rows, found without gradients."""
        context, members = self.flow.context, ensemble.adapter_names
        rows = context.eval_tables[task]
        rows = rows.select(spread_sample(len(rows), min(_ROWS, len(rows)), context.args.seed))
        scorer = ensemble_scorer(ensemble)

        def loss(weights: np.ndarray) -> float:
            ensemble.weights = {task: dict(zip(members, weights.tolist()))}
            scored = context.evaluator.score_rows(scorer, rows, name=task).summary().loss
            return scored + _PENALTY * float(np.abs(weights).mean())

        start = np.full(len(members), 1.0 / len(members))
        options = {"maxfev": _EVALUATIONS + 2 * len(members), "initial_tr_radius": 0.5}
        bounds = [(-_RANGE, _RANGE)] * len(members)
        found = minimize(loss, start, method="COBYQA", bounds=bounds, options=options)
        return dict(zip(members, found.x.tolist()))

    def _by_member(self, made: MadeSystem) -> dict[str, Path]:
        return {f"compared_{number}": folder for number, folder in enumerate(made.serving.values())}

    @contextmanager
    def _loaded(self, made: MadeSystem) -> Iterator[list[str]]:
        """While open, the tasks' adapters are on the model; yields their names in the order of the tasks."""
        with loaded_adapters(self.flow, self._by_member(made)) as names:
            yield names


def training_ratio(cost: SystemCost, other: SystemCost) -> float:
    """What a system costs to train, in multiples of another: by tokens where operations could not be counted."""
    measure = "training_flops" if other.training_flops else "training_tokens"
    return getattr(cost, measure) / getattr(other, measure)


def _listed(groups: Sequence[Sequence[str]]) -> str:
    return "; ".join(", ".join(group) for group in groups)
