"""A run that was killed within a training leaves the records of one that was not, timings aside."""

import json
import math

import pytest

from helpers import toy
from helpers.trainers import sft_trainer, text_trainer
from hf_ensemble.train.task_trainer import TaskSFTTrainer, TaskTrainer

CHANGES = {"save_strategy": "steps", "save_steps": 2, "num_groups": 2, "num_train_epochs": 2}
# A checksum is of the timings too.
TIMINGS = ("seconds", "prediction_seconds", "capture_seconds", "training_seconds", "checksum")
# Of the process, with whatever it held before.
TIMINGS += ("peak_memory",)
# Of the work that was kept, as far as it is known.
TIMINGS += ("cost", "is_resumed")
# Sums in another order.
ROUNDED = ("flops", "training_flops", "inference_flops")
# Of entries of logs.
SPEEDS = ("_runtime", "_per_second")


def without_timings(value):
    if isinstance(value, dict):
        kept = {key: own for key, own in value.items() if key not in TIMINGS and not key.endswith(SPEEDS)}
        return {
            key: pytest.approx(own, rel=1e-6) if key in ROUNDED and own is not None else without_timings(own)
            for key, own in kept.items()
        }
    return [without_timings(own) for own in value] if isinstance(value, list) else value


def records(folder):
    paths = [path for path in folder.rglob("*.json") if "checkpoint" not in str(path)]
    return {str(path.relative_to(folder)): without_timings(json.loads(path.read_text())) for path in paths}


def run_killed_at(trainer_class, make, kills, monkeypatch):
    """Train, and begin again after each kill; a kill is a training's name and its step."""
    step = trainer_class.training_step
    pending = list(kills)

    def killed(self, *args, **kwargs):
        if pending and (self.args.output_dir.rsplit("/", 1)[1], self.state.global_step) == pending[0]:
            pending.pop(0)
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "training_step", killed)
        for _ in kills:
            with pytest.raises(KeyboardInterrupt):
                make().train()
        output = make().train()
    assert not pending
    return output


@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({}, [("baseline", 3), ("baseline", 7), ("group_0", 5), ("group_1", 3)]),
        # Between two logs, and in the middle of an epoch of accumulated steps.
        (
            {"logging_strategy": "steps", "logging_steps": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 4},
            [("baseline", 5), ("group_1", 3)],
        ),
        ({"restore_callback_states_from_checkpoint": True, "save_steps": 3}, [("baseline", 4)]),
    ],
    ids=["each training", "between logs", "with states of callbacks"],
)
def test_records_of_a_killed_run_equal_those_of_a_whole_one(tmp_path, base_folder, monkeypatch, changes, kills):
    def make(folder):
        return sft_trainer(tmp_path / folder / "run", base_folder, **{**CHANGES, **changes})

    whole = make("whole").train()
    resumed = run_killed_at(TaskSFTTrainer, lambda: make("killed"), kills, monkeypatch)
    expected, found = (records(tmp_path / folder / "run") for folder in ("whole", "killed"))
    assert found.keys() == expected.keys() and "training/baseline.json" in found
    for name, record in expected.items():
        assert found[name] == record, name
    assert resumed.training_loss == whole.training_loss


@pytest.mark.parametrize("changes", [{}, {"max_steps": 4, "num_groups": 1}], ids=["epochs", "max_steps"])
def test_a_training_killed_after_its_last_step_trains_no_other(tmp_path, base_folder, monkeypatch, changes):
    def make(folder):
        return sft_trainer(tmp_path / folder / "run", base_folder, **{**CHANGES, **changes})

    whole = make("whole").train()

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_ensemble.train.flows.adapter_training.save_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            make("killed").train()
    resumed = make("killed").train()
    expected, found = (records(tmp_path / folder / "run") for folder in ("whole", "killed"))
    assert found["training/baseline.json"]["global_step"] == changes.get("max_steps", 18)
    assert found == expected and resumed.training_loss == whole.training_loss


def test_logged_losses_of_a_resumed_training_are_those_of_a_whole_one(tmp_path, monkeypatch):
    def make(folder):
        return text_trainer(
            tmp_path / folder,
            toy.bert(4),
            toy.text_tasks(),
            num_groups=1,
            logging_strategy="steps",
            logging_steps=4,
            **{key: CHANGES[key] for key in ("save_strategy", "save_steps")},
        )

    outputs, logs = [], []
    for folder, kills in (("whole", []), ("killed", [("baseline", 3), ("baseline", 7)])):
        trainers = []

        def fresh(folder=folder, trainers=trainers):
            trainers.append(make(folder))
            return trainers[-1]

        outputs.append(run_killed_at(TaskTrainer, fresh, kills, monkeypatch))
        logs.append([entry for entry in trainers[-1].state.log_history if "adapter" in entry])
    for key in ("loss", "train_loss"):
        whole, resumed = ([entry[key] for entry in own if key in entry] for own in logs)
        assert whole == resumed and whole
    assert outputs[0].training_loss == outputs[1].training_loss and math.isfinite(outputs[0].training_loss)
