"""Gradients of prompts whose answers nobody knows, and weights of adapters by their directions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hf_ensemble.capture import GradientExtractor
from hf_ensemble.models.batches import length_sorted_batches

from ..trainers import trainer_from_flags

SPLITS = ("train", "validation", "test")
_DIMENSION, _BATCH = 2048, 64


def log_odds_of_own_answer(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-odds `(B,)` of the answer that the model itself finds most probable, of all tasks' labels."""
    best = logits.float().log_softmax(-1).amax(-1)
    return best - torch.log1p(-best.exp().clamp(max=1 - 1e-6))


def gradient_features(folder: Path, baseline: Path, flags: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Projected gradients `(rows, 2048)` in the adapter for all tasks, of unit norm, by split and task.

    Args:
        folder (`Path`): of a run that only reads the tasks.
        baseline (`Path`): the adapter.
        flags (`Sequence[str]`): those of the trainer, with the tasks.
    """
    trainer, tasks = trainer_from_flags([*flags, "--output_dir", str(folder)])
    trainer.open_run()
    context, training = trainer.flow.context, trainer.flow.training
    rows = {split: trainer.prepare_rows(tasks.split(split)) for split in SPLITS}
    with trainer.working(), context.model_state.restored():
        training.reset()
        training.load(baseline)
        extract = GradientExtractor(context.model, _DIMENSION, margin=log_odds_of_own_answer)
        found = {
            split: {task: _of_rows(extract, context, own) for task, own in by_task.items()}
            for split, by_task in rows.items()
        }
        training.reset()
    return found


def _of_rows(extract: GradientExtractor, context, rows) -> torch.Tensor:
    table = context.model_columns(rows)
    batches = length_sorted_batches([len(row) for row in table["input_ids"]], _BATCH)
    features = [extract(context.data_collator([table[number] for number in batch])).features for batch in batches]
    order = torch.tensor([number for batch in batches for number in batch])
    return torch.nn.functional.normalize(torch.cat(features)[order.argsort()])


class GradientWeights:
    """Weights of adapters by cosines with the mean gradient of what each was trained on.

    The cosines with an adapter's mean are standardised by those of all training rows, and the softmax of them weights
    the adapters (ELREA, [2502.00089](https://arxiv.org/abs/2502.00089)).

    Args:
        features (`dict[str, torch.Tensor]`): unit gradients of each task's training rows.
        mixtures (`list[dict[str, float]]`): what each adapter was trained on.
    """

    def __init__(self, features: Mapping[str, torch.Tensor], mixtures: Sequence[Mapping[str, float]]):
        means = [sum(weight * features[task].sum(0) for task, weight in mixture.items()) for mixture in mixtures]
        self._means = torch.nn.functional.normalize(torch.stack(means))
        cosines = torch.cat(list(features.values())) @ self._means.T
        self._center, self._spread = cosines.mean(0), cosines.std(0)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Weights `(rows, m)`."""
        return ((features @ self._means.T - self._center) / self._spread).softmax(-1)


def mixtures_of(plan: Mapping, members: Sequence[str]) -> list[dict[str, float]]:
    """What each adapter was trained on, all of it: those that go on have learnt all tasks before."""
    return [dict(plan["parts"][name]["mixture"]) for name in members]
