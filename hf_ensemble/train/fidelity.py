"""Predictions against the truth: subsets of the tasks that are fine-tuned."""

import time
from collections.abc import Sequence

import numpy as np

from .._settings import check_at_least, checked_names
from ..capture import applied_update
from ..errors import ConfigurationError, EstimationError
from ..estimate import Prediction, SubsetEstimator
from ..evaluate.fidelity_measures import correlation, coverage, mean_or_nan, mean_relative_error, task_spearman
from ..runs import FidelityReport, FirstOrderError, NoiseCeiling, ScoredRun
from ..select import mixed_subsets
from ..store import GradientStore
from ..tasks import EXAMPLE_ID
from .ensemble_trainer import EnsembleSFTTrainer, EnsembleTrainer
from .flows.ensemble_flow import EnsembleFlow
from .flows.selection_flow import SelectionFlow
from .selection_trainer import SelectionSFTTrainer, SelectionTrainer

# A second training of a subset has this seed beside the arguments' own.
_OTHER_SEED = 1


def measure_fidelity(
    trainer: EnsembleTrainer | EnsembleSFTTrainer | SelectionTrainer | SelectionSFTTrainer,
    num_subsets: int = 20,
    sizes: Sequence[int] | None = None,
    subsets: Sequence[Sequence[str]] | None = None,
    num_repeated: int = 0,
    num_first_order: int = 3,
    seed: int = 0,
) -> FidelityReport:
    """Fine-tune random subsets of the tasks with the user's own trainer, and compare with the predictions.

    Gradients are captured first where the run has none. Every finished subset is kept in the run, so that a killed
    measurement goes on where it stopped. Subsets that calibrated the estimates are left out.

    Args:
        trainer (`EnsembleTrainer`, `SelectionTrainer` or one of their SFT forms): trains and scores.
        num_subsets (`int`, *optional*, defaults to 20): number of random subsets.
        sizes (`Sequence[int]`, *optional*): their sizes, in turn; from one task to all by default.
        subsets (`Sequence[Sequence[str]]`, *optional*): in place of random ones.
        num_repeated (`int`, *optional*, defaults to 0): how many of the subsets, from the first on, are trained with a
            second seed, for the noise ceiling.
        num_first_order (`int`, *optional*, defaults to 3): number of subsets whose predicted parameters are put into
            the model, for the error of the first-order approximation alone.
        seed (`int`, *optional*, defaults to 0): seed of the draw of subsets.

    Raises:
        `ConfigurationError`: for numbers out of range, and subsets that are empty or have unknown tasks.
        `EstimationError`: when no subset is left to compare with.
    """
    check_at_least("num_repeated", num_repeated, 0)
    check_at_least("num_first_order", num_first_order, 0)
    names = list(trainer.tasks)
    if subsets is None:
        drawn = mixed_subsets(len(names), num_subsets, sizes, seed)
        subsets = [[name for name, held in zip(names, row) if held] for row in drawn]
    subsets = [checked_names("tasks of a subset", subset, names) for subset in subsets]
    if not all(subsets):
        raise ConfigurationError(f"Expected at least one task in each subset, found none in one of {subsets!s:.200}.")
    with trainer.working(), trainer.run_directory.repeated("fidelity", adds_up=True):
        report = _measured(trainer, subsets, num_repeated, num_first_order)
        trainer.run_directory.write(report)
    return report


def _measured(
    trainer: EnsembleTrainer | EnsembleSFTTrainer | SelectionTrainer | SelectionSFTTrainer,
    subsets: Sequence[Sequence[str]],
    num_repeated: int,
    num_first_order: int,
) -> FidelityReport:
    store = trainer.capture()
    calibration = trainer.flow.calibration
    estimator = calibration.selector(trainer.flow.num_calibration_runs()).estimator
    names = list(estimator.task_names)
    seen = [sorted(observed.mixture) for observed in estimator.observed_runs]
    subsets = [list(subset) for subset in subsets if sorted(subset) not in seen]
    if not subsets:
        raise EstimationError(
            f"Every subset calibrates the estimates already: {seen}. Ask for more subsets, or for other ones."
        )
    start = time.perf_counter()
    prediction = estimator.predict_subsets(subsets)
    prediction_seconds = time.perf_counter() - start
    first = [
        calibration.scored_run(subset, description=f"Subset {number}/{len(subsets)}")
        for number, subset in enumerate(subsets, start=1)
    ]
    second = [
        calibration.scored_run(subset, trainer.args.seed + _OTHER_SEED, f"Second seed {number}/{num_repeated}")
        for number, subset in enumerate(subsets[:num_repeated], start=1)
    ]
    return _report(
        estimator,
        subsets,
        prediction,
        first,
        ceiling=_ceiling(prediction.loss, _measure(first, names, "loss"), second, names),
        first_order=_first_order(trainer.flow, store, estimator, prediction, first, num_first_order),
        capture_seconds=trainer.run_directory.seconds("gradients"),
        prediction_seconds=prediction_seconds,
    )


def _report(
    estimator: SubsetEstimator,
    subsets: list[list[str]],
    prediction: Prediction,
    runs: Sequence[ScoredRun],
    ceiling: NoiseCeiling | None,
    first_order: FirstOrderError | None,
    capture_seconds: float | None,
    prediction_seconds: float,
) -> FidelityReport:
    names = list(estimator.task_names)
    low, high = prediction.loss_low, prediction.loss_high
    true, accuracy = (_measure(runs, names, measure) for measure in ("loss", "accuracy"))
    inside = np.array([[name in subset for name in names] for subset in subsets])
    ranks = task_spearman(prediction.loss, true)
    base = estimator.base_loss()
    seconds = [one.seconds for one in runs]
    speed_up = None
    if capture_seconds is not None:
        speed_up = float(100 * np.mean(seconds) / (capture_seconds + 100 * prediction_seconds / len(subsets)))
    return FidelityReport(
        task_names=names,
        subsets=subsets,
        predicted_loss=prediction.loss.tolist(),
        loss_low=low.tolist(),
        loss_high=high.tolist(),
        true_loss=true.tolist(),
        predicted_accuracy=prediction.accuracy.tolist(),
        true_accuracy=accuracy.tolist(),
        mean_relative_error=mean_relative_error(prediction.loss, true),
        mean_accuracy_error=float(np.mean(np.abs(prediction.accuracy - accuracy))),
        task_spearman=dict(zip(names, ranks.tolist())),
        mean_task_spearman=mean_or_nan(ranks),
        mean_task_spearman_inside=mean_or_nan(task_spearman(prediction.loss, true, inside)),
        mean_task_spearman_outside=mean_or_nan(task_spearman(prediction.loss, true, ~inside)),
        correlation=correlation(prediction.loss, true),
        change_correlation=correlation(prediction.loss - base, true - base),
        interval_level=prediction.level if np.isfinite(prediction.level) else None,
        interval_coverage=coverage(low, high, true) if np.isfinite(prediction.level) else None,
        ceiling=ceiling,
        first_order=first_order,
        calibration_subsets=[list(observed.mixture) for observed in estimator.observed_runs],
        l2_scale=estimator.regularization.l2_scale,
        l2_evidence=estimator.regularization.evidence,
        training_seconds=seconds,
        capture_seconds=capture_seconds,
        prediction_seconds=prediction_seconds,
        speed_up=speed_up,
    )


def _measure(runs: Sequence[ScoredRun], names: Sequence[str], measure: str) -> np.ndarray:
    return np.array([[getattr(run.scores[name], measure) for name in names] for run in runs])


def _ceiling(predicted, true, second: Sequence[ScoredRun], names: Sequence[str]) -> NoiseCeiling | None:
    if not second:
        return None
    again = _measure(second, names, "loss")
    count = len(again)
    return NoiseCeiling(
        num_subsets=count,
        mean_relative_error=mean_relative_error(again, true[:count]),
        mean_task_spearman=mean_or_nan(task_spearman(again, true[:count])),
        predicted_mean_task_spearman=mean_or_nan(task_spearman(predicted[:count], true[:count])),
    )


def _first_order(
    flow: EnsembleFlow | SelectionFlow,
    store: GradientStore,
    estimator: SubsetEstimator,
    prediction: Prediction,
    runs: Sequence[ScoredRun],
    count: int,
) -> FirstOrderError | None:
    chosen = np.unique(np.linspace(0, len(runs) - 1, min(count, len(runs))).round().astype(int))
    if not len(chosen):
        return None
    error = norm = 0.0
    losses, linear_losses, distances = [], [], []
    for row in chosen:
        flow.training.reset()
        with (
            flow.context.model_state.restored(),
            applied_update(flow.context.model, store, estimator.parameters_at(prediction.coefficients[row])),
        ):
            distances.append(flow.training.distance())
            true = validation_margins(flow, store)
        linear = estimator.linear_margins(prediction.coefficients[row])
        for name in estimator.task_names:
            examples = [key for key in linear if key[0] == name]
            own, expected = (np.array([margins[key] for key in examples]) for margins in (true, linear))
            error += float(np.sum((own - expected) ** 2))
            norm += float(np.sum(own**2))
            losses.append(np.logaddexp(0.0, -own).mean())
            linear_losses.append(np.logaddexp(0.0, -expected).mean())
    return FirstOrderError(
        num_subsets=len(chosen),
        squared_error=error / norm,
        loss_relative_error=mean_relative_error(np.array(linear_losses), np.array(losses)),
        predicted_distance=float(np.mean(distances)),
        training_distance=float(np.mean([runs[row].distance for row in chosen])),
    )


def validation_margins(flow: EnsembleFlow | SelectionFlow, store: GradientStore) -> dict[tuple[str, str], float]:
    """Margin of every validation example at the model's present parameters, by (task, example id)."""
    kind = store.identity["config"]["margin"]
    context, margins = flow.context, {}
    for name, rows in context.eval_tables.items():
        scores = context.evaluator.score_rows(context.answer_scorer(), rows, kind, name)
        margins.update({(name, example): float(m) for example, m in zip(rows[EXAMPLE_ID], scores.margin)})
    return margins
