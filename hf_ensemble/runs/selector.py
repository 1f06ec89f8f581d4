"""Predictions from a run's store, with the evidence that the run holds."""

from collections.abc import Mapping, Sequence

from ..estimate import ObservedRun
from ..select import DataSelector
from ..store import GradientStore
from .directory import RunDirectory
from .records import TasksRecord


def run_selector(
    run: RunDirectory,
    tasks: Sequence[str] | None = None,
    num_components: int = 400,
    observed_runs: Sequence[ObservedRun] | None = None,
    clusters: Mapping[str, int] | None = None,
    continued_length: float | None = None,
    device: str | None = None,
    other_lengths: Sequence[float] = (),
) -> DataSelector:
    """The selector of a run's captured gradients, sampling weights and true fine-tunings.

    Args:
        run (`RunDirectory`): a run whose gradients are captured.
        tasks (`Sequence[str]`, *optional*): tasks to take; all by default.
        num_components (`int`, *optional*, defaults to 400): see [`SubsetEstimator`].
        observed_runs (`Sequence[ObservedRun]`, *optional*):
            What calibrates the predictions; by default every fine-tuning of the run that was on no other tasks, began
            where the gradients were captured, and was as long as those to choose for.
        clusters (`dict[str, int]`, *optional*): see [`DataSelector.from_store`].
        continued_length (`float`, *optional*):
            Choose for trainings of this length that go on from the adapter for all tasks, instead of whole ones from
            the start.
        device, other_lengths: see [`DataSelector.from_store`].

    Raises:
        `StoreError`: when the gradients are not captured.
        `RecordError`: for damaged records.
    """
    record = run.read(TasksRecord)
    known = record.tasks
    names = list(known) if tasks is None else list(tasks)
    gradients = run.gradients if continued_length is None else run.baseline_gradients
    length = 1.0 if continued_length is None else continued_length
    if observed_runs is None:
        theta0 = GradientStore(gradients).identity["model"]["theta0"]
        observed_runs = [
            scored.as_observed()
            for scored in run.scored_runs()
            if set(scored.subset) <= set(names) and scored.theta0 == theta0 and scored.length == length
        ]
    weights = {name: known[name].sampling_weight for name in names if name in known}
    return DataSelector.from_store(
        gradients,
        tasks,
        num_components,
        observed_runs,
        weights,
        clusters,
        record.task_loss_weighting,
        length,
        device,
        other_lengths,
    )
