"""The sides of the capture benchmark: each takes the same rows through the same model in its own way.

A side is made with the model, the setting and the rows of one run; `prepare` makes what is kept for all runs (a
projection matrix), `run` takes all rows through once. `once` holds seconds of a run that do not grow with its rows.
Peers are optional: a side whose package is missing raises `ImportError` when it is made.
"""

import functools
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from capture_models import NUM_LABELS, Setting, make_batches
from datasets import Dataset
from torch import nn

from hf_ensemble import CaptureConfig, TaskSet, capture_gradients
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.tasks import TaskCollator


class Side:
    """See the module's docstring."""

    note = ""
    # Batches of one run; a slow side takes fewer, and its time is reported per example.
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
        """What is made once for all rows."""

    def run(self) -> None:
        raise NotImplementedError

    def margins(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean log-odds of every example's answer `(B,)`, in the simplest way."""
        logits, labels = self.model(input_ids=batch["input_ids"]).logits, batch["labels"]
        if labels.dim() == 1:
            return _log_odds(logits, labels)
        kept = labels[:, 1:] != -100
        values = _log_odds(logits[:, :-1][kept], labels[:, 1:][kept])
        return torch.stack([part.mean() for part in values.split(kept.sum(dim=1).tolist())])


def _log_odds(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_prob = torch.log_softmax(logits.float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return log_prob - torch.log(-torch.expm1(log_prob.clamp(max=-1e-6)))


# The published matrix is larger than this: its first rows stand for all others, which takes the same time.
MATRIX_BYTES = 2**30


@functools.lru_cache(maxsize=2)
def sign_matrix(rows: int, columns: int, dtype: str) -> np.ndarray:
    """Dense random signs over the root of the columns; two sides share one."""
    rows = min(rows, MATRIX_BYTES // (columns * np.dtype(dtype).itemsize))
    rng = np.random.default_rng(0)
    matrix = np.empty((rows, columns), dtype=dtype)
    for start in range(0, rows, 4096):
        part = matrix[start : start + 4096]
        part[:] = rng.integers(0, 2, size=part.shape, dtype=np.int8) * 2 - 1
    matrix *= columns**-0.5
    return matrix


def times_signs(flat: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return sum(flat[i : i + len(matrix)] @ matrix[: len(flat) - i] for i in range(0, len(flat), len(matrix)))


class Plain(Side):
    """Forward and backward of the model's own loss, gradients in the adapter: a training step without its optimizer."""

    def run(self) -> None:
        for batch in self.batches:
            self.model(**batch).loss.backward()
            self.model.zero_grad(set_to_none=True)


class Capture(Side):
    """`capture_gradients` into a new store, finished; all rows, of which the first are training rows."""

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
    """The same without a preconditioner, so without moment rows."""

    config = {"preconditioner": "none"}


class Published(Side):
    """GradEx and EnsembleLoRA at batch size 1: forward, `autograd.grad`, then a dense random sign matrix in NumPy."""

    most_batches = 1
    together = 1

    def prepare(self) -> None:
        numel = sum(p.numel() for p in self.parameters.values())
        self.matrix = sign_matrix(numel, self.setting.dim, "float64")
        whole = numel * self.setting.dim * 8
        self.note = f"dense float64 matrix as published, {whole / 2**30:.1f} GiB"
        self.facts.update(matrix_bytes=whole, matrix_bytes_not_made=whole - self.matrix.nbytes)

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            number = 0
            for batch in self.batches:
                for start in range(0, self.setting.batch, self.together):
                    features = self.features({k: v[start : start + self.together] for k, v in batch.items()})
                    np.save(f"{folder}/{number}.npy", features)
                    number += 1

    def features(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        features, wanted = [], list(self.parameters.values())
        for margin in self.margins(batch):
            gradients = torch.autograd.grad(margin, wanted, retain_graph=True)
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).float().cpu().numpy()
            features.append(times_signs(flat, self.matrix))
        return np.array(features)


class SignMatrix(Published):
    """The published projection alone, in one precision."""

    dtype = "float32"

    def prepare(self) -> None:
        numel = sum(p.numel() for p in self.parameters.values())
        self.matrix = sign_matrix(numel, self.setting.dim, self.dtype)
        self.flat = np.ones(numel, dtype=np.float32)

    def run(self) -> None:
        for _ in range(self.setting.batch):
            times_signs(self.flat, self.matrix)


class SignMatrixDouble(SignMatrix):
    """As published."""

    dtype = "float64"


class PublishedBatch(Published):
    """The same at the benchmark's batch size: every example's backward goes through the whole batch's graph."""

    def __init__(self, model: nn.Module, setting: Setting, rows: Dataset):
        self.together = setting.batch
        super().__init__(model, setting, rows)


class Bergson(Side):
    """Bergson's `GradientCollector` with its default projection, p x p for each module, into its own index."""

    target = "per_module"
    most_batches = 1

    def prepare(self) -> None:
        from bergson import GradientProcessor
        from bergson.collector.collector import HookCollectorBase, fwd_bwd_factory
        from bergson.collector.gradient_collectors import GradientCollector
        from bergson.config import IndexConfig

        # Its hooks expect (batch, tokens, features), which a head on pooled features is not.
        own = {name.removesuffix(".weight") for name in self.parameters if "lora_" in name}
        count = len(HookCollectorBase.discover_targets(self.model, own))
        size = round(math.sqrt(self.setting.dim / count)) if self.target == "per_module" else self.setting.dim
        stored = count * size**2 if self.target == "per_module" else size
        self.facts.update(modules=count, projection_dim=size, stored_features=stored)
        self.note = f"{count} modules, {stored} features"
        self.make = lambda folder: GradientCollector(
            model=self.model,
            target_modules=own,
            data=self.rows,
            cfg=IndexConfig(run_path=folder, projection_dim=size),
            processor=self.processor,
        )
        # Kept, as it holds the projection matrices.
        self.processor = GradientProcessor(projection_dim=size, projection_target=self.target)
        self.step = fwd_bwd_factory(IndexConfig(run_path="unused")) if self.setting.causal else self._classify

    @staticmethod
    def _classify(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, batch) -> torch.Tensor:
        losses = nn.functional.cross_entropy(model(ids).logits, labels, reduction="none")
        losses.sum().backward()
        model.zero_grad()
        return losses

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            collector = self.make(folder)
            for number, batch in enumerate(self.batches):
                ids, labels = batch["input_ids"], batch["labels"]
                with collector.with_batch(torch.ones_like(ids, dtype=torch.bool)):
                    losses = self.step(self.model, ids, labels, {})
                start = number * self.setting.batch
                collector.process_batch(list(range(start, start + len(ids))), losses=losses)
            collector.teardown()


class BergsonGlobal(Bergson):
    """The same with one dense projection of all modules to exactly `dim` features, made anew for every batch."""

    target = "global"
    most_batches = 1


class Vmap(Side):
    """`torch.func`: vmap(grad) over a batch, gradients without a projection."""

    most_batches = 1

    def gradients(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values = {name: p.detach() for name, p in self.parameters.items()}

        def loss(values, ids, labels):
            inputs = {"input_ids": ids.unsqueeze(0), "labels": labels.unsqueeze(0)}
            return torch.func.functional_call(self.model, values, kwargs=inputs).loss

        one = torch.func.grad(loss)
        return torch.func.vmap(one, in_dims=(None, 0, 0))(values, batch["input_ids"], batch["labels"])

    def run(self) -> None:
        for batch in self.batches:
            self.gradients(batch)


class Trak(Vmap):
    """TRAK's CPU projector (`BasicProjector`, signs) alone, on a batch of gradients that is there already."""

    most_batches = 1

    def prepare(self) -> None:
        from trak.projectors import BasicProjector, ProjectionType

        numel = sum(p.numel() for p in self.parameters.values())
        device = torch.device(self.setting.device)
        self.projector = BasicProjector(numel, self.setting.dim, 0, ProjectionType.rademacher, device)
        gradients = []
        for i in range(self.setting.batch):
            one = {name: value[i : i + 1] for name, value in self.batches[0].items()}
            parts = torch.autograd.grad(self.model(**one).loss, list(self.parameters.values()))
            gradients.append(torch.cat([part.reshape(-1) for part in parts]))
        self.flat = torch.stack(gradients).float()

    def run(self) -> None:
        self.projector.project(self.flat, model_id=0)


SIDES: dict[str, type[Side]] = {
    "plain": Plain,
    "capture": Capture,
    "capture, no preconditioner": CaptureUnscaled,
    "published, batch of 1": Published,
    "published, whole batch": PublishedBatch,
    "published projection alone, float32": SignMatrix,
    "published projection alone, float64": SignMatrixDouble,
    "Bergson, per module": Bergson,
    "Bergson, global": BergsonGlobal,
    "torch.func, no projection": Vmap,
    "TRAK's projector alone": Trak,
}
