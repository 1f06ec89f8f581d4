"""Figures that are not finite: of metrics, they are left out; of a training, they end it in words."""

import math

import pytest

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split
from hf_ensemble import EnsembleSFTTrainer, SelectionSFTConfig, SelectionSFTTrainer
from hf_ensemble.errors import RunDivergedError


def nothing_to_correlate(prediction):
    return {"correlation": math.nan, "rows": float(len(prediction.predictions)), "odd": math.inf}


@pytest.mark.parametrize(
    ("trainer_class", "config", "changes"),
    [
        (EnsembleSFTTrainer, {}, {}),
        (EnsembleSFTTrainer, {"eval_strategy": "epoch"}, {}),
        (SelectionSFTTrainer, {"config_class": SelectionSFTConfig}, {"target": "sums"}),
    ],
)
def test_metrics_that_are_not_finite_are_left_out(tmp_path, base_folder, trainer_class, config, changes):
    tasks = toy.sft_tasks()
    trainer = trainer_class(
        model=base_folder,
        args=sft_config(tmp_path / "run", **config),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        compute_metrics=nothing_to_correlate,
        **changes,
    )
    found = trainer.train().metrics
    assert any(name.endswith("_rows") for name in found)
    assert not any(name.endswith(("_correlation", "_odd")) for name in found)
    # The run is whole, and read again.
    assert trainer.report().verdict or trainer_class is SelectionSFTTrainer


def test_a_training_that_diverges_says_so(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(RunDivergedError, match=r"'baseline' diverged: its loss is .*Lower learning_rate"):
        trainer.train()
    lower = sft_trainer(tmp_path / "run", base_folder, learning_rate=1e-3, overwrite_run=True)
    assert math.isfinite(lower.train().metrics["eval_loss"])
