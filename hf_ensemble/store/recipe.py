"""The training that continues from where the gradients were captured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .._settings import check_at_least, check_flag, check_number
from ..errors import ConfigurationError

# Enough for a replay, and few enough for a manifest.
_NUM_SEGMENTS = 200


@dataclass(frozen=True)
class TrainingRecipe:
    """What determines how far a training on all tasks moves the parameters.

    Args:
        learning_rates (`Sequence[float]`):
            Learning rate of every optimizer step, in order. Long trainings are stored as sums over 200 segments.
        batch_size (`int`): number of rows per optimizer step, over all devices.
        num_parameters (`float`, *optional*):
            Effective number of parameters that take full steps of Adam or a related optimizer, see
            [`Preconditioner.num_effective_parameters`]. `None` for plain gradient descent.
        input_gain (`float`, *optional*, defaults to 0.0):
            Relative growth of a fresh LoRA's A x when Adam moves all entries of A by one unit along the signs of x, see
            [`fresh_lora_gain`]; 0 for other adapters.
        fixed_steps (`bool`, *optional*, defaults to `False`):
            Whether every training takes the same number of steps regardless of its data (`max_steps`).

    Raises:
        `ConfigurationError`: for a recipe without steps, and values out of range.
    """

    learning_rates: Sequence[float]
    batch_size: int
    num_parameters: float | None = None
    input_gain: float = 0.0
    fixed_steps: bool = False

    def __post_init__(self):
        check_at_least("batch_size", self.batch_size, 1)
        check_number("num_parameters", self.num_parameters, 0, above=True, optional=True)
        check_number("input_gain", self.input_gain, 0)
        check_flag("fixed_steps", self.fixed_steps)
        try:
            rates = np.asarray(self.learning_rates, dtype=np.float64)
        except (TypeError, ValueError):
            rates = np.zeros(0)
        if rates.ndim != 1 or not len(rates) or not np.isfinite(rates).all() or (rates < 0).any() or not rates.any():
            raise ConfigurationError(
                "Expected the learning rate of at least one step, none negative and not all zero, found "
                f"{str(self.learning_rates):.80}."
            )
        segments = np.array_split(rates, min(len(rates), _NUM_SEGMENTS))
        object.__setattr__(self, "learning_rates", [float(segment.sum()) for segment in segments])

    def shortened(self, share: float) -> "TrainingRecipe":
        """The same training on a share of the rows."""
        return self if self.fixed_steps else self.of_length(share)

    def of_length(self, length: float) -> "TrainingRecipe":
        """A training of another number of epochs or steps, in multiples of this one's, with the schedule stretched."""
        return replace(self, learning_rates=[length * rate for rate in self.learning_rates])
