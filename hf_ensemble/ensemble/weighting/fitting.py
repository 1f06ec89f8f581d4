"""Fitting an ensemble's weights to rows of its tasks: outputs are computed once, weights are learnt on these."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import EnsembleError
from ...logging import get_logger
from ...tasks import IGNORE_INDEX, TASK, pop_meta, restrict_to_labels
from ...tasks.answers import answer_positions
from ..forward.task_weights import label_mask
from .objectives import FittedWeights, Objective, fit_objective, logits_objective, probs_objective

if TYPE_CHECKING:
    from ..model import PeftEnsembleModel

logger = get_logger(__name__)

Rows = Sequence[Mapping[str, Any]]
Collator = Callable[[list[Mapping[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class WeightFit:
    """Fitted weights beside the plain choices.

    Args:
        adapter_names (`list[str]`): order of the weights.
        tasks (`dict[str, FittedWeights]`): weights of each task.
        overall (`FittedWeights`): one set of weights for all tasks, each of which counts alike.
    """

    adapter_names: list[str]
    tasks: dict[str, FittedWeights]
    overall: FittedWeights

    def weights_of(self, fitted: FittedWeights) -> dict[str, float]:
        """By adapter, without those that weigh nothing."""
        return {name: float(w) for name, w in zip(self.adapter_names, fitted.weights) if w}

    def report(self) -> dict[str, dict[str, float]]:
        """Mean example loss of each task and of `overall`: `fitted`, `uniform`, `one_hot` (the best single adapter),
        and `gap`, a bound on how far `fitted` is above the optimum."""
        return {
            task: {
                "fitted": fitted.loss,
                "uniform": fitted.uniform_loss,
                "one_hot": float(fitted.one_hot_losses.min()),
                "gap": fitted.gap,
            }
            for task, fitted in [*self.tasks.items(), ("overall", self.overall)]
        }


def fit_ensemble(
    ensemble: "PeftEnsembleModel",
    dataset: "Mapping[str, Rows] | Rows",
    constraint: str = "simplex",
    data_collator: Collator | None = None,
    batch_size: int = 8,
    min_weight: float = 0.0,
    max_values: int = 2**27,
) -> WeightFit:
    """Fit weights, see [`PeftEnsembleModel.fit_weights`].

    Raises:
        `EnsembleError`: without rows, and for the combination `weights`, whose loss is not convex in its weights.
    """
    if ensemble.combination == "weights":
        raise EnsembleError(
            "With the combination 'weights' the loss is not convex in the weights: fit them with combination='logits', "
            "and compare the losses before using them for 'weights'."
        )
    tables = _by_task(dataset)
    make = probs_objective if ensemble.combination == "probs" else logits_objective
    limit = max_values // (len(tables) * len(ensemble.adapter_names))
    objectives = {}
    for task, rows in tables.items():
        cached = _outputs(ensemble, task, rows, data_collator or _collate(ensemble), batch_size, limit)
        objectives[task] = make(*cached)

    def overall(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        parts = [objective(w) for objective in objectives.values()]
        return tuple(sum(values) / len(parts) for values in zip(*parts))

    def fitted(objective: Objective) -> FittedWeights:
        return fit_objective(objective, len(ensemble.adapter_names), constraint, ensemble.combination, min_weight)

    own = {task: fitted(objective) for task, objective in objectives.items()}
    return WeightFit(ensemble.adapter_names, own, fitted(overall))


def _by_task(dataset: "Mapping[str, Rows] | Rows") -> dict[str, Rows]:
    if isinstance(dataset, Mapping):
        tables: dict[str, Any] = dict(dataset)
    else:
        tables = {}
        for row in dataset:
            if TASK not in row:
                raise EnsembleError(
                    f"Expected a dict of tables by task, or rows with a column 'task', found a row with {sorted(row)}."
                )
            tables.setdefault(row[TASK], []).append(row)
    empty = sorted(task for task, rows in tables.items() if not len(rows))
    if empty or not tables:
        raise EnsembleError(f"Expected rows of at least one task, found none{f' of {empty}' if empty else ''}.")
    return tables


@torch.no_grad()
def _outputs(ensemble, task: str, rows: Rows, collate: Collator, batch_size: int, max_values: int):
    """Every adapter's logits at the answers `(m, n, V)`, targets `(n,)` and examples `(n,)`, on the CPU."""
    shift = not getattr(ensemble.config, "is_encoder_decoder", False)
    parts, values, count = [], 0, 0
    for start in range(0, len(rows), batch_size):
        if parts and values >= max_values:
            logger.warning(
                "Weights of %r are fitted to its first %d of %d rows, whose logits fill max_values; raise it to use "
                "more.",
                task,
                count,
                len(rows),
            )
            break
        examples = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = dict(collate(examples))
        pop_meta(batch)
        batch = {key: value.to(ensemble.device) for key, value in batch.items()}
        if "labels" not in batch:
            raise EnsembleError(f"The rows of {task!r} have no labels to fit weights to.")
        logits, targets, own = _batch_outputs(ensemble, task, batch, shift)
        parts.append((logits, targets, own + count))
        count += len(examples)
        values += logits[0].numel()
    logits, targets, owners = zip(*parts)
    if not sum(map(len, targets)):
        raise EnsembleError(f"The rows of {task!r} have no answer token to fit weights to.")
    return torch.cat(logits, 1), torch.cat(targets), torch.cat(owners)


def _batch_outputs(ensemble, task: str, batch: dict[str, torch.Tensor], shift: bool):
    labels = batch.pop("labels")
    if not shift and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = ensemble.model.get_base_model().prepare_decoder_input_ids_from_labels(labels)
    if ensemble.can_generate():
        batch["use_cache"] = False
    collected = []
    with ensemble.member_forward() as run:
        for _, logits in run.members(batch):
            if logits.dim() == 2:
                logits = restrict_to_labels(logits, label_mask(task, len(labels), ensemble.label_space))
            answers, targets, own = answer_positions(logits, labels, shift)
            collected.append(answers.cpu())
    return torch.stack(collected), targets.cpu(), own.cpu()


def _collate(ensemble) -> Collator:
    """Numbers and lists of numbers as tensors, padded on the right; other columns are left out."""
    pad = getattr(ensemble.config, "pad_token_id", None) or 0
    fill = {"input_ids": pad, "decoder_input_ids": pad, "labels": IGNORE_INDEX}

    def collate(examples: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [
            {**row, "attention_mask": row.get("attention_mask", [1] * len(row["input_ids"]))} for row in examples
        ]
        return {
            key: _padded([row[key] for row in examples], fill.get(key, 0))
            for key in examples[0]
            if _is_numeric(examples[0][key])
        }

    return collate


def _padded(values: list[Any], fill: int) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if not tensors[0].dim():
        return torch.stack(tensors)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, (int, float)) for v in value)
    return isinstance(value, (int, float, np.ndarray, torch.Tensor)) and not isinstance(value, bool)
