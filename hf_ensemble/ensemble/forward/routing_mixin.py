"""The weights of a batch's rows: the part of [`PeftEnsembleModel`] that tasks and routings decide."""

from collections.abc import Mapping
from typing import Any

import torch

from ..members import standing_alone
from .combination import SCALED_COMBINATIONS
from .router import PROMPT_INPUTS, known_router, prompt_states
from .routing import check_routing
from .rows import batch_size_of
from .task_weights import Tasks, check_known, tasks_of_rows, weight_rows


class RoutingMixin:
    """Weights of rows of [`PeftEnsembleModel`]."""

    def row_weights(self, task: Tasks, batch_size: int) -> torch.Tensor:
        """Weight of each adapter for each row, `(batch_size, members)`, times the scale of the row's task.

        Args:
            task (`str` or `Sequence[str]`, *optional*): one task for all rows, or one per row. Rows of no known task
                take the default weights.
            batch_size (`int`): number of rows.

        Raises:
            `EnsembleError`: for a list of another length than the batch.
        """
        tasks = tasks_of_rows(task, batch_size)
        weights = weight_rows(tasks, self.weights, self.default_weights, self.adapter_names, self.device)
        if self.combination not in SCALED_COMBINATIONS or not self.scales:
            return weights
        return weights * weights.new_tensor([[self.scales.get(task, 1.0)] for task in tasks])

    def _routed_weights(self, task, routing: str | None, inputs: Mapping[str, Any], labels=None) -> torch.Tensor:
        """[`row_weights`], with rows of no known task as the routing has it."""
        self.check_adapters()
        batch_size = batch_size_of(inputs)
        weights = self.row_weights(task, batch_size)
        routing = routing or self.routing
        check_routing(routing)
        tasks = tasks_of_rows(task, batch_size)
        if routing is None:
            check_known(tasks, self.weights)
        rows = [row for row, name in enumerate(tasks) if name not in self.weights]
        if routing in (None, "default") or not rows:
            return weights
        alone = standing_alone(self.members)
        if routing == "hidden_states":
            own = {key: inputs[key][rows] for key in PROMPT_INPUTS if inputs.get(key) is not None}
            states = self.prompt_states(own, None if labels is None else labels[rows])
            routed = known_router(self.router, len(alone)).weights(states)
        else:
            run = self._combined_forward([self.adapter_names[k] for k in alone])
            routed = run.prompt_weights(rows, inputs, labels, self.routing_temperature)
        weights[rows] = torch.zeros_like(weights[rows]).index_copy(
            1, weights.new_tensor(alone).long(), routed.to(weights)
        )
        return weights

    def prompt_states(self, inputs: Mapping[str, Any], labels: torch.Tensor | None = None) -> torch.Tensor:
        """Mean hidden states of the base model over the prompts of a batch, `(B, H)`; see [`prompt_states`].

        Raises:
            `EnsembleError`: for inputs without `input_ids`.
        """
        return prompt_states(self.model.get_base_model(), inputs, labels)
