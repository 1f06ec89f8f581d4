"""Mixtures that are fine-tuned for real and scored on test rows, each once, whoever asks for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_ensemble._files import write_json
from hf_ensemble.tasks import TaskSet

FOLDER = "chosen"
Mixture = Mapping[str, float]


class TrainedMixtures:
    """Test scores after fine-tunings with the trainer's own arguments, kept in OUTPUT_DIR/chosen.

    Args:
        trainer (`StagesMixin`): a trainer over several tasks.
        tasks (`TaskSet`): the tasks with their test rows.
    """

    def __init__(self, trainer, tasks: TaskSet):
        self.trainer = trainer
        self._test = trainer.prepare_rows(tasks.split("test"))
        self._folder = Path(trainer.args.output_dir) / FOLDER

    def make(self, wanted: Sequence[tuple[Mixture, int, Sequence[str]]], part: str = "0/1") -> None:
        """Train every mixture with its seed and score it on tasks, or only a part: "1/2" is every second one."""
        first, step = (int(number) for number in part.split("/"))
        keys = list(dict.fromkeys(_key(mixture, seed) for mixture, seed, _ in wanted))[first::step]
        for mixture, seed, targets in wanted:
            if _key(mixture, seed) in keys:
                for target, score in self.scores(mixture, seed, targets).items():
                    print(target, sorted(mixture), seed, score, flush=True)

    def scores(self, mixture: Mixture, seed: int, targets: Sequence[str]) -> dict[str, dict[str, float]]:
        """Test scores on some tasks."""
        folder = self._folder / _key(mixture, seed)
        records = {target: folder.with_suffix(f".{target}.json") for target in targets}
        missing = [target for target, record in records.items() if not record.exists()]
        if missing:
            adapter = self.trainer.adapter_training.run(f"{FOLDER}-{folder.name}", dict(mixture), folder, seed)
            found = self.trainer.score_adapter(folder, {name: self._test[name] for name in missing}, "Test rows")
            for name, score in found.items():
                write_json(records[name], {**score, "seconds": adapter.seconds, "steps": adapter.global_step})
        return {target: json.loads(record.read_text()) for target, record in records.items()}


def _key(mixture: Mixture, seed: int) -> str:
    weights = json.dumps(sorted(mixture.items()))
    return f"{hashlib.blake2b(weights.encode(), digest_size=8).hexdigest()}-seed{seed}"
