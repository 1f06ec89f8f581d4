"""What a finished run came to, on rows that nothing was chosen by where there are any."""

from dataclasses import replace

from ..runs import FidelityReport, Results
from .ensemble_trainer import EnsembleSFTTrainer, EnsembleTrainer
from .flows.stages import announce
from .inputs.evaluation_rows import labelled_test_rows
from .selection_trainer import SelectionSFTTrainer, SelectionTrainer


def collect_results(
    trainer: EnsembleTrainer | EnsembleSFTTrainer | SelectionTrainer | SelectionSFTTrainer,
    fidelity: FidelityReport | None = None,
) -> Results:
    """What a run came to on the tasks' test rows, or on evaluation rows unless all tasks have test rows with labels.

    Args:
        trainer (`EnsembleTrainer`, `SelectionTrainer` or one of their SFT forms): a trainer whose `train()` is done.
        fidelity (`FidelityReport`, *optional*): to be kept with the results.

    Returns:
        `Results`: also written into the run.

    Raises:
        `ConfigurationError`: before `train()`.
    """
    results = trainer.report()
    rows = labelled_test_rows(trainer.tasks)
    if rows is not None:
        announce("Next: evaluation on test rows", with_bars=not trainer.args.disable_tqdm)
        with trainer.run_directory.repeated("evaluation:test"):
            scores = trainer.scores(rows)
        trainer.flow.report("test", scores)
        results = trainer.report()
    if fidelity is not None:
        results = replace(results, fidelity=fidelity)
        trainer.run_directory.write(results)
    trainer.write_page()
    return results
