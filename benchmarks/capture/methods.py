"""The base class of all methods that the study compares, the plain pass, and the library's capture."""

import shutil
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from hf_ensemble import CaptureConfig, TaskSet, capture_gradients
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.tasks import TaskCollator

from .models import NUM_LABELS, Setting, make_batches


class Method:
    """One way to take rows through a model, built for the rows of one run.

    `prepare` creates what all runs share, such as a projection matrix; `run` takes all rows through once. `once` holds
    the seconds of a run that do not grow with its rows.
    """

    note = ""
    # Batches per run; a slow method takes fewer, since times are reported per example.
    most_batches: int | None = None

    def __init__(self, model: nn.Module, setting: Setting, rows: Dataset):
        self.model, self.setting, self.rows = model, setting, rows
        if self.most_batches is not None:
            self.rows = rows.select(range(min(len(rows), self.most_batches * setting.batch)))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.batches = make_batches(setting, self.rows)
        self.once: dict[str, dict[str, float]] = {}
        self.facts: dict[str, object] = {}

    def prepare(self) -> None:
        """Create what all runs share."""

    def run(self) -> None:
        raise NotImplementedError

    def margins(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean log-odds of each example's answer `(B,)`, computed in the simplest way."""
        logits, labels = self.model(input_ids=batch["input_ids"]).logits, batch["labels"]
        if labels.dim() == 1:
            return _log_odds(logits, labels)
        kept = labels[:, 1:] != -100
        values = _log_odds(logits[:, :-1][kept], labels[:, 1:][kept])
        return torch.stack([part.mean() for part in values.split(kept.sum(dim=1).tolist())])


def _log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_prob = torch.log_softmax(logits.float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return log_prob - torch.log(-torch.expm1(log_prob.clamp(max=-1e-6)))


class Plain(Method):
    """Forward and backward of the model's own loss in the adapter: a training step without the optimizer."""

    def run(self) -> None:
        for batch in self.batches:
            self.model(**batch).loss.backward()
            self.model.zero_grad(set_to_none=True)


class Capture(Method):
    """`capture_gradients` of all rows into a new store; the last batch is validation rows."""

    config: dict = {}
    clock = staticmethod(time.process_time)

    def prepare(self) -> None:
        held_out = min(self.setting.batch, len(self.rows) - 1)
        self.tables = {
            "train": self.rows.select(range(len(self.rows) - held_out)),
            "validation": self.rows.select(range(len(self.rows) - held_out, len(self.rows))),
        }
        columns = ["input_ids", "labels"]
        if not self.setting.causal:
            plain = [{"text": str(i), "label": i} for i in range(NUM_LABELS)]
            self.tasks = TaskSet.from_datasets({"t": plain}, {"t": plain})
        else:
            self.tasks = TaskSet.from_datasets(*({"t": self.tables[s].select_columns(columns)} for s in self.tables))
        self.collator = TaskCollator(lambda rows: {c: torch.tensor([row[c] for row in rows]) for c in columns})

    def run(self) -> None:
        config = CaptureConfig(projection_dim=self.setting.dim, batch_size=self.setting.batch, **self.config)
        moments, add = [], GradientExtractor.add_second_moments

        def timed(extractor, *arguments):
            start = self.clock(), time.perf_counter()
            add(extractor, *arguments)
            moments.append((self.clock() - start[0], time.perf_counter() - start[1]))

        GradientExtractor.add_second_moments = timed
        folder = tempfile.mkdtemp()
        try:
            store = capture_gradients(
                self.model,
                self.tasks,
                config,
                Path(folder) / "store",
                data_collator=self.collator,
                encoded=self.tables,
                disable_tqdm=True,
            )
            self.facts["fallback"] = store.manifest["coverage"]["fallback"]
        finally:
            GradientExtractor.add_second_moments = add
            shutil.rmtree(folder)
        if moments:
            cpu, wall = (sum(part) for part in zip(*moments))
            rows = min(128, len(self.tables["train"]))
            self.once["moment rows"] = {"cpu": cpu, "wall": wall, "rows": rows}


class CaptureUnscaled(Capture):
    """Capture without a preconditioner, and so without moment rows."""

    config = {"preconditioner": "none"}
