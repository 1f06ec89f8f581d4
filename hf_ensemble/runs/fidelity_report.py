"""How predictions compare with the truth."""

from dataclasses import dataclass

from .._records import Record


@dataclass(frozen=True)
class NoiseCeiling:
    """The truth against itself: the same subsets, trained with another seed.

    Args:
        num_subsets (`int`): trained twice.
        mean_relative_error (`float`): of the second losses as a prediction of the first.
        mean_task_spearman (`float`): of both trainings' losses.
        predicted_mean_task_spearman (`float`): of the predictions with the first losses, on the same subsets.
    """

    num_subsets: int
    mean_relative_error: float
    mean_task_spearman: float | None
    predicted_mean_task_spearman: float | None


@dataclass(frozen=True)
class FirstOrderError:
    """How far the model is from linear where the surrogate's optima lie: by real forward passes at theta0 + S P w.

    Args:
        num_subsets (`int`): whose optima were put into the model.
        squared_error (`float`): sum of (m - (m_i + x_i.w))^2 over sum of m^2, m the margin at theta0 + S P w of every
            validation example; the residual of GradEx, arXiv 2409.19458.
        loss_relative_error (`float`): mean relative error of the linear losses against those at theta0 + S P w.
        predicted_distance (`float`): mean norm of S P w.
        training_distance (`float`): mean norm of the way that training went on the same subsets.
    """

    num_subsets: int
    squared_error: float
    loss_relative_error: float
    predicted_distance: float
    training_distance: float


@dataclass(frozen=True)
class FidelityReport(Record):
    """Predicted and true validation losses of `S` subsets and `T` tasks.

    Figures that are not defined, such as a rank correlation over two subsets, are NaN, and null in JSON.

    Args:
        task_names (`list[str]`): the tasks.
        subsets (`list[list[str]]`): what was fine-tuned on; none of them calibrated the estimates.
        predicted_loss (`list[list[float]]`): `(S, T)`.
        loss_low (`list[list[float]]`): lower ends of the predictions' intervals, `(S, T)`.
        loss_high (`list[list[float]]`): upper ends.
        true_loss (`list[list[float]]`): `(S, T)`.
        predicted_accuracy (`list[list[float]]`): `(S, T)`, see [`Prediction`].
        true_accuracy (`list[list[float]]`): `(S, T)`.
        mean_relative_error (`float`): mean of |predicted - true| / true of the loss over all pairs.
        mean_accuracy_error (`float`): mean of |predicted - true| of the accuracy over all pairs.
        task_spearman (`dict[str, float]`): Spearman correlation over the subsets, by task.
        mean_task_spearman (`float`): its mean over tasks.
        mean_task_spearman_inside (`float`): the same, of each task over the subsets that hold it.
        mean_task_spearman_outside (`float`): the same over the subsets that do not.
        correlation (`float`): Pearson correlation of the losses over all pairs.
        change_correlation (`float`): the same of the losses' changes from theta0.
        interval_level (`float`): coverage that the intervals promise; `None` without intervals.
        interval_coverage (`float`): share of true losses inside of theirs; `None` without intervals.
        ceiling (`NoiseCeiling`, *optional*): where subsets were trained twice.
        first_order (`FirstOrderError`, *optional*): where optima were put into the model.
        calibration_subsets (`list[list[str]]`): what the runs that calibrated the estimates were trained on.
        l2_scale (`float`): the constant c of the estimates.
        l2_evidence (`str`): where c came from.
        training_seconds (`list[float]`): wall time of each fine-tuning and its scoring on every task's rows.
        capture_seconds (`float`, *optional*): wall time of the capture pass; not known of one that was interrupted.
        prediction_seconds (`float`): wall time of all predictions together.
        speed_up (`float`, *optional*):
            Time to truly train and score 100 such subsets over time to capture and to predict 100 of them.
    """

    format = "hf_ensemble.fidelity"

    task_names: list[str]
    subsets: list[list[str]]
    predicted_loss: list[list[float]]
    loss_low: list[list[float | None]]
    loss_high: list[list[float | None]]
    true_loss: list[list[float]]
    predicted_accuracy: list[list[float]]
    true_accuracy: list[list[float]]
    mean_relative_error: float
    mean_accuracy_error: float
    task_spearman: dict[str, float | None]
    mean_task_spearman: float | None
    mean_task_spearman_inside: float | None
    mean_task_spearman_outside: float | None
    correlation: float | None
    change_correlation: float | None
    interval_level: float | None
    interval_coverage: float | None
    ceiling: NoiseCeiling | None
    first_order: FirstOrderError | None
    calibration_subsets: list[list[str]]
    l2_scale: float
    l2_evidence: str
    training_seconds: list[float]
    capture_seconds: float | None
    prediction_seconds: float
    speed_up: float | None
