"""`hf-ensemble export`: one adapter for each task, for a server."""

from collections.abc import Sequence
from typing import Any

from ...ensemble.saving.export import export_for_servers
from ..arguments import needed
from ..parsing import parse
from ..saved import loaded_ensemble
from ..saved_arguments import ExportArguments
from ..tables import console


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Write the adapters and the line that serves them.

    Returns:
        `dict`: folder of each task's adapter, the largest rank, the command, and what LoRAX would leave out.

    Raises:
        `HfEnsembleError`: for bad arguments and ensembles, and for adapters that vLLM does not serve.
    """
    (arguments,), _ = parse([ExportArguments], argv, command="export")
    needed("export", ensemble=arguments.ensemble)
    ensemble = loaded_ensemble(arguments, "export")
    export = export_for_servers(ensemble, arguments.output_dir, arguments.tasks, arguments.rank, arguments.num_shards)
    console().print(f"{export.command}\nThe same: sh {export.script}", soft_wrap=True)
    for task, obstacles in export.lorax_obstacles.items():
        console().print(f"LoRAX would leave out of {task!r}: {', '.join(obstacles)}.", soft_wrap=True)
    return {
        "adapters": export.adapters,
        "max_lora_rank": export.max_lora_rank,
        "command": export.command,
        "script": export.script,
        "lorax_obstacles": export.lorax_obstacles,
    }
