"""The choice of groups, and the training of their adapters, one after the other or several at once."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ...._processes import run_on_main, wait_for_everyone
from ....estimate import ObservedRun
from ....runs import Estimate, ScoredRun, TrainedAdapter, run_selector
from ....runs.progress import ADAPTER, GROUP
from ....select import DataSelector, Grouping
from ....select.settings import LEAST_STEPS
from ...configs import AUTO
from ..adapter_training import AdapterTraining, run_concurrently
from ..calibration import Calibration
from ..context import FlowContext
from ..example_rows import keep_example_rows
from .concurrency import groups_at_once, lower_concurrency


class GroupTrainings:
    """Chooses groups and trains their adapters; with mixtures, those that are left are chosen anew after each training.

    Each adapter that was trained is evidence: its measured losses calibrate the predictions of those that are not, and
    decide which tasks it serves. A choice is written before anything is trained by it and says what was trained until
    then, so that a run that was killed goes on from its last one.

    Args:
        context (`FlowContext`): what the run works on.
        training (`AdapterTraining`): trains.
        calibration (`Calibration`): scores, and has the fine-tunings that calibrate.
        num_calibration_runs (`int`): number of these.
    """

    def __init__(
        self, context: FlowContext, training: AdapterTraining, calibration: Calibration, num_calibration_runs: int
    ):
        self.context = context
        self.training = training
        self.calibration = calibration
        self.num_calibration_runs = num_calibration_runs

    @property
    def is_sequential(self) -> bool:
        """Whether groups are chosen anew after each training."""
        return self.context.args.grouping_method == "mixtures" and self.context.args.sequential_groups

    def train(self, grouping: Grouping, on_choice: Callable[[Grouping], None]) -> Grouping:
        """Every adapter is a member of the run's ensemble afterwards; returns the last choice.

        Args:
            grouping (`Grouping`): the choice so far.
            on_choice (`Callable`): is called with each later choice before anything is trained by it.
        """
        run, done = self.context.run, set()
        if self.context.args.concurrent_groups != 1:
            self._train_concurrently(grouping)
        while name := next((own for own in grouping.groups if own not in done), None):
            trained = self.train_group(grouping, name)
            done.add(name)
            is_new = name != grouping.baseline_group and name not in grouping.settings["trained"]
            if is_new and self.is_sequential:
                scored = self.calibration.score_trained(trained, run.member(name), f"Evaluating {name}")
                grouping = self._chosen_again(grouping, name, scored)
                on_choice(grouping)
        return grouping

    def train_group(
        self,
        grouping: Grouping,
        name: str,
        training: AdapterTraining | None = None,
        first_step: int | None = None,
    ) -> TrainedAdapter:
        """Train the adapter of a group, or copy one that was trained alike, beside other processes with other groups.

        Args:
            grouping (`Grouping`): the choice of groups.
            name (`str`): the group.
            training (`AdapterTraining`, *optional*): trains it; the run's own by default.
            first_step (`int`, *optional*): steps that the run's log counts before it; those of all begun by default.

        Raises:
            `RunLockedError`: when another process trains it.
        """
        run, mixture = self.context.run, grouping.mixtures[name]
        training = training or self.training
        with run.stage(f"{ADAPTER}:{name}"):
            if self._goes_on(grouping, name):
                start = {"start": run.baseline, "length": grouping.length_of(name)}
                return training.run(name, mixture, run.member(name), first_step=first_step, **start)
            known = self.calibration.reuse(mixture, name, run.member(name))
            return training.run(name, mixture, run.member(name), first_step=first_step) if known is None else known

    def _is_known(self, grouping: Grouping, name: str) -> bool:
        """Whether the run has made the same training, so that its adapter is copied."""
        return self.calibration.is_known(grouping.mixtures[name], self.context.run.member(name))

    def _goes_on(self, grouping: Grouping, name: str) -> bool:
        """Whether a group's training begins at the adapter for all tasks."""
        return self.context.args.group_initialization == "baseline" and name != grouping.baseline_group

    def _train_concurrently(self, grouping: Grouping) -> None:
        """Train the adapters of several groups at once, but for those that are copied.

        Where the run has found out how many and memory runs out after all, half as many go on from their checkpoints.
        """
        args = self.context.args
        while True:
            steps = self._steps_left(grouping)
            mixtures = {name: grouping.mixtures[name] for name in steps}
            at_once = groups_at_once(self.training, mixtures, sum(steps.values()) * args.gradient_accumulation_steps)
            if at_once == 1:
                return
            try:
                run_concurrently(self.training, self._jobs(grouping, steps), at_once)
                return
            except Exception as error:
                if args.concurrent_groups != AUTO or not should_reduce_batch_size(error):
                    raise
            # Outside of the handler: the exception holds the tensors of the trainings.
            clear_device_cache(garbage_collection=True)
            lower_concurrency(self.context, at_once)

    def _steps_left(self, grouping: Grouping) -> dict[str, int]:
        """The groups that are not trained yet and not copied, with the optimizer steps of each."""
        run, steps = self.context.run, {}
        for name in grouping.groups:
            goes_on = self._goes_on(grouping, name)
            if not run.is_done(f"{ADAPTER}:{name}") and (goes_on or not self._is_known(grouping, name)):
                steps[name] = self.training.num_steps(grouping.trained_on(name), grouping.length_of(name))
        return steps

    def _jobs(self, grouping: Grouping, steps: Mapping[str, int]) -> list[Callable[[AdapterTraining], TrainedAdapter]]:
        """Trainings of these groups, each of which the run's log counts after those before.

        One that has been begun keeps its steps, and those that have not come after all of these.
        """
        run, jobs, begun = self.context.run, [], {}
        for name in steps:
            known = run.trained_adapter(name)
            if known is not None and known.mixture == grouping.mixtures[name]:
                begun[name] = known.first_step
        next_step = max([run.num_steps(), *(first_step + steps[name] for name, first_step in begun.items())])
        for name, count in steps.items():
            first_step = begun.get(name, next_step)
            if name not in begun:
                next_step += count
            jobs.append(partial(self.train_group, grouping, name, first_step=first_step))
        return jobs

    def chosen(self) -> Grouping:
        """The run's last choice; the first one is made by the fine-tunings that calibrate."""
        run, evidence = self.context.run, self._evidence({})
        with run.stage(GROUP, Grouping, Estimate) as todo:
            if not todo:
                return run_on_main(lambda: run.read(Grouping))
            return self._choose(evidence, {})

    def _chosen_again(self, grouping: Grouping, name: str, scored: ScoredRun) -> Grouping:
        """The choice that follows when a group's adapter was trained."""
        before = {own: ObservedRun(**run) for own, run in grouping.settings["trained"].items()}
        trained = {**before, name: scored.as_observed()}
        evidence = self._evidence(trained)
        with self.context.run.stage(f"{GROUP}:{name}"):
            return self._choose(evidence, trained)

    def _evidence(self, trained: Mapping[str, ObservedRun]) -> list[ObservedRun]:
        """Trainings that began where those of the groups begin."""
        if self.context.args.group_initialization == "baseline":
            return list(trained.values())
        observed = self.calibration.observed_runs(self.num_calibration_runs)
        known = [run.mixture for run in observed]
        return [*observed, *(run for run in trained.values() if run.mixture not in known)]

    def _choose(self, observed: Sequence[ObservedRun], trained: Mapping[str, ObservedRun]) -> Grouping:
        """One process predicts and chooses, the others take its choice."""
        grouping = run_on_main(lambda: self._choice(observed, trained))
        wait_for_everyone()
        return grouping

    def _choice(self, observed: Sequence[ObservedRun], trained: Mapping[str, ObservedRun]) -> Grouping:
        args, run = self.context.args, self.context.run
        selector = self._selector(observed)
        options: dict[str, Any] = {}
        if args.grouping_method == "mixtures":
            # Other weights have no scale.
            has_scales = args.ensemble_weights in ("cross_validated", "answers")
            options = {"trained": trained, "output_scales": has_scales}
        # The adapter for all tasks is the first fine-tuning that calibrates.
        has_baseline = self.num_calibration_runs > 0
        grouping = selector.group(**args.group_arguments(), has_baseline=has_baseline, seed=args.seed, **options)
        run.write(Estimate.of(selector.estimator, grouping))
        run.write(grouping)
        if not trained:
            keep_example_rows(self.context, selector, self.context.tasks.names)
        return grouping

    def _has_steps(self, length: float) -> bool:
        """Whether a training of this length is as long as it is said to be, on the smallest task as well."""
        return length >= 1 or all(
            self.training.num_steps([task], length) >= LEAST_STEPS for task in self.context.tasks.names
        )

    def _selector(self, observed: Sequence[ObservedRun]) -> DataSelector:
        context, args = self.context, self.context.args
        options: dict[str, Any] = {"device": args.estimate_device}
        if args.group_initialization == "baseline":
            length, *others = args.continued_lengths()
            options |= {"continued_length": length, "other_lengths": [own for own in others if self._has_steps(own)]}
        return run_selector(context.run, context.tasks.names, args.num_components, observed, **options)
