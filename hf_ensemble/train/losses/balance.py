"""Weights of the tasks' losses, and the coefficients that a step's tokens get by them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .convergence import convergence_weights


class TaskBalance:
    """Weight of each task's mean loss in a step: equal ones, or by the convergence of their evaluation losses.

    Args:
        names (`Sequence[str]`): the tasks.
        window (`int`, *optional*): see [`convergence_weights`]; weights are equal without.
    """

    def __init__(self, names: Sequence[str], window: int | None = None):
        self.names = list(names)
        self.window = window
        self._evaluations: dict[int, list[float]] = {}
        self.weights = [1.0 / len(self.names)] * len(self.names)

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """Take evaluation losses by task into account; a second evaluation at a step replaces the first."""
        if self.window is not None:
            self._evaluations[step] = [float(losses[name]) for name in self.names]
            self._update()

    def _update(self) -> None:
        steps = sorted(self._evaluations)
        rows = [self._evaluations[step] for step in steps]
        self.weights = convergence_weights(rows, steps, self.window).tolist()

    def coefficients(self, counts: torch.Tensor) -> torch.Tensor:
        """What each token's loss is multiplied with, by its task, so that the sum is the weighted mean over tasks.

            loss = sum_k w_k mean_{tokens of k} loss / sum_k w_k      over the tasks k of the step

        as in MFTCoder (arXiv 2311.02303), whose weights are equal.

        Args:
            counts (`torch.Tensor` of shape `(K,)`): tokens of each task in the whole step.
        """
        weights = torch.tensor(self.weights, device=counts.device) * (counts > 0)
        return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny) / counts.clamp(min=1)

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"names": self.names, "evaluations": [[step, *own] for step, own in self._evaluations.items()]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same tasks."""
        if state["names"] == self.names and state["evaluations"] and self.window is not None:
            self._evaluations = {int(step): own for step, *own in state["evaluations"]}
            self._update()
