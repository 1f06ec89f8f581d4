"""What do random projections of a language model's LoRA gradients cost, and how large is their error?

    python -m benchmarks.projection.run OUTPUT

The gradients are those of a Llama-shaped model with random weights (LoRA r=8 on every linear layer): for each layer,
its input x and output gradient g, whose product over the tokens is the layer's gradient. Every projection starts from
x and g, so those that never form the gradient save that time. The error is that of inner products of two examples,
relative to the product of their norms, over seeds and pairs; dense random signs have 1/sqrt(features).
"""

import math
import time

import numpy as np
import torch

from ..capture.models import Setting, make_batches, make_model, make_rows
from ..common import add_machine_flags, make_parser, shape_of, write_results
from .constructions import CONSTRUCTIONS, Construction, Factors, gradients
from .table import table

# Too slow for as many seeds, and its error is known.
FEW_SEEDS = ("dense random signs, made for each batch",)


def lora_factors(setting: Setting) -> Factors:
    """Layer inputs and output gradients of the model's mean loss."""
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


def time_of_forming(factors: Factors, batch: int) -> float:
    """Median milliseconds per example of forming the gradients."""
    seconds = []
    for _ in range(10):
        start = time.process_time()
        for _ in gradients(factors):
            pass
        seconds.append(time.process_time() - start)
    return 1e3 * float(np.median(seconds)) / batch


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--model", default="llama", help="one of the capture study's models")
    parser.add_argument("--batch", type=int, default=8, help="examples")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--answer", type=int, default=32, help="tokens of its answer")
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 4096, 8192], help="numbers of features")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--few_seeds", type=int, default=2, help="for projections that are too slow for more")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(arguments.model, arguments.batch, arguments.length, arguments.answer)
    factors = lora_factors(setting)
    results = {
        "shape": shape_of(arguments),
        "layers": len(factors),
        "parameters": sum(x.shape[-1] * g.shape[-1] for x, g in factors.values()),
        "forming_gradients_ms_per_example": time_of_forming(factors, arguments.batch),
        "dims": {},
    }
    for dim in arguments.dims:
        results["dims"][str(dim)] = {
            name: measure(make, factors, dim, arguments.few_seeds if name in FEW_SEEDS else arguments.seeds)
            for name, make in CONSTRUCTIONS.items()
        }
        write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
