"""Weights that do not overfit few rows: candidates averaged by their cross-validated losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..._settings import checked_mapping
from ...errors import EnsembleError
from ...estimate.output_scale import SCALE_SPREAD, most_probable_scales
from ..members import check_weights
from .collector import CollectedAnswers
from .convex import minimize_convex
from .objectives import CrossValidation, FittedWeights

UNIFORM, OWN, BEST, FITTED, CHOSEN, UNSCALED = "uniform", "own", "best", "fitted", "chosen", "unscaled"
# Shares of an anchor that the fitted weights are shrunk by.
_SHRINKAGES = (0.25, 0.5, 0.75)
_FOLD_TOLERANCE = 1e-8


def adapter_candidate(name: str) -> str:
    """The candidate of an adapter alone. Names of adapters have no space: none is called like another candidate."""
    return f"adapter {name}"


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
    equal weights, the task's own adapters and whichever simple candidate is best. On the simplex, the combined logits
    of each have a scale, the inverse of a temperature (Guo et al. 2017,
    [1706.04599](https://arxiv.org/abs/1706.04599)), under a prior that keeps it near 1: an adapter that is right and
    too sure of itself is not taken for a bad one. Each is found anew without each fold of the rows and scored on it.
    The result is the mean of the candidates with shares in proportion to the likelihood of the left-out answers,
    exp(-n loss) for n answer tokens (pseudo-BMA, [1704.02030](https://arxiv.org/abs/1704.02030)): a clear winner takes
    all, and differences that are noise are averaged over.

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
        [`FittedWeights`]: `loss` is that of the scaled weights on the rows, and `gap` bounds how far they are, without
        their scale, above the least loss of any weights. A single row gets its own adapters, or equal weights.
    """
    anchor = None if own is None else np.array([own.get(name, 0.0) for name in names])
    search = _Search(answers, names, combination, optimum, anchor, min_weight)
    size = answers.num_rows
    if size < 2:
        return search.result(np.full(len(names), 1 / len(names)) if anchor is None else anchor, 1.0, None)
    order = np.random.default_rng(seed).permutation(size)
    folds = [np.sort(fold) for fold in np.array_split(order, min(num_folds, size))]
    *found, everywhere = search.candidates([*(np.setdiff1d(order, fold) for fold in folds), None])
    held_out = [search.losses(fold, np.stack(list(own.values()))) for fold, own in zip(folds, found)]
    losses = dict(zip(found[0], np.concatenate(held_out, axis=1).mean(1).tolist()))
    shares = _shares(losses, len(answers.targets))
    chosen = [search.averaged(own, shares) for own in found]
    losses[CHOSEN] = search.mean_loss(folds, [scale * weights for weights, scale in chosen])
    weights, scale = search.averaged(everywhere, shares)
    if scale != 1.0:
        losses[UNSCALED] = search.mean_loss(folds, [weights for weights, _ in chosen])
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

    def candidates(self, parts: Sequence[np.ndarray | None]) -> list[dict[str, np.ndarray]]:
        """Weights by name, multiplied by their scale, on each of these parts of the rows."""
        size = len(self.names)
        simple = {UNIFORM: np.full(size, 1 / size)}
        simple |= {adapter_candidate(name): own for name, own in zip(self.names, np.eye(size))}
        if self.own is not None:
            simple[OWN] = self.own
        # Their logits are combined once for all parts.
        scales = {own.tobytes(): self._scales(own, parts) for own in simple.values()}
        scaled = {name: np.outer(scales[own.tobytes()], own) for name, own in simple.items()}
        found = []
        for place, rows in enumerate(parts):
            fitted, own = self._fitted(rows), {name: weights[place] for name, weights in scaled.items()}
            losses = self._of(rows).row_losses(np.stack(list(own.values())), self.combination).mean(1)
            anchors = {UNIFORM: UNIFORM, BEST: list(own)[int(losses.argmin())]}
            if self.own is not None:
                anchors[OWN] = OWN
            own[FITTED] = fitted
            for name, anchor in anchors.items():
                for share in _SHRINKAGES:
                    own[f"{FITTED}, {share} {name}"] = (1 - share) * fitted + share * own[anchor]
            found.append(own)
        return found

    def _fitted(self, rows: np.ndarray | None) -> np.ndarray:
        """The optimum on some rows, multiplied by its scale."""
        weights = self.optimum.weights
        if rows is not None:
            objective = self._of(rows).objective(self.combination)
            weights, _, _ = minimize_convex(objective, weights, self.optimum.constraint, tolerance=_FOLD_TOLERANCE)
        if not self._has_scale:
            return weights
        combined = self.answers.combined(weights)
        return most_probable_scale(combined if rows is None else combined.of_rows(rows)) * weights

    def losses(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Loss of each of these rows, `(J, rows)`, with weights `(J, m)`."""
        return self._of(rows).row_losses(weights, self.combination)

    def mean_loss(self, folds: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> float:
        """Mean loss of the folds' rows, each fold with weights `(m,)` of its own."""
        rows = [self.losses(fold, own[None])[0] for fold, own in zip(folds, weights)]
        return float(np.concatenate(rows).mean())

    @property
    def _has_scale(self) -> bool:
        """Weights with any sum have their scale in them, and mean probabilities have none."""
        return self.optimum.constraint == "simplex" and self.combination != "probs"

    def averaged(self, candidates: Mapping[str, np.ndarray], shares: Mapping[str, float]) -> tuple[np.ndarray, float]:
        """The mean of the candidates and its scale, on the simplex without light adapters."""
        weights, scale = sum(share * candidates[name] for name, share in shares.items()), 1.0
        if self.optimum.constraint != "simplex":
            return weights, scale
        if self._has_scale:
            scale = float(weights.sum())
            weights = weights / scale
        # The heaviest stays.
        kept = np.where(weights < min(self.min_weight, weights.max()), 0.0, weights)
        return kept / kept.sum(), scale

    def _scales(self, weights: np.ndarray, parts: Sequence[np.ndarray | None]) -> list[float]:
        """The most probable scale of the combined logits on each part of the rows."""
        if not self._has_scale:
            return [1.0] * len(parts)
        combined = self.answers.combined(weights)
        everywhere = most_probable_scale(combined)
        return [
            everywhere if rows is None else most_probable_scale(combined.of_rows(rows), everywhere) for rows in parts
        ]

    def result(self, weights: np.ndarray, scale: float, validation: CrossValidation | None) -> FittedWeights:
        """The weights, with the losses that the optimum was compared with."""
        both = np.stack([scale * weights, weights])
        loss, plain = self.answers.row_losses(both, self.combination).mean(1).tolist()
        gap = plain - (self.optimum.loss - self.optimum.gap)
        return replace(self.optimum, weights=weights, loss=loss, gap=gap, scale=scale, validation=validation)

    def _of(self, rows: np.ndarray | None) -> CollectedAnswers:
        return self.answers if rows is None else self.answers.of_rows(rows)


def most_probable_scale(answers: CollectedAnswers, start: float = 1.0) -> float:
    """The most probable scale of a single adapter's logits, under the prior of [`SCALE_SPREAD`]."""
    objective = answers.objective("logits")

    def derivatives(log_scales: np.ndarray, _: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.exp(log_scales[0])
        _, slope, curvature = objective(scale)
        return scale * slope[None], scale**2 * curvature + scale * slope

    precision = np.array([1 / (answers.num_rows * SCALE_SPREAD**2)])
    return float(np.exp(most_probable_scales(derivatives, precision, np.log([[start]]))[0, 0]))


def _shares(losses: Mapping[str, float], tokens: int) -> dict[str, float]:
    gaps = np.array(list(losses.values())) - min(losses.values())
    shares = np.exp(-tokens * gaps)
    return dict(zip(losses, (shares / shares.sum()).tolist()))
