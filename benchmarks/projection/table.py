"""Random projections as Markdown."""

import math

from ..common import markdown_table

HEADER = ("construction", "features", "ms per example", "error of pairs", "of norms", "kept", "seeds")


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
