"""`hf-ensemble merge`: the adapters of one task as a plain PEFT adapter."""

from collections.abc import Sequence
from typing import Any

from ..arguments import needed
from ..parsing import parse
from ..saved import loaded_ensemble
from ..saved_arguments import MergeArguments
from ..tables import console


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Merge and save.

    Returns:
        `dict`: folder, rank, relative error and the weights of the merged adapters.

    Raises:
        `HfEnsembleError`: for bad arguments, ensembles and tasks.
    """
    (arguments,), _ = parse([MergeArguments], argv, command="merge")
    needed("merge", ensemble=arguments.ensemble, task=arguments.task)
    merged = loaded_ensemble(arguments, "merge").merge(arguments.task, arguments.rank, arguments.method)
    merged.save_pretrained(arguments.output_dir)
    console().print(
        f"Saved: {arguments.output_dir} (rank {merged.rank}, relative error of the cut {merged.relative_error:.2%})",
        soft_wrap=True,
    )
    return {
        "adapter": arguments.output_dir,
        "rank": merged.rank,
        "relative_error": merged.relative_error,
        "weights": merged.weights,
    }
