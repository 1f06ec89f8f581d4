"""How well are trainings predicted that go on from the adapter for all tasks?

    python -m benchmarks.continued.run OUTPUT [--num_subsets 8] [--length 1.0] FLAGS

Each task alone, and random subsets of several, go on from this adapter for LENGTH times the whole training, and are
scored on every task's validation rows. They are compared with predictions from the gradients at that adapter, by a
replay (no fine-tuning is observed) and after one or two trainings have calibrated them, and with the assumption that
nothing changes. FLAGS are those of `hf-ensemble fidelity`. Trainings are kept in OUTPUT_DIR.
"""

import numpy as np

from hf_ensemble._text import counted
from hf_ensemble.estimate import Prediction
from hf_ensemble.evaluate.fidelity_measures import (
    correlation,
    coverage,
    mean_or_nan,
    mean_relative_error,
    task_spearman,
)
from hf_ensemble.runs import run_selector
from hf_ensemble.select import mixed_subsets

from ..common import make_parser, write_results
from ..trainers import trainer_from_flags
from .table import table


def subsets_of(names: list[str], count: int, seed: int) -> list[list[str]]:
    """Random subsets of several tasks, then each task alone."""
    sizes = sorted({int(round(size)) for size in np.geomspace(2, len(names), 4)})
    drawn = mixed_subsets(len(names), count, sizes, seed)
    return [[names[index] for index in np.flatnonzero(row)] for row in drawn] + [[name] for name in names]


def errors(predicted: np.ndarray, true: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Relative errors of losses `(S, T)`; `held` says which tasks a training is on."""
    return {
        "error": mean_relative_error(predicted, true),
        "error_inside": mean_relative_error(predicted[held], true[held]),
        "error_outside": mean_relative_error(predicted[~held], true[~held]),
    }


def agreement(prediction: Prediction, start: np.ndarray, true: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """The errors, and how well changes from the losses at the start `(T,)` and their order are predicted."""
    moved, truly = np.log(prediction.loss / start), np.log(true / start)
    found = {
        **errors(prediction.loss, true, held),
        "correlation_of_changes": correlation(moved, truly),
        "correlation_of_changes_inside": correlation(moved[held], truly[held]),
        "spearman": mean_or_nan(task_spearman(prediction.loss, true)),
    }
    if np.isfinite(prediction.loss_low).all():
        found["coverage"] = coverage(prediction.loss_low, prediction.loss_high, true)
        found["level"] = prediction.level
    return found


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--num_subsets", type=int, default=8, help="random subsets of several tasks")
    parser.add_argument("--length", type=float, default=1.0, help="of the trainings that go on")
    own, flags = parser.parse_known_args()
    flags += ["--group_initialization", "baseline", "--continued_length", str(own.length)]
    trainer, _ = trainer_from_flags(flags)
    trainer.group_tasks()
    count = trainer.args.num_components
    estimator = run_selector(
        trainer.run_directory, list(trainer.tasks), count, [], continued_length=own.length
    ).estimator
    names = list(estimator.task_names)
    subsets = subsets_of(names, own.num_subsets, trainer.args.seed)
    scored = []
    with trainer.working():
        flow, run = trainer.flow, trainer.run_directory
        for number, subset in enumerate(subsets):
            name, folder = f"on-{number}", run.path / "continued" / str(number)
            trained = flow.training.run(name, subset, folder, start=run.baseline, length=own.length)
            scored.append(flow.calibration.score_trained(trained, folder, f"Subset {number + 1}/{len(subsets)}"))
    true = np.array([[one.scores[name].loss for name in names] for one in scored])
    held = np.array([[name in subset for name in names] for subset in subsets])
    start = estimator.base_loss()
    replayed = estimator.predict_subsets(subsets)
    systems = {
        "nothing changes": errors(np.tile(start, (len(true), 1)), true, held),
        "a replay": agreement(replayed, start, true, held),
    }
    for count in (1, 2):
        # Those of several tasks come first.
        observed = [one.as_observed() for one in scored[:count]]
        calibrated = run_selector(
            run, names, trainer.args.num_components, observed, continued_length=own.length
        ).estimator.predict_subsets(subsets[count:])
        label = f"{counted(count, 'training')} observed"
        systems[label] = agreement(calibrated, start, true[count:], held[count:])
    results = {
        "length": own.length,
        "task_names": names,
        "subsets": subsets,
        "start_loss": start.tolist(),
        "true_loss": true.tolist(),
        "predicted_loss": replayed.loss.tolist(),
        "systems": systems,
    }
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
