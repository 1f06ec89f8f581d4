"""The metric in which an adaptive optimizer's steps are gradient steps."""

from collections.abc import Mapping

import numpy as np
import torch

from ..errors import CaptureError

PRECONDITIONERS: tuple[str, ...] = ("adam", "optimizer", "none")

# Share of their mean that is added to the second moments: a parameter that hardly has a gradient is not to outweigh all
# others.
_FLOOR = 1e-3


class Preconditioner:
    """Multiplies every parameter's gradient by s = v^(-1/4), v the second moments of the training gradients.

    Adam (Kingma and Ba 2015) moves along g / sqrt(v). In the coordinates theta / s, whose gradients are s g, that is a
    step along the gradient. There the shortest way to an effect, which the surrogate's penalty prefers, is the way that
    training goes. Back in the parameters' own coordinates a move is multiplied by s again.

    Args:
        scales (`dict[str, torch.Tensor]` or `dict[str, np.ndarray]`): s of each parameter, by name, in its shape.
    """

    def __init__(self, scales: Mapping[str, torch.Tensor | np.ndarray]):
        self.scales = {name: torch.as_tensor(scale) for name, scale in scales.items()}

    @classmethod
    def from_second_moments(cls, moments: Mapping[str, torch.Tensor]) -> "Preconditioner":
        """From sums or means of squared gradients, by parameter. The scales are 1 where v is its mean.

        Parameters without any gradient do not count into the mean: at a fresh LoRA that is A, while B is zero.

        Raises:
            `CaptureError`: when no parameter has a gradient.
        """
        total = sum(float(moment.double().sum()) for moment in moments.values())
        if not total:
            raise CaptureError(
                "No training row has a gradient that is finite and not zero. Check that the adapter is active, and the "
                "model's precision (float16 weights overflow; bfloat16 or float32 do not)."
            )
        mean = total / sum(int(moment.count_nonzero()) for moment in moments.values())
        return cls({name: (moment / mean + _FLOOR) ** -0.25 for name, moment in moments.items()})

    @classmethod
    def from_optimizer(
        cls, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
    ) -> "Preconditioner":
        """From the second moments that Adam or one of its kin has gathered in training.

        Args:
            optimizer (`torch.optim.Optimizer`): after its first step.
            parameters (`dict[str, nn.Parameter]`): the trained parameters, by name.

        Raises:
            `CaptureError`: when the optimizer keeps no second moments of a parameter, entry by entry.
        """
        moments = {}
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})
            found = sorted(state) or "nothing"
            moment = state.get("exp_avg_sq")
            if moment is None or moment.shape != parameter.shape:
                raise CaptureError(
                    f"{type(optimizer).__name__} has no second moments of {name!r} (found {found}; expected "
                    "exp_avg_sq in the parameter's shape). Adam and AdamW keep them from their first step on; "
                    "with another optimizer, or before the first step, set preconditioner='adam' or 'none'."
                )
            moments[name] = moment.detach().float()
        return cls.from_second_moments(moments)

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One parameter's gradients or move `(..., *shape)`, times s."""
        scale = self.scales[name]
        if scale.device != tensor.device:
            self.scales[name] = scale = scale.to(tensor.device)
        return tensor * scale.to(tensor.dtype)

    def num_moving(self) -> float:
        """Sum of sqrt(v / mean v): the parameters that take full steps of Adam, as if their moments were equal.

        A norm in the scaled coordinates, squared, is the mean second moment times this number.
        """
        return float(
            sum((scale.cpu().double() ** -4 - _FLOOR).clamp(min=0).sqrt().sum() for scale in self.scales.values())
        )
