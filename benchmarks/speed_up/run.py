"""How much faster are predictions than fine-tuning on every subset?

    python -m benchmarks.speed_up.run OUTPUT FLAGS

Runs `hf-ensemble fidelity FLAGS` and keeps the timings of its report.
"""

import json

from ..common import make_parser, write_results
from ..trainers import run_command, scored_runs
from .table import table

KEPT = ("subsets", "training_seconds", "capture_seconds", "prediction_seconds", "speed_up")


def main() -> None:
    own, flags = make_parser(__file__, __doc__).parse_known_args()
    folder = run_command("fidelity", flags)
    report = json.loads((folder / "estimate" / "fidelity.json").read_text())
    calibrating = [sorted(subset) for subset in report["calibration_subsets"]]
    seconds = [run["seconds"] for run in scored_runs(folder) if sorted(run["mixture"]) in calibrating]
    write_results(own.output, {**{key: report[key] for key in KEPT}, "calibration_seconds": sum(seconds)}, table)


if __name__ == "__main__":
    main()
