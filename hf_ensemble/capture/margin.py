"""The margin of an example: the log-odds of its answer."""

import hashlib
import json
from collections.abc import Callable
from typing import Literal

import torch

from .._values import identity_of
from ..errors import ConfigurationError
from ..tasks import AnswerScores, TaskSet

# Maps logits `(B, T, V)` or `(B, num_labels)` and labels `(B, T)` or `(B,)` to one number per example `(B,)`.
OutputFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MarginKind = Literal["geometric_mean", "mean_log_odds"] | OutputFunction
MARGIN_KINDS: tuple[str, ...] = ("geometric_mean", "mean_log_odds")

# Keeps log(1 - p) and its derivative finite in float32.
_LARGEST_LOG_PROB = -1e-6


def check_single_answers(tasks: TaskSet) -> None:
    """Raise `ConfigurationError` for rows with several labels: a margin is of one answer a row."""
    if tasks.is_multi_label:
        raise ConfigurationError(
            f"Gradients are captured of one answer a row, and the rows of {list(tasks)} have several labels each. "
            "Train one model on all datasets, without an adapter, or make a task of each label."
        )


def log_odds(log_prob: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) from log p, finite for p near 0 and 1. Any shape, returns float32."""
    log_prob = log_prob.float().clamp(max=_LARGEST_LOG_PROB)
    return log_prob - torch.log(-torch.expm1(log_prob))


def margins(scores: AnswerScores, kind: MarginKind = "geometric_mean") -> torch.Tensor:
    """Margin of each example, `(B,)` float32.

    `"geometric_mean"`: log(q / (1 - q)) with q the geometric mean of the answer tokens' probabilities, so that
    log(1 + exp(-margin)) is the example's mean token loss. `"mean_log_odds"`: the mean of the tokens' log-odds, as in
    the code of GradEx (arXiv 2409.19458). For an answer of one token, both are log(p / (1 - p)) as in the papers.

    Raises:
        `ConfigurationError`: for an unknown kind.
    """
    if kind == "geometric_mean":
        return log_odds(-scores.loss)
    if kind == "mean_log_odds":
        return scores.mean_over_tokens(log_odds(scores.log_probs))
    raise ConfigurationError(f"margin has to be one of {MARGIN_KINDS}, found {kind!r}.")


def margin_identity(kind: MarginKind) -> str:
    """A name that identifies the margin: for functions, the qualified name and a fingerprint of [`identity_of`]."""
    if isinstance(kind, str):
        return kind
    digest = hashlib.blake2b(json.dumps(identity_of(kind), sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__qualname__)}:{digest}"
