"""Trainers from the flags of `hf-ensemble fidelity`, and fine-tuning on mixtures with cached scores."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hf_ensemble._files import write_json
from hf_ensemble.cli.arguments import FidelityArguments
from hf_ensemble.cli.main import main as hf_ensemble
from hf_ensemble.cli.trainers import started
from hf_ensemble.cli.words import Words
from hf_ensemble.runs import RunDirectory
from hf_ensemble.runs.systems import BASELINE
from hf_ensemble.tasks import TaskSet

FOLDER = "chosen"
Mixture = Mapping[str, float]


def trainer_from_flags(flags: Sequence[str]):
    """Build the trainer that `hf-ensemble fidelity` would build from these flags; returns it with its tasks.

    Unless flags say otherwise, it predicts trainings from the start.
    """
    from_the_start = ["--grouping_method", "direct", "--group_initialization", "fresh"]
    trainer = started(FidelityArguments, [*from_the_start, *flags], "fidelity").trainer
    return trainer, trainer.tasks


def train_baseline(trainer) -> None:
    """Capture gradients, and train and score the adapter for all tasks, which calibrates the predictions."""
    trainer.capture()
    with trainer.working():
        flow, run = trainer.flow, trainer.run_directory
        baseline = flow.training.run(BASELINE, list(trainer.tasks), run.baseline)
        flow.calibration.score_trained(baseline, run.baseline, "Evaluating baseline")


def flag_value(flags: Sequence[str], name: str) -> str:
    """Value of a required flag among those that are passed on, or in their `--config` file."""
    words = Words.of(flags)
    given = [
        *words.options.get(name.removeprefix("--"), ())[:1],
        *(value for flag, value in zip(words.line, words.line[1:]) if flag == name),
        *(word.split("=", 1)[1] for word in words.line if word.startswith(f"{name}=")),
    ]
    if not given:
        sys.exit(f"Expected {name}.")
    return given[-1]


def run_command(command: str, flags: Sequence[str]) -> Path:
    """Run or resume `hf-ensemble COMMAND`; returns its output directory."""
    folder = Path(flag_value(flags, "--output_dir"))
    status = hf_ensemble([command, *flags])
    if status:
        sys.exit(status)
    return folder


def scored_runs(output_dir: Path) -> list[dict]:
    """Fine-tuning runs of a finished `hf-ensemble fidelity`, each with mixture, seed, scores and seconds."""
    return [run.to_dict() for run in RunDirectory(output_dir).scored_runs()]


class TrainedMixtures:
    """Test scores after fine-tuning on mixtures of the tasks, cached in OUTPUT_DIR/chosen.

    Args:
        trainer (`EnsembleTrainer` or `EnsembleSFTTrainer`): trains every mixture with its own arguments.
        tasks (`TaskSet`): the tasks with their test rows.
    """

    def __init__(self, trainer, tasks: TaskSet):
        self.trainer = trainer
        trainer.open_run()
        self._test = trainer.prepare_rows(tasks.split("test"))
        self._folder = Path(trainer.args.output_dir) / FOLDER

    def make(self, wanted: Sequence[tuple[Mixture, int, Sequence[str]]], part: str = "0/1") -> None:
        """Train on every mixture with its seed and score it on its targets; part "1/2" takes every second one."""
        first, step = (int(number) for number in part.split("/"))
        keys = list(dict.fromkeys(_key(mixture, seed) for mixture, seed, _ in wanted))[first::step]
        for mixture, seed, targets in wanted:
            if _key(mixture, seed) in keys:
                for target, score in self.scores(mixture, seed, targets).items():
                    print(target, sorted(mixture), seed, score, flush=True)

    def scores(self, mixture: Mixture, seed: int, targets: Sequence[str]) -> dict[str, dict[str, float]]:
        """Test scores on the targets, from the cache or by training."""
        folder = self._folder / _key(mixture, seed)
        records = {target: folder.with_suffix(f".{target}.json") for target in targets}
        missing = [target for target, record in records.items() if not record.exists()]
        if missing:
            flow = self.trainer.flow
            adapter = flow.training.run(f"{FOLDER}-{folder.name}", dict(mixture), folder, seed)
            rows = {name: flow.context.model_columns(self._test[name]) for name in missing}
            for name, score in flow.evaluation.score_adapter(folder, rows, "Test rows").items():
                write_json(records[name], {**asdict(score), "seconds": adapter.seconds, "steps": adapter.global_step})
        return {target: json.loads(record.read_text()) for target, record in records.items()}


def _key(mixture: Mixture, seed: int) -> str:
    weights = json.dumps(sorted(mixture.items()))
    return f"{hashlib.blake2b(weights.encode(), digest_size=8).hexdigest()}-seed{seed}"
