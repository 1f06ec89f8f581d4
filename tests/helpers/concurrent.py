"""Trainings that are made one after the other and at once."""

from functools import partial

import pytest
from safetensors.torch import load_file

from hf_ensemble.train.flows.adapter_training import run_concurrently

from . import toy
from .trainers import sft_trainer, text_trainer, without_speed

# Rows of each task, in batches of 4 that are accumulated by two: an epoch of a ends with a single one of two rows.
ROWS = {"a": 10, "b": 4, "c": 3, "d": 8}
OPTIONS = {
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "learning_rate": 2e-3,
    "logging_strategy": "steps",
    "logging_steps": 10,
}


def sft(folder, **options):
    rows = {
        task: {"train": toy.sum_rows(n, n, "sum" if n % 3 else "diff"), "validation": toy.sum_rows(4, 9)}
        for task, n in ROWS.items()
    }
    return sft_trainer(folder / "run", toy.save_model(toy.llama(), folder / "base"), rows, **OPTIONS, **options)


def text(folder, **options):
    rows = {
        task: {"train": toy.text_rows(n, n, noun), "validation": toy.text_rows(4, 9, noun)}
        for (task, n), noun in zip(ROWS.items(), ("film", "book", "song", "film"))
    }
    toy.save_model(toy.bert(2), folder / "base")
    return text_trainer(folder / "run", str(folder / "base"), rows, head="linear", **OPTIONS, **options)


def trained(trainer, num_at_once, names=tuple(ROWS), forgets=True):
    """Weights and records of adapters that are trained on one task each."""
    run, training = trainer.run_directory, trainer.flow.training
    for name in names if forgets else ():
        run.forget_training(name)

    def job(name, own):
        return own.run(name, [name], run.path / str(num_at_once) / name)

    if num_at_once == 1:
        records = [job(name, training) for name in names]
    else:
        records = run_concurrently(training, [partial(job, name) for name in names], num_at_once)
    folders = [run.path / str(num_at_once) / name for name in names]
    return [load_file(folder / "adapter_model.safetensors") for folder in folders], records


def assert_equal_trainings(one, other, tolerance=1e-5):
    for (weights, others), (record, known) in zip(zip(one[0], other[0]), zip(one[1], other[1])):
        assert weights.keys() == others.keys()
        assert max(float((weights[key] - others[key]).abs().max()) for key in weights) <= tolerance
        timed = ("seconds", "files", "first_step")
        plain, found = ({k: v for k, v in vars(own).items() if k not in timed} for own in (record, known))
        for entry, same in zip(plain.pop("log_history"), found.pop("log_history"), strict=True):
            assert without_speed(entry) == pytest.approx(without_speed(same), abs=tolerance)
        for name in ("training_loss", "distance"):
            assert plain.pop(name) == pytest.approx(found.pop(name), abs=tolerance)
        assert plain == found
