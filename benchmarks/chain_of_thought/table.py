"""Markdown tables of choices measured by generated answers."""

import numpy as np

from ..common import markdown_table, mean_and_deviation


def table(results: dict) -> str:
    worlds, shape = results["worlds"], results["shape"]
    ways = list(worlds[0]["scores"])
    rows = []
    for way in ways:
        own = [world["scores"][way] for world in worlds]
        each = [f"{score['exact_match']:.3f}" for score in own]
        size = np.mean([len(score["skills"]) for score in own])
        accuracy, loss = (mean_and_deviation([score[name] for score in own]) for name in ("exact_match", "loss"))
        rows.append([way, *each, accuracy, loss, "-" if way == "base model" else f"{size:.1f}"])
    header = ["trained on", *(f"seed {world['seed']}" for world in worlds), "mean", "test loss", "auxiliary skills"]
    chosen = [
        [way, *(", ".join(world["scores"][way]["skills"]) or "none" for world in worlds)]
        for way in ways
        if way not in ("base model", "all", "alone")
    ]
    lines = [
        f"Share of {results['test_rows']} test questions of `{results['target']}` whose generated final answer is "
        f"right. Training rows: {shape['target_rows']} of the target, {shape['rows']} of each other skill, "
        f"{shape['corrupted_rows']} of each corrupted copy. Mean over {len(worlds)} seeds ± standard deviation.",
        "",
        *markdown_table(header, rows),
        "",
        *markdown_table(["auxiliary skills of", *(f"seed {world['seed']}" for world in worlds)], chosen),
    ]
    return "\n".join(lines) + "\n"
