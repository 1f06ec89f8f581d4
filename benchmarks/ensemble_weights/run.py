"""One ensemble, weighed in four ways, on the test rows of its tasks.

    python benchmarks/ensemble_weights.py TARGET FLAGS

FLAGS are those of `hf-ensemble fidelity`, with --num_groups. Adapters are trained as `hf-ensemble run` trains them;
then each task's test rows are scored with equal weights, with the task's own group alone, with the one adapter that is
best on validation rows, with weights fitted on these rows, and, of causal language models, with weights by how well
each adapter predicts the prompt. Writes TARGET.json and .md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from trl import ModelConfig

from hf_ensemble.cli.arguments import FidelityArguments, parse, with_config
from hf_ensemble.cli.trainers import build_trainer, load_tasks
from hf_ensemble.tasks import pop_meta, restrict_to_labels, score_answers


@torch.no_grad()
def scores(trainer, rows, task: str | None) -> dict[str, float]:
    """Mean loss and accuracy over rows; with `task=None` each prompt weighs the adapters, its answer unseen."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    own, flags = parser.parse_known_args()
    (arguments, model_arguments), flags = parse([FidelityArguments, ModelConfig], with_config(flags), True)
    tasks = load_tasks(arguments, model_arguments, "fidelity")
    trainer = build_trainer(arguments, model_arguments, tasks, flags)
    trainer.train()
    ensemble, names = trainer.ensemble.eval(), tasks.names
    adapters = ensemble.adapter_names
    test = trainer.prepare_rows(tasks.split("test"))
    weighings = {
        "equal": {task: dict.fromkeys(adapters, 1 / len(adapters)) for task in names},
        "own group alone": {task: {trainer.grouping.group_of(task): 1.0} for task in names},
    }
    found = {}
    for way, weights in weighings.items():
        ensemble.weights = weights
        found[way] = {task: scores(trainer, test[task], task) for task in names}
    fit = ensemble.fit_weights(
        concatenate_datasets([trainer.eval_dataset[task] for task in names]), data_collator=trainer.data_collator
    )
    fitted = ensemble.weights
    ensemble.weights = {
        task: {fit.adapter_names[int(np.argmin(fit.tasks[task].one_hot_losses))]: 1.0} for task in names
    }
    found["best single adapter"] = {task: scores(trainer, test[task], task) for task in names}
    ensemble.weights = fitted
    found["fitted"] = {task: scores(trainer, test[task], task) for task in names}
    if tasks.label_space is None:
        found["by the prompt"] = {task: scores(trainer, test[task], None) for task in names}
    report = {
        "adapters": {member.name: list(member.tasks) for member in ensemble.members},
        "weights": {task: ensemble.weights[task] for task in names},
        "fit": fit.report(),
        "scores": found,
        "mean": {
            way: {key: float(np.mean([score[key] for score in by_task.values()])) for key in ("loss", "accuracy")}
            for way, by_task in found.items()
        },
    }
    own.target.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        f"{len(adapters)} adapters, test rows of {len(names)} tasks; means over tasks, and the loss of each. "
        "Accuracy is exact match where answers are generated.",
        "",
        f"| weights | mean loss | mean accuracy | {' | '.join(names)} |",
        f"|---|{'---|' * (len(names) + 2)}",
    ]
    for way, mean in report["mean"].items():
        cells = [f"{found[way][task]['loss']:.3f}" for task in names]
        lines.append(f"| {way} | {mean['loss']:.4f} | {mean['accuracy']:.3f} | {' | '.join(cells)} |")
    own.target.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
