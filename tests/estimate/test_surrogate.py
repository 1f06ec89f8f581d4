import numpy as np
import pytest
import torch

from helpers import oracles
from hf_ensemble.errors import EstimationError
from hf_ensemble.estimate import FeatureReduction, solve_surrogate
from hf_ensemble.estimate.outcomes import predicted_outcomes
from hf_ensemble.estimate.solver.conjugate_gradient import conjugate_gradient
from hf_ensemble.estimate.surrogate import SurrogateProblem

MIXTURES = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1], [0.2, 0.0, 3.0, 1.0], [0, 0, 0, 1e-3]])
PENALTIES = np.array([1e-3, 1e-2, 1e-1, 3e-3, 1.0])


def rows(sizes=(20, 30, 15, 25), k=25, margin=2.0, seed=1):
    """Features, margins and tasks, in no order."""
    rng = np.random.default_rng(seed)
    task = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return rng.normal(size=(len(task), k)), margin * rng.normal(size=len(task)), task


def assert_exact(features, margin, task, mixtures, l2, **options):
    weights = options.get("row_weights", np.ones(len(task)))
    solution = solve_surrogate(features, margin, task, mixtures, l2, tolerance=1e-10, **options)
    assert (solution.gradient_norm <= 1e-10).all()
    for mixture, penalty, w in zip(mixtures, l2, solution.coefficients):
        expected = oracles.fit(features, margin, mixture[task] * weights, penalty)
        assert np.abs(w - expected).max() < 1e-5
        loss = [np.logaddexp(0, -(margin + features @ v)) for v in (w, expected)]
        assert np.abs(loss[0] - loss[1]).max() < 1e-5


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"sizes": (1, 3, 300, 40)},
        {"sizes": (20, 0, 15, 25)},
        {"k": 120},
        {"margin": 10.0},
    ],
    ids=["plain", "unequal_tasks", "task_without_rows", "more_features_than_rows", "large_margins"],
)
def test_surrogate_equals_the_exact_minimiser(shape):
    assert_exact(*rows(**shape), MIXTURES, PENALTIES)


def test_surrogate_is_exact_for_any_penalty_and_weights():
    rng = np.random.default_rng(0)
    mixtures = 10.0 ** rng.uniform(-3, 3, size=(8, 4)) * (rng.random((8, 4)) < 0.6)
    mixtures[mixtures.sum(axis=1) == 0, 0] = 1.0
    assert_exact(*rows(k=12), mixtures, np.logspace(-5, 1, 8))


@pytest.mark.parametrize("sizes", [(20, 30, 15, 25), (20, 0, 15, 25)])
def test_surrogate_is_exact_for_rows_of_different_weights(sizes):
    features, margin, task = rows(sizes)
    tokens = np.random.default_rng(2).integers(1, 30, size=len(task)) / 9.0
    assert_exact(features, margin, task, MIXTURES, PENALTIES, row_weights=tokens)
    with pytest.raises(EstimationError, match="Row weights have to be positive, found 0"):
        SurrogateProblem(features, margin, task, row_weights=np.where(task == 2, 0.0, 1.0))


def test_surrogate_is_exact_for_margins_up_to_30():
    features, _, task = rows()
    margin = np.linspace(-30, 30, len(task))
    assert_exact(features, margin, task, MIXTURES, PENALTIES)


def test_tasks_without_features_stay_at_the_start():
    features, margin, task = rows()
    features[task == 1] = 0.0
    assert_exact(features, margin, task, np.array([[0, 1, 0, 0], [0, 1, 0, 1]]), np.array([1e-9, 1e-2]))


def test_one_subset_alone():
    assert_exact(*rows(), np.array([[0, 1, 0, 1]]), np.array([1e-3]))


def test_one_penalty_serves_all_mixtures():
    one = solve_surrogate(*rows(), MIXTURES, 0.01).coefficients
    assert np.array_equal(one, solve_surrogate(*rows(), MIXTURES, np.full(5, 0.01)).coefficients)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_of_any_precision(dtype):
    features, margin, task = rows()
    narrow, margin = features.astype(dtype), margin.astype(dtype)
    one = solve_surrogate(narrow, margin, task, MIXTURES, PENALTIES).coefficients
    two = solve_surrogate(narrow.astype(float), margin.astype(float), task, MIXTURES, PENALTIES).coefficients
    assert np.array_equal(one, two)


@pytest.mark.parametrize("pairs", [1, 100, 130])
def test_chunks_do_not_matter(monkeypatch, pairs):
    whole = solve_surrogate(*rows(), MIXTURES, PENALTIES, tolerance=1e-10)
    monkeypatch.setattr("hf_ensemble.estimate.surrogate._CHUNK", pairs)
    chunked = solve_surrogate(*rows(), MIXTURES, PENALTIES, tolerance=1e-10)
    assert whole.coefficients.shape == chunked.coefficients.shape
    assert np.abs(whole.coefficients - chunked.coefficients).max() < 1e-7


@pytest.mark.parametrize("steps", [0, 1])
def test_the_steps_in_single_precision_do_not_change_the_optimum(monkeypatch, steps):
    one = solve_surrogate(*rows(), MIXTURES, PENALTIES, tolerance=1e-10).coefficients
    monkeypatch.setattr("hf_ensemble.estimate.solver.newton._MAX_FLOAT32_STEPS", steps)
    two = solve_surrogate(*rows(), MIXTURES, PENALTIES, tolerance=1e-10).coefficients
    assert np.abs(one - two).max() < 1e-7


def test_a_slow_mixture_does_not_change_the_others():
    penalties = np.array([1.0, 1.0, 1.0, 1e-6, 1.0])
    features, margin, task = rows()
    features = features * np.logspace(0, -2, features.shape[1])
    together = solve_surrogate(features, margin, task, MIXTURES, penalties, tolerance=1e-10)
    for mixture, penalty, w, steps in zip(MIXTURES, penalties, together.coefficients, together.iterations):
        alone = solve_surrogate(features, margin, task, mixture[None], penalty, tolerance=1e-10)
        assert np.abs(w - alone.coefficients[0]).max() < 1e-5 * max(1.0, np.abs(w).max())
        assert steps <= alone.iterations[0] + 1
    assert together.iterations[3] > np.delete(together.iterations, 3).max()


def test_conjugate_gradients_solve_every_system_to_its_own_target():
    generator = torch.Generator().manual_seed(0)
    ridge = torch.tensor([[1.0], [1e-4], [1e2], [1e-3], [1.0], [1e2]], dtype=torch.float64)
    target = torch.tensor([1e-2, 1e-9, 1e-3, 1e-8, 1e-1, 1e-9])
    hessians = ridge.unsqueeze(1) * torch.eye(8, dtype=torch.float64)
    terms = []
    for mixtures in ([0, 1, 3, 5], [1, 2, 4], [0, 3, 4, 5]):
        x = torch.randn(20, 8, dtype=torch.float64, generator=generator)
        curvature = torch.rand(len(mixtures), 20, dtype=torch.float64, generator=generator)
        terms.append((curvature, torch.tensor(mixtures), x))
        hessians[mixtures] += torch.einsum("sn,nk,nl->skl", curvature, x, x)
    right_side = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    diagonal = torch.diagonal(hessians, dim1=1, dim2=2)
    v = conjugate_gradient(terms, diagonal, ridge, right_side, target)
    residual = right_side - torch.einsum("skl,sl->sk", hessians, v)
    assert (residual.norm(dim=1) <= target * 1.001).all()


def test_conjugate_gradients_leave_alone_what_is_solved_already():
    identity = torch.ones(3, 2, dtype=torch.float64)
    right_side = torch.tensor([[1.0, 2.0], [1e-3, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for small in (right_side, right_side[1:]):
        target = torch.full((len(small),), 1e-2)
        v = conjugate_gradient([], identity[: len(small)], identity[: len(small), :1], small, target)
        assert (v - torch.where(small.norm(dim=1, keepdim=True) > 1e-2, small, 0.0)).abs().max() < 1e-12


def test_warm_start_saves_steps_and_finds_the_same_optimum():
    problem = SurrogateProblem(*rows())
    cold = problem.solve(MIXTURES, PENALTIES, tolerance=1e-10)
    near = MIXTURES.copy()
    near[:, 3] += 0.02
    warm = problem.solve(near, PENALTIES, tolerance=1e-10, initial=cold.coefficients)
    again = problem.solve(near, PENALTIES, tolerance=1e-10)
    assert np.abs(warm.coefficients - again.coefficients).max() < 1e-7
    assert warm.iterations.sum() < again.iterations.sum()
    done = problem.solve(MIXTURES, PENALTIES, tolerance=1e-10, initial=cold.coefficients)
    assert (done.iterations == 0).all()
    assert np.array_equal(done.coefficients, cold.coefficients)


def test_bad_input_is_named():
    features, margin, task = rows()
    hole = features.copy()
    hole[3, 2] = np.inf
    ones = np.ones((2, 4))
    for arguments, message in [
        ((hole, margin, task, ones, 1.0), "Expected finite features, found"),
        ((features, margin * np.nan, task, ones, 1.0), "Expected finite margins, found"),
        ((features, margin, task, ones * np.nan, 1.0), "Expected finite mixtures, found"),
        ((features, margin, task, ones, np.array([1.0, np.inf])), "Expected finite l2, found"),
        ((features, margin, task, ones, np.array([1.0, 0.0])), "l2 has to be positive"),
        ((features, margin, task, np.array([[1, 1, 1, 1], [0, 0, 0, 0]]), 1.0), "Mixture 1 is empty"),
        ((features, margin, task, np.array([[1, 1, 1, 1], [1, 0, -1, 0]]), 1.0), "Mixture 1 has a negative weight"),
        ((features, margin, task, np.ones((2, 3)), 1.0), "over 4 tasks"),
    ]:
        with pytest.raises(EstimationError, match=message):
            solve_surrogate(*arguments)
    for initial, message in [
        (np.zeros((2, 3)), r"shape \(2, 25\), found \(2, 3\)"),
        (np.full((2, 25), np.nan), "Expected finite initial coefficients, found"),
    ]:
        with pytest.raises(EstimationError, match=message):
            solve_surrogate(features, margin, task, ones, 1.0, initial=initial)


def test_a_tolerance_that_is_not_reached_is_an_error():
    with pytest.raises(EstimationError, match="did not reach the gradient norm 1e-08 in 1 steps"):
        solve_surrogate(*rows(), MIXTURES, 1e-3, max_iterations=1)


@pytest.mark.gpu
def test_gpu_finds_the_same_optima():
    one = solve_surrogate(*rows(), MIXTURES, PENALTIES, tolerance=1e-10).coefficients
    two = solve_surrogate(*rows(), MIXTURES, PENALTIES, tolerance=1e-10, device="cuda").coefficients
    assert np.abs(one - two).max() < 1e-6


@pytest.mark.parametrize("pairs", [1, 8_000_000])
def test_outcomes_are_means_over_each_tasks_rows(monkeypatch, pairs):
    monkeypatch.setattr("hf_ensemble.estimate.outcomes._CHUNK", pairs)
    features, margin, task = rows(margin=12.0)
    coefficients = np.random.default_rng(0).normal(size=(6, 25))
    loss, accuracy, displacement = predicted_outcomes(features, margin, task, 4, coefficients)
    for row, w in enumerate(coefficients):
        z = margin + features @ w
        for column in range(4):
            own = z[task == column]
            assert abs(loss[row, column] - np.logaddexp(0, -own).mean()) < 1e-12
            assert abs(accuracy[row, column] - (own > 0).mean()) < 1e-12
            moved = (features @ w)[task == column]
            assert abs(displacement[row, column] - np.sqrt((moved**2).mean())) < 1e-12


def gradients(n=160, d=60):
    return (np.random.default_rng(0).normal(size=(n, d)) * np.logspace(1, -1, d)).astype(np.float32)


def test_reduction_with_enough_components_loses_nothing():
    features = gradients()
    reduction = FeatureReduction.fit(features, 1000)
    reduced = reduction.apply(features)
    norm = np.linalg.norm(features, axis=1).mean()
    assert np.abs(reduced @ reduced.T - features @ features.T / norm**2).max() < 1e-5
    w = np.random.default_rng(0).normal(size=reduced.shape[1])
    assert np.abs(features @ reduction.restore(w) - reduced @ w).max() < 1e-4
    wide = FeatureReduction.fit(features[:20], 1000)
    assert wide.components.shape == (60, 20)
    assert np.abs(wide.components.T @ wide.components - np.eye(20)).max() < 1e-8


def test_reduction_keeps_the_leading_directions():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 50)) * np.logspace(1, -2, 50)
    kept = FeatureReduction.fit(features, 5).components
    _, _, directions = np.linalg.svd(features, full_matrices=False)
    assert np.abs(kept.T @ directions[:5].T).max(axis=1).min() > 0.999


@pytest.mark.parametrize("n", [160, 30])
def test_reduction_in_blocks_equals_the_whole(monkeypatch, n):
    features = gradients(n)
    whole = FeatureReduction.fit(features, 12)
    reduced = whole.apply(features)
    monkeypatch.setattr("hf_ensemble.store.features.BLOCK", 7 * 60)
    blocks = FeatureReduction.fit(features, 12)
    assert abs(whole.scale - blocks.scale) < 1e-12 * whole.scale
    # A direction is known up to its sign.
    signs = np.sign((whole.components * blocks.components).sum(axis=0))
    assert np.abs(whole.components - signs * blocks.components).max() < 1e-9
    assert np.abs(reduced - signs * blocks.apply(features)).max() < 1e-6


def test_reduction_reads_a_memory_map_in_half_precision(tmp_path):
    np.save(tmp_path / "features.npy", gradients().astype(np.float16))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    reduction = FeatureReduction.fit(mapped, 1000)
    exact = np.asarray(mapped).astype(np.float64)
    reduced = reduction.apply(mapped)
    assert reduced.dtype == np.float32
    norm = np.linalg.norm(exact, axis=1).mean()
    assert np.abs(reduced @ reduced.T - exact @ exact.T / norm**2).max() < 1e-5


def test_bad_features_are_named(monkeypatch):
    monkeypatch.setattr("hf_ensemble.store.features.BLOCK", 7 * 60)
    features = gradients()
    features[100, 3] = np.nan
    with pytest.raises(EstimationError, match="Row 100 has a feature that is not finite"):
        FeatureReduction.fit(features, 5)
    with pytest.raises(EstimationError, match="Expected nonzero gradient features"):
        FeatureReduction.fit(np.zeros((10, 4), dtype=np.float16), 5)


def test_rows_are_converted_in_parts_that_share_their_memory(monkeypatch):
    """New memory for each of them lets the process grow with every step."""
    rng = np.random.default_rng(0)
    x, margin, task = rng.normal(size=(300, 12)).astype(np.float32), rng.normal(size=300), np.repeat([0, 1, 2], 100)
    mixtures = np.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    whole = SurrogateProblem(x, margin, task)
    expected = whole.solve(mixtures, np.full(2, 1e-3)).coefficients
    slopes = whole.row_slopes(expected[0], expected[1])
    derived = whole.derivatives(mixtures[0], expected[0], 1e-3)
    monkeypatch.setattr("hf_ensemble.estimate.solver.newton._CONVERTED", 7 * 12)
    parts = SurrogateProblem(x, margin, task)
    places = {features.data_ptr() for rows in parts._tasks for _, features in rows.parts()}
    assert len(places) == 1
    assert np.allclose(parts.solve(mixtures, np.full(2, 1e-3)).coefficients, expected, atol=1e-7)
    assert np.allclose(parts.row_slopes(expected[0], expected[1]), slopes)
    for own, other in zip(parts.derivatives(mixtures[0], expected[0], 1e-3), derived):
        assert np.allclose(own, other)
