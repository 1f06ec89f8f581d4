"""Other ways to get per-example gradient features: the published procedure, Bergson, `torch.func` and TRAK.

Peers are optional: a method whose package is not installed raises `ImportError` in `prepare`.
"""

import functools
import math
import tempfile

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from .methods import Capture, CaptureUnscaled, Method, Plain
from .models import Setting

# The published matrix is larger: its first rows are reused for all others, which takes the same time.
MATRIX_BYTES = 2**30


@functools.lru_cache(maxsize=2)
def sign_matrix(rows: int, columns: int, dtype: str) -> np.ndarray:
    """Dense random signs, divided by the square root of the number of columns; methods share a matrix."""
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


class Published(Method):
    """GradEx and EnsembleLoRA at batch size 1: forward, `autograd.grad`, and a dense random sign matrix in NumPy."""

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
    """The published projection alone, in float32."""

    dtype = "float32"

    def prepare(self) -> None:
        numel = sum(p.numel() for p in self.parameters.values())
        self.matrix = sign_matrix(numel, self.setting.dim, self.dtype)
        self.flat = np.ones(numel, dtype=np.float32)

    def run(self) -> None:
        for _ in range(self.setting.batch):
            times_signs(self.flat, self.matrix)


class SignMatrixDouble(SignMatrix):
    """The published projection alone, in float64 as published."""

    dtype = "float64"


class PublishedBatch(Published):
    """The published procedure on whole batches: each example's backward goes through the graph of the batch."""

    def __init__(self, model: nn.Module, setting: Setting, rows: Dataset):
        self.together = setting.batch
        super().__init__(model, setting, rows)


class Bergson(Method):
    """Bergson's `GradientCollector` with its default projection, p x p per module, into its own index."""

    target = "per_module"
    most_batches = 1

    def prepare(self) -> None:
        from bergson import GradientProcessor
        from bergson.collector.collector import HookCollectorBase, fwd_bwd_factory
        from bergson.collector.gradient_collectors import GradientCollector
        from bergson.config import IndexConfig

        # Its hooks expect inputs of (batch, tokens, features), which a head on pooled features does not get.
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
        # It holds the projection matrices, so it is kept.
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
    """Bergson with one dense projection of all modules to `dim` features, regenerated for every batch."""

    target = "global"
    most_batches = 1


class Vmap(Method):
    """`torch.func.vmap` of `grad` over a batch, without a projection."""

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
    """TRAK's CPU projector (`BasicProjector`, signs) alone, on precomputed gradients."""

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


METHODS: dict[str, type[Method]] = {
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
