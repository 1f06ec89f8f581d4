"""Merging and serving: the part of [`PeftEnsembleModel`] that makes plain adapters of it."""

from typing import Any

from ...errors import EnsembleError
from ..saving.vllm import vllm_obstacles
from ..saving.vocabulary import is_resized
from .merge import MergedAdapter, merge_adapters


class MergingMixin:
    """Merging of [`PeftEnsembleModel`]."""

    def merge(
        self, task: str | None = None, rank: int | None = None, method: str = "sum", **options: Any
    ) -> MergedAdapter:
        """The adapters of a task as one plain PEFT adapter.

        Args:
            task (`str`, *optional*): task whose weights to use; the default weights if not given.
            rank (`int`, *optional*): largest rank; the result states the error of the truncation. By default the rank
                is the sum of the adapters' ranks, and `sum` and `lines` are exact.
            method (`str`, *optional*, defaults to `"sum"`):
                `sum` is what the combination `weights` computes; `lines` (LiNeS) scales it by depth with `alpha` and
                `beta`; `ties`, `dare_linear`, `dare_ties` (with `density`, and `seed` for DARE), `breadcrumbs` (with
                `drop_smallest` and `drop_largest`) and `pcb` (PCB-Merging, with `density`) merge entry by entry;
                `tsv` (TSV-Merge) and `knots` (KnOTS, with `density`) merge singular directions.
            options: the method's own.

        Returns:
            [`MergedAdapter`]: to save as plain PEFT files, or to add to a model.

        Raises:
            `EnsembleError`: for an unknown task or method, and adapters that have no merged form.
        """
        if task is not None and task not in self.weights:
            raise EnsembleError(f"No weights for the task {task!r}; known: {sorted(self.weights)}.")
        self.check_adapters()
        weights = self.default_weights if task is None else self.weights[task]
        return merge_adapters(self.model, weights, rank, method, self.base_model_reference, **options)

    def vllm_obstacles(self) -> dict[str, list[str]]:
        """For each adapter, why vLLM would refuse it or compute it wrongly; an empty list where it serves it."""
        resized = is_resized(self.model.get_base_model())
        return {name: vllm_obstacles(self.model.peft_config[name], resized) for name in self.adapter_names}
