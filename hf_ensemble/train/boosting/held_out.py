"""What an ensemble and a further member say of validation rows."""

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset

from ...ensemble import PeftEnsembleModel
from ...ensemble.weighting.added_member import AddedAnswers
from ...ensemble.weighting.collector import AnswerCollector
from ...models.wrappers import evaluation_mode
from ..flows.context import FlowContext

# Validation rows per task, and entries of all adapters' logits that are held at once, a gigabyte.
_ROWS = 500
_VALUES = 2**28


def added_answers(
    context: FlowContext,
    ensemble: PeftEnsembleModel,
    change: Mapping[str, float],
    tables: Mapping[str, Dataset],
) -> list[AddedAnswers]:
    """The ensemble's logits at the answers of each task, and those of an addition.

    Args:
        context (`FlowContext`): what the run works on.
        ensemble (`PeftEnsembleModel`): holds all adapters; its weights and scales are those without the addition.
        change (`dict[str, float]`): weight of each adapter in the addition, which is not scaled.
        tables (`dict[str, Dataset]`): token table of each task.
    """
    args = context.args
    collect = AnswerCollector(
        ensemble,
        context.data_collator,
        args.per_device_eval_batch_size,
        _VALUES // len(tables),
        _ROWS,
        args.seed,
        log_probs_only=False,
        mixed_precision=context.mixed_precision,
    )
    found = []
    with evaluation_mode(ensemble):
        for task, rows in tables.items():
            answers = collect(task, rows)
            impossible = answers.values.isneginf().any(0)
            values = answers.values.masked_fill(impossible, 0.0)
            before, added = (_combined(values, row, ensemble.adapter_names) for row in (ensemble.weights[task], change))
            before = (before * ensemble.scales.get(task, 1.0)).masked_fill(impossible, float("-inf"))
            found.append(AddedAnswers(before, added, answers.targets, answers.rows))
    return found


def _combined(values: torch.Tensor, row: Mapping[str, float], names: Sequence[str]) -> torch.Tensor:
    weights = torch.tensor([float(row.get(name, 0.0)) for name in names])
    return torch.einsum("m,mnv->nv", weights, values)
