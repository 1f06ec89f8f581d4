"""A training replayed on the linearised model."""

import numpy as np
import pytest
import torch

from hf_ensemble import FeatureTable, ObservedRun, SubsetEstimator, TrainingRecipe
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate.replay import replayed_coefficients


def rows(n=240, d=60, seed=0):
    """A linear world: features in two tasks, margins near zero, answers that a hidden direction decides in part."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=d) / np.sqrt(d)
    raw = generator.normal(size=(n, d))
    sign = np.where(raw @ hidden + generator.normal(size=n) > 0, 1.0, -1.0)
    return sign[:, None] * raw, 0.1 * generator.normal(size=n)


def loss(margin, features, w):
    return float(np.logaddexp(0, -(margin + features @ w)).mean())


def test_plain_gradient_descent_is_replayed_step_by_step():
    x, m = rows()
    rates = np.linspace(0.5, 0.0, 30)
    w = np.zeros(x.shape[1])
    for rate in rates:
        w += rate * (1 / (1 + np.exp(m + x @ w))) @ x / len(x)
    scale = 3.0
    found = replayed_coefficients(x / scale, m, np.ones(len(x)), (x**2).sum(1), scale, TrainingRecipe(rates, 8))
    # Coefficients of the features divided by the scale.
    assert np.allclose(found / scale, w)


def test_weights_draw_rows_more_often():
    x, m = rows()
    weights = np.where(np.arange(len(x)) < 40, 3.0, 1.0)
    repeated = np.repeat(np.arange(len(x)), weights.astype(int))
    recipe = TrainingRecipe([0.01] * 50, 8, 60.0)
    one = replayed_coefficients(x, m, weights, (x**2).sum(1), 1.0, recipe)
    other = replayed_coefficients(
        x[repeated], m[repeated], np.ones(len(repeated)), (x[repeated] ** 2).sum(1), 1.0, recipe
    )
    assert np.allclose(one, other)


def test_rows_of_larger_losses_count_more_in_a_batch():
    x, m = rows()
    tokens = 1.0 + np.arange(len(x)) % 3
    one = replayed_coefficients(x, m, np.ones(len(x)), (x**2).sum(1), 1.0, TrainingRecipe([0.5] * 9, 8), tokens)
    # To plain gradient descent a row that counts twice is a row that is drawn twice.
    two = replayed_coefficients(x, m, tokens, (x**2).sum(1), 1.0, TrainingRecipe([0.5] * 9, 8))
    assert np.allclose(one, two)
    # Adam divides by its batches' gradients, which vary more.
    recipe = TrainingRecipe([0.01] * 9, 8, 60.0)
    one, two = (
        replayed_coefficients(x, m, *pair)
        for pair in ((np.ones(len(x)), (x**2).sum(1), 1.0, recipe, tokens), (tokens, (x**2).sum(1), 1.0, recipe))
    )
    assert 0.9 < np.linalg.norm(one) / np.linalg.norm(two) < 1


@pytest.mark.parametrize("rate", [0.002, 0.01])
def test_it_goes_as_far_as_adam(rate):
    x, m = rows(n=320)
    epochs, batch = 3, 16
    steps = epochs * len(x) // batch
    rates = rate * (1 - np.arange(steps) / steps)
    ends = []
    for seed in range(3):
        w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=rate)
        order = np.random.default_rng(seed)
        batches = [part for _ in range(epochs) for part in np.split(order.permutation(len(x)), len(x) // batch)]
        for own_rate, part in zip(rates, batches):
            optimizer.param_groups[0]["lr"] = own_rate
            optimizer.zero_grad()
            z = torch.from_numpy(m[part]) + torch.from_numpy(x[part]) @ w
            torch.nn.functional.softplus(-z).mean().backward()
            optimizer.step()
        ends.append(loss(m, x, w.detach().numpy()))
    # The features are as large in every coordinate: no preconditioner is needed, and all parameters take full steps.
    recipe = TrainingRecipe(rates, batch, x.shape[1])
    found = loss(m, x, replayed_coefficients(x, m, np.ones(len(x)), (x**2).sum(1), 1.0, recipe))
    start = loss(m, x, np.zeros(x.shape[1]))
    assert abs((start - found) / (start - np.mean(ends)) - 1) < 0.2


def test_many_steps_are_taken_together():
    x, m = rows()
    few, many = (
        loss(m, x, replayed_coefficients(x, m, np.ones(len(x)), (x**2).sum(1), 1.0, TrainingRecipe(rates, 16, 60.0)))
        for rates in ([0.02] * 200, [0.0004] * 10_000)
    )
    assert abs(few - many) < 1e-3


@pytest.mark.parametrize("num_parameters, rate, steps", [(None, 1.0, 20_000), (None, 4.0, 10_000), (1e6, 1e-3, 10_000)])
def test_steps_that_are_taken_together_do_not_overshoot(num_parameters, rate, steps):
    x, m = rows(n=600, d=40)
    x = x * np.arange(1, 41) ** -0.5
    x /= np.linalg.norm(x, axis=1).mean()
    norms = (x**2).sum(1)
    recipe = TrainingRecipe([rate * steps / 200] * 200, 16, num_parameters)
    found = loss(m, x, replayed_coefficients(x, m, np.ones(len(x)), norms, 1.0, recipe))
    # So long a training ends at the optimum of the linear model, which gradient flow never overshoots.
    w = np.zeros(40)
    for _ in range(20_000):
        w += 2.0 * (1 / (1 + np.exp(m + x @ w))) @ x / len(x)
    assert found == pytest.approx(loss(m, x, w), abs=3e-3)


def tables(recipe=None, **kwargs):
    x, m = rows(n=400)
    names = ("a", "b")
    parts = [
        FeatureTable(x[part].astype(np.float32), m[part], np.arange(200) % 2, names, np.arange(200).astype(str))
        for part in (slice(200), slice(200, 400))
    ]
    return SubsetEstimator(*parts, recipe=recipe, **kwargs)


def test_a_longer_training_has_a_smaller_penalty():
    short, long = (tables(TrainingRecipe([rate] * 40, 16, 60.0)) for rate in (1e-3, 1e-2))
    assert short.regularization.evidence == long.regularization.evidence == "replay"
    assert long.regularization.l2_scale < 0.5 * short.regularization.l2_scale
    assert short.regularization.criterion < 0.02 and long.regularization.criterion < 0.05
    assert np.isnan(long.predict_subsets([["a"]]).loss_low).all()


def test_trainings_of_equal_length_have_equal_penalties():
    estimators = [tables(TrainingRecipe([1e-2] * 40, 16, 60.0, fixed_steps=fixed)) for fixed in (False, True)]
    both, one = np.ones((1, 2)), np.array([[1.0, 0.0]])
    assert np.allclose(*(estimator.predict(both, 1.0).coefficients for estimator in estimators))
    short, long = (np.linalg.norm(estimator.predict(one, 1.0).coefficients) for estimator in estimators)
    assert long > 1.2 * short


def test_observed_runs_are_better_evidence():
    free = tables(TrainingRecipe([1e-3] * 40, 16, 60.0))
    seen = free.predict(np.ones((1, 2)), l2_scale=5.0).loss[0]
    runs = [ObservedRun({"a": 1.0, "b": 1.0}, dict(zip("ab", seen)))]
    found = tables(TrainingRecipe([1e-3] * 40, 16, 60.0), observed_runs=runs).regularization
    assert found.evidence == "observed_runs" and found.l2_scale == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize(
    "arguments",
    [([], 4), ([0.0], 4), ([-1.0, 1.0], 4), ([np.nan], 4), ([1.0], 0), ([1.0], 4, -2.0), ([1.0], 4, 2.0, -1.0)],
)
def test_bad_recipes_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="Expected the learning rate|has to be a"):
        TrainingRecipe(*arguments)
