"""Does it gain to solve the mixture anew at every epoch of a training, from fresh gradients?

    python -m benchmarks.remixing.run OUTPUT --tasks sst2 mr trec --targets trec --seeds 0 1 2 FLAGS

One adapter is trained on several tasks, for the mean over all of them and for each target, with shares of the tasks
that are proportional to their rows; that have the least predicted loss from gradients at the start; the same, solved
anew before every epoch; that ODM sets at every step; and that DoReMi finds beforehand. All are trained on the same
number of rows, the proportional shares and the mixture also on as many as re-solving draws and captures. FLAGS are
those of `hf-ensemble fidelity`; each seed draws training and validation rows of its own. Finished trainings are kept in
OUTPUT_DIR/SEED/trainings, so that a killed study can be resumed.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_ensemble._files import write_json
from hf_ensemble.evaluate import RowScores, system_intervals

from ..common import drawn_tasks, make_parser, rows_over_seeds, shape_of, write_results
from ..trainers import flag_value, trainer_from_flags
from .mixers import DoReMiProxy, FixedShares, GradientMixture, OnlineDataMixing, proportional_shares
from .table import table
from .training import AdapterTrainer

ALL = "all tasks"
PROPORTIONAL, STATIC, REMIXED, ODM, DOREMI = "proportional", "mixture", "mixture, re-solved", "ODM", "DoReMi"
LONGER = ", longer"
# What needs no goal.
SHARED = (PROPORTIONAL, PROPORTIONAL + LONGER, ODM, DOREMI)
OF_GOAL = (STATIC, REMIXED, STATIC + LONGER)
# A forward pass without a backward one, in rows that go through both.
FORWARD = 1 / 3


@dataclass
class Seed:
    """The trainings of one seed.

    Args:
        folder (`Path`): keeps what is finished.
        trainer (`EnsembleTrainer`): on the tasks with the rows of this seed.
        seed (`int`): of the trainings.
        num_epochs (`int`): of a training that is not longer.
        test_rows (`int`): most rows of a task that are scored.
    """

    folder: Path
    trainer: object
    seed: int
    num_epochs: int
    test_rows: int

    def __post_init__(self):
        self.trainer.open_run()
        context = self.trainer.flow.context
        test = {name: sampled(rows, self.test_rows) for name, rows in self.trainer.tasks.split("test").items()}
        test = self.trainer.prepare_rows(test)
        self.tables = {
            "validation": context.eval_tables,
            "test": {name: context.model_columns(rows) for name, rows in test.items()},
        }
        self.context = context
        self.training = AdapterTrainer(context, self.seed)

    def made(self, way: str, goal: str) -> dict:
        """What a way comes to, trained now or read."""
        name = f"{way}-{goal}" if way in OF_GOAL else way
        file = self.folder / "trainings" / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        if not file.exists():
            begin = time.process_time()
            write_json(file, self._trained(way, goal))
            print(self.seed, name, round(time.process_time() - begin, 1), flush=True)
        return json.loads(file.read_text())

    def _trained(self, way: str, goal: str) -> dict:
        length, targets = 1.0, None if goal == ALL else [goal]
        if way.endswith(LONGER):
            # As many rows as re-solving draws and captures; the static mixture captures once.
            mixture = self.made(REMIXED, goal)
            length = (mixture["rows"] + mixture["extra_rows"]) / mixture["rows"]
        if way.startswith(PROPORTIONAL):
            mixer = FixedShares(proportional_shares(self.training))
        elif way == STATIC + LONGER:
            static = self.made(STATIC, goal)
            length -= static["extra_rows"] / static["rows"]
            mixer = FixedShares(np.array(static["shares"][0]), static["extra_rows"])
        elif way in (STATIC, REMIXED):
            stores = self.folder / "stores" / f"{goal}-{way}".replace(" ", "_")
            mixer = GradientMixture(self.training, targets, self.num_epochs, stores, way == REMIXED)
        elif way == ODM:
            mixer = OnlineDataMixing(self.training, self.seed)
        else:
            mixer = self._doremi()
        rows = self.training.train(mixer, self.num_epochs * length)
        found = {"rows": rows, "extra_rows": mixer.extra_rows, "shares": mixer.history, **self._scores()}
        return {**found, "losses": self.training.losses().tolist()} if way == PROPORTIONAL else found

    def _doremi(self) -> FixedShares:
        """The reference is the proportional training; the proxy is as large as the model."""
        reference = self.made(PROPORTIONAL, ALL)
        proxy = DoReMiProxy(self.training, np.array(reference["losses"]))
        rows = self.training.train(proxy, self.num_epochs)
        extra = reference["rows"] + rows + FORWARD * len(reference["losses"])
        return FixedShares(proxy.mean_weights, extra)

    def _scores(self) -> dict:
        """Loss and accuracy of every validation and test row by task."""
        scorer, found = self.context.answer_scorer(), {}
        for split, tables in self.tables.items():
            scores = self.context.evaluator.score_tasks(scorer, tables, split)
            found[split] = {
                name: {"loss": own.rows.loss.tolist(), "correct": own.rows.correct.tolist()}
                for name, own in scores.items()
            }
        return found


def of_goal(goal: str, seeds: Sequence[Seed], ways: Sequence[str], tasks: Sequence[str]) -> dict[str, dict]:
    """Figures of each way for a goal, over the seeds, and its paired differences from two of the ways."""
    made = {way: [seed.made(way, goal) for seed in seeds] for way in ways}
    counted = list(tasks) if goal == ALL else [goal]
    rows = {way: rows_over_seeds([test_scores(one, counted) for one in own]) for way, own in made.items()}
    against = {other: system_intervals(rows, other) for other in (PROPORTIONAL, STATIC)}
    found = {}
    for way, own in made.items():
        found[way] = {
            "cost": float(np.mean([(one["rows"] + one["extra_rows"]) / made[PROPORTIONAL][0]["rows"] for one in own])),
            "first_shares": np.mean([one["shares"][0] for one in own], axis=0).tolist(),
            "last_shares": np.mean([one["shares"][-1] for one in own], axis=0).tolist(),
            "validation_loss": [mean_over_tasks(one["validation"], counted, "loss") for one in own],
            "test_loss": [mean_over_tasks(one["test"], counted, "loss") for one in own],
            "test_accuracy": [mean_over_tasks(one["test"], counted, "correct") for one in own],
            "differences": {
                other: {name: [one.value, *one.interval] for name, one in intervals[way].mean_difference.items()}
                for other, intervals in against.items()
                if other != way
            },
        }
    return found


def sampled(rows: Dataset, count: int) -> Dataset:
    """At most `count` rows, the same ones for every seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    return rows.select(np.sort(order[:count]))


def test_scores(one: dict, tasks: Sequence[str]) -> dict[str, RowScores]:
    """Scores of the test rows of some tasks."""
    return {task: RowScores(*(np.array(one["test"][task][name]) for name in ("loss", "correct"))) for task in tasks}


def mean_over_tasks(rows: dict, tasks: Sequence[str], name: str) -> float:
    return float(np.mean([np.mean(rows[task][name]) for task in tasks]))


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks of DATA that are trained on")
    parser.add_argument("--targets", nargs="*", default=[], help="tasks that are goals by themselves")
    parser.add_argument("--without", nargs="*", default=[], help="ways to leave out")
    parser.add_argument("--rows", type=int, default=150, help="training rows per task")
    parser.add_argument("--validation_rows", type=int, default=100, help="validation rows per task")
    parser.add_argument("--test_rows", type=int, default=300, help="test rows per task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of rows and trainings")
    own, flags = parser.parse_known_args()
    passed = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    passed.add_argument("--data")
    passed.add_argument("--output_dir")
    data, folder = (Path(flag_value(flags, name)) for name in ("--data", "--output_dir"))
    flags = passed.parse_known_args(flags)[1]
    limits = {"train": own.rows, "validation": own.validation_rows}
    seeds = []
    for seed in own.seeds:
        rows = folder / str(seed) / "tasks"
        if not rows.is_dir():
            part = drawn_tasks(data, rows.with_suffix(".part"), limits, seed, own.tasks)
            part.rename(rows)
        more = ["--data", str(rows), "--output_dir", str(folder / str(seed) / "run"), "--seed", str(seed)]
        trainer, _ = trainer_from_flags([*flags, *more])
        seeds.append(Seed(folder / str(seed), trainer, seed, round(trainer.args.num_train_epochs), own.test_rows))
    goals, ways = [ALL, *own.targets], [way for way in (*SHARED, *OF_GOAL) if way not in own.without]
    for seed in seeds:
        for way in reversed(ways):
            for goal in goals:
                seed.made(way, goal)
    results = {
        **shape_of(own),
        "tasks": seeds[0].training.names,
        "epochs": seeds[0].num_epochs,
        "goals": {goal: of_goal(goal, seeds, ways, seeds[0].training.names) for goal in goals},
    }
    write_results(own.output, results, table)


if __name__ == "__main__":
    main()
