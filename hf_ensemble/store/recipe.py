"""How a training goes on from where its gradients were captured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigurationError

# As many as a replay needs, and few enough for a manifest.
_STRETCHES = 200


@dataclass(frozen=True)
class TrainingRecipe:
    """What decides how far a training on all tasks goes.

    Args:
        learning_rates (`Sequence[float]`):
            Of every optimizer step, in order. Of a long training, what is kept are their sums over 200 stretches.
        batch_size (`int`): rows of an optimizer step, over all devices.
        num_parameters (`float`, *optional*):
            Of Adam and its kin: how many parameters take full steps, see [`Preconditioner.num_moving`]. `None` for
            plain gradient descent.
        input_gain (`float`, *optional*, defaults to 0.0):
            How much the response of a fresh LoRA's A to an input grows, relative to its own, per unit that Adam moves
            all entries of A in one direction, see [`fresh_lora_gain`]; 0 for other adapters.
        fixed_steps (`bool`, *optional*, defaults to `False`):
            Whether every training takes the same number of steps, whatever it trains on (`max_steps`).

    Raises:
        `ConfigurationError`: for a recipe without steps, or with values that are not positive.
    """

    learning_rates: Sequence[float]
    batch_size: int
    num_parameters: float | None = None
    input_gain: float = 0.0
    fixed_steps: bool = False

    def __post_init__(self):
        rates = np.asarray(self.learning_rates, dtype=np.float64)
        if rates.ndim != 1 or not len(rates) or not np.isfinite(rates).all() or (rates < 0).any() or not rates.any():
            raise ConfigurationError("A recipe needs the learning rate of every step, not negative and not all zero.")
        if self.batch_size < 1 or (self.num_parameters is not None and self.num_parameters <= 0):
            raise ConfigurationError(
                f"Expected a positive batch_size and num_parameters, found {self.batch_size}, {self.num_parameters}."
            )
        if not self.input_gain >= 0:
            raise ConfigurationError(f"Expected an input_gain of 0 or more, found {self.input_gain}.")
        stretches = np.array_split(rates, min(len(rates), _STRETCHES))
        object.__setattr__(self, "learning_rates", [float(stretch.sum()) for stretch in stretches])

    def shortened(self, share: float) -> "TrainingRecipe":
        """The same training over a share of the rows."""
        return (
            self if self.fixed_steps else replace(self, learning_rates=[share * rate for rate in self.learning_rates])
        )
