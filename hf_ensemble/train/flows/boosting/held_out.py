"""What an ensemble and a further member say of validation rows."""

from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from ....ensemble import PeftEnsembleModel
from ....ensemble.weighting.added_member import AddedAnswers
from ....ensemble.weighting.collector import AnswerCollector
from ....models.wrappers import evaluation_mode
from ..context import FlowContext

# Validation rows per task, and entries of all adapters' logits that are held at once, a gigabyte.
_ROWS = 500
_VALUES = 2**28
# Without two rows of each task a gain has no error, and no step is kept.
_LEAST_ROWS = 2


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
    args, names = context.args, ensemble.adapter_names
    least = _LEAST_ROWS * len(names) * ensemble.num_outputs
    collect = AnswerCollector(
        ensemble,
        context.data_collator,
        args.per_device_eval_batch_size,
        max(_VALUES // len(tables), least),
        _ROWS,
        args.seed,
        log_probs_only=False,
        mixed_precision=context.mixed_precision,
    )
    found = []
    with evaluation_mode(ensemble):
        for task, rows in tables.items():
            answers = collect(task, rows)
            before, added = (
                answers.combined(np.array([row.get(name, 0.0) for name in names])).values[0]
                for row in (ensemble.weights[task], change)
            )
            # Nothing is added to the labels of other tasks, which stay impossible.
            added = added.masked_fill(added.isneginf(), 0.0)
            found.append(AddedAnswers(before * ensemble.scales.get(task, 1.0), added, answers.targets, answers.rows))
    return found
