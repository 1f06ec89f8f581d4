"""Markdown tables of time and memory of the capture."""

from ..common import markdown_table

HEADER = ("method", "per example", "x plain", "wall", "peak memory", "above plain", "")
LIMIT = 64 * 2**20


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def _row(name: str, own: dict, memory: dict, plain_memory: dict) -> list[str]:
    cells = [name]
    if "failed" in own:
        cells += [own["failed"], "", ""]
    elif "cpu" in own:
        ratios = own["cpu"]["ratios"]
        cells += [
            f"{1e3 * own['cpu']['seconds_per_example']:.0f} ms",
            f"{own['cpu']['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)})",
            f"{own['wall']['ratio']:.2f}",
        ]
    else:
        cells += ["", "", ""]
    if "failed" in memory:
        cells += [memory["failed"], ""]
    elif memory:
        peak = memory["peak_extra_bytes"]
        over = peak - plain_memory.get("peak_extra_bytes", peak)
        cells += [_mebibytes(peak), "" if name == "plain" else f"{over / 2**20:+.0f} MiB"]
    else:
        cells += ["", ""]
    return [*cells, own.get("note", "")]


def _capture_notes(own: dict) -> list[str]:
    methods, memory, lines = own["methods"], own.get("memory", {}), []
    capture = methods.get("capture", {}).get("cpu")
    if capture:
        moments = capture.get("moment rows, ratio per row")
        lines.append(
            f"Not in the table: the pass over 128 moment rows, once per store, at {moments:.2f} times a plain pass per "
            f"row. With it, capturing 1,000 rows costs {capture['ratio'] + 0.128 * moments:.2f}, and 10,000 rows "
            f"{capture['ratio'] + 0.0128 * moments:.2f}."
        )
        for name, other in methods.items():
            if name.startswith(("published,", "Bergson")) and "cpu" in other:
                lines.append(f"{name}: {other['cpu']['ratio'] / capture['ratio']:.2f} times as slow as the capture.")
    if {"plain", "capture"} <= memory.keys() and "peak_extra_bytes" in memory["capture"]:
        over = memory["capture"]["peak_extra_bytes"] - memory["plain"]["peak_extra_bytes"]
        layer = own.get("largest_layer_gradients_bytes", 0)
        lines.append(
            f"Limit of the capture's peak above the plain pass: {_mebibytes(layer + LIMIT)} (per-example gradients of "
            f"one batch in the largest layer, {layer / 2**20:.1f} MiB, and 64 MiB); measured {over / 2**20:+.0f} MiB."
        )
    largest = own.get("largest_tensor")
    if largest and "bytes" in largest:
        top = largest["largest"][0]
        lines.append(
            f"Largest tensor of a capture with {largest['trained_parameters'] / 1e6:.1f}M trained parameters: "
            f"{_mebibytes(largest['bytes'])}, `{top['operation']}` of shape {tuple(top['shape'])}."
        )
    return lines


def _device_notes(own: dict, shape: dict) -> list[str]:
    """Examples per second and, where the device's peak is given, its utilization."""
    lines = []
    for name in ("plain", "capture"):
        wall = own["methods"].get(name, {}).get("wall")
        if shape.get("device") != "cuda" or not wall:
            continue
        line = f"{name}: {1 / wall['seconds_per_example']:.1f} examples/s"
        if shape.get("peak_tflops"):
            # Forward, and backward through the activations: two operations per weight and token each.
            flops = 4 * own["multiplied_weights"] * shape["length"] / wall["seconds_per_example"]
            line += f", {flops / shape['peak_tflops'] / 1e12:.0%} of the device's peak"
        lines.append(line + ".")
    return lines


def table(results: dict) -> str:
    shape, machine = results["shape"], results["machine"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads; batches of {shape['batch']} rows x "
        f"{shape['length']} tokens, {shape['dim']} features. Times are CPU time per example, with "
        "the median ratio to the plain pass of the same turn (range, turns), and the same ratio in wall time. Memory: "
        "peak of a separate process above the model at rest, and above the plain pass; empty where not measured."
    ]
    for name, own in results["models"].items():
        own = {"methods": {}, **own}
        lines += [
            "",
            f"## {name}",
            "",
            f"{own.get('parameters', 0) / 1e6:.0f}M parameters, {own.get('trained_parameters', 0):,} trained.",
            "",
        ]
        methods, memory = own["methods"], own.get("memory", {})
        lines += markdown_table(
            HEADER,
            (
                _row(method, methods.get(method, {}), memory.get(method, {}), memory.get("plain", {}))
                for method in dict.fromkeys([*methods, *memory])
            ),
        )
        notes = _capture_notes(own) + _device_notes(own, shape)
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
