"""What does `hf-ensemble demo` come to, with other seeds than its own as well?

    python -m benchmarks.demo.run OUTPUT [--seeds 0 1 2] [--folder FOLDER]

Runs the demo for each seed, which draws world, base model and trainings anew, and keeps the accuracy of every system
on the test rows of each task, the tasks that were selected for the target, and what the predictions were worth.
"""

from pathlib import Path

from hf_ensemble.cli.demo.flow import DemoResults
from hf_ensemble.cli.demo.flow import main as run_demo

from ..common import make_parser, write_results
from .table import table


def outcome(seed: int, demo: DemoResults) -> dict:
    """What the study keeps of a demo."""
    found = demo.results
    return {
        "seed": seed,
        "split": found.split,
        "target": demo.target,
        "corrupted": demo.corrupted,
        "accuracy": {
            system: {task: own.accuracy for task, own in scores.items()} for system, scores in found.scores.items()
        },
        "mean_loss": found.mean_loss,
        "groups": found.groups,
        "selected": demo.selected,
        "mean_relative_error": demo.mean_relative_error,
        "reload_difference": demo.reload_difference,
        "seconds": sum(cost.seconds for cost in found.stage_costs.values()),
    }


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of world, base model and trainings")
    parser.add_argument("--folder", default="demo_output", help="where models and runs go, a folder for each seed")
    own = parser.parse_args()
    demos = []
    for seed in own.seeds:
        folder = str(Path(own.folder) / f"seed-{seed}")
        demos.append(outcome(seed, run_demo(["--output_dir", folder, "--seed", str(seed)])))
    write_results(own.output, {"demos": demos}, table)


if __name__ == "__main__":
    main()
