"""What TensorBoard and other trackers see of a run's trainings."""

from contextvars import ContextVar
from pathlib import Path

import pytest
import transformers.integrations.integration_utils as integrations
from transformers import TrainerCallback

from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble.train.inputs import trackers
from hf_ensemble.train.task_trainer import TaskSFTTrainer
from hf_ensemble.train.tracking import PartOfRun

CHANGES = {"num_groups": 2, "num_train_epochs": 1, "logging_strategy": "steps", "logging_steps": 1}


class Tracker(TrainerCallback):
    """Like a tracker of one run for the whole process: it is open from the first training's begin to the same's end."""

    logged: list[tuple[int, dict]] = []
    saved: list[int] = []
    names: list[str] = []
    holder = None
    # Where trackio keeps its run.
    run = ContextVar("run", default=None)

    def on_train_begin(self, args, state, control, **kwargs):
        if Tracker.holder is None:
            Tracker.holder = self
            Tracker.run.set(self)
            Tracker.names.append(args.run_name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert None is not Tracker.holder is Tracker.run.get()
        Tracker.logged.append((state.global_step, integrations.rewrite_logs(logs)))

    def on_save(self, args, state, control, **kwargs):
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
        Tracker.saved.append(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if Tracker.holder is self:
            Tracker.holder = None


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "fake", Tracker)
    for name in ("logged", "saved", "names"):
        monkeypatch.setattr(Tracker, name, [])
    monkeypatch.setattr(Tracker, "holder", None)
    return Tracker


def test_a_tracker_sees_one_run_whose_steps_go_on(tmp_path, base_folder, tracker):
    trainer = sft_trainer(
        tmp_path / "run",
        base_folder,
        report_to=["fake"],
        run_name="mine",
        eval_strategy="epoch",
        save_strategy="epoch",
        **CHANGES,
    )
    trainer.train()
    assert tracker.names == ["mine"] and tracker.holder is None
    steps = [step for step, _ in tracker.logged]
    assert steps == sorted(steps) and steps[0] == 1
    run = trainer.run_directory
    lengths = [run.trained_adapter(name).global_step for name in ("baseline", "group_0", "group_1")]
    assert steps[-1] == sum(lengths) == run.num_steps() == trainer.state.global_step
    assert len(tracker.saved) == 3
    for number, name in enumerate(("baseline", "group_0", "group_1")):
        own = [step for step, logs in tracker.logged if f"train/{name}/loss" in logs]
        start = sum(lengths[:number])
        assert run.trained_adapter(name).first_step == start
        assert own == list(range(start + 1, start + lengths[number] + 1))
    assert any("eval/baseline/sums_loss" in logs for _, logs in tracker.logged)
    assert any("train/baseline/loss_sums" in logs for _, logs in tracker.logged)
    # The run's own metrics come last, without a training's name.
    assert "eval/mean_loss" in tracker.logged[-2][1] and "train/train_loss" in tracker.logged[-1][1]


def test_trainings_at_once_are_one_run_too(tmp_path, base_folder, tracker):
    options = {"concurrent_groups": 2, "train_baseline": False, "calibration_runs": 0, **CHANGES}
    trainer = sft_trainer(tmp_path / "run", base_folder, report_to=["fake"], run_name="mine", **options)
    trainer.train_groups()
    assert tracker.names == ["mine"] and tracker.holder is None
    run = trainer.run_directory
    lengths = [run.trained_adapter(name).global_step for name in ("group_0", "group_1")]
    for number, name in enumerate(("group_0", "group_1")):
        own = [step for step, logs in tracker.logged if f"train/{name}/loss" in logs]
        start = sum(lengths[:number])
        assert own == list(range(start + 1, start + lengths[number] + 1))


def test_steps_go_on_after_a_kill(tmp_path, base_folder, tracker, monkeypatch):
    def make():
        return sft_trainer(
            tmp_path / "run", base_folder, report_to=["fake"], save_strategy="steps", save_steps=2, **CHANGES
        )

    step = TaskSFTTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.args.output_dir.endswith("group_0") and self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TaskSFTTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            make().train()
    assert tracker.holder is None
    first = [step for step, logs in tracker.logged if "train/group_0/loss" in logs]
    tracker.logged.clear()
    make().train()
    second = [step for step, logs in tracker.logged if "train/group_0/loss" in logs]
    # From the checkpoint on, which is one step back.
    assert second[0] == first[-1] and second == list(range(second[0], second[-1] + 1))


class OfTheProcess(TrainerCallback):
    """Like trackio's: it opens a run of the process by itself, and the end of any training closes that."""

    events: list[str] = []

    def __init__(self):
        self._initialized = False

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._initialized:
            OfTheProcess.events.append("opened")
        self._initialized = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.on_train_begin(args, state, control)
        assert OfTheProcess.events[-1] != "closed", "reports to a closed run"
        OfTheProcess.events.append(next(iter(integrations.rewrite_logs(logs))))

    def on_train_end(self, args, state, control, **kwargs):
        OfTheProcess.events.append("closed")


@pytest.fixture
def of_the_process(monkeypatch):
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "trackio", OfTheProcess)
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["trackio"])
    monkeypatch.setattr(OfTheProcess, "events", [])
    return OfTheProcess


@pytest.mark.parametrize("is_own", [False, True], ids=["by_name", "passed"])
def test_the_run_of_a_process_is_opened_and_closed_once(tmp_path, base_folder, of_the_process, is_own):
    options = {"callbacks": [of_the_process()], "report_to": "none"} if is_own else {"report_to": ["trackio"]}
    few = dict(list(toy.sft_tasks(8).items())[:2])
    trainer = sft_trainer(tmp_path / "run", base_folder, few, **options, **CHANGES, max_steps=1)
    trainer.train()
    events = of_the_process.events
    assert events[0] == "opened" and events[-1] == "closed"
    assert events.count("opened") == events.count("closed") == 1
    assert {"train/baseline/loss", "train/group_0/loss", "train/group_1/loss"} <= set(events)


def test_an_error_closes_what_is_open_once_and_uploads_nothing(tmp_path, base_folder, tracker, monkeypatch):
    ended = []

    class Own(TrainerCallback):
        """Of each training its own, such as a writer of files."""

        def on_train_begin(self, args, state, control, **kwargs):
            ended.append([args.output_dir.split("/")[-1], 0])
            self.entry = ended[-1]

        def on_train_end(self, args, state, control, **kwargs):
            self.entry[1] += 1
            if self.entry[0] == "run":
                raise OSError("no space left")

    class Uploading(TrainerCallback):
        uploads = 0

        def on_train_end(self, args, state, control, **kwargs):
            Uploading.uploads += 1

    for name, kind in (("tensorboard", Own), ("wandb", Uploading)):
        monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, name, kind)
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    step = TaskSFTTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.args.output_dir.endswith("group_0"):
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(TaskSFTTrainer, "training_step", failing)
    names = ["fake", "tensorboard", "wandb"]
    with pytest.raises(OSError, match="no space") as caught:
        sft_trainer(tmp_path / "run", base_folder, report_to=names, **CHANGES).train()
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    # A tracker that fails at its end keeps no other one open.
    assert tracker.holder is None
    assert ended == [["run", 1], ["baseline", 1], ["group_0", 1]] and Uploading.uploads == 1


class Writer:
    """Stands in for `SummaryWriter`: a line for each figure."""

    def __init__(self, log_dir=None):
        assert log_dir is not None, "would be written beside the script"
        self.file = Path(log_dir) / "events.out"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def add_scalar(self, name, value, step):
        with self.file.open("a") as file:
            file.write(f"{name} {step}\n")

    def add_text(self, *args, **kwargs):
        self.file.touch()

    def flush(self):
        pass

    close = flush


@pytest.mark.parametrize("folder", [None, "all"])
def test_logs_of_every_training_stay(tmp_path, base_folder, monkeypatch, folder):
    class TensorBoard(integrations.TensorBoardCallback):
        def __init__(self):
            self._SummaryWriter, self.tb_writer = Writer, None
            self.logging_dir = None if folder is None else str(tmp_path / folder)

    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "tensorboard", TensorBoard)
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    trainer = sft_trainer(run, base_folder, report_to=["tensorboard"], save_strategy="steps", save_steps=2, **CHANGES)
    trainer.train()
    trainer.evaluate()
    for name in ("baseline", "group_0", "group_1"):
        (file,) = (tmp_path / folder).rglob("events.out") if folder else (run / "training" / name).rglob("events.out")
        lines = [line.split() for line in file.read_text().splitlines()]
        steps = [int(step) for key, step in lines if key == f"train/{name}/loss"]
        start = trainer.run_directory.trained_adapter(name).first_step
        assert steps == list(range(start + 1, start + len(steps) + 1)) and len(steps) > 2
    assert not list(run.rglob("checkpoint-*"))
    files = list((tmp_path / folder if folder else run / "runs").rglob("events.out"))
    assert any("eval/mean_loss" in file.read_text() for file in files)
    assert not (tmp_path / "runs").exists()


def test_other_callbacks_see_the_training_as_it_is(tmp_path, base_folder, tracker):
    class Plain(TrainerCallback):
        first: list[int] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                Plain.first.append(state.global_step)

    trainer = sft_trainer(tmp_path / "run", base_folder, callbacks=[Plain()], report_to=["fake"], **CHANGES)
    trainer.train()
    assert Plain.first.count(1) == 3
    assert not any(isinstance(callback, PartOfRun) for callback in trainer.callback_handler.callbacks)
