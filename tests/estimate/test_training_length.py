"""How far a training on each mixture goes."""

import numpy as np
import pytest
import torch

from hf_ensemble import TrainingRecipe
from hf_ensemble.estimate.training_length import TrainingLength

COUNTS = np.array([20, 40, 30])
TASK = np.repeat(np.arange(3), COUNTS)
WEIGHTS = np.array([1.0, 2.0, 1.0])


def rows(seed=0, k=8):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(len(TASK), k)) * np.array([1.0, 0.1, 3.0])[TASK][:, None]
    return features, generator.normal(size=len(TASK))


TOKENS = np.random.default_rng(3).integers(1, 12, size=len(TASK)) * np.array([1, 4, 2])[TASK]


def length(recipe=None, row_weights=None):
    features, margin = rows()
    return TrainingLength(features, (features**2).sum(1), margin, TASK, WEIGHTS, recipe, row_weights)


def mean_square_of_batches(mixture, batch_size, row_weights=None, draws=40_000):
    """By drawing batches; of weighted rows, the mean divides by the weight that is expected of a batch."""
    features, margin = rows()
    gradients = features / (1 + np.exp(margin))[:, None]
    share = mixture[TASK] / mixture[TASK].sum()
    if row_weights is not None:
        gradients = gradients * (row_weights / (share @ row_weights))[:, None]
    picked = np.random.default_rng(1).choice(len(TASK), size=(draws, batch_size), p=share)
    return np.square(gradients[picked].mean(1)).sum(1).mean()


def rows_of_epoch(mixture):
    return (mixture * COUNTS).sum() / mixture.max()


MIXTURES = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.0, 1.2], [1.0, 2.0, 1.0]])


@pytest.mark.parametrize("row_weights", [None, TOKENS / TOKENS.mean()], ids=["equal", "tokens"])
def test_adam_divides_by_the_batches_gradients(row_weights):
    recipe = TrainingRecipe([1e-3] * 10, 4, 100.0)
    far = [rows_of_epoch(mixture) / np.sqrt(mean_square_of_batches(mixture, 4, row_weights)) for mixture in MIXTURES]
    expected = 5.0 / rows_of_epoch(WEIGHTS) * far[3] / np.array(far)
    assert np.allclose(length(recipe, row_weights).l2(5.0, MIXTURES), expected, rtol=0.02)
    # Tasks with small gradients go as far: their penalty is small, and their features are as small.
    assert expected[1] < 0.2 * expected[0]


def test_plain_gradient_descent_and_no_recipe_follow_the_epoch_alone():
    expected = [5.0 / rows_of_epoch(mixture) for mixture in MIXTURES]
    for recipe in (None, TrainingRecipe([1e-3] * 10, 4)):
        assert np.allclose(length(recipe).l2(5.0, MIXTURES), expected)


def test_trainings_of_fixed_steps_do_not_follow_the_epoch():
    recipes = [TrainingRecipe([1e-3], 4, 9.0, fixed_steps=value) for value in (False, True)]
    every, fixed = (length(recipe).l2(5.0, MIXTURES) for recipe in recipes)
    assert np.allclose(fixed / every, [rows_of_epoch(mixture) / rows_of_epoch(WEIGHTS) for mixture in MIXTURES])
    assert np.allclose(length(TrainingRecipe([1e-3], 4, fixed_steps=True)).l2(5.0, MIXTURES), 5.0 / 65)


def test_a_fresh_lora_goes_faster_the_longer_it_trains():
    rates = [1e-3] * 50
    plain, growing = (length(TrainingRecipe(rates, 4, 100.0, gain)) for gain in (0.0, 700.0))
    growth = 700.0 * 0.05 / 70
    share = np.array([rows_of_epoch(mixture) / rows_of_epoch(WEIGHTS) for mixture in MIXTURES])
    expected = plain.l2(5.0, MIXTURES) * (1 + growth) / (1 + growth * share)
    assert np.allclose(growing.l2(5.0, MIXTURES), expected)
    # All tasks together have the same penalty, and shorter trainings a larger one.
    assert np.allclose(growing.l2(5.0, MIXTURES[3:]), plain.l2(5.0, MIXTURES[3:]))
    assert (growing.l2(5.0, MIXTURES[:3]) > 1.05 * plain.l2(5.0, MIXTURES[:3])).all()


@pytest.mark.parametrize("recipe", [None, TrainingRecipe([1e-3] * 10, 4, 100.0, 300.0)])
def test_a_mixture_is_the_same_however_its_weights_are_scaled(recipe):
    found = length(recipe)
    assert np.allclose(found.l2(1.0, MIXTURES), found.l2(1.0, 7.0 * MIXTURES))
    assert np.allclose(found.l2(np.array([1.0, 2.0, 3.0, 4.0]), MIXTURES), found.l2(1.0, MIXTURES) * [1, 2, 3, 4])


def test_mixtures_that_the_solver_refuses_have_a_number():
    values = length(TrainingRecipe([1e-3], 4, 9.0)).l2(1.0, np.array([[0.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
    assert np.isfinite(values).all()


def test_a_training_without_gradients_has_a_number():
    none = TrainingLength(
        np.zeros((3, 2)), np.zeros(3), np.zeros(3), np.arange(3), np.ones(3), TrainingRecipe([1.0], 4, 9.0)
    )
    assert np.isfinite(none.l2(1.0, np.eye(3))).all()


def test_a_task_without_gradients_beside_others_has_a_penalty_that_can_be_solved():
    features, margin = rows()
    features[TASK == 1] = 0.0
    recipe = TrainingRecipe([1e-3] * 10, 4, 9.0)
    found = TrainingLength(features, (features**2).sum(1), margin, TASK, WEIGHTS, recipe)
    penalty = found.l2(1.0, np.eye(3))
    assert 1e-9 < penalty[1] < penalty[0]
    value, slope = found.l2_with_gradient(1.0, np.array([0.0, 1.0, 0.0]))
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_it_follows_adam_where_tasks_have_gradients_of_unequal_size():
    """Three tasks of 96 rows that pull along one direction, with gradients of 1, 0.2 and 3."""
    generator = np.random.default_rng(0)
    task = np.repeat(np.arange(3), 96)
    sizes = np.array([1.0, 0.2, 3.0])[task][:, None]
    x = sizes * (generator.normal(size=(288, 12)) + 0.3)
    batch, rate = 8, 2e-3

    def distance(members):
        own = torch.from_numpy(x[np.isin(task, members)])
        w = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=rate)
        for part in torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.softplus(-(own[part] @ w)).mean().backward()
            optimizer.step()
        return float(w.detach().norm())

    found = TrainingLength(x, (x**2).sum(1), np.zeros(288), task, np.ones(3), TrainingRecipe([rate], batch, 12.0))
    subsets = [[0], [1], [2], [0, 1], [0, 1, 2]]
    mixtures = np.array([[float(index in subset) for index in range(3)] for subset in subsets])
    # While the way is short, the surrogate's optimum is the mean gradient / (2 l2).
    mean = np.stack([(0.5 * x[np.isin(task, subset)]).mean(0) for subset in subsets])
    predicted = np.linalg.norm(mean, axis=1) / found.l2(1.0, mixtures)
    true = np.array([distance(subset) for subset in subsets])
    assert np.allclose(predicted / predicted[-1], true / true[-1], rtol=0.25)
