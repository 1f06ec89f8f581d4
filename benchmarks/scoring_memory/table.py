"""Markdown table of the peak memory of scoring."""

from ..common import markdown_table

STEP, SMALL_TILES = "training step", "training step, tiles of 64 MiB"


def table(results: dict) -> str:
    lines = [
        f"Llama of {results['layers']} layers and hidden size {results['hidden_size']}, vocabulary "
        f"{results['vocabulary']:,}, {results['batch_size']} rows of {results['length']:,} tokens, LoRA of rank "
        f"{results['rank']} on every linear layer, float32 on a CPU. Peak of the resident set above the process at "
        "rest, in MiB, and as a multiple of the peak of a training step, as trl computes it and with tiles of 64 MiB. "
        "The logits that `max_values` keeps are subtracted and shown separately.",
    ]
    steps = [results["answers"]["every token"][step]["peak_bytes"] for step in (STEP, SMALL_TILES)]
    for answers, methods in results["answers"].items():
        columns = (f"answers: {answers}", "MiB", "x step", "x step with tiles of 64 MiB", "kept, MiB", "seconds")
        rows = []
        for method, own in methods.items():
            peak = own["peak_bytes"] - own["kept_bytes"]
            kept = f"{own['kept_bytes'] / 2**20:.0f}" if own["kept_bytes"] else ""
            ratios = [f"{peak / step:.2f}" for step in steps]
            rows.append((method, f"{peak / 2**20:.0f}", *ratios, kept, f"{own['seconds']:.1f}"))
        lines += ["", *markdown_table(columns, rows)]
    return "\n".join(lines) + "\n"
