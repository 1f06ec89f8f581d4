"""Markdown table of memory and time of a large estimate."""

from ..common import markdown_table


def table(results: dict) -> str:
    lines = [
        f"{results['tasks']:,} tasks of {results['rows']:,} training and {results['validation_rows']:,} validation "
        f"rows in {results['dim']:,} dimensions, {results['subsets']:,} subsets of {results['size']} tasks, "
        f"{results['threads']} thread(s).",
        "",
    ]
    rows = [
        ("seconds to reduce and calibrate", f"{results['seconds_to_reduce_and_calibrate']:.1f}"),
        ("seconds to predict", f"{results['seconds_to_predict']:.1f}"),
        ("largest gradient norm", f"{results['greatest_gradient_norm']:.1e}"),
        ("peak resident memory, mapped features included", _gigabytes(results["peak_resident_bytes"])),
        ("anonymous memory at the end", _gigabytes(results["anonymous_bytes_at_the_end"])),
        ("mapped features", _gigabytes(results["bytes_of_mapped_features"])),
    ]
    return "\n".join([*lines, *markdown_table(("measure", "value"), rows)]) + "\n"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
