"""Ensembles whose adapters `benchmarks.budgets.train --choices` has trained."""

import json
from pathlib import Path

import numpy as np

from hf_ensemble.ensemble.weighting.cross_validation import most_probable_scale

from ..budgets.run import Outputs, scored
from ..budgets.train import CHOICES


def of_folder(folder: Path) -> tuple[float, dict]:
    """Budget of the choices of one seed, and the lines of its ensembles.

    Their true losses are those left with a scale of each task's outputs, the most probable one by its validation rows.
    """
    found, outputs = json.loads((folder / CHOICES).read_text()), Outputs(folder)
    losses: dict[str, dict[str, dict[str, float]]] = {}

    def of(part: str) -> dict[str, dict[str, float]]:
        if part not in losses:
            losses[part] = _losses(outputs, part)
        return losses[part]

    def line(one: dict) -> dict:
        parts = [of(part) for part in one["parts"]]
        own = {task: parts[one["serving"][task]] for task in outputs.tasks}
        best = {
            task: min((part for part in parts if task in part["test"]), key=lambda part: part["validation"][task])
            for task in outputs.tasks
        }
        true = {split: float(np.mean([own[task][split][task] for task in own])) for split in ("validation", "test")}
        true["test_reassigned"] = float(np.mean([best[task]["test"][task] for task in best]))
        kept = {name: one[name] for name in ("label", "cost", "predicted_loss", "expected_loss")}
        return {**kept, "num_mixtures": len(one["mixtures"]), "true": true}

    lines = {kind: [line(one) for one in own] for kind, own in found["ensembles"].items()}
    return found["budget"], {**lines, "baseline": lines["baseline"][0]}


def _losses(outputs: Outputs, part: str) -> dict[str, dict[str, float]]:
    """Mean loss of each task that a part answers for, by split."""
    tasks = [task for task in outputs.tasks if f"test/{task}" in outputs.part(part)]
    found: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    for task in tasks:
        answers = {split: outputs.answers([part], split, task) for split in found}
        scale = np.array([most_probable_scale(answers["validation"])])
        for split, own in answers.items():
            found[split][task] = float(scored(own, scale).loss.mean())
    return found
