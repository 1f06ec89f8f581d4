"""Loss and accuracy of every task, for any function from a batch to logits."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from ..capture import evaluation_mode
from ..tasks import TASK, LabelSpace, pop_meta, restrict_to_labels, score_answers
from ..tasks.answers import answer_positions

LogitsFunction = Callable[[dict[str, Any], list[str]], torch.Tensor]


def score_tasks(
    trainer: Trainer,
    logits_of: LogitsFunction,
    datasets: Mapping[str, Dataset],
    label_space: LabelSpace | None = None,
    description: str = "Evaluating",
) -> dict[str, dict[str, float]]:
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
            losses, correct = [], []
            for inputs, labels, tasks in _batches(trainer, dataset):
                logits = logits_of(inputs, tasks)
                if logits.dim() == 2 and label_space is not None:
                    logits = restrict_to_labels(logits, label_space.mask(tasks))
                answers = score_answers(logits, labels, _shift(trainer))
                gathered = trainer.accelerator.gather_for_metrics((answers.loss, answers.exact_match.float()))
                losses.append(gathered[0].cpu())
                correct.append(gathered[1].cpu())
                bar.update(len(gathered[0]))
            losses, correct = torch.cat(losses).double(), torch.cat(correct).double()
            scores[name] = {
                "loss": float(losses.mean()),
                "accuracy": float(correct.mean()),
                "num_examples": len(losses),
            }
    return scores


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
