"""Random projections of LoRA gradients, from layer inputs and output gradients to features."""

import math

import numpy as np
import torch

from hf_ensemble.capture import SeededProjection

# Per layer: x (B, T, in) and g (B, T, out).
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def gradients(factors: Factors):
    """Name and gradient `(B, out, in)` of each layer."""
    for name, (x, g) in factors.items():
        yield name, torch.bmm(g.transpose(1, 2), x)


class Construction:
    """A random projection, drawn once; `project` maps the factors of a batch to features `(B, features)`."""

    def __init__(self, factors: Factors, dim: int, seed: int):
        self.dim, self.generator = dim, torch.Generator().manual_seed(seed)
        self.rows = len(next(iter(factors.values()))[0])
        self.shapes = {name: torch.Size((g.shape[-1], x.shape[-1])) for name, (x, g) in factors.items()}
        self.draw(seed)

    def draw(self, seed: int) -> None:
        raise NotImplementedError

    def project(self, factors: Factors) -> torch.Tensor:
        raise NotImplementedError

    def signs(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=self.generator, dtype=torch.int8) * 2 - 1

    def kept(self) -> int:
        """Bytes of the random numbers that are kept."""
        tables = [value for value in vars(self).values() if isinstance(value, dict)]
        tensors = [t for table in tables for v in table.values() for t in (v if isinstance(v, tuple) else (v,))]
        return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


class SignedShift(Construction):
    """The library's own projection: signed, shifted addition of blocks."""

    def draw(self, seed):
        self.projection = SeededProjection(self.shapes, self.dim, seed)
        # It is drawn on first use.
        self.projection.transpose(torch.zeros(self.dim))

    def project(self, factors):
        features = torch.zeros(self.rows, self.dim)
        for name, gradient in gradients(factors):
            self.projection.add(features, name, gradient)
        return features

    def kept(self):
        return self.projection.num_parameters


class CountSketch(Construction):
    """Adds every entry, with a random sign, to a random feature."""

    def draw(self, seed):
        self.sign = {name: self.signs(shape.numel()) for name, shape in self.shapes.items()}
        self.place = {
            name: torch.randint(0, self.dim, (shape.numel(),), generator=self.generator)
            for name, shape in self.shapes.items()
        }

    def project(self, factors):
        features = torch.zeros(self.rows, self.dim)
        for name, gradient in gradients(factors):
            features.index_add_(1, self.place[name], gradient.flatten(1) * self.sign[name])
        return features


class DenseSigns(Construction):
    """A dense matrix of random signs, regenerated in blocks for every batch because it is too large to keep."""

    block = 2048

    def draw(self, seed):
        self.seed = seed

    def project(self, factors):
        rng, features = np.random.default_rng(self.seed), torch.zeros(self.rows, self.dim)
        for _, gradient in gradients(factors):
            for part in gradient.flatten(1).split(self.block, dim=1):
                random = np.frombuffer(rng.bytes(part.shape[1] * self.dim // 8), dtype=np.uint8)
                signs = torch.from_numpy(np.unpackbits(random)).view(part.shape[1], self.dim).float()
                # The signs are 2 x bits - 1.
                features.addmm_(part, signs, alpha=2.0).sub_(part.sum(dim=1, keepdim=True))
        return features / math.sqrt(self.dim)


class Hadamard(Construction):
    """Random signs, a Hadamard transform of the whole gradient, and a random sample of `dim` entries."""

    factor = 128

    def draw(self, seed):
        numel = sum(shape.numel() for shape in self.shapes.values())
        self.axes = max(1, math.ceil(math.log(numel, self.factor)))
        # The last axis is as short as the gradient allows.
        self.last = 2 ** math.ceil(math.log2(numel / self.factor ** (self.axes - 1)))
        self.size = self.factor ** (self.axes - 1) * self.last
        kept = torch.randperm(self.size, generator=self.generator)[: self.dim]
        self.table = {"signs": self.signs(numel), "kept": kept}

    def project(self, factors):
        flat = torch.zeros(self.rows, self.size)
        start = 0
        for _, gradient in gradients(factors):
            part = gradient.flatten(1)
            flat[:, start : start + part.shape[1]] = part
            start += part.shape[1]
        flat[:, :start] *= self.table["signs"]
        # A transform whose size is a product is one transform along each axis.
        flat = flat.view(self.rows, *[self.factor] * (self.axes - 1), self.last)
        for axis in range(1, self.axes + 1):
            flat = (flat.transpose(axis, -1) @ hadamard(flat.shape[axis])).transpose(axis, -1)
        return flat.reshape(self.rows, -1)[:, self.table["kept"]] / math.sqrt(self.dim)


def hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


class TwoSidedPerLayer(Construction):
    """p x p features per layer, concatenated: projects inputs and output gradients, never forms the gradient."""

    def draw(self, seed):
        self.p = max(1, round(math.sqrt(self.dim / len(self.shapes))))
        self.sides = {name: (self.matrix(shape[1]), self.matrix(shape[0])) for name, shape in self.shapes.items()}

    def matrix(self, size: int) -> torch.Tensor:
        return self.signs(size, self.p).float() / math.sqrt(self.p)

    def project(self, factors):
        parts = []
        for name, (x, g) in factors.items():
            inner, outer = self.sides[name]
            parts.append(torch.bmm((g @ outer).transpose(1, 2), x @ inner).flatten(1))
        return torch.cat(parts, dim=1)


class OneSidedSummed(Construction):
    """Projects the longer side of each layer to `dim` / rank, keeps the other, and sums over layers."""

    def draw(self, seed):
        self.sides = {}
        for name, shape in self.shapes.items():
            width = self.dim // min(shape)
            self.sides[name] = self.signs(max(shape), width).float() / math.sqrt(width)

    def project(self, factors):
        total = 0
        for name, (x, g) in factors.items():
            short, long = (g, x) if x.shape[-1] >= g.shape[-1] else (x, g)
            # Short first: rank x long is smaller than tokens x width.
            formed = torch.bmm(short.transpose(1, 2), long)
            total = total + (formed @ self.sides[name]).flatten(1)
        return total


CONSTRUCTIONS = {
    "signed shifted addition (in use)": SignedShift,
    "count sketch": CountSketch,
    "dense random signs, made for each batch": DenseSigns,
    "subsampled randomized Hadamard": Hadamard,
    "two-sided, p x p for each layer": TwoSidedPerLayer,
    "one-sided dense, added over layers": OneSidedSummed,
}
