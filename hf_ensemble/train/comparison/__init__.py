"""The simpler systems that an ensemble has to beat, trained, scored and costed by the same code."""

from .baselines import BASELINES
from .comparison import BaselineComparison

__all__ = ["BASELINES", "BaselineComparison"]
