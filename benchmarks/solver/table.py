"""Markdown tables of the solver's time, memory and accuracy."""

from ..common import markdown_table

GROWTH_HEADER = (
    "subsets",
    "tasks",
    "tasks in a subset",
    "rows of a task",
    "time",
    "per subset and row",
    "Newton steps",
)


def table(results: dict) -> str:
    main, machine = results["target"], results["machine"]
    lines = [
        f"{main['subsets']} random subsets of {main['tasks_in_a_subset']} of {main['tasks']} tasks of "
        f"{main['rows_of_a_task']} rows, {main['components']} components, l2 = {main['l2']:.2g}; {machine['threads']} "
        f"threads on {machine['cores']} cores.",
        "",
        *markdown_table(["", *(f"tolerance {own['tolerance']:.0e}" for own in main["solved"])], _main_rows(main)),
    ]
    for name, growth in results["growth"].items():
        sizes = [
            (
                *(size[key] for key in ("subsets", "tasks", "size", "rows")),
                f"{size['seconds']:.3f} s",
                f"{size['nanoseconds_per_subset_and_row']:.0f} ns",
                f"{size['newton_steps']:.1f}",
            )
            for size in growth["sizes"]
        ]
        lines += [
            "",
            f"Time against the number of {name}: log-log slope {growth['slope']:.2f}.",
            "",
            *markdown_table(GROWTH_HEADER, sizes),
        ]
    return "\n".join(lines) + "\n"


def _main_rows(main: dict) -> list[list[str]]:
    """One row per measure and per kind of scikit-learn fit, one column per tolerance."""
    close = main["solved"][0]["agreement"]
    measures = {
        "time for all subsets": lambda own: f"{own['seconds']:.2f} s",
        "largest gradient norm": lambda own: f"{own['greatest_gradient_norm']:.1e}",
        "mean Newton steps": lambda own: f"{own['newton_steps']:.1f}",
        "peak memory above the start, data included": lambda own: (
            f"{own['peak_memory_above_start_bytes'] / 2**20:.0f} MiB"
        ),
        f"largest difference in predicted loss from an exact solver ({close['sample']} subsets)": lambda own: (
            f"{own['agreement']['predicted_losses']:.1e}"
        ),
        f"largest difference in a coefficient (the largest is {close['greatest_coefficient']:.1f})": lambda own: (
            f"{own['agreement']['coefficients']:.1e}"
        ),
    }
    rows = [[name, *(cell(own) for own in main["solved"])] for name, cell in measures.items()]
    for fit in main["scikit_learn"]:
        name = (
            f"one scikit-learn fit per subset, tol {fit['tol']:.0e}: {1000 * fit['seconds_for_one_subset']:.1f} ms "
            f"each, gradient norm up to {fit['greatest_gradient_norm']:.1e} ({fit['sample']} subsets)"
        )
        rows.append([name, *(f"{slower:.0f} times slower" for slower in fit["times_slower"])])
    return rows
