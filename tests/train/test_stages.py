"""Stages are announced, with the time that is left."""

import pytest
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_ensemble.runs import RunDirectory
from hf_ensemble.train.flows.bars import label_bars
from hf_ensemble.train.flows.stages import Stage, StageAnnouncer, announced, duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_time_left_follows_the_measured_speed():
    said, clock = [], Clock()
    stages = [
        Stage("gradients", "gradients", 100.0),
        Stage("baseline", "one adapter for all", 300.0),
        Stage("group", "groups", 1.0),
        Stage("adapter", "adapter", 300.0),
        Stage("evaluation", "evaluation", 50.0),
    ]
    announcer = StageAnnouncer(stages, said.append, clock)
    begun = announcer.begin("gradients")
    clock.now += 60
    announcer.end("gradients", begun)
    begun = announcer.begin("baseline")
    clock.now += 300
    announcer.end("baseline", begun)
    begun = announcer.begin("group")
    clock.now += 1
    announcer.end("group", begun)
    stages[3].parts = {"group_0": 200.0, "group_1": 0.0, "group_2": 100.0}
    announcer.begin("adapter:group_0")
    announcer.passed("adapter:group_0")
    announcer.passed("adapter:group_1")
    # A choice that is made again is no whole stage: its time says nothing about the speed.
    begun = announcer.begin("group:group_0")
    clock.now += 1000
    announcer.end("group:group_0", begun)
    announcer.begin("adapter:group_2")
    announcer.begin("boosting:step_1")
    assert said == [
        "Stage 1 of 5: gradients",
        "Stage 2 of 5: one adapter for all, about 7 minutes left",
        "Stage 3 of 5: groups, about 5 minutes left",
        "Stage 4 of 5: adapter group_0 (1 of 3), about 5 minutes left",
        "Stage 4 of 5: adapter group_2 (3 of 3), about 2 minutes left",
        "Next: boosting step 1",
    ]


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "1 second"), (4, "4 seconds"), (33, "35 seconds"), (58, "1 minute"), (170, "3 minutes"), (9000, "2 hours")],
)
def test_times_are_as_coarse_as_estimates_are(seconds, words):
    assert duration(seconds) == words


def test_a_run_tells_of_the_stages_that_it_runs(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ensemble.train.flows.stages.announce", lambda text, with_bars: said.append(text))
    run = RunDirectory.open(tmp_path, {}, {})
    stages = [Stage("gradients", "gradients", 1.0), Stage("weights", "weights", 1.0)]
    with run.stage("gradients"):
        pass
    with announced(run, stages, False):
        for name in ("gradients", "weights"):
            with run.stage(name):
                pass
    assert said == ["Stage 2 of 2: weights"] and run.listener is None


def test_a_resumed_stage_is_over_when_it_ends(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ensemble.train.flows.stages.announce", lambda text, with_bars: said.append(text))
    run = RunDirectory.open(tmp_path, {}, {})
    with pytest.raises(KeyboardInterrupt), run.stage("group"):
        raise KeyboardInterrupt
    with announced(run, [Stage("group", "groups", 1.0), Stage("adapter", "adapter", 1.0)], False):
        for name in ("group", "group:group_0", "adapter"):
            with run.stage(name):
                pass
    # How fast it was is not known: no time is told.
    assert said == ["Stage 1 of 2: groups", "Stage 2 of 2: adapter"]


def test_every_stage_of_a_run_is_planned(finished):
    trainer, _, _ = finished
    announcer = StageAnnouncer(trainer.flow.stages(), print)
    assert all(announcer.stage(name) is not None for name in trainer.run_directory.record.stages)
    rows = {name: len(own) for name, own in trainer.eval_dataset.items()}
    trained = trainer.run_directory.trained_adapter("baseline")
    steps = trained.global_step * trainer.args.train_batch_size
    assert announcer.stage("baseline").work == pytest.approx(3 * steps + sum(rows.values()))


def test_groups_that_go_on_are_planned_for_their_length(finished, monkeypatch):
    flow = finished[0].flow

    def work(**changes):
        for name, value in {"compute_budget": None, "continued_length": 0.25, **changes}.items():
            monkeypatch.setattr(flow.context.args, name, value)
        return next(stage.work for stage in flow.stages() if stage.name == "adapter")

    assert work(group_initialization="baseline") == 0.25 * work(group_initialization="fresh") > 0


def test_bars_of_trainings_carry_their_names(tmp_path, capsys):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    bars = ProgressCallback()
    handler = CallbackHandler([bars], None, None, None, None)
    label_bars(handler, "group_0")
    state, control = TrainerState(max_steps=3), TrainerControl()
    handler.eval_dataloader = [1, 2]
    handler.on_train_begin(args, state, control)
    handler.on_prediction_step(args, state, control)
    assert bars.training_bar.desc == "Training group_0: " and bars.prediction_bar.desc == "Evaluating group_0: "
    handler.on_evaluate(args, state, control, {})
    handler.on_train_end(args, state, control)
    assert "Training group_0" in capsys.readouterr().err
    # Without bars there is nothing to label.
    silent = CallbackHandler([], None, None, None, None)
    label_bars(silent, "group_0")
    assert silent.callbacks == []
