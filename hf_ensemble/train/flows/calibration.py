"""Fine-tunings of subsets that are made for their scores: evidence for the estimates, and their test."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ...estimate import ObservedRun
from ...runs import ScoredRun, TrainedAdapter, run_selector
from ...select import DataSelector, calibration_subsets
from .adapter_training import AdapterTraining
from .context import FlowContext
from .evaluation import SystemEvaluation


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

    def scored_run(self, subset: Sequence[str], seed: int | None = None, description: str = "Run") -> ScoredRun:
        """Fine-tune a subset and score it on every task's validation rows; the adapter is thrown away.

        What was made before is read from the run.

        Args:
            subset (`Sequence[str]`): names of tasks.
            seed (`int`, *optional*): of the training; that of the arguments by default.
            description (`str`, *optional*, defaults to `"Run"`): label of the progress bar.
        """
        run, seed = self.context.run, self.context.args.seed if seed is None else seed
        known = self._known(subset, seed, self.training.theta0_fingerprint())
        if known is not None:
            return known
        folder = run.scored_adapter(subset, seed)
        trained = self.training.run(_name_of(folder), subset, folder, seed)
        scored = self.score_trained(trained, folder, description)
        if is_main_process():
            shutil.rmtree(folder)
        wait_for_everyone()
        return scored

    def score_trained(self, trained: TrainedAdapter, folder: Path, description: str) -> ScoredRun:
        """Keep the scores of an adapter that was trained on a subset of the tasks.

        Args:
            trained (`TrainedAdapter`): its training.
            folder (`Path`): where the adapter lies.
            description (`str`): label of the progress bar.
        """
        run, subset = self.context.run, list(trained.mixture)
        known = self._known(subset, trained.seed, trained.theta0)
        if known is not None:
            return known
        start = time.perf_counter()
        # Estimates are calibrated by losses: metrics that nobody reads are not computed.
        scores = self.evaluation.score_adapter(folder, self.context.eval_tables, description, has_metrics=False)
        seconds = round(trained.seconds + time.perf_counter() - start, 3)
        scored = ScoredRun(subset, trained.seed, scores, seconds, trained.distance, trained.theta0)
        run.write_scored_run(scored)
        wait_for_everyone()
        return scored

    def _known(self, subset: Sequence[str], seed: int, theta0: str) -> ScoredRun | None:
        """What the run holds of a fine-tuning that began at theta0."""
        known = run_on_main(lambda: self.context.run.scored_run(subset, seed))
        return known if known is not None and known.theta0 == theta0 else None

    def observed_runs(self, count: int) -> list[ObservedRun]:
        """The fine-tunings that calibrate the estimates; those that the run does not hold yet are made."""
        subsets = calibration_subsets(self.context.tasks.names, count, self.context.args.seed)
        return [
            self.scored_run(subset, description=f"Calibration run {number}/{len(subsets)}").as_observed()
            for number, subset in enumerate(subsets, start=1)
        ]

    def training_names(self, count: int) -> list[str]:
        """Names of the trainings that [`observed_runs`] makes, where nothing else has made them."""
        seed = self.context.args.seed
        subsets = calibration_subsets(self.context.tasks.names, count, seed)
        return [_name_of(self.context.run.scored_adapter(subset, seed)) for subset in subsets]

    def selector(self, count: int) -> DataSelector:
        """Predictions from the run's store, calibrated by `count` fine-tunings."""
        observed = self.observed_runs(count)
        return run_selector(self.context.run, self.context.tasks.names, self.context.args.num_components, observed)


def _name_of(folder: Path) -> str:
    """Name of the training whose adapter goes to a folder."""
    return f"scored-{folder.name}"
