"""Write the tasks and the base model of `hf-ensemble demo`, as studies that take folders read them.

    python -m benchmarks.inputs.demo_world --output_dir WORLD [--seed 0]

The tasks are WORLD/tasks/NAME/{train,validation,test}.jsonl, the model is WORLD/model.
"""

from pathlib import Path

from hf_ensemble.cli.demo.flow import base_model
from hf_ensemble.cli.demo.world import build_world

from ..common import make_parser, write_rows


def main() -> None:
    parser = make_parser(__file__, __doc__, output=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="where tasks and model go")
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    arguments = parser.parse_args()
    world = build_world(arguments.seed)
    for name, splits in world.tasks().items():
        for split, rows in splits.items():
            write_rows(arguments.output_dir / "tasks" / name / f"{split}.jsonl", rows)
    base_model(world, arguments.output_dir / "model", arguments.seed)


if __name__ == "__main__":
    main()
