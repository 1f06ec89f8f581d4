"""Diagonal scaling of gradients that turns an adaptive optimizer's steps into gradient steps."""

from collections.abc import Mapping

import numpy as np
import torch

from ..errors import CaptureError

PRECONDITIONERS: tuple[str, ...] = ("adam", "optimizer", "none")

# Fraction of their mean that is added to the second moments, so that parameters with almost no gradient do not
# outweigh all others.
_FLOOR = 1e-3


class Preconditioner:
    """Multiplies every parameter's gradient by s = v^(-1/4), with v the second moments of the training gradients.

    Adam (Kingma and Ba 2015) moves along g / sqrt(v). In the coordinates theta / s, whose gradients are s g, this is a
    step along the gradient, so the shortest update with a given effect, which the surrogate's penalty prefers, points
    where training goes. An update is multiplied by s once more to return to the parameters' own coordinates.

    Args:
        scales (`dict[str, torch.Tensor]` or `dict[str, np.ndarray]`): s of each parameter, by name, in its shape.
    """

    def __init__(self, scales: Mapping[str, torch.Tensor | np.ndarray]):
        self.scales = {name: torch.as_tensor(scale) for name, scale in scales.items()}

    @classmethod
    def from_second_moments(cls, moments: Mapping[str, torch.Tensor]) -> "Preconditioner":
        """Create from sums or means of squared gradients by parameter; the scale is 1 where v equals its mean.

        The mean leaves out entries without a gradient, such as those of a fresh LoRA's A, whose B is zero.

        Raises:
            `CaptureError`: when no parameter has a gradient.
        """
        # Not every device has float64.
        moments = {name: moment.cpu() for name, moment in moments.items()}
        total = sum(float(moment.double().sum()) for moment in moments.values())
        if not total:
            raise CaptureError(
                "Expected a training row with a finite and nonzero gradient, found none. Check that the adapter is "
                "active, and the model's precision (float16 weights overflow; use bfloat16 or float32)."
            )
        mean = total / sum(int(moment.count_nonzero()) for moment in moments.values())
        return cls({name: (moment / mean + _FLOOR) ** -0.25 for name, moment in moments.items()})

    @classmethod
    def from_optimizer(
        cls, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
    ) -> "Preconditioner":
        """Create from the second moments of Adam or a related optimizer.

        Args:
            optimizer (`torch.optim.Optimizer`): the optimizer, after its first step.
            parameters (`dict[str, nn.Parameter]`): trainable parameters by name.

        Raises:
            `CaptureError`: when the optimizer has no elementwise second moments of a parameter.
        """
        moments = {}
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})
            found = sorted(state) or "nothing"
            moment = state.get("exp_avg_sq")
            if moment is None or moment.shape != parameter.shape:
                raise CaptureError(
                    f"{type(optimizer).__name__} has no second moments of {name!r}: expected exp_avg_sq in the "
                    f"parameter's shape, found {found}. Adam and AdamW have them from the first step on; with another "
                    "optimizer, or before the first step, set preconditioner='adam' or 'none'."
                )
            moments[name] = moment.detach().float()
        return cls.from_second_moments(moments)

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Multiply a parameter's gradients or update `(..., *shape)` by s."""
        scale = self.scales[name]
        if scale.device != tensor.device:
            self.scales[name] = scale = scale.to(tensor.device)
        return tensor * scale.to(tensor.dtype)

    def num_effective_parameters(self) -> float:
        """Effective number of parameters that take full steps of Adam: the sum of sqrt(v / mean v).

        A squared gradient norm in the scaled coordinates is the mean second moment times this number.
        """
        return float(
            sum((scale.cpu().double() ** -4 - _FLOOR).clamp(min=0).sqrt().sum() for scale in self.scales.values())
        )
