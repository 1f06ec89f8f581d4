"""Markdown tables of time and error of random projections."""

import math

from ..common import markdown_table

HEADER = ("projection", "features", "ms per example", "error of pairs", "error of norms", "memory", "seeds")


def table(results: dict) -> str:
    shape, machine, forming = results["shape"], results["machine"], results["forming_gradients_ms_per_example"]
    lines = [
        f"{results['parameters']:,} LoRA parameters in {results['layers']} layers, {shape['batch']} examples of "
        f"{shape['length']} tokens; {machine['device']}, {machine['threads']} threads. Time: CPU milliseconds per "
        "example, starting from layer inputs and output gradients; forming the gradients takes "
        f"{forming:.2f} of it, and drawing random numbers once is not counted. Error: of inner products of two "
        "examples, relative to their norms and times sqrt(requested features); dense signs have 1 (1.41 for norms).",
    ]
    for dim, own in results["dims"].items():
        rows = [
            (
                name,
                f"{result['features']:,}",
                f"{result['ms_per_example']:.2f}",
                f"{result['error_of_pairs_times_sqrt_dim']:.2f}",
                f"{result['error_of_norms_times_sqrt_dim']:.2f}",
                f"{result['bytes_kept'] / 2**20:.1f} MiB",
                result["seeds"],
            )
            for name, result in own.items()
        ]
        lines += ["", f"{int(dim):,} features (1/sqrt = {1 / math.sqrt(int(dim)):.4f}):", ""]
        lines += markdown_table(HEADER, rows)
    return "\n".join(lines) + "\n"
