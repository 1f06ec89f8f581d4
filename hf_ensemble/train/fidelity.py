"""Predictions against the truth: subsets of the tasks fine-tuned for real."""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from .._files import read_json, write_json
from ..estimate import SubsetEstimator
from ..select import random_subsets
from .stages import StagesMixin


@dataclass(frozen=True)
class FidelityReport:
    """Predicted and true validation losses of `S` subsets and `T` tasks.

    Args:
        task_names (`list[str]`): the tasks.
        subsets (`list[list[str]]`): what was fine-tuned on.
        predicted_loss (`list[list[float]]`): `(S, T)`.
        true_loss (`list[list[float]]`): `(S, T)`.
        true_accuracy (`list[list[float]]`): `(S, T)`.
        mean_relative_error (`float`): mean of |predicted - true| / true over all pairs.
        mean_task_spearman (`float`): Spearman correlation over the subsets, per task, averaged.
        task_spearman (`dict[str, float]`): the same, by task.
        correlation (`float`): Pearson correlation over all pairs.
        l2_scale (`float`): the constant c of the estimates.
        l2_evidence (`str`): where c came from.
        training_seconds (`list[float]`): wall time of each fine-tuning.
        prediction_seconds (`float`): wall time of all predictions together.
    """

    task_names: list[str]
    subsets: list[list[str]]
    predicted_loss: list[list[float]]
    true_loss: list[list[float]]
    true_accuracy: list[list[float]]
    mean_relative_error: float
    mean_task_spearman: float
    task_spearman: dict[str, float]
    correlation: float
    l2_scale: float
    l2_evidence: str
    training_seconds: list[float]
    prediction_seconds: float

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), asdict(self))


def measure_fidelity(
    trainer: StagesMixin,
    estimator: SubsetEstimator,
    num_subsets: int = 20,
    subset_size: int | None = None,
    subsets: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> FidelityReport:
    """Fine-tune random subsets of the tasks with the user's own trainer, and compare with the predictions.

    Every finished subset is kept in `OUTPUT_DIR/fidelity`, so that a killed measurement goes on where it stopped.

    Args:
        trainer (`EnsembleTrainer` or another trainer over several tasks): trains and scores.
        estimator (`SubsetEstimator`): predictions from the features captured at the same starting point.
        num_subsets (`int`, *optional*, defaults to 20): random subsets.
        subset_size (`int`, *optional*): tasks of a subset; a third of them, and at least 2, by default.
        subsets (`Sequence[Sequence[str]]`, *optional*): in place of random ones.
        seed (`int`, *optional*, defaults to 0): seed of the subsets.
    """
    run = trainer.open_run()
    names = list(estimator.task_names)
    if subsets is None:
        size = subset_size or max(2, round(len(names) / 3))
        drawn = random_subsets(len(names), size, num_subsets, seed)
        subsets = [[name for name, held in zip(names, row) if held] for row in drawn]
    start = time.perf_counter()
    predicted = estimator.predict_subsets(subsets).loss
    prediction_seconds = time.perf_counter() - start
    truth, accuracy, seconds = [], [], []
    for number, subset in enumerate(subsets):
        digest = hashlib.blake2b("|".join(sorted(subset)).encode(), digest_size=8).hexdigest()
        record = run.path / "fidelity" / f"subset-{digest}.json"
        if not record.exists():
            folder = run.path / "fidelity" / "adapter"
            shutil.rmtree(folder, ignore_errors=True)
            trained = trainer.adapter_training.run(f"fidelity-{digest}", subset, folder)
            scores = trainer.score_adapter(folder, trainer.eval_dataset, f"Fidelity {number + 1}/{len(subsets)}")
            if trainer.is_world_process_zero():
                write_json(record, {"subset": list(subset), "scores": scores, "seconds": trained.seconds})
            trainer.accelerator.wait_for_everyone()
        kept = read_json(record)
        truth.append([kept["scores"][name]["loss"] for name in names])
        accuracy.append([kept["scores"][name]["accuracy"] for name in names])
        seconds.append(kept["seconds"])
    true = np.array(truth)
    ranks = {name: float(spearmanr(predicted[:, i], true[:, i]).statistic) for i, name in enumerate(names)}
    report = FidelityReport(
        task_names=names,
        subsets=[list(subset) for subset in subsets],
        predicted_loss=predicted.tolist(),
        true_loss=truth,
        true_accuracy=accuracy,
        mean_relative_error=float(np.mean(np.abs(predicted - true) / true)),
        mean_task_spearman=float(np.mean(list(ranks.values()))),
        task_spearman=ranks,
        correlation=float(np.corrcoef(predicted.ravel(), true.ravel())[0, 1]),
        l2_scale=estimator.regularization.l2_scale,
        l2_evidence=estimator.regularization.evidence,
        training_seconds=seconds,
        prediction_seconds=prediction_seconds,
    )
    if trainer.is_world_process_zero():
        report.save(run.path / "estimate" / "fidelity.json")
    return report
