"""A boosting step in the linearised model equals a dense oracle, whatever the order of the rows."""

import numpy as np
import pytest
from scipy.optimize import minimize

from hf_ensemble.errors import EstimationError
from hf_ensemble.estimate import linear_step

L2 = 0.3


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(24, 40)).astype(np.float32)
    return features, generator.normal(size=24) * 2, generator.integers(1, 5, 24).astype(float)


def oracle(features, margin, weights, method):
    """The minimum over all coefficients, without components."""
    x, shares = features.astype(np.float64), weights / weights.sum()

    def objective(w):
        z = x @ w
        if method == "surrogate":
            wrong = 1 / (1 + np.exp(margin + z))
            value, slope = shares @ np.logaddexp(0, -(margin + z)), -shares * wrong
        else:
            error = z - 1 / (1 + np.exp(margin))
            value, slope = shares @ error**2, 2 * shares * error
        return value + L2 * w @ w, x.T @ slope + 2 * L2 * w

    return minimize(objective, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-10}).x


@pytest.mark.parametrize("method", ["surrogate", "ridge"])
def test_a_step_equals_the_dense_optimum_in_both_of_its_forms(rows, method):
    features, margin, weights = rows
    step = linear_step(features, margin, L2, method, weights)
    expected = oracle(features, margin, weights, method)
    assert step.coefficients == pytest.approx(expected, abs=2e-5)
    assert features.T @ step.row_coefficients == pytest.approx(expected, abs=2e-5)


def test_fewer_components_keep_the_two_forms_the_same(rows):
    features, margin, _ = rows
    for given in (features, features[:, :10]):
        step = linear_step(given, margin, L2, num_components=6)
        assert given.T @ step.row_coefficients == pytest.approx(step.coefficients, abs=1e-5)


def test_the_order_of_the_rows_does_not_matter_and_their_alignment_does(rows):
    features, margin, weights = rows
    order = np.random.default_rng(1).permutation(len(margin))
    step = linear_step(features, margin, L2, "surrogate", weights)
    other = linear_step(features[order], margin[order], L2, "surrogate", weights[order])
    assert other.coefficients == pytest.approx(step.coefficients, abs=1e-5)
    assert other.row_coefficients == pytest.approx(step.row_coefficients[order], abs=1e-5)
    wrong = linear_step(features, margin[order], L2, "surrogate", weights)
    assert np.abs(wrong.coefficients - step.coefficients).max() > 1e-2


def test_rows_that_are_answered_well_count_little(rows):
    features, margin, _ = rows
    margin = margin.copy()
    margin[0] = 20.0
    step = linear_step(features, margin, L2)
    assert abs(step.row_coefficients[0]) < 1e-6 * np.abs(step.row_coefficients).max()


def test_bad_arguments_are_refused(rows):
    features, margin, _ = rows
    with pytest.raises(EstimationError, match="method has to be one of"):
        linear_step(features, margin, L2, "lasso")
    with pytest.raises(EstimationError, match="Expected finite margins"):
        linear_step(features, np.where(np.arange(len(margin)) == 3, np.nan, margin), L2, "ridge")
