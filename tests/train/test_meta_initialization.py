"""Gradients are captured where trainings begin, in whatever order a trainer is asked."""

import shutil

import pytest
import torch

from helpers import toy
from helpers.trainers import sft_config, split
from hf_ensemble import SelectionSFTConfig, SelectionSFTTrainer, measure_fidelity
from hf_ensemble.errors import RunMismatchError
from hf_ensemble.runs import RunDirectory, run_selector
from hf_ensemble.store import GradientStore


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(toy.llama(), tmp_path_factory.mktemp("base"))


def selection_trainer(folder, base, **changes):
    tasks = toy.sft_tasks(8, 4)
    settings = {"meta_initialization": True, "max_auxiliary": 1, "num_train_epochs": 1, **changes}
    return SelectionSFTTrainer(
        model=base,
        args=sft_config(folder, SelectionSFTConfig, **settings),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        target="sums",
    )


def starting_points(run):
    """theta0 of the store, and of every training but the meta adapter's own."""
    store = GradientStore(run.gradients).identity["model"]["theta0"]
    names = [path.stem for path in (run.path / "training").glob("*.json") if path.stem != "meta"]
    return {store, *(run.trained_adapter(name).theta0 for name in names), *(own.theta0 for own in run.scored_runs())}


def capture(trainer):
    trainer.capture()


def fidelity(trainer):
    measure_fidelity(trainer, subsets=[["sums"], ["diffs"]], num_first_order=1)


def train(trainer):
    trainer.train()


@pytest.mark.parametrize("is_new_process", [False, True], ids=["one trainer", "a trainer each"])
@pytest.mark.parametrize("steps", [(fidelity, train), (train, fidelity), (capture, train), (train, capture, fidelity)])
def test_gradients_and_trainings_have_one_starting_point(tmp_path, base, steps, is_new_process):
    trainer = selection_trainer(tmp_path / "run", base)
    fresh = trainer.flow
    for number, step in enumerate(steps):
        if is_new_process and number:
            trainer = selection_trainer(tmp_path / "run", base)
        step(trainer)
    run = trainer.run_directory
    assert fresh is None and len(starting_points(run)) == 1
    meta = run.trained_adapter("meta")
    assert meta.theta0 not in starting_points(run) and trainer.flow.training.fingerprint() != meta.theta0


def test_the_order_changes_no_result(tmp_path, base):
    first, second = (selection_trainer(tmp_path / name, base) for name in ("first", "second"))
    measured = first.train().metrics, measure_fidelity(first, subsets=[["sums"], ["diffs"]], num_first_order=1)
    report = measure_fidelity(second, subsets=[["sums"], ["diffs"]], num_first_order=1)
    metrics = second.train().metrics
    assert measured[1].true_loss == report.true_loss and measured[1].predicted_loss == report.predicted_loss
    compared = [key for key in metrics if key.endswith(("loss", "accuracy"))]
    assert {key: measured[0][key] for key in compared} == {key: metrics[key] for key in compared}
    compared = [key for key in compared if key.startswith("eval_")]
    # What fidelity puts into the model is gone: the final adapter is what is evaluated and saved.
    assert {key: first.evaluate()[key] for key in compared} == {key: metrics[key] for key in compared}
    final = {n: p for n, p in first.model.named_parameters() if "lora_" in n}
    assert all(torch.equal(final[n], p) for n, p in second.model.named_parameters() if "lora_" in n)


def test_gradients_of_another_starting_point_are_refused(tmp_path, base):
    meta, plain = (
        selection_trainer(tmp_path / name, base, meta_initialization=m) for name, m in (("m", True), ("p", False))
    )
    meta.capture()
    plain.capture()
    shutil.rmtree(tmp_path / "m" / "gradients")
    shutil.copytree(tmp_path / "p" / "gradients", tmp_path / "m" / "gradients")
    for trainer in (meta, selection_trainer(tmp_path / "m", base)):
        with pytest.raises(RunMismatchError, match="captured at other parameters .* Choose another output_dir"):
            trainer.train()


def test_fine_tunings_from_elsewhere_are_no_evidence(tmp_path, base):
    trainer = selection_trainer(tmp_path / "run", base)
    trainer.open_run()
    # Below the stages, where nothing has settled the starting point.
    early = trainer.flow.calibration.scored_run(["sums"])
    trainer.capture()
    assert not run_selector(RunDirectory(tmp_path / "run")).estimator.observed_runs
    with trainer.working():
        again = trainer.flow.calibration.scored_run(["sums"])
    assert again.theta0 != early.theta0 and again.scores != early.scores
    assert len(run_selector(RunDirectory(tmp_path / "run")).estimator.observed_runs) == 1
