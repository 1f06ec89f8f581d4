"""Weights that do not overfit few rows: candidates averaged by their cross-validated losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from ..._settings import checked_mapping
from ...errors import EnsembleError
from ..members import check_weights
from .collector import CollectedAnswers
from .convex import minimize_convex
from .objectives import CrossValidation, FittedWeights

UNIFORM, OWN, BEST, FITTED, CHOSEN, UNSCALED = "uniform", "own", "best", "fitted", "chosen", "unscaled"
# Before the name of an adapter alone, which has no space in it: none is called like another candidate.
_ADAPTER = "adapter"
# Shares of an anchor that the fitted weights are shrunk by.
_SHRINKAGES = (0.25, 0.5, 0.75)
# Standard deviation of the prior on the logarithm of the scale: few rows leave the logits as sharp as they are.
_SCALE_SPREAD = 0.3
_FOLD_TOLERANCE = 1e-8


def check_own_adapters(
    own_adapters: Mapping[str, Mapping[str, float]] | None, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Raise `EnsembleError` for weights, by task, of unknown adapters or that cannot be one point of the simplex."""
    found = checked_mapping("own_adapters", own_adapters or {}, EnsembleError)
    check_weights(found, list(names), "own_adapters")
    for task, own in found.items():
        if min(own.values()) < 0 or abs(sum(own.values()) - 1) > 1e-6:
            raise EnsembleError(f"Expected own_adapters of {task!r} to be shares whose sum is 1, found {dict(own)}.")
    return {task: dict(own) for task, own in found.items()}


def cross_validated_weights(
    answers: CollectedAnswers,
    names: Sequence[str],
    combination: str,
    optimum: FittedWeights,
    own: Mapping[str, float] | None = None,
    min_weight: float = 0.0,
    num_folds: int = 5,
    seed: int = 0,
) -> FittedWeights:
    """Weights for rows like these, rather than for these rows.

    The candidates are equal weights, every adapter alone, the optimum on the rows, and this optimum shrunk towards
    equal weights, the task's own adapters and whichever simple candidate is best. Each is found anew without each fold
    of the rows and scored on it. The result is the mean of the candidates with shares in proportion to the likelihood
    of the left-out answers, exp(-n loss) for n answer tokens (pseudo-BMA,
    [1704.02030](https://arxiv.org/abs/1704.02030)): a clear winner takes all, and differences that are noise are
    averaged over.

    A scale of the combined logits is fitted last, under a prior that keeps it near 1, and used where it lowers the
    cross-validated loss by more than the standard error of the difference over the rows.

    Args:
        answers (`CollectedAnswers`): what `m` adapters say of the rows.
        names (`Sequence[str]`): names of the adapters.
        combination (`str`): `logits`, `log_probs` or `probs`; the latter has no scale.
        optimum (`FittedWeights`): the optimum on all rows.
        own (`dict[str, float]`, *optional*): shares of the adapters that were trained for the task.
        min_weight (`float`, *optional*, defaults to 0.0): on the simplex, lighter adapters are left out.
        num_folds (`int`, *optional*, defaults to 5): at most one per row.
        seed (`int`, *optional*, defaults to 0): of the folds.

    Returns:
        [`FittedWeights`]: `loss` is that of the scaled weights on the rows, and `gap` bounds its distance from the
        least loss of any weights. A single row gets its own adapters, or equal weights.
    """
    anchor = None if own is None else np.array([own.get(name, 0.0) for name in names])
    search = _Search(answers, names, combination, optimum, anchor, min_weight)
    size = answers.num_rows
    if size < 2:
        return search.result(search.candidates(None).get(OWN, np.full(len(names), 1 / len(names))), 1.0, None)
    order = np.random.default_rng(seed).permutation(size)
    folds = [np.sort(fold) for fold in np.array_split(order, min(num_folds, size))]
    found = [search.candidates(np.setdiff1d(order, fold)) for fold in folds]
    held_out = [search.losses(fold, np.stack(list(own.values()))) for fold, own in zip(folds, found)]
    losses = dict(zip(found[0], np.concatenate(held_out, axis=1).mean(1).tolist()))
    shares = _shares(losses, len(answers.targets))
    weights, by_fold = search.averaged(search.candidates(None), shares), [search.averaged(f, shares) for f in found]
    plain = np.concatenate([search.losses(fold, own[None])[0] for fold, own in zip(folds, by_fold)])
    losses[CHOSEN], scale = float(plain.mean()), 1.0
    if combination != "probs":
        scaled = np.concatenate(
            [
                search.losses(fold, search.scale(np.setdiff1d(order, fold), own) * own[None])[0]
                for fold, own in zip(folds, by_fold)
            ]
        )
        gains = plain - scaled
        if gains.mean() > gains.std(ddof=1) / size**0.5:
            scale = search.scale(None, weights)
            losses[UNSCALED], losses[CHOSEN] = losses[CHOSEN], float(scaled.mean())
    return search.result(weights, scale, CrossValidation(losses, shares))


@dataclass(frozen=True)
class _Search:
    """The candidates, on some of the rows or all of them (`None`)."""

    answers: CollectedAnswers
    names: Sequence[str]
    combination: str
    optimum: FittedWeights
    own: np.ndarray | None
    min_weight: float

    def candidates(self, rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """Weights by name."""
        size, answers, fitted = len(self.names), self._of(rows), self.optimum.weights
        alone = {f"{_ADAPTER} {name}": own for name, own in zip(self.names, np.eye(size))}
        found = {UNIFORM: np.full(size, 1 / size), **alone}
        losses = answers.row_losses(np.stack(list(found.values())), self.combination).mean(1)
        if rows is not None:
            objective = answers.objective(self.combination)
            fitted, _, _ = minimize_convex(objective, fitted, self.optimum.constraint, tolerance=_FOLD_TOLERANCE)
        anchors = {UNIFORM: found[UNIFORM], BEST: list(found.values())[int(losses.argmin())]}
        if self.own is not None:
            anchors[OWN] = found[OWN] = self.own
        found[FITTED] = fitted
        for name, anchor in anchors.items():
            for share in _SHRINKAGES:
                found[f"{FITTED}, {share} {name}"] = (1 - share) * fitted + share * anchor
        return found

    def losses(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Loss of each of these rows, `(J, rows)`, with weights `(J, m)`."""
        return self._of(rows).row_losses(weights, self.combination)

    def averaged(self, candidates: Mapping[str, np.ndarray], shares: Mapping[str, float]) -> np.ndarray:
        """The mean of the candidates, on the simplex without light adapters."""
        weights = sum(share * candidates[name] for name, share in shares.items())
        if self.optimum.constraint != "simplex":
            return weights
        # The heaviest stays.
        kept = np.where(weights < min(self.min_weight, weights.max()), 0.0, weights)
        return kept / kept.sum()

    def scale(self, rows: np.ndarray | None, weights: np.ndarray) -> float:
        """The most probable scale of the combined logits; before any row is seen, its logarithm is normal around 0."""
        own = self._of(rows).combined(weights)
        penalty = 1 / (2 * own.num_rows * _SCALE_SPREAD**2)

        def loss(log_scale: float) -> float:
            return float(own.row_losses(np.exp([[log_scale]]), self.combination).mean()) + penalty * log_scale**2

        return float(np.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-5}).x))

    def result(self, weights: np.ndarray, scale: float, validation: CrossValidation | None) -> FittedWeights:
        """The weights, with the losses that the optimum was compared with."""
        loss = float(self.answers.row_losses(scale * weights[None], self.combination).mean())
        gap = loss - (self.optimum.loss - self.optimum.gap)
        return replace(self.optimum, weights=weights, loss=loss, gap=gap, scale=scale, validation=validation)

    def _of(self, rows: np.ndarray | None) -> CollectedAnswers:
        return self.answers if rows is None else self.answers.of_rows(rows)


def _shares(losses: Mapping[str, float], tokens: int) -> dict[str, float]:
    gaps = np.array(list(losses.values())) - min(losses.values())
    shares = np.exp(-tokens * gaps)
    return dict(zip(losses, (shares / shares.sum()).tolist()))
