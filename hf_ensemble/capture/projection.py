"""Seeded random projection of gradients, without forming the matrix."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import CaptureError

# Maximum number of a parameter's gradients that are gathered at once.
_GATHERED = 16_000_000


class SeededProjection:
    """x = P^T g for a gradient g given parameter by parameter, with E[P P^T] = I.

    Every entry of g is added to one of the `dim` features with a random sign. A parameter's entries are split into
    blocks of `dim`; each block is added to consecutive features, cyclically from a random start. Entries of one block
    never collide and entries of different blocks collide with probability 1 / dim, so inner products are unbiased with
    at most the variance of a count sketch (Charikar et al. 2002), and applying P is a signed, shifted addition.

    Signs and starts are drawn on the CPU from (seed, parameter name, shape), so they are the same on every device, in
    every process and after every restart.

    Args:
        shapes (`dict[str, torch.Size]`): shape of each parameter, by name.
        dim (`int`, *optional*): number of features; `None` keeps the exact gradient, concatenated.
        seed (`int`, *optional*, defaults to 0): seed of the projection.

    Raises:
        `CaptureError`: when there is no parameter, or `dim` is not positive.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], dim: int | None, seed: int = 0):
        if not shapes:
            raise CaptureError("Expected a trainable parameter, found none. Add an adapter and activate it.")
        if dim is not None and dim <= 0:
            raise CaptureError(f"projection_dim has to be positive or None, found {dim}.")
        self.shapes = dict(shapes)
        self.seed = seed
        self.num_parameters = sum(shape.numel() for shape in self.shapes.values())
        # More features than parameters would not add information.
        self.exact = dim is None or dim >= self.num_parameters
        self.dim = self.num_parameters if self.exact else dim
        offsets = np.cumsum([0, *(shape.numel() for shape in self.shapes.values())])
        self._offset = dict(zip(self.shapes, offsets.tolist()))
        self._drawn: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _signs_and_starts(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs `(numel,)` int8 and the first feature of each block `(blocks,)` int32, which stay on the device."""
        if name not in self._drawn:
            shape = tuple(self.shapes[name])
            key = hashlib.blake2b(f"{self.seed}|{name}|{shape}".encode(), digest_size=8).digest()
            generator = np.random.Generator(np.random.Philox(int.from_bytes(key, "little")))
            numel = self.shapes[name].numel()
            bits = np.unpackbits(np.frombuffer(generator.bytes(-(-numel // 8)), dtype=np.uint8))[:numel]
            starts = generator.integers(0, self.dim, size=-(-numel // self.dim)).astype(np.int32)
            self._drawn[name] = (torch.from_numpy(bits.astype(np.int8) * 2 - 1), torch.from_numpy(starts))
        signs, starts = self._drawn[name]
        if signs.device != device:
            self._drawn[name] = signs, starts = signs.to(device), starts.to(device)
        return signs, starts

    def add(self, features: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
        """Add the contribution of one parameter in place.

        Args:
            features (`torch.Tensor` of shape `(B, dim)`): features so far, float32.
            name (`str`): name of the parameter.
            gradient (`torch.Tensor` of shape `(B, *shape)`): its gradient for each example.
        """
        flat = gradient.reshape(len(features), -1).to(features.dtype)
        if self.exact:
            features[:, self._offset[name] : self._offset[name] + flat.shape[1]] += flat
            return
        signs, starts = self._signs_and_starts(name, flat.device)
        # A processor reads blocks fastest one after the other; an accelerator would start two kernels for each.
        add_blocks = _add_in_turn if flat.device.type == "cpu" else _add_gathered
        add_blocks(features, flat, signs, starts)

    def transpose(self, w: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameter update P w for feature coefficients `w` `(dim,)`, by parameter name."""
        update = {}
        for name, shape in self.shapes.items():
            if self.exact:
                flat = w[self._offset[name] : self._offset[name] + shape.numel()]
            else:
                signs, starts = self._signs_and_starts(name, w.device)
                feature = (starts.unsqueeze(1) + torch.arange(self.dim, device=w.device)) % self.dim
                flat = w[feature.flatten()[: shape.numel()]] * signs.to(w.dtype)
            update[name] = flat.reshape(shape).clone()
        return update


def _add_in_turn(features: torch.Tensor, flat: torch.Tensor, signs: torch.Tensor, starts: torch.Tensor) -> None:
    """Add signed blocks of gradients `(B, numel)` to features `(B, dim)`, one block after the other."""
    dim = features.shape[1]
    for block, first in zip((flat * signs).split(dim, dim=1), starts.tolist()):
        head = min(block.shape[1], dim - first)
        features[:, first : first + head] += block[:, :head]
        features[:, : block.shape[1] - head] += block[:, head:]


def _add_gathered(features: torch.Tensor, flat: torch.Tensor, signs: torch.Tensor, starts: torch.Tensor) -> None:
    """The same sum in a few large operations, whose number does not depend on the number of blocks."""
    rows, dim = features.shape
    column = torch.arange(dim, dtype=torch.int32, device=flat.device)
    size = max(1, _GATHERED // (rows * dim))
    for own, part, sign in zip(starts.split(size), flat.split(size * dim, dim=1), signs.split(size * dim)):
        part = part * sign
        missing = len(own) * dim - part.shape[1]
        if missing:
            part = torch.nn.functional.pad(part, (0, missing))
        block = torch.arange(len(own), dtype=torch.int32, device=flat.device).unsqueeze(1)
        # Which of a block's entries falls on each feature.
        index = (column - own.unsqueeze(1)) % dim + block * dim
        features += part.index_select(1, index.flatten()).view(rows, len(own), dim).sum(1)
