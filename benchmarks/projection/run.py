"""Time and error of several random projections of a language model's LoRA gradients, at equal numbers of features.

    python benchmarks/projection.py TARGET

writes TARGET.json and TARGET.md. The gradients are those of a Llama-shaped model with random weights (LoRA r=8 on every
linear layer): for each layer input x and output gradient g, whose product over the tokens is the layer's gradient.
Every construction begins there, so that one which never forms the gradient gains by it. The error is that of inner
products of two examples, relative to the product of their norms, over seeds and pairs; dense random signs have
1/sqrt(features).
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from capture_models import Setting, make_batches, make_model, make_rows

from hf_ensemble.capture import SeededProjection

# Per layer: x (B, T, in) and g (B, T, out).
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def lora_factors(setting: Setting) -> Factors:
    """Of the model's own mean loss, example by example."""
    model, factors, handles = make_model(setting), {}, []

    def keep(name):
        def hook(module, inputs, output):
            x = inputs[0].detach()
            output.register_hook(lambda g: factors.__setitem__(name, (x, g.detach().clone())))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" in name:
            handles.append(module.register_forward_hook(keep(name)))
    (batch,) = make_batches(setting, make_rows(setting, setting.batch))
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return dict(sorted(factors.items()))


def gradients(factors: Factors):
    """The layers' gradients, one after the other: name and (B, out, in)."""
    for name, (x, g) in factors.items():
        yield name, torch.bmm(g.transpose(1, 2), x)


class Construction:
    """Draws what is kept for all batches when made; `project` takes a batch's factors to features `(B, features)`."""

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
        """Bytes of what was drawn."""
        tables = [value for value in vars(self).values() if isinstance(value, dict)]
        tensors = [t for table in tables for v in table.values() for t in (v if isinstance(v, tuple) else (v,))]
        return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


class SignedShift(Construction):
    """The library's own: signed, shifted addition of blocks."""

    def draw(self, seed):
        self.projection = SeededProjection(self.shapes, self.dim, seed)
        # It draws at the first use.
        self.projection.transpose(torch.zeros(self.dim))

    def project(self, factors):
        features = torch.zeros(self.rows, self.dim)
        for name, gradient in gradients(factors):
            self.projection.add(features, name, gradient)
        return features

    def kept(self):
        return self.projection.num_parameters


class CountSketch(Construction):
    """Every entry has a random sign and a random feature of its own, by `index_add`."""

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
    """A dense matrix of random signs, made anew for every batch in blocks: it is too large to keep."""

    block = 2048

    def draw(self, seed):
        self.seed = seed

    def project(self, factors):
        rng, features = np.random.default_rng(self.seed), torch.zeros(self.rows, self.dim)
        for _, gradient in gradients(factors):
            for part in gradient.flatten(1).split(self.block, dim=1):
                random = np.frombuffer(rng.bytes(part.shape[1] * self.dim // 8), dtype=np.uint8)
                signs = torch.from_numpy(np.unpackbits(random)).view(part.shape[1], self.dim).float()
                # Of bits: signs are 2 bits - 1.
                features.addmm_(part, signs, alpha=2.0).sub_(part.sum(dim=1, keepdim=True))
        return features / math.sqrt(self.dim)


class Hadamard(Construction):
    """Random signs, a Hadamard transform of the whole gradient, and `dim` of its entries at random."""

    factor = 128

    def draw(self, seed):
        numel = sum(shape.numel() for shape in self.shapes.values())
        self.axes = max(1, math.ceil(math.log(numel, self.factor)))
        # The last axis as short as the gradient allows.
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
        # The transform of a product of sizes is one transform along each axis.
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
    """p x p features of each layer, side by side: inputs and output gradients are projected, gradients never formed."""

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
    """The longer side of each layer to `dim` / rank, the side of the LoRA's rank as it is; added over the layers."""

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
# Too slow for as many seeds; its error is known.
FEW_SEEDS = ("dense random signs, made for each batch",)


def measure(make: type[Construction], factors: Factors, dim: int, seeds: int) -> dict:
    exact = torch.cat([gradient.flatten(1) for _, gradient in gradients(factors)], dim=1).double()
    inner = exact @ exact.T
    norms = inner.diagonal().sqrt()
    off = ~torch.eye(len(inner), dtype=torch.bool)
    errors, seconds = [], []
    for seed in range(seeds):
        made = make(factors, dim, seed)
        start = time.process_time()
        features = made.project(factors)
        seconds.append(time.process_time() - start)
        features = features.double()
        errors.append((features @ features.T - inner) / (norms[:, None] * norms))
    errors = torch.stack(errors)
    root = math.sqrt(dim)
    return {
        "features": features.shape[1],
        "seeds": seeds,
        "ms_per_example": 1e3 * float(np.median(seconds)) / len(inner),
        "bytes_kept": made.kept(),
        "error_of_pairs": float(errors[:, off].square().mean().sqrt()),
        "error_of_pairs_times_sqrt_dim": float(errors[:, off].square().mean().sqrt()) * root,
        "error_of_norms_times_sqrt_dim": float(errors[:, ~off].square().mean().sqrt()) * root,
        "bias_of_norms": float(errors[:, ~off].mean()),
    }


def table(results: dict) -> str:
    shape, machine, forming = results["shape"], results["machine"], results["forming_gradients_ms_per_example"]
    lines = [
        f"{results['parameters']:,} LoRA parameters in {results['layers']} layers, {shape['batch']} examples of "
        f"{shape['length']} tokens; {machine['device']}, {machine['threads']} threads. Time: CPU milliseconds per "
        f"example from the layers' inputs and output gradients on, of which forming the gradients is {forming:.2f}; "
        "what is drawn once is not counted. Error: of inner products of two examples, "
        "relative to their norms and times sqrt(features asked for): 1 is that of dense random signs (for norms 1.41).",
    ]
    for dim, own in results["dims"].items():
        root = 1 / math.sqrt(int(dim))
        lines += [
            "",
            f"{int(dim):,} features (1/sqrt = {root:.4f}):",
            "",
            "| construction | features | ms per example | error of pairs | of norms | kept | seeds |",
            "|---" * 7 + "|",
        ]
        for name, line in own.items():
            lines.append(
                f"| {name} | {line['features']:,} | {line['ms_per_example']:.2f} | "
                f"{line['error_of_pairs_times_sqrt_dim']:.2f} | {line['error_of_norms_times_sqrt_dim']:.2f} | "
                f"{line['bytes_kept'] / 2**20:.1f} MiB | {line['seeds']} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="path of the results without .json and .md")
    parser.add_argument("--model", default="llama")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--few_seeds", type=int, default=2, help="for constructions that are too slow for more")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.model, arguments.batch, arguments.length, arguments.answer)
    factors = lora_factors(setting)
    forming = []
    for _ in range(10):
        start = time.process_time()
        for _ in gradients(factors):
            pass
        forming.append(time.process_time() - start)
    results = {
        "machine": {
            "device": f"CPU, {os.cpu_count()} cores",
            "threads": arguments.threads,
            "torch": torch.__version__,
        },
        "shape": {key: value for key, value in vars(arguments).items() if key != "output"},
        "layers": len(factors),
        "parameters": sum(x.shape[-1] * g.shape[-1] for x, g in factors.values()),
        "forming_gradients_ms_per_example": 1e3 * float(np.median(forming)) / arguments.batch,
        "dims": {},
    }
    for dim in arguments.dims:
        own = results["dims"].setdefault(str(dim), {})
        for name, make in CONSTRUCTIONS.items():
            seeds = arguments.few_seeds if name in FEW_SEEDS else arguments.seeds
            own[name] = measure(make, factors, dim, seeds)
            Path(f"{arguments.output}.json").write_text(json.dumps(results, indent=1) + "\n")
            Path(f"{arguments.output}.md").write_text(table(results))
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
