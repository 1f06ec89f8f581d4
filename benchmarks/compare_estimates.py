"""What an estimate gains or loses by each of its choices, against fine-tunings that `hf-ensemble fidelity` has made.

    python benchmarks/compare_estimates.py TARGET [--margins geometric_mean mean_log_odds] FLAGS

FLAGS are those of the `hf-ensemble fidelity` whose output_dir holds the fine-tunings. Exact gradients are captured once
for each kind of margin, at theta0 and after a light warm-up (one epoch on all tasks at a quarter of the learning rate);
scales and projections are applied to them afterwards. One choice is changed at a time. Writes TARGET.json and .md.
"""

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from trl import ModelConfig

from hf_ensemble.capture import CaptureConfig, Preconditioner, SeededProjection, capture_gradients, training_recipe
from hf_ensemble.capture.capture_pass import MOMENT_ROWS
from hf_ensemble.capture.training_arguments import fresh_lora_gain
from hf_ensemble.cli.arguments import FidelityArguments, parse, with_config
from hf_ensemble.cli.trainers import build_trainer, load_tasks
from hf_ensemble.estimate import ObservedRun, SubsetEstimator
from hf_ensemble.estimate.fidelity_measures import (
    correlation,
    coverage,
    mean_or_nan,
    mean_relative_error,
    task_spearman,
)
from hf_ensemble.select import calibration_subsets
from hf_ensemble.store import FeatureTable, GradientStore, TrainingRecipe

REFERENCE = {
    "linearised at": "theta0",
    "margin": "geometric_mean",
    "preconditioner": "adam",
    "projection": "4096, seed 0",
    "components": 400,
    "training rows": "all",
    "steps": "of each mixture",
    "growth": "of A",
    "evidence": "2 runs",
    "rows": "by their tokens",
    "calibration": "of each task",
}


def variants(margins: list[str]) -> Iterator[dict[str, Any]]:
    """The reference, then one choice changed at a time."""
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


class Captures:
    """Exact gradients, captured when first asked for, and what is made of them."""

    def __init__(self, trainer, folder: Path):
        self.trainer = trainer
        self.folder = folder
        self._tables: dict[tuple[str, str], dict[str, FeatureTable]] = {}

    def tables(self, choice: Mapping[str, Any]) -> dict[str, FeatureTable]:
        """Training and validation features of a choice."""
        exact = self._exact(choice["linearised at"], choice["margin"])
        train = exact["train"]
        scales = torch.ones(train.features.shape[1])
        if choice["preconditioner"] == "adam":
            scales = self._adam_scales(train)
        kept = self._kept_rows(train, choice["training rows"])
        parts = {"train": _rows(train, kept), "validation": exact["validation"]}
        return {
            split: dataclasses.replace(table, features=_projected(table.features, scales, choice["projection"]))
            for split, table in parts.items()
        }

    def recipe(self, choice: Mapping[str, Any]) -> TrainingRecipe | None:
        """The training in Adam's metric, as far as the choice knows it."""
        if choice["evidence"] == "validation loss":
            return None
        train = self._exact(choice["linearised at"], choice["margin"])["train"]
        steps = self.trainer.adapter_training.num_steps(self.trainer.tasks.names)
        num_parameters = Preconditioner({"all": self._adam_scales(train)}).num_effective_parameters()
        recipe = training_recipe(self.trainer.args, steps)
        if choice["steps"] == "equal, no growth":
            return recipe
        growth = {"none": 0.0, "x 1/2": 0.5, "x 2": 2.0, "x 4": 4.0}.get(choice["growth"], 1.0)
        self.trainer.adapter_training.reset()
        return dataclasses.replace(
            recipe, num_parameters=num_parameters, input_gain=growth * fresh_lora_gain(self.trainer.model)
        )

    def _exact(self, point: str, margin: str) -> dict[str, FeatureTable]:
        if (point, margin) not in self._tables:
            self._tables = {}
            training = self.trainer.adapter_training
            training.reset()
            if point == "warm-up":
                training.load(self._warm_up())
            store = self._capture(self.folder / f"{point}-{margin}", margin)
            training.reset()
            names = self.trainer.tasks.names
            self._tables[point, margin] = {split: store.table(split, names) for split in ("train", "validation")}
        return self._tables[point, margin]

    def _capture(self, folder: Path, margin: str) -> GradientStore:
        config = CaptureConfig(None, margin=margin, preconditioner="none")
        trainer = self.trainer
        encoded = {
            "train": trainer.train_dataset,
            "validation": concatenate_datasets([trainer.eval_dataset[name] for name in trainer.tasks]),
        }
        return capture_gradients(
            trainer.model, trainer.tasks, config, folder, data_collator=trainer.data_collator, encoded=encoded
        )

    def _warm_up(self) -> Path:
        trainer, args = self.trainer, self.trainer.args
        trainer.args = copy.copy(args)
        trainer.args.num_train_epochs, trainer.args.learning_rate = 1, args.learning_rate / 4
        try:
            trainer.adapter_training.run("warm-up", trainer.tasks.names, self.folder / "warm-up-adapter")
        finally:
            trainer.args = args
        return self.folder / "warm-up-adapter"

    @staticmethod
    def _adam_scales(train: FeatureTable) -> torch.Tensor:
        rows = np.unique(np.linspace(0, len(train) - 1, min(MOMENT_ROWS, len(train))).round().astype(int))
        loss_gradients = train.features[rows] / (1 + np.exp(train.margin[rows]))[:, None]
        moments = {"all": torch.from_numpy((loss_gradients**2).sum(0))}
        return Preconditioner.from_second_moments(moments).scales["all"]

    @staticmethod
    def _kept_rows(train: FeatureTable, share: str) -> np.ndarray:
        step = 1 if share == "all" else int(share.split("/")[1])
        return np.concatenate([np.flatnonzero(train.task == task)[::step] for task in range(len(train.task_names))])


def _rows(table: FeatureTable, rows: np.ndarray) -> FeatureTable:
    names = ("features", "margin", "task", "example_id", "num_tokens")
    arrays = {name: getattr(table, name)[rows] for name in names}
    return dataclasses.replace(table, **arrays)


def _projected(features: np.ndarray, scales: torch.Tensor, projection: str) -> np.ndarray:
    scaled = torch.from_numpy(features) * scales
    if projection == "exact":
        return scaled.numpy()
    dim, seed = (int(word) for word in projection.split(", seed "))
    own = SeededProjection({"all": scaled.shape[1:]}, dim, seed)
    projected = torch.zeros(len(scaled), own.dim)
    own.add(projected, "all", scaled)
    return projected.numpy()


@dataclasses.dataclass
class Truth:
    """Validation losses `(S, T)` of subsets that calibrate nothing, those of second seeds, and the calibration runs."""

    names: list[str]
    calibration: list[ObservedRun]
    mixtures: np.ndarray
    loss: np.ndarray
    repeated: np.ndarray
    again: np.ndarray

    @classmethod
    def read(cls, folder: Path, names: list[str], seed: int) -> "Truth":
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        losses = {
            (tuple(sorted(run["subset"])), run["seed"]): [run["scores"][name]["loss"] for name in names] for run in runs
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
    """How well a choice predicts."""
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
        # The intervals are those around calibrated losses.
        "interval_coverage": coverage(prediction.loss_low, prediction.loss_high, truth.loss)
        if estimator.calibration is not None
        else None,
    }


def ceiling(truth: Truth) -> dict:
    """The truth against itself."""
    first = truth.loss[truth.repeated]
    return {
        "num_subsets": len(first),
        "mean_relative_error": mean_relative_error(truth.again, first),
        "mean_task_spearman": mean_or_nan(task_spearman(truth.again, first)),
        "mean_task_spearman_inside": mean_or_nan(task_spearman(truth.again, first, truth.mixtures[truth.repeated] > 0)),
    }


def markdown(report: dict) -> str:
    top = report["ceiling"]
    lines = [
        f"{report['num_subsets']} subsets, {top['num_subsets']} of them trained twice. Reference: "
        + ", ".join(f"{key} {value}" for key, value in REFERENCE.items())
        + ". Each row changes one of these.",
        "",
        "| choice | mean relative error | per-task Spearman | inside | on twice-trained | correlation | of changes "
        "| inside of 90 % intervals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["variants"]:
        changed = [f"{key}: {value}" for key, value in row["choice"].items() if value != REFERENCE[key]]
        result = row["result"]
        covered = result["interval_coverage"]
        lines.append(
            f"| {', '.join(changed) or 'reference'} | {result['mean_relative_error']:.1%} | "
            f"{result['mean_task_spearman']:.3f} | {result['mean_task_spearman_inside']:.3f} | "
            f"{result['mean_task_spearman_repeated']:.3f} | {result['correlation']:.3f} | "
            f"{result['change_correlation']:.3f} | {'-' if covered is None else format(covered, '.0%')} |"
        )
    lines.append(
        f"| the truth, another seed | {top['mean_relative_error']:.1%} | - | {top['mean_task_spearman_inside']:.3f} | "
        f"{top['mean_task_spearman']:.3f} | - | - | - |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--margins", nargs="+", default=[REFERENCE["margin"]])
    own, flags = parser.parse_known_args()
    (arguments, model_arguments), flags = parse([FidelityArguments, ModelConfig], with_config(flags), True)
    trainer = build_trainer(arguments, model_arguments, load_tasks(arguments, model_arguments, "fidelity"), flags)
    out = trainer.open_run().path
    truth = Truth.read(out / "scored_runs", trainer.tasks.names, trainer.args.seed)
    captures = Captures(trainer, out / "compared")
    validation = captures.tables(REFERENCE)["validation"]
    losses = np.logaddexp(0, -validation.margin.astype(np.float64))
    base = np.array([losses[validation.task == task].mean() for task in range(len(truth.names))])
    rows = []
    for choice in variants(own.margins):
        rows.append({"choice": choice, "result": estimated(captures, truth, choice, base)})
        print({key: value for key, value in choice.items() if value != REFERENCE[key]}, rows[-1]["result"], flush=True)
    report = {
        "num_subsets": len(truth.loss),
        "task_names": truth.names,
        "base_loss": base.tolist(),
        "ceiling": ceiling(truth),
        "variants": rows,
    }
    own.target.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    own.target.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
