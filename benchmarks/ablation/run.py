"""What does each part of the estimator gain, measured against real fine-tuning on subsets?

    python -m benchmarks.ablation.run OUTPUT [--margins geometric_mean mean_log_odds] FLAGS

FLAGS are those of the fidelity study, whose output_dir holds the fine-tuning runs. Exact gradients are captured once
per kind of margin, at theta0 and after a light warm-up (one epoch on all tasks at a quarter of the learning rate);
scales and projections are applied to them afterwards. Each variant changes one choice of the reference.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.evaluate.fidelity_measures import (
    correlation,
    coverage,
    mean_or_nan,
    mean_relative_error,
    task_spearman,
)
from hf_ensemble.select import calibration_subsets

from ..common import make_parser, write_results
from ..trainers import scored_runs, trainer_from_flags
from .captures import Captures
from .table import REFERENCE, changes, table


def variants(margins: list[str]) -> Iterator[dict[str, Any]]:
    """The reference, then every variant that changes one of its choices."""
    yield REFERENCE
    others = {
        "preconditioner": ["none"],
        "projection": [
            "exact",
            "16384, seed 0",
            "8192, seed 0",
            "4096, seed 1",
            "4096, seed 2",
            "1024, seed 0",
            "400, seed 0",
        ],
        "components": [25, 50, 100, 200, 800, 1600],
        "training rows": ["1/2", "1/4", "1/8"],
        "rows": ["equal"],
        "calibration": ["none"],
        "steps": ["equal, no growth"],
        "growth": ["none", "x 1/2", "x 2", "x 4"],
        "evidence": ["1 run", "replay", "validation loss"],
        "linearised at": ["warm-up"],
        "margin": [margin for margin in margins if margin != REFERENCE["margin"]],
    }
    for key, values in others.items():
        for value in values:
            yield {**REFERENCE, key: value}


@dataclasses.dataclass
class Truth:
    """Validation losses `(S, T)` of real fine-tuning runs, those of second seeds, and the calibration runs."""

    names: list[str]
    calibration: list[ObservedRun]
    mixtures: np.ndarray
    loss: np.ndarray
    repeated: np.ndarray
    again: np.ndarray

    @classmethod
    def of(cls, runs: list[dict], names: list[str], seed: int) -> "Truth":
        """Sort the runs of an `hf-ensemble fidelity` with two calibration runs."""
        losses = {
            (tuple(sorted(run["mixture"])), run["seed"]): [run["scores"][name]["loss"] for name in names]
            for run in runs
        }
        calibrating = [tuple(sorted(subset)) for subset in calibration_subsets(names, 2, seed)]
        observed = [
            ObservedRun(dict.fromkeys(subset, 1.0), dict(zip(names, losses[subset, seed]))) for subset in calibrating
        ]
        subsets = [subset for subset, run_seed in losses if run_seed == seed and subset not in calibrating]
        repeated = [index for index, subset in enumerate(subsets) if (subset, seed + 1) in losses]
        return cls(
            names,
            observed,
            np.array([[float(name in subset) for name in names] for subset in subsets]),
            np.array([losses[subset, seed] for subset in subsets]),
            np.array(repeated, dtype=int),
            np.array([losses[subsets[index], seed + 1] for index in repeated]),
        )


def estimated(captures: Captures, truth: Truth, choice: Mapping[str, Any], base: np.ndarray) -> dict:
    """Accuracy of a variant's predictions."""
    tables = captures.tables(choice)
    if choice["rows"] == "equal":
        tables = {split: dataclasses.replace(table, num_tokens=None) for split, table in tables.items()}
    runs = truth.calibration[: {"2 runs": 2, "1 run": 1}.get(choice["evidence"], 0)]
    recipe = captures.recipe(choice)
    estimator = SubsetEstimator(tables["train"], tables["validation"], choice["components"], runs, recipe=recipe)
    chosen = estimator.regularization
    if choice["calibration"] == "none":
        estimator.calibration = None
    prediction = estimator.predict(truth.mixtures)
    ranks = task_spearman(prediction.loss, truth.loss)
    inside = truth.mixtures > 0
    own, other = prediction.loss[truth.repeated], truth.loss[truth.repeated]
    return {
        "evidence": chosen.evidence,
        "l2_scale": chosen.l2_scale,
        "criterion": chosen.criterion,
        "mean_relative_error": mean_relative_error(prediction.loss, truth.loss),
        "mean_task_spearman": mean_or_nan(ranks),
        "mean_task_spearman_inside": mean_or_nan(task_spearman(prediction.loss, truth.loss, inside)),
        "mean_task_spearman_repeated": mean_or_nan(task_spearman(own, other)),
        "correlation": correlation(prediction.loss, truth.loss),
        "change_correlation": correlation(prediction.loss - base, truth.loss - base),
        # Intervals exist around calibrated losses only.
        "interval_coverage": coverage(prediction.loss_low, prediction.loss_high, truth.loss)
        if estimator.calibration is not None
        else None,
    }


def ceiling(truth: Truth) -> dict:
    """Agreement of two seeds of real fine-tuning."""
    first = truth.loss[truth.repeated]
    return {
        "num_subsets": len(first),
        "mean_relative_error": mean_relative_error(truth.again, first),
        "mean_task_spearman": mean_or_nan(task_spearman(truth.again, first)),
        "mean_task_spearman_inside": mean_or_nan(task_spearman(truth.again, first, truth.mixtures[truth.repeated] > 0)),
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--margins", nargs="+", default=[REFERENCE["margin"]], help="kinds of margin to compare")
    own, flags = parser.parse_known_args()
    trainer, _ = trainer_from_flags(flags)
    out = trainer.open_run().path
    truth = Truth.of(scored_runs(out), trainer.tasks.names, trainer.args.seed)
    captures = Captures(trainer, out / "compared")
    validation = captures.tables(REFERENCE)["validation"]
    losses = np.logaddexp(0, -validation.margin.astype(np.float64))
    base = np.array([losses[validation.task == task].mean() for task in range(len(truth.names))])
    rows = []
    for choice in variants(own.margins):
        rows.append({"choice": choice, "result": estimated(captures, truth, choice, base)})
        print(changes(choice), rows[-1]["result"], flush=True)
    results = {
        "num_subsets": len(truth.loss),
        "task_names": truth.names,
        "base_loss": base.tolist(),
        "ceiling": ceiling(truth),
        "variants": rows,
    }
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
