"""What all trainings of a process share, kept apart for trainings that take turns."""

import random
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState


class ProcessState:
    """Random states, and what accelerate knows of the accumulation of gradients, as they are now."""

    def __init__(self):
        self._random: tuple[Any, ...] = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._accumulation = _copied(GradientState._shared_state)

    def restore(self) -> None:
        """Put everything back."""
        python, numpy, cpu = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._devices is not None:
            torch.cuda.set_rng_state_all(self._devices)
        current = GradientState._shared_state
        current.clear()
        current.update(self._accumulation)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
