"""What does the whole flow give on real classification tasks?

    python -m benchmarks.real_tasks.run OUTPUT FLAGS

Runs `hf-ensemble run FLAGS`, which resumes where it was stopped, and keeps its results without the folder of the model.
"""

import json
from pathlib import Path

from ..common import make_parser, write_results
from ..trainers import run_command
from .table import table


def without_paths(results: dict) -> dict:
    """The results with the model's name in place of its folder."""
    model = results["configuration"]["model"]
    configuration = {**results["configuration"], "model": {**model, "name": Path(model["name"]).name}}
    return {**results, "configuration": configuration}


def main() -> None:
    own, flags = make_parser(__file__, __doc__).parse_known_args()
    results = json.loads((run_command("run", flags) / "results.json").read_text())
    write_results(own.output, without_paths(results), table)


if __name__ == "__main__":
    main()
