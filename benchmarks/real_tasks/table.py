"""Turn the results of `hf-ensemble run` into the JSON and the table that are kept beside this file.

    python benchmarks/report.py OUTPUT_DIR/results.json benchmarks/real_tasks

writes `benchmarks/real_tasks.json` (the results without the paths of the machine) and `benchmarks/real_tasks.md`.
"""

import json
import sys
from pathlib import Path

SYSTEMS = {"base": "base model", "baseline": "one adapter for all", "ensemble": "ensemble"}


def without_paths(results: dict) -> dict:
    """The results with the model's name in place of its folder."""
    model = results["configuration"]["model"]
    configuration = {**results["configuration"], "model": {**model, "name": Path(model["name"]).name}}
    return {**results, "configuration": configuration}


def tables(results: dict) -> str:
    """Accuracy of every system and the groups as Markdown."""
    scores = results["scores"]
    group_of = {task: name for name, tasks in results["groups"].items() for task in tasks}
    lines = [f"Accuracy on {results['split']} rows.", ""]
    lines += ["| task | group | " + " | ".join(SYSTEMS[s] for s in SYSTEMS if s in scores) + " |"]
    systems = [system for system in SYSTEMS if system in scores]
    lines += ["|---" * (2 + len(systems)) + "|"]
    for task in scores["ensemble"]:
        cells = [f"{scores[system][task]['accuracy']:.3f}" for system in systems]
        lines.append(f"| {task} | {group_of[task]} | {' | '.join(cells)} |")
    means = [f"{results['mean_accuracy'][system]:.3f}" for system in systems]
    lines += [f"| **mean** | | {' | '.join(means)} |"]
    return "\n".join(lines) + "\n"


def main(source: str, target: str) -> None:
    results = without_paths(json.loads(Path(source).read_text()))
    Path(f"{target}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{target}.md").write_text(tables(results))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
