"""Which weights of an ensemble are best on the test rows of its tasks?

    python -m benchmarks.ensemble_weights.run OUTPUT --num_groups N FLAGS

Adapters are trained as `hf-ensemble run` trains them; then each task's test rows are scored with equal weights, with
its own group alone, with the single adapter that is best on validation rows, with the weights of least loss on those
rows, with weights cross-validated on them, as a run chooses them, without and with their scale, and, for causal
language models, with weights by how well each adapter predicts the prompt. FLAGS are those of `hf-ensemble fidelity`.
"""

import numpy as np
import torch
from datasets import concatenate_datasets

from hf_ensemble.tasks import pop_meta, restrict_to_labels, score_answers

from ..common import make_parser, write_results
from ..trainers import trainer_from_flags
from .table import table


@torch.no_grad()
def scores(trainer, rows, task: str | None) -> dict[str, float]:
    """Mean loss and accuracy over rows; with `task=None`, adapters are weighted by how well they predict the prompt."""
    ensemble, losses, matches = trainer.ensemble, [], []
    space = trainer.tasks.label_space
    for start in range(0, len(rows), 32):
        batch = trainer.data_collator([rows[index] for index in range(start, min(start + 32, len(rows)))])
        pop_meta(batch)
        labels = batch.pop("labels")
        routing = "prompt" if task is None else "default"
        logits = ensemble(**batch, labels=labels, task=task, routing=routing).logits
        if space is not None:
            logits = restrict_to_labels(logits, space.mask([task] * len(labels)))
        answers = score_answers(logits, labels, shift=True)
        losses += answers.loss.tolist()
        matches += answers.exact_match.float().tolist()
    return {"loss": float(np.mean(losses)), "accuracy": float(np.mean(matches))}


def compare(trainer, test: dict) -> tuple[dict, dict]:
    """Scores by weighting and task, and the report of the fit."""
    ensemble, names = trainer.ensemble.eval(), trainer.tasks.names
    adapters = ensemble.adapter_names
    found, ensemble.scales = {}, {}

    def score(way: str, weights: dict) -> None:
        ensemble.weights = weights
        found[way] = {task: scores(trainer, test[task], task) for task in names}

    score("equal", {task: dict.fromkeys(adapters, 1 / len(adapters)) for task in names})
    score("own group alone", {task: {trainer.grouping.group_of(task): 1.0} for task in names})
    validation = concatenate_datasets([trainer.eval_dataset[task] for task in names])
    fit = ensemble.fit_weights(validation, data_collator=trainer.data_collator, cross_validate=False)
    fitted = ensemble.weights
    best = {task: fit.adapter_names[int(np.argmin(fit.tasks[task].one_hot_losses))] for task in names}
    score("best single adapter", {task: {adapter: 1.0} for task, adapter in best.items()})
    score("fitted", fitted)
    chosen = ensemble.fit_weights(
        validation,
        data_collator=trainer.data_collator,
        min_weight=0.05,
        own_adapters={task: {trainer.grouping.group_of(task): 1.0} for task in names},
    )
    weights, scales = ensemble.weights, ensemble.scales
    ensemble.scales = {}
    score("cross-validated", weights)
    ensemble.scales = scales
    score("cross-validated, scaled", weights)
    if trainer.tasks.label_space is None:
        found["by the prompt"] = {task: scores(trainer, test[task], None) for task in names}
    return found, fit.report() | {"cross_validated": chosen.report()}


def main() -> None:
    own, flags = make_parser(__file__, __doc__).parse_known_args()
    trainer, tasks = trainer_from_flags(flags)
    trainer.train()
    found, fit = compare(trainer, trainer.prepare_rows(tasks.split("test")))
    results = {
        "adapters": {member.name: list(member.tasks) for member in trainer.ensemble.members},
        "weights": {task: trainer.ensemble.weights[task] for task in tasks.names},
        "fit": fit,
        "scores": found,
        "mean": {
            way: {key: float(np.mean([score[key] for score in by_task.values()])) for key in ("loss", "accuracy")}
            for way, by_task in found.items()
        },
    }
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
