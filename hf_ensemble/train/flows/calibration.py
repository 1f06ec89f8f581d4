"""Fine-tunings of subsets that are made for their scores: evidence for the estimates, and their test."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..._files import checksums, remove_folder, write_folder_atomically
from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ...capture.row_sample import sample_rows
from ...estimate import ObservedRun
from ...evaluate import TaskScores
from ...evaluate.evaluator import with_answers
from ...runs import ScoredRun, TrainedAdapter, run_selector
from ...runs.layout import SCORED_TRAINING
from ...runs.progress import CALIBRATION, calibration_stages
from ...runs.systems import BASELINE
from ...select import DataSelector, calibration_subsets
from ...tasks import EXAMPLE_ID
from .adapter_training import AdapterTraining
from .context import FlowContext
from .evaluation import SystemEvaluation
from .stages import FORWARD, TRAINING, Stage


class Calibration:
    """True fine-tunings of a run, and the predictions that they calibrate.

    Args:
        context (`FlowContext`): what the run works on.
        training (`AdapterTraining`): trains.
        evaluation (`SystemEvaluation`): scores.
    """

    def __init__(self, context: FlowContext, training: AdapterTraining, evaluation: SystemEvaluation):
        self.context = context
        self.training = training
        self.evaluation = evaluation

    def scored_run(
        self, subset: Sequence[str], seed: int | None = None, description: str = "Run", keep_adapter: bool = False
    ) -> ScoredRun:
        """Fine-tune a subset and score it on every task's validation rows.

        What was made before is read from the run.

        Args:
            subset (`Sequence[str]`): names of tasks.
            seed (`int`, *optional*): of the training; that of the arguments by default.
            description (`str`, *optional*, defaults to `"Run"`): label of the progress bar.
            keep_adapter (`bool`, *optional*, defaults to `False`): whether the adapter stays until [`discard`].
        """
        run, seed = self.context.run, self.context.args.seed if seed is None else seed
        known = self._known(dict.fromkeys(subset, 1.0), seed, self.training.fingerprint())
        if known is not None:
            return known
        folder = run.scored_adapter(subset, seed)
        trained = self.training.run(_name_of(folder), subset, folder, seed)
        scored = self.score_trained(trained, folder, description)
        if not keep_adapter:
            self._remove(folder)
        return scored

    def score_trained(self, trained: TrainedAdapter, folder: Path, description: str) -> ScoredRun:
        """Keep the scores of an adapter of the run.

        Args:
            trained (`TrainedAdapter`): its training.
            folder (`Path`): where the adapter lies.
            description (`str`): label of the progress bar.
        """
        known = self._known(trained.mixture, trained.seed, trained.theta0, trained.length)
        if known is not None:
            return known
        start = time.perf_counter()
        # Estimates are calibrated by losses: metrics that nobody reads are not computed.
        scores = self.evaluation.score_adapter(folder, self.context.eval_tables, description, has_metrics=False)
        scored = ScoredRun(
            trained.mixture,
            trained.seed,
            scores,
            round(trained.seconds + time.perf_counter() - start, 3),
            trained.distance,
            trained.theta0,
            trained.length,
            self._captured_losses(scores),
        )
        self.context.run.write_scored_run(scored)
        wait_for_everyone()
        return scored

    def _captured_losses(self, scores: Mapping[str, TaskScores]) -> dict[str, float]:
        """Mean loss of the validation rows that gradients are captured of, for tasks that have more."""
        config, found = self.context.capture_config(), {}
        for task, own in scores.items():
            rows = self.context.eval_tables[task]
            sample = sample_rows(rows, config.row_limit("validation"), config.capture_seed)
            if sample.num_rows:
                is_captured = np.isin(with_answers(rows)[EXAMPLE_ID][:], sample.rows[EXAMPLE_ID][:])
                found[task] = float(own.rows.loss[is_captured].mean())
        return found

    def _known(self, mixture: Mapping[str, float], seed: int, theta0: str, length: float = 1.0) -> ScoredRun | None:
        """What the run holds of a fine-tuning of a length that began at theta0."""
        return run_on_main(lambda: self.context.run.scored_run(mixture, seed, theta0, length))

    def reuse(self, mixture: Mapping[str, float], name: str, folder: Path) -> TrainedAdapter | None:
        """Copy the adapter of a training from theta0 on this mixture to a folder, where the run has made one.

        The one adapter for all tasks may be it, or a calibrating fine-tuning. The copy has no record of its own.

        Args:
            mixture (`dict[str, float]`): weight of each task's rows.
            name (`str`): name of the training in whose place the copy is.
            folder (`Path`): where it goes.
        """
        found = run_on_main(lambda: self._same_training(mixture, folder))
        if found is None:
            return None
        known, source = found
        if source != folder:
            self.context.run.forget_training(name)
            if is_main_process():
                write_folder_atomically(folder, lambda new: shutil.copytree(source, new, dirs_exist_ok=True))
            wait_for_everyone()
        return known

    def is_known(self, mixture: Mapping[str, float], folder: Path) -> bool:
        """Whether [`reuse`] would copy an adapter."""
        return run_on_main(lambda: self._same_training(mixture, folder)) is not None

    def _same_training(self, mixture: Mapping[str, float], copy: Path) -> tuple[TrainedAdapter, Path] | None:
        """The record of the same training, and where its adapter lies: in its own place or in that of a copy."""
        for known, place in self._alike(mixture):
            if place.is_dir():
                known.check_files(place)
                return known, place
            # Cards and tokenizers may have been put beside a copy.
            if copy.is_dir() and known.files.items() <= checksums(copy).items():
                return known, copy
        return None

    def origin(self, name: str, mixture: Mapping[str, float]) -> str:
        """Name of the training that an adapter is from: its own, or that of which it is a copy; on the main process."""
        if self.context.run.trained_adapter(name) is not None:
            return name
        return next((known.name for known, _ in self._alike(mixture)), name)

    def _alike(self, mixture: Mapping[str, float]) -> Iterator[tuple[TrainedAdapter, Path]]:
        """Finished trainings from theta0 on a mixture that others may be copies of, and where their adapters were."""
        run, seed = self.context.run, self.context.args.seed
        own = run.scored_adapter(mixture, seed)
        for name, place in ((BASELINE, run.baseline), (_name_of(own), own)):
            wanted = TrainedAdapter(name, dict(mixture), seed, self.training.fingerprint())
            known = run.trained_adapter(name)
            if known is not None and known.status == "done" and wanted.continues(known):
                yield known, place

    def discard(self, count: int) -> None:
        """Delete the adapters of calibrating fine-tunings: what they are needed for is copied."""
        for subset in calibration_subsets(self.context.tasks.names, count, self.context.args.seed):
            self._remove(self.context.run.scored_adapter(subset, self.context.args.seed))

    def _remove(self, folder: Path) -> None:
        if is_main_process():
            remove_folder(folder)
        wait_for_everyone()

    def observed_runs(self, count: int) -> list[ObservedRun]:
        """The fine-tunings that calibrate the estimates; those that the run does not hold yet are made.

        Their adapters stay until [`discard`].
        """
        for name in self.stages(count):
            self.run_stage(name, count)
        subsets = calibration_subsets(self.context.tasks.names, count, self.context.args.seed)
        return [self.scored_run(subset, keep_adapter=True).as_observed() for subset in subsets]

    def stages(self, count: int) -> dict[str, list[str]]:
        """The stages of these fine-tunings, but for what the run has anyway, and their tasks."""
        args = self.context.args
        given = {
            "calibration_runs": count,
            "seed": args.seed,
            "train_baseline": getattr(args, "train_baseline", False),
        }
        return calibration_stages(self.context.tasks.names, given)

    def announced(self, count: int, num_scored: int) -> list[Stage]:
        """These stages, to be announced, with `num_scored` rows that each is scored on."""
        work = {
            name.partition(":")[2]: self.training.num_rows(subset) * TRAINING + num_scored * FORWARD
            for name, subset in self.stages(count).items()
        }
        return [Stage(CALIBRATION, "calibration run", sum(work.values()), work)] if work else []

    def run_stage(self, name: str, count: int) -> None:
        """Make one of these fine-tunings, where the run does not hold it yet."""
        stages = self.stages(count)
        label = f"Calibration run {list(stages).index(name) + 1}/{len(stages)}"
        with self.context.run.stage(name):
            self.scored_run(stages[name], description=label, keep_adapter=True)

    def training_names(self, count: int) -> list[str]:
        """Names of the trainings that [`observed_runs`] makes, where nothing else has made them."""
        seed = self.context.args.seed
        subsets = calibration_subsets(self.context.tasks.names, count, seed)
        return [_name_of(self.context.run.scored_adapter(subset, seed)) for subset in subsets]

    def selector(self, count: int) -> DataSelector:
        """Predictions from the run's store, calibrated by `count` fine-tunings."""
        observed = self.observed_runs(count)
        context, args = self.context, self.context.args
        return run_selector(
            context.run, context.tasks.names, args.num_components, observed, device=args.estimate_device
        )


def _name_of(folder: Path) -> str:
    """Name of the training whose adapter goes to a folder."""
    return f"{SCORED_TRAINING}{folder.name}"
