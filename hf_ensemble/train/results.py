"""What a finished run came to, on rows that nothing was chosen by where there are any."""

from ..runs import FidelityReport, Results, SelectionResult
from ..tasks.class_labels import are_hidden
from .ensemble_trainer import EnsembleSFTTrainer, EnsembleTrainer
from .selection_trainer import SelectionSFTTrainer, SelectionTrainer


def collect_results(
    trainer: EnsembleTrainer | EnsembleSFTTrainer | SelectionTrainer | SelectionSFTTrainer,
    fidelity: FidelityReport | None = None,
) -> Results:
    """Score every system on the tasks' test rows, or on evaluation rows unless all tasks have test rows with labels.

    Args:
        trainer (`EnsembleTrainer`, `SelectionTrainer` or one of their SFT forms): a trainer whose `train()` is done.
        fidelity (`FidelityReport`, *optional*): to be kept with the results.

    Returns:
        `Results`: also written into the run.

    Raises:
        `ConfigurationError`: before `train()`.
    """
    rows = trainer.tasks.split("test") if trainer.tasks.has_split("test") else None
    if rows is not None and any(are_hidden(own) for own in rows.values()):
        rows = None
    split = "eval" if rows is None else "test"
    scores = trainer.scores(rows)
    trainer.flow.report(split, {system: own for system, own in scores.items() if system != "base"})
    if isinstance(trainer, (SelectionTrainer, SelectionSFTTrainer)):
        selection = trainer.selection
        outcome = {"selection": SelectionResult(list(selection.targets), selection.tasks, selection.summary)}
    else:
        outcome = {"groups": trainer.grouping.groups, "weights": trainer.ensemble.weights}
    results = Results.of(trainer.run_directory.record, split, scores, fidelity=fidelity, **outcome)
    trainer.run_directory.write(results)
    return results
