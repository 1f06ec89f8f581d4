"""Markdown tables of the parts that were measured on a GPU."""

import statistics

from ..common import formatted, markdown_table
from .capture import CAPTURE


def table(results: dict) -> str:
    parts = results["parts"]
    settings = {name: _setting(own) for name, own in parts.items()}
    shared = len(set(settings.values())) == 1
    lines = [next(iter(settings.values()))] if shared else []
    for name, own in parts.items():
        kind = _capture if name.startswith("capture") else _decoding if name == "decoding" else _estimator
        blank, title, *rest = kind(own)
        lines += [blank, title, *([] if shared else ["", settings[name]]), *rest]
    return "\n".join(lines).lstrip() + "\n"


def _setting(own: dict) -> str:
    machine = own["machine"]
    sizes = " Toy sizes, which only show that the parts run." if own["arguments"]["tiny"] else ""
    return f"{machine['device']}, {machine['threads']} CPU threads; wall times.{sizes}"


def _gibibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.1f} GiB"


def _capture(own: dict) -> list[str]:
    ways = own["ways"]
    capture = statistics.median(ways[CAPTURE]["seconds"]) if CAPTURE in ways else None
    rows = []
    for name, way in ways.items():
        seconds = statistics.median(way["seconds"])
        rows.append(
            (
                name,
                f"{1e3 * seconds:.0f} ms",
                f"{way['tokens_per_second']:,.0f}",
                "-" if capture is None else f"{capture / seconds:.2f}",
                _gibibytes(way["peak_bytes"]),
                formatted(way["kernels"], ",d"),
            )
        )
    lines = [
        "",
        f"## Capture, {own['model']} in nf4",
        "",
        f"{own['layers']} layers, {own['parameters'] / 1e9:.2f}B parameters, {own['trained_parameters'] / 1e6:.1f}M "
        f"trained (LoRA r=16 on attention); batches of {own['rows']} rows x {own['length']} tokens, {own['answer']} of "
        f"them the answer, {own['features']} features, bfloat16. Weights: {_gibibytes(own['weights_bytes'])}, made in "
        f"{own['seconds_to_make']:.0f} s. Memory is the peak above them.",
        "",
        *markdown_table(("", "a batch", "tokens/s", "capture / this", "memory", "kernels"), rows),
    ]
    if "store" in own:
        store = own["store"]
        line = f"A whole capture of {store['rows']} rows took {store['seconds']:.1f} s"
        if store["moments"]:
            line += f", {store['moments']['wall']:.1f} s of them for second moments of {store['moments']['rows']} rows"
        lines += ["", line + "."]
    return lines


def _decoding(own: dict) -> list[str]:
    shape = own["shape"]
    lines = [
        "",
        f"## Decoding, {shape['model']}",
        "",
        f"{own['layers']} layers in {own['dtype']}, m = {shape['members']} adapters of rank {shape['rank']} on every "
        f"linear layer, prompts of {shape['length']} tokens. Milliseconds; in brackets, the ratio to one adapter on B "
        "rows.",
        "",
    ]
    measured = own["rows"]
    header = ["", *(f"{phase}, B = {rows}" for phase in ("prefill", "a token") for rows in measured)]
    names = next(iter(measured.values()))["methods"]
    rows = []
    for name in names:
        cells = [name]
        for phase in ("prefill", "decode"):
            for one in measured.values():
                value, reference = one["methods"][name][phase], one["methods"]["one adapter, B rows"][phase]
                cells.append(f"{value:.1f} ({value / reference:.2f})")
        rows.append(cells)
    generated = [
        [name, *(f"{one['generate'][name]:.0f}" for one in measured.values())]
        for name in next(iter(measured.values()))["generate"]
    ]
    header_of_generate = [f"generate, {shape['tokens']} tokens", *(f"B = {rows}" for rows in measured)]
    return [*lines, *markdown_table(header, rows), "", *markdown_table(header_of_generate, generated)]


def _estimator(own: dict) -> list[str]:
    reduction, predictions = own["reduction"], own["predictions"]
    rows = [
        (
            "fitting the estimator to these tasks",
            *(f"{predictions[name]['seconds_to_make']:.3f} s" for name in ("CPU", "device")),
            "",
        ),
        (
            f"losses of {own['subsets']} subsets of {own['tasks_in_a_subset']} of {own['tasks']} tasks x "
            f"{own['rows_of_a_task']} rows, {own['components']} components",
            *(f"{min(predictions[name]['seconds']):.3f} s" for name in ("CPU", "device")),
            f"{own['loss_difference']:.1e} nats",
        ),
        (
            f"{reduction['components']} components of {reduction['rows']:,} x {reduction['features']:,} features",
            *(f"{min(reduction['seconds'][name]):.3f} s" for name in ("CPU", "device")),
            f"{reduction['subspace_difference']:.1e} (1 - cosine)",
        ),
    ]
    header = ("", f"CPU, {own['threads']} threads", "device", "largest difference")
    return ["", "## Estimator", "", *markdown_table(header, rows)]
