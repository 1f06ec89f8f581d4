"""Markdown tables of choices by the number of rows that searches look at."""

from ..common import markdown_table


def table(results: dict) -> str:
    selections, groupings = results["selections"], results.get("groupings", [])
    together = selections[-1]["loss_of_all_tasks"]
    lines = [
        f"{results['tasks']} tasks of {results['rows']} training and as many validation rows, {results['dim']} "
        "dimensions; losses are predicted from all rows, whatever the search has looked at. The gain is that over all "
        f"tasks, as a share of what a search by all rows gains. Selections are for {results['targets']} targets, and "
        "agreement is the number of tasks that both searches select, by the number of those that either selects.",
        "",
    ]
    best = selections[-1]["predicted_loss"]
    rows = [
        (
            _rows(results, one),
            f"{one['predicted_loss']:.4f}",
            f"{(together - one['predicted_loss']) / (together - best):.0%}",
            f"{one['agreement']:.2f}",
            f"{one['cpu_seconds']:.1f}",
        )
        for one in selections
    ]
    header = ("rows of a task", "selection: mean loss", "gain", "agreement", "CPU seconds")
    lines += markdown_table(header, rows)
    if groupings:
        last = groupings[-1]
        whole = last["loss_of_one_group"] - last["predicted_loss"]
        rows = [
            (
                _rows(results, one),
                f"{one['predicted_loss']:.4f}",
                f"{(one['loss_of_one_group'] - one['predicted_loss']) / whole:.0%}",
                one["num_groups"],
                f"{one['cpu_seconds']:.1f}",
            )
            for one in groupings
        ]
        header = ("rows of a task", "direct grouping: mean loss", "gain", "groups", "CPU seconds")
        lines += ["", *markdown_table(header, rows)]
    return "\n".join(lines) + "\n"


def _rows(results: dict, one: dict) -> str:
    return "all" if one["search_rows"] is None else f"{one['search_rows'] // results['tasks']}"
