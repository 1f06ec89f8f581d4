"""From trained adapters to the weighted ensemble."""

import shutil
from collections.abc import Mapping

from ..._compat import preserve_active_adapter
from ..._files import write_folder_atomically
from ..._processes import is_main_process, run_on_all, run_on_main, split_between_processes, wait_for_everyone
from ...ensemble import EnsembleMember, PeftEnsembleModel
from ...ensemble.saving.files import load_adapter
from ...ensemble.weighting.fitting import WeightFit, fit_ensemble
from ...ensemble.weighting.sampling import spread_sample
from ...models.sharding import is_sharded
from ...runs import EnsembleWeights
from ...runs.systems import BASELINE
from ...select import Grouping
from ..inputs.used_models import mark_as_of_a_run
from .context import FlowContext
from .evaluation import ensemble_generate

# Validation rows per task that the weights are fitted to: enough for a few weights, small in memory.
_WEIGHT_ROWS = 200
# Entries of all adapters' logits that are held at once, a gigabyte: long answers over a large vocabulary.
_WEIGHT_VALUES = 2**28
# An adapter below a twentieth changes little but costs its forward pass.
_MIN_WEIGHT = 0.05


class EnsembleAssembly:
    """Puts a run's adapters side by side on its model and weighs them.

    Args:
        context (`FlowContext`): what the run works on.
        grouping (`Grouping`): which tasks each adapter was trained on.
    """

    def __init__(self, context: FlowContext, grouping: Grouping):
        self.context = context
        self.grouping = grouping
        self._loaded: dict[str, object] = {}

    def _copy_baseline(self) -> None:
        """Make the one adapter for all tasks a member."""
        run = self.context.run
        if is_main_process():
            write_folder_atomically(
                run.member(BASELINE), lambda new: shutil.copytree(run.baseline, new, dirs_exist_ok=True)
            )
        wait_for_everyone()

    def assemble(self) -> PeftEnsembleModel:
        """The ensemble over the run's own model, with its weights, saved to the run.

        With fitted weights the baseline's adapter stands beside the groups' as one more member: it is trained anyway,
        and a task that does better with it gets it. It is left out where no task gives it a weight.
        """
        run = self.context.run
        members = [EnsembleMember(name, self.grouping.trained_on(name)) for name in self.grouping.groups]
        shared = EnsembleMember(BASELINE, list(self.context.tasks))
        with run.stage("weights", EnsembleWeights) as todo:
            if todo:
                run.write(self._weights(members, shared))
                wait_for_everyone()
        chosen = run_on_main(lambda: run.read(EnsembleWeights))
        weights = chosen.weights
        if any(BASELINE in row for row in weights.values()):
            self._copy_baseline()
            members.append(shared)
        return self.save(self.ensemble(members, weights, chosen.scales))

    def ensemble(
        self,
        members: list[EnsembleMember],
        weights: Mapping[str, Mapping[str, float]],
        scales: Mapping[str, float] | None = None,
    ) -> PeftEnsembleModel:
        """The run's adapters as an ensemble over the run's own model."""
        self._load(members)
        return PeftEnsembleModel(
            self.context.model, members, weights, label_space=self.context.label_space, scales=scales
        )

    def save(self, ensemble: PeftEnsembleModel) -> PeftEnsembleModel:
        """Write an ensemble's configuration to the run, beside its adapters."""
        run = self.context.run
        if is_main_process():
            ensemble.ensemble_config().save(run.ensemble)
            self.context.save_tokenizer(run.ensemble)
        wait_for_everyone()
        return ensemble

    def _weights(self, members: list[EnsembleMember], shared: EnsembleMember) -> EnsembleWeights:
        """Weight of each adapter by task; every process gets the same."""
        args = self.context.args
        stands_alone = args.train_baseline and self.grouping.baseline_group is None
        candidates = [*members, shared] if stands_alone else members
        if args.ensemble_weights == "own_group" or len(candidates) < 2:
            return EnsembleWeights({task: {self.grouping.group_of(task): 1.0} for task in self.context.tasks})
        ensemble = self.ensemble(candidates, {})
        tasks = list(self.context.tasks)
        if is_sharded(self.context.model):
            # All processes run the model, and fit the same weights.
            fits = self._fits(ensemble, tasks)
        else:
            # Each task is one process's: its weights are then those that a single process would find.
            own = split_between_processes(tasks)
            fits = [fit for part in run_on_all(lambda: self._fits(ensemble, own)) for fit in part]
        found = EnsembleWeights({})
        for task in self.context.tasks:
            fit = next(fit for fit in fits if task in fit.tasks)
            found.weights[task] = fit.weights_of(fit.tasks[task])
            found.losses[task] = {key: value for key, value in fit.report()[task].items() if key != "gap"}
            found.scales.update(fit.scales)
            validation = fit.tasks[task].validation
            if validation is not None:
                found.cross_validated[task], found.shares[task] = validation.losses, validation.shares
        if args.ensemble_weights == "answers":
            for task in self.context.answers.metrics:
                fit = next(fit for fit in fits if task in fit.tasks)
                fitted = found.weights[task]
                found.weights[task], found.answered[task] = self._by_answers(ensemble, task, fit)
                if found.weights[task] != fitted:
                    found.scales.pop(task, None)
        return found

    def _by_answers(
        self, ensemble: PeftEnsembleModel, task: str, fit: WeightFit
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The weights with the best first metric of the task's generated answers, and the metric of each candidate.

        Of equal ones the first is taken: the fitted weights, then those of the own group.
        """
        single = fit.adapter_names[int(fit.tasks[task].one_hot_losses.argmin())]
        candidates = {
            "fitted": fit.weights_of(fit.tasks[task]),
            "own_group": {self.grouping.group_of(task): 1.0},
            "one_hot": {single: 1.0},
            "uniform": dict.fromkeys(fit.adapter_names, 1.0 / len(fit.adapter_names)),
        }
        rows = self.context.eval_tables[task]
        table = {task: rows.select(spread_sample(len(rows), min(_WEIGHT_ROWS, len(rows)), self.context.args.seed))}
        found = {}
        for name, weights in candidates.items():
            ensemble.weights = {task: weights}
            figures = self.context.answers.score_tasks(ensemble_generate(ensemble), table, f"Weights {name} of {task}")
            found[name] = next(iter(figures[task].figures.values()))
        return candidates[max(found, key=found.get)], found

    def _fits(self, ensemble: PeftEnsembleModel, tasks: list[str]) -> list[WeightFit]:
        own = {task: {self.grouping.group_of(task): 1.0} for task in tasks}
        return [fit_task(self.context, ensemble, task, own[task]) for task in tasks]

    def _load(self, members: list[EnsembleMember]) -> None:
        """Put the members' adapters on the run's model, beside its own.

        An adapter of the same name counts only if this object has loaded it.
        """
        model, run = self.context.model, self.context.run
        with preserve_active_adapter(model):
            for member in members:
                found = model.peft_config.get(member.name)
                if found is not None and found is self._loaded.get(member.name):
                    continue
                if found is not None:
                    model.delete_adapter(member.name)
                folder = run.baseline if member.name == BASELINE else run.member(member.name)
                trained = run.trained_adapter(member.name)
                if trained is not None:
                    trained.check_files(folder)
                load_adapter(model, folder, member.name)
                mark_as_of_a_run(model.peft_config[member.name])
                self._loaded[member.name] = model.peft_config[member.name]


def fit_task(context: FlowContext, ensemble: PeftEnsembleModel, task: str, own: Mapping[str, float]) -> WeightFit:
    """Weights and scale of a run's task, fitted to its evaluation rows; `own` are those they are shrunk towards."""
    args = context.args
    return fit_ensemble(
        ensemble,
        {task: context.eval_tables[task]},
        data_collator=context.data_collator,
        batch_size=args.per_device_eval_batch_size,
        min_weight=_MIN_WEIGHT,
        max_values=_WEIGHT_VALUES,
        max_rows=_WEIGHT_ROWS,
        seed=args.seed,
        mixed_precision=context.mixed_precision,
        cross_validate=args.ensemble_weights != "fitted",
        own_adapters={task: own},
    )
