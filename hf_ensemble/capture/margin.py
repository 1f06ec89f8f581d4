"""The margin of an example: the log-odds of its answer."""

from typing import Literal

import torch

from ..errors import ConfigurationError
from ..tasks import AnswerScores

MarginKind = Literal["geometric_mean", "mean_log_odds"]
MARGIN_KINDS: tuple[str, ...] = ("geometric_mean", "mean_log_odds")

# The nearest float32 below zero that keeps log(1 - p) finite and its derivative within float32's range.
_LARGEST_LOG_PROB = -1e-6


def log_odds(log_prob: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p, finite for p near 0 and 1. Any shape, float32."""
    log_prob = log_prob.float().clamp(max=_LARGEST_LOG_PROB)
    return log_prob - torch.log(-torch.expm1(log_prob))


def margins(scores: AnswerScores, kind: MarginKind = "geometric_mean") -> torch.Tensor:
    """Margin of each example, `(B,)` float32.

    `"geometric_mean"`: log(q / (1 - q)) with q the geometric mean of the answer tokens' probabilities, so that
    log(1 + exp(-margin)) is the example's mean token loss. `"mean_log_odds"`: the mean of the tokens' log-odds, as in
    the code of GradEx (arXiv 2409.19458). Both are the papers' log(p / (1 - p)) for an answer of one token.

    Raises:
        `ConfigurationError`: for another kind.
    """
    if kind == "geometric_mean":
        return log_odds(-scores.loss)
    if kind == "mean_log_odds":
        return scores.mean_over_tokens(log_odds(scores.log_probs))
    raise ConfigurationError(f"margin has to be one of {MARGIN_KINDS}, found {kind!r}.")
