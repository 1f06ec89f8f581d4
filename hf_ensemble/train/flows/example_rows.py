"""Keeping the training rows that help most and least, as text."""

from collections.abc import Mapping, Sequence

from ...runs import ExampleRows
from ...select import DataSelector
from ...tasks import EXAMPLE_ID, TASK
from .context import FlowContext


def keep_example_rows(
    context: FlowContext,
    selector: DataSelector,
    targets: str | Sequence[str],
    mixture: Mapping[str, float] | None = None,
) -> None:
    """Score the training rows by what they do to the targets' predicted loss, and keep both ends with their text.

    Args:
        context (`FlowContext`): what the run works on.
        selector (`DataSelector`): predictions from the run's gradients.
        targets (`str` or `Sequence[str]`): tasks whose loss counts.
        mixture (`dict[str, float]`, *optional*): the training that the rows are part of; of all tasks by default.
    """
    table = context.train_table
    places = {key: place for place, key in enumerate(zip(table[TASK], table[EXAMPLE_ID]))}

    def text_of(task: str, example_id: str) -> str:
        row = table[places[task, example_id]]
        tokenizer, ids = context.processing_class, row["input_ids"]
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        label = row.get("labels")
        if context.label_space is not None and isinstance(label, int) and label >= 0:
            return f"{text} → {context.label_space.names[label]}"
        return text

    context.run.write(ExampleRows.of(selector.score_examples(targets, mixture), text_of))
