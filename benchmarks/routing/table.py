"""Markdown table of losses by the way to weight adapters."""

import numpy as np

from ..common import markdown_table

EQUAL, KNOWN = "equal weights", "each task's cross-validated weights"
ROUTED, PROMPTS = "router, fitted to all tasks", "the same, which has seen prompts of training rows"
OTHERS = "router, fitted to all other tasks and their prompts"
GRADIENTS = "router of gradients, fitted to all tasks and these prompts"
COSINES = "cosines of gradients, as in ELREA"


def table(results: dict) -> str:
    seeds = results["seeds"]
    tasks = list(seeds[0]["losses"][EQUAL])
    means = {
        way: {task: float(np.mean([own["losses"][way][task] for own in seeds])) for task in tasks}
        for way in seeds[0]["losses"]
    }
    mean = {way: float(np.mean(list(own.values()))) for way, own in means.items()}
    gap = mean[EQUAL] - mean[KNOWN]
    rows = [
        (way, f"{mean[way]:.4f}", f"{(mean[EQUAL] - mean[way]) / gap:.0%}", *(f"{own[task]:.3f}" for task in tasks))
        for way, own in means.items()
    ]
    chosen = ", ".join(
        f"{own['members']} ({'; '.join(own['routers'][way]['chosen'] for way in own['routers'])})" for own in seeds
    )
    lines = [
        f'Test loss of the adapters of "{results["system"]}" that serve every task, mean over seeds (of {len(seeds)}). '
        "Their number, and which router of all tasks was chosen without and with these prompts, and of gradients: "
        f"{chosen}. The gain is that over equal weights, as a share of what each task's own weights gain, all without "
        "scales.",
        "",
        *markdown_table(("weights", "mean loss", "gain", *tasks), rows),
    ]
    return "\n".join(lines) + "\n"
