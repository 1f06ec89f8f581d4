"""How accurate are base model, one adapter for all, and ensemble on real classification tasks?

    python -m benchmarks.real_tasks.run OUTPUT FLAGS

Runs `hf-ensemble run FLAGS`, which resumes an interrupted run, and keeps its results.
"""

import json
from pathlib import Path

from ..common import make_parser, write_results
from ..trainers import run_command
from .table import table


def without_paths(results: dict) -> dict:
    """Results with the model's path cut to its name."""
    model = results["configuration"]["model"]
    configuration = {**results["configuration"], "model": {**model, "name": Path(model["name"]).name}}
    return {**results, "configuration": configuration}


def main() -> None:
    own, flags = make_parser(__file__, __doc__).parse_known_args()
    results = json.loads((run_command("run", flags) / "results.json").read_text())
    write_results(own.output, without_paths(results), table)


if __name__ == "__main__":
    main()
