"""Markdown tables of selection methods."""

from ..common import markdown_table, mean_and_deviation


def table(results: dict) -> str:
    targets = list(results["scores"])
    rows = []
    for way, mean in results["mean"].items():
        cells = []
        for target in targets:
            accuracy = mean_and_deviation([score["accuracy"] for score in results["scores"][target][way]])
            cells.append(f"{accuracy} ({len(results['choices'][target][way][0]['weights'])})")
        rows.append([way, *cells, mean_and_deviation(mean["accuracy"]), mean_and_deviation(mean["loss"])])
    taken = [(row["target"], ", ".join(row["forward"])) for row in results["taken"]]
    lines = [
        f"Test accuracy on the target, mean over {len(results['seeds'])} seeds ± standard deviation. The last two "
        "columns are the mean accuracy and test loss over targets.",
        "",
        *markdown_table(["trained on", *targets, "mean accuracy", "mean loss"], rows),
        "",
        "In brackets: number of tasks trained on.",
        "",
        *markdown_table(("target", "tasks taken by forward selection, in order"), taken),
    ]
    return "\n".join(lines) + "\n"
