"""How well do predictions match real fine-tuning on subsets of the tasks?

    python -m benchmarks.fidelity.run OUTPUT FLAGS

Runs `hf-ensemble fidelity FLAGS`, which resumes an interrupted run, and keeps its report with a table and a picture.
"""

import json
import shutil

from ..common import make_parser, write_results
from ..trainers import run_command
from .table import table


def main() -> None:
    own, flags = make_parser(__file__, __doc__).parse_known_args()
    folder = run_command("fidelity", flags) / "estimate"
    write_results(own.output, json.loads((folder / "fidelity.json").read_text()), table)
    shutil.copy(folder / "fidelity.png", f"{own.output}.png")


if __name__ == "__main__":
    main()
