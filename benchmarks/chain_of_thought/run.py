"""Which skills with rationales are best to train on for a target, measured by the answers that are generated?

    python -m benchmarks.chain_of_thought.run OUTPUT --output_dir OUT

A small Llama is trained from scratch on ten generated skills, which reason before they answer. Most of the arithmetic
among them is wrong: in 60 % of the rows every result is too large by one. So it has seen how to do it right, and by
itself does it wrong. Fine-tuning for the target, additions in two steps, chooses among the other skills and two
corrupted copies of the target, one with wrong rationales and one with random results. Each choice is fine-tuned, and
its answers to test questions are generated and compared with the right ones. Every method except "all", "alone" and the
verified prediction takes as many skills as forward selection by predicted loss does. Finished
trainings are kept in OUT, so that a killed study can be resumed.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars

from hf_ensemble import SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble.select import Selection, SelectionProblem, mean_cosines
from hf_ensemble.select.baselines import similarity_selection
from hf_ensemble.store import FeatureTable
from hf_ensemble.tasks import EXAMPLE_ID, TASK, pop_meta

from ..common import make_parser, shape_of, write_results
from ..skills import CORRUPTED, SKILLS, TARGET, rows
from ..skills_trainer import METRIC, pretrained, skills_arguments, skills_lora
from .table import table

TEST_ROWS = 150


def make_trainer(base: Path, folder: Path, settings, seed: int) -> SelectionSFTTrainer:
    """The trainer over one draw of all skills' rows."""
    counts = {name: settings.corrupted_rows if name in CORRUPTED else settings.rows for name in SKILLS}
    counts[TARGET] = settings.target_rows
    train = {name: rows(name, count, f"train{seed}") for name, count in counts.items()}
    # Predictions are needed for the target alone.
    sizes = {name: settings.validation_rows if name == TARGET else 8 for name in SKILLS}
    validation = {name: rows(name, size, f"validation{seed}") for name, size in sizes.items()}
    args = SelectionSFTConfig(
        **skills_arguments(folder, seed) | {"learning_rate": settings.learning_rate},
        calibration_runs=settings.calibration_runs,
        max_auxiliary=settings.max_auxiliary,
        num_train_epochs=settings.epochs,
    )
    return SelectionSFTTrainer(
        model=str(base),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        peft_config=skills_lora(),
        target=TARGET,
        answer_metrics=METRIC,
    )


def representations(trainer: SelectionSFTTrainer, like: FeatureTable, split: str) -> FeatureTable:
    """The base model's mean hidden state over the tokens of the rows in a table of gradients."""
    names = list(trainer.tasks)
    table_rows = trainer.train_dataset
    if split == "validation":
        table_rows = concatenate_datasets([trainer.eval_dataset[name] for name in names])
    found, model = {}, trainer.model.get_base_model().model.eval()
    for start in range(0, len(table_rows), 100):
        inputs = trainer.data_collator([table_rows[i] for i in range(start, min(start + 100, len(table_rows)))])
        meta, mask = pop_meta(inputs), inputs["attention_mask"]
        with torch.no_grad(), trainer.model.disable_adapter():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found.update(zip(zip(meta[TASK], meta[EXAMPLE_ID]), means.numpy()))
    keys = zip((like.task_names[index] for index in like.task), like.example_id.tolist())
    return replace(like, features=np.stack([found[key] for key in keys]))


def choose(trainer: SelectionSFTTrainer, seed: int) -> dict[str, Selection]:
    """What each method takes."""
    store, selector = trainer.capture(), trainer.selector()
    estimator = selector.estimator
    hidden = [
        representations(trainer, store.table(split, estimator.task_names), split) for split in ("train", "validation")
    ]
    forward = selector.select(TARGET, max_auxiliary=trainer.args.max_auxiliary)
    size = len(forward.auxiliary)
    similar = similarity_selection(
        SelectionProblem(estimator, TARGET), size, mean_cosines(*hidden), "representation_similarity"
    )
    verify = partial(trainer.flow.answered, estimator)
    return {
        "prediction": forward,
        "prediction, verified by answers": selector.select(
            TARGET, max_auxiliary=trainer.args.max_auxiliary, metric="answers", verify=verify
        ),
        "all": selector.select(TARGET, "all"),
        "alone": selector.select(TARGET, "alone"),
        "random": selector.select(TARGET, "random", size, seed=seed),
        "gradient similarity": selector.select(TARGET, "gradient_similarity", size),
        "representation similarity": similar,
    }


def scores(
    trainer: SelectionSFTTrainer, choices: Mapping[str, Selection], seed: int
) -> dict[str, dict[str, float | list[str]]]:
    """Scores of the fine-tuned choices on the target's test rows, and of the base model."""
    flow = trainer.flow
    seen = {row["prompt"] for own in trainer.tasks[TARGET].splits.values() for row in own}
    test = trainer.prepare_rows({TARGET: unseen(seen, f"test{seed}")})
    test = {name: flow.context.model_columns(own) for name, own in test.items()}
    found = {"base model": {**_flat(flow.evaluation.score_base(test)[TARGET]), "skills": []}}
    for way, selection in choices.items():
        name = "choice-" + "-".join(sorted(selection.weights))
        folder = Path(trainer.args.output_dir) / "chosen" / str(hash_of(name))
        flow.training.run(f"choice-{folder.name}", selection.weights, folder)
        own = flow.evaluation.score_adapter(folder, test, "Test rows")[TARGET]
        found[way] = {**_flat(own), "skills": list(selection.auxiliary)}
        print(seed, way, found[way], flush=True)
    return found


def unseen(seen: set[str], seed: str) -> list[dict[str, str]]:
    """Different test questions, none of them among the target's training and validation rows."""
    drawn = {row["prompt"]: row for row in rows(TARGET, 50 * TEST_ROWS, seed) if row["prompt"] not in seen}
    return list(drawn.values())[:TEST_ROWS]


def hash_of(name: str) -> int:
    """A number that is the same in every process."""
    return random.Random(name).getrandbits(32)


def _flat(own) -> dict[str, float]:
    return {"loss": own.loss, **own.metrics}


def measure(base: Path, settings, seeds: Sequence[int]) -> list[dict]:
    """Scores of every method, seed by seed."""
    worlds = []
    for seed in seeds:
        trainer = make_trainer(base, Path(settings.output_dir) / f"seed-{seed}", settings, seed)
        choices = choose(trainer, seed)
        steps = {way: [outcome_of(step) for step in selection.path] for way, selection in choices.items()}
        worlds.append({"seed": seed, "scores": scores(trainer, choices, seed), "paths": steps})
    return worlds


def outcome_of(step: Mapping) -> dict:
    """What the results keep of a step of a search."""
    kept = ("added", "predicted_loss", "answered", "verified")
    return {name: step[name] for name in kept if name in step}


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--output_dir", required=True, help="where the base model and the trainings go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining_rows", type=int, default=120_000)
    parser.add_argument("--rows", type=int, default=32, help="training rows of each other skill")
    parser.add_argument("--target_rows", type=int, default=16, help="training rows of the target")
    parser.add_argument("--corrupted_rows", type=int, default=96, help="training rows of each corrupted copy")
    parser.add_argument("--validation_rows", type=int, default=100, help="validation rows of the target")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--calibration_runs", type=int, default=1)
    parser.add_argument("--max_auxiliary", type=int, default=3, help="most skills to train on besides the target")
    settings = parser.parse_args()
    disable_progress_bars()
    base = pretrained(Path(settings.output_dir) / "base", settings.pretraining_rows)
    results = {
        "shape": shape_of(settings, "output_dir", "seeds"),
        "target": TARGET,
        "test_rows": TEST_ROWS,
        "worlds": measure(base, settings, settings.seeds),
    }
    write_results(settings.output, results, table)


if __name__ == "__main__":
    main()
