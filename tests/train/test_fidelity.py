"""Predictions against subsets that are fine-tuned for real."""

import json

import numpy as np
import pytest
import torch

from helpers.trainers import sft_trainer
from hf_ensemble import (
    measure_fidelity,
)
from hf_ensemble.errors import ConfigurationError, EstimationError
from hf_ensemble.train.task_trainer import TaskSFTTrainer


def test_fidelity_compares_with_real_trainings_and_resumes(finished, monkeypatch):
    trainer, _, _ = finished
    estimator = trainer.selector().estimator
    # The baseline calibrates, so that all tasks together are no test.
    assert [sorted(run.mixture) for run in estimator.observed_runs] == [sorted(trainer.tasks)]
    subsets = [["sums"], ["diffs"], ["sums", "diffs"], ["more_sums", "diffs"], trainer.tasks.names]
    report = measure_fidelity(trainer, subsets=subsets, num_repeated=3, num_first_order=1)
    assert report.subsets == subsets[:4] and report.calibration_subsets == [list(trainer.tasks)]
    predicted = estimator.predict_subsets(subsets[:4])
    true = np.array(report.true_loss)
    assert report.mean_relative_error == pytest.approx(np.mean(np.abs(predicted.loss - true) / true))
    held = (predicted.loss_low <= true) & (true <= predicted.loss_high)
    assert report.interval_coverage == pytest.approx(held.mean()) and report.interval_level == 0.75
    assert report.ceiling.num_subsets == 3 and report.ceiling.mean_relative_error > 0
    assert report.first_order.num_subsets == 1 and report.first_order.training_distance > 0
    assert report.speed_up > 0
    saved = json.loads((trainer.run_directory.path / "estimate" / "fidelity.json").read_text())
    assert saved["true_loss"] == report.true_loss
    # Two subsets hold a task: too few for a rank correlation, and JSON has no NaN.
    assert np.isnan(report.mean_task_spearman_inside) == (saved["mean_task_spearman_inside"] is None)
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    again = measure_fidelity(trainer, subsets=subsets, num_repeated=3, num_first_order=1)
    assert again.true_loss == report.true_loss
    assert again.first_order == report.first_order
    with pytest.raises(EstimationError, match="Every subset calibrates the estimates already"):
        measure_fidelity(trainer, subsets=[trainer.tasks.names])


def test_a_scored_run_is_a_plain_training_and_its_seed_counts(finished):
    trainer, _, _ = finished
    calibration = trainer.flow.calibration
    run, other = calibration.scored_run(["sums"]), calibration.scored_run(["sums"], seed=7)
    assert run.scores["sums"].loss != other.scores["sums"].loss and run.distance > 0
    trained = trainer.flow.training.run("plain", ["sums"], trainer.run_directory.path / "plain")
    assert trained.distance == pytest.approx(run.distance)
    scores = trainer.flow.evaluation.score_adapter(
        trainer.run_directory.path / "plain", trainer.flow.context.eval_tables, "x"
    )
    assert scores["diffs"].loss == pytest.approx(run.scores["diffs"].loss, abs=1e-6)
    parameters = dict(trainer.ensemble.model.named_parameters())
    assert all(torch.equal(parameters[n].cpu(), p) for n, p in trainer.flow.training.theta0.items())
    assert not [path for path in (trainer.run_directory.path / "scored_runs").iterdir() if path.is_dir()]


def test_calibration_runs_are_made_once(tmp_path, base_folder, monkeypatch):
    trainer = sft_trainer(tmp_path / "run", base_folder, train_baseline=False, calibration_runs=2, num_train_epochs=1)
    trainer.open_run()
    runs = trainer.flow.calibration.observed_runs(trainer.flow.num_calibration_runs())
    assert len(runs) == 2 and set(runs[0].mixture) == set(trainer.tasks) and len(runs[1].mixture) == 1
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    assert trainer.flow.calibration.observed_runs(2) == runs
    none = sft_trainer(tmp_path / "none", base_folder, train_baseline=False, calibration_runs=0)
    none.open_run()
    assert none.flow.calibration.observed_runs(none.flow.num_calibration_runs()) == []
    with pytest.raises(ConfigurationError, match="calibration_runs has to be an integer of at least 0"):
        sft_trainer(tmp_path / "bad", base_folder, calibration_runs=-1)
