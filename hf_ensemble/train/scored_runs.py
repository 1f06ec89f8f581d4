"""Fine-tunings of subsets that are wanted for their scores: evidence for the estimates, and their test."""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._files import read_json, write_json
from ..estimate import ObservedRun
from .adapter_training import TrainedAdapter
from .evaluation import Scores

FOLDER = "scored_runs"


@dataclass(frozen=True)
class ScoredRun:
    """A subset of the tasks, fine-tuned for real from theta0.

    Args:
        subset (`list[str]`): the tasks.
        seed (`int`): of the training's order and dropout.
        scores (`dict[str, dict[str, float]]`): validation loss and accuracy of every task.
        seconds (`float`): wall time of the training and its scoring.
        distance (`float`): Euclidean norm of the trained parameters' move away from theta0.
    """

    subset: list[str]
    seed: int
    scores: Scores
    seconds: float
    distance: float

    def as_observed(self) -> ObservedRun:
        """As the evidence that an estimate takes."""
        losses = {task: score["loss"] for task, score in self.scores.items()}
        return ObservedRun(dict.fromkeys(self.subset, 1.0), losses)


def scored_run(trainer: Any, subset: Sequence[str], seed: int | None = None, description: str = "Run") -> ScoredRun:
    """Fine-tune a subset with the user's own trainer, score it on every task's evaluation rows, and keep the scores.

    They lie in `OUTPUT_DIR/scored_runs` and are read from there the next time; the adapter is thrown away.

    Args:
        trainer (`StagesMixin`): a trainer over several tasks.
        subset (`Sequence[str]`): names of tasks.
        seed (`int`, *optional*): of the training; the arguments' own by default.
        description (`str`, *optional*, defaults to `"Run"`): of the progress bar.
    """
    seed = trainer.args.seed if seed is None else seed
    record = _record(trainer, subset, seed)
    if record.exists():
        return ScoredRun(**read_json(record))
    folder = record.with_suffix("")
    trained = trainer.adapter_training.run(f"scored-{folder.name}", subset, folder, seed)
    run = keep_scored_run(trainer, trained, folder, seed, description)
    if trainer.is_world_process_zero():
        shutil.rmtree(folder)
    return run


def keep_scored_run(
    trainer: Any, trained: TrainedAdapter, folder: Path, seed: int | None = None, description: str = "Run"
) -> ScoredRun:
    """Score an adapter that was trained on a subset anyway, as [`scored_run`] would have."""
    seed = trainer.args.seed if seed is None else seed
    record = _record(trainer, list(trained.mixture), seed)
    if not record.exists():
        start = time.perf_counter()
        scores = trainer.score_adapter(folder, trainer.eval_dataset, description)
        seconds = trained.seconds + time.perf_counter() - start
        if trainer.is_world_process_zero():
            run = ScoredRun(list(trained.mixture), seed, scores, round(seconds, 3), trained.distance)
            write_json(record, asdict(run))
        trainer.accelerator.wait_for_everyone()
    return ScoredRun(**read_json(record))


def _record(trainer: Any, subset: Sequence[str], seed: int) -> Path:
    digest = hashlib.blake2b("|".join(sorted(subset)).encode(), digest_size=8).hexdigest()
    return trainer.open_run().path / FOLDER / f"{digest}-seed{seed}.json"
