"""Loss and accuracy of every task, for any function from a batch to logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from ..capture import MarginKind, margins
from ..models.wrappers import evaluation_mode
from ..tasks import TASK, LabelSpace, pop_meta, restrict_to_labels, score_answers
from ..tasks.answers import answer_positions

LogitsFunction = Callable[[dict[str, Any], list[str]], torch.Tensor]
Scores = dict[str, dict[str, float]]


def score_tasks(
    trainer: Trainer,
    logits_of: LogitsFunction,
    datasets: Mapping[str, Dataset],
    label_space: LabelSpace | None = None,
    description: str = "Evaluating",
) -> Scores:
    """Score each task.

    Args:
        trainer (`Trainer`): gives dataloaders and gathers over processes; its state is left alone.
        logits_of (`Callable`): from a batch (without labels) and the task of each row to logits.
        datasets (`dict[str, Dataset]`): token table of each task.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        description (`str`, *optional*): of the progress bar.

    Returns:
        `dict[str, dict[str, float]]`: for each task `loss` (mean over examples of the mean token loss, in nats),
        `accuracy` (share of examples whose whole answer greedy decoding gives) and `num_examples`.
    """
    scores = {}
    total = sum(len(rows) for rows in datasets.values())
    hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    with tqdm(total=total, desc=description, unit="example", leave=False, disable=hidden) as bar:
        for name, dataset in datasets.items():
            examples = score_examples(trainer, logits_of, dataset, label_space, bar=bar)
            scores[name] = {
                "loss": float(examples.loss.double().mean()),
                "accuracy": float(examples.correct.double().mean()),
                "num_examples": len(examples.loss),
            }
    return scores


@dataclass(frozen=True)
class ExampleScores:
    """Of each of a dataset's `n` examples, in its order, on the CPU.

    Args:
        loss (`torch.Tensor` of shape `(n,)`): mean token loss, in nats.
        correct (`torch.Tensor` of shape `(n,)`): 1.0 where greedy decoding gives the whole answer.
        margin (`torch.Tensor` of shape `(n,)`): log-odds of the answer.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    margin: torch.Tensor


def score_examples(
    trainer: Trainer,
    logits_of: LogitsFunction,
    dataset: Dataset,
    label_space: LabelSpace | None = None,
    margin: MarginKind = "geometric_mean",
    bar: tqdm | None = None,
) -> ExampleScores:
    """Score each example of one task's token table; arguments as of [`score_tasks`], `margin` as of [`margins`]."""
    parts = []
    for inputs, labels, tasks in _batches(trainer, dataset):
        logits = logits_of(inputs, tasks)
        if logits.dim() == 2 and label_space is not None:
            logits = restrict_to_labels(logits, label_space.mask(tasks))
        answers = score_answers(logits, labels, _shift(trainer))
        own = (answers.loss, answers.exact_match.float(), margins(answers, margin))
        parts.append([tensor.cpu() for tensor in trainer.accelerator.gather_for_metrics(own)])
        if bar is not None:
            bar.update(len(parts[-1][0]))
    return ExampleScores(*(torch.cat(tensors) for tensors in zip(*parts)))


def answer_logits(
    trainer: Trainer,
    logits_of: LogitsFunction,
    dataset: Dataset,
    label_space: LabelSpace | None,
    max_examples: int,
    max_values: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits at the answer tokens of a task's first rows: `(n, V)`, targets `(n,)` and rows `(n,)`, on the CPU.

    Takes whole batches until `max_examples` rows, or until the logits have `max_values` entries.
    """
    parts, offset, values = [], 0, 0
    for inputs, labels, tasks in _batches(trainer, dataset.select(range(min(max_examples, len(dataset))))):
        logits = logits_of(inputs, tasks)
        if logits.dim() == 2 and label_space is not None:
            logits = restrict_to_labels(logits, label_space.mask(tasks))
        answers, targets, rows = answer_positions(logits, labels, _shift(trainer))
        parts.append((answers.cpu(), targets.cpu(), rows.cpu() + offset))
        offset += len(labels)
        values += answers.numel()
        if values >= max_values:
            break
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


def _shift(trainer: Trainer) -> bool:
    return not getattr(trainer.model.config, "is_encoder_decoder", False)


def _batches(trainer: Trainer, dataset: Dataset):
    """Evaluation batches as (inputs, labels, tasks), without a trace in the trainer or the random state."""
    with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(trainer.model):
        dataloader = trainer.get_eval_dataloader(dataset)
        try:
            for batch in dataloader:
                inputs = dict(trainer._prepare_inputs(batch))
                tasks = pop_meta(inputs)[TASK]
                yield inputs, inputs.pop("labels"), tasks
        finally:
            # Every get_*_dataloader() appends there and nothing frees it.
            if dataloader in trainer.accelerator._dataloaders:
                trainer.accelerator._dataloaders.remove(dataloader)
