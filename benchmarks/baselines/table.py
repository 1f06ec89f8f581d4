"""A Markdown table of systems beside an ensemble."""

from hf_ensemble.runs.systems import system_name

from ..common import markdown_table, mean_and_deviation


def table(results: dict) -> str:
    systems = results["systems"]
    figures = list(dict.fromkeys(name for own in systems for name in own["figures"]))
    header = ["system", "training cost", "stored parameters"]
    header += [word for name in figures for word in (name.replace("_", " "), "difference")]
    rows = [_row(own, figures) for own in systems]
    shape, tasks = results["shape"], results["train_rows"]
    count = len(shape["seeds"])
    seeds = "one seed" if count == 1 else f"{count} seeds (± standard deviation)"
    sizes = " or ".join(str(size) for size in sorted(set(tasks.values())))
    lines = [
        f"Means over {seeds} and the {results['split']} rows of {len(tasks)} tasks of {sizes} training rows. The "
        "training cost, in operations, and the stored parameters are in multiples of those of one adapter for all, "
        "from which differences are, with 95 % intervals over rows. The ensemble may cost "
        f"{shape['budget']:g}, and has {' / '.join(str(count) for count in results['groups'])} groups.",
        "",
        *markdown_table(header, rows),
    ]
    for name, why in results["left_out"].items():
        lines += ["", f"Left out: {system_name(name)}. {why}"]
    return "\n".join(lines) + "\n"


def _row(own: dict, figures: list[str]) -> list[str]:
    cells = [system_name(own["system"]), f"{own['training_cost']:.2f}", f"{own['stored_parameters']:.1f}"]
    for name in figures:
        values = own["figures"].get(name)
        cells.append("-" if values is None else mean_and_deviation(values) if len(values) > 1 else f"{values[0]:.3f}")
        found = own["differences"].get(name)
        cells.append("-" if found is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*found))
    return cells
