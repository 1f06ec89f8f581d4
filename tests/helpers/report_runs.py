"""Records of finished runs, without their trainings."""

import numpy as np

from hf_ensemble.evaluate import RowScores
from hf_ensemble.runs import (
    EnsembleWeights,
    Estimate,
    EvaluatedRows,
    Evaluation,
    ExampleRows,
    RowFigures,
    RunDirectory,
    StageCost,
    StageRecord,
    TaskRecord,
    TasksRecord,
    TrainedAdapter,
)
from hf_ensemble.select import ExampleScores, Grouping, LeftOut, Selection

NAMES = ["sums", "diffs", "words", "verbs", "colours", "noise"]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</svg></style></script><b>bold",
    "$\\frac{1}{$ {{ 7 * 7 }} {% raw %}",
    "a very long name of a dataset that somebody has given to it without any thought of tables " * 2,
    "数据集 & ünïcode 🙂 'quoted' `code`",
]
ROWS = 40


def ensemble_run(folder, names=NAMES, seed=0, further=None):
    """The records of an ensemble run with two groups over these tasks, and with losses of further systems by name."""
    generator = np.random.default_rng(seed)
    run = RunDirectory.open(folder, {"model": {"name": "/home/me/models/tiny"}, "note": names[0]}, {"num_groups": 2})
    half = len(names) // 2
    groups = {"group_0": list(names[:half]), "group_1": list(names[half:])}
    run.write(_tasks(names))
    run.write(
        Grouping(
            groups=groups,
            mixtures={name: {task: 1.0 if task in own else 0.25 for task in names} for name, own in groups.items()},
            method="mixtures",
            task_names=list(names),
            affinity=generator.normal(0.0, 0.05, (len(names), len(names))).tolist(),
            predicted_loss={"1": 2.0, "2": 1.6, "3": 1.55},
            cost=2.0,
            cost_curve=[_cost_point(1.0, 0, 2.0, 0.0), _cost_point(2.0, 2, 1.6, -0.35)],
            summary="2 mixtures, at 2.00 times the training of one adapter for all, lower the mean predicted loss.",
            settings={"group_initialization": "fresh"},
        )
    )
    run.write(
        Estimate(
            l2_scale=0.1,
            l2_evidence="observed_runs",
            l2_criterion=0.01,
            calibration_subsets=[list(names)],
            calibration=None,
            num_components=20,
            base_loss=dict.fromkeys(names, 5.0),
            predicted_loss={name: {task: 1.5 + 0.1 * i for i, task in enumerate(names)} for name in groups},
            left_out={
                task: LeftOut(0.02 - 0.03 * (i == 5), 0.004, 5 * (i == 5), len(names) - 1)
                for i, task in enumerate(names)
            },
        )
    )
    weights = {task: {name: 1.0} for name, own in groups.items() for task in own}
    run.write(EnsembleWeights({**weights, names[0]: {"group_0": 0.6, "group_1": 0.4}}))
    _evaluated(run, {"base": 5.0, "baseline": 1.9, "ensemble": 1.6, **(further or {})}, names, generator)
    _trained(run, "baseline", names, 0, generator)
    for count, (name, own) in enumerate(groups.items(), start=1):
        _trained(run, name, own, 40 * count, generator)
    _example_rows(run, dict.fromkeys(names, 1 / len(names)), names, generator)
    _finish_stages(run, ["gradients", "baseline", "group", "adapter:group_0", "adapter:group_1", "weights"])
    return run


def selection_run(folder, names=NAMES, seed=0):
    """The records of a selection run for the first of these tasks."""
    generator = np.random.default_rng(seed)
    run = RunDirectory.open(folder, {"model": {"name": "me/tiny"}}, {"max_auxiliary": 2})
    run.write(_tasks(names))
    target, first, second = names[:3]
    step = {"level": 0.9, "close_calls": [second]}
    run.write(
        Selection(
            targets={target: 1.0},
            tasks=[target, first, second],
            method="forward",
            scores={name: 1.0 - 0.1 * i for i, name in enumerate(names[1:])},
            path=[
                {"added": target, "predicted_loss": 1.4, "interval": [1.2, 1.6], "level": 0.9, "close_calls": []},
                {"added": first, "predicted_loss": 1.1, "interval": [0.9, 1.3], **step},
                {"added": second, "predicted_loss": 1.05, "interval": None, "level": None, "close_calls": []},
            ],
            baselines={"all": 1.3, "alone": 1.4, "random": 1.35},
            summary=f"Adding {first} and {second} lowers the predicted loss of {target}.",
            settings={},
        )
    )
    _evaluated(run, {"base": 5.0, "selection": 1.1}, names, generator)
    _trained(run, "adapter", names[:3], 0, generator, by_task=False)
    _example_rows(run, {target: 1.0}, names, generator)
    _finish_stages(run, ["gradients", "select", "adapter"])
    return run


def _cost_point(cost, num_groups, loss, difference):
    return {
        "cost": cost,
        "num_groups": float(num_groups),
        "predicted_loss": loss,
        "expected_loss": 2.0 + 0.9 * difference,
        "optimism": 0.05 if num_groups else 0.0,
        "difference": difference,
        "difference_low": difference - 0.05,
        "difference_high": difference + 0.05,
    }


def _left_out(is_harmful, num_others):
    return LeftOut(-0.01 if is_harmful else 0.02, 0.004, num_others if is_harmful else 0, num_others)


def _tasks(names):
    sizes = {"train": 120, "validation": ROWS}
    return TasksRecord("text", "f00", {task: TaskRecord(sizes, {}, [task, "other"], 1.0) for task in names})


def _evaluated(run, losses, names, generator):
    shared = {task: generator.gamma(2.0, 0.2, ROWS) for task in names}
    scores, rows = {}, {}
    for system, level in losses.items():
        for task in names:
            own = level + shared[task] - shared[task].mean() + generator.normal(0.0, 0.05, ROWS)
            found = RowScores(own, (generator.random(ROWS) < 0.4).astype(float))
            scores.setdefault(system, {})[task] = found.summary()
            rows.setdefault(system, {})[task] = RowFigures.of(found)
    run.write(Evaluation({"eval": scores}))
    run.write(EvaluatedRows({"eval": rows}))


def _trained(run, name, tasks, first_step, generator, by_task=True):
    log = []
    for step in range(5, 45, 5):
        entry = {"step": step, "loss": 5.0 / step + 1.5}
        if by_task:
            entry |= {f"loss_{task}": 5.0 / step + 1.5 + generator.normal(0.0, 0.05) for task in tasks}
        log.append(entry)
        if by_task and step % 10 == 0:
            log.append({"step": step, **{f"eval_{task}_loss": 5.0 / step + 1.6 for task in tasks}})
    trained = TrainedAdapter(
        name,
        dict.fromkeys(tasks, 1.0),
        0,
        "f00",
        first_step,
        "done",
        num_examples=120 * len(tasks),
        global_step=40,
        training_loss=1.7,
        distance=2.5,
        log_history=log,
    )
    run.write_trained_adapter(trained)


def _example_rows(run, targets, names, generator):
    scores = {task: {f"{task}-{row}": float(generator.normal(1e-6, 4e-6)) for row in range(12)} for task in names}
    sizes = dict.fromkeys(names, 12)
    summary = "5 of the 72 rows harm."
    found = ExampleScores(targets, dict.fromkeys(names, 1.0), scores, sizes, summary=summary, settings={})
    run.write(ExampleRows.of(found, lambda task, example: f"Question {example} of {task}?\nAnswer: 4"))


def _finish_stages(run, names):
    for number, name in enumerate(names, start=1):
        with run.stage(name):
            pass
        done = StageRecord("done", StageCost(12.5 * number, 1e9 * number, 100 * number))
        run._record_stage(name, lambda known, done=done: done)
