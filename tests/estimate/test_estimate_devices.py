"""An estimate on each device: the CPU's components, optima and losses."""

import numpy as np
import pytest
import torch

from helpers.devices import DEVICES
from helpers.feature_tables import world
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.estimate import FeatureReduction, SubsetEstimator
from hf_ensemble.store import TrainingRecipe


@pytest.mark.parametrize("device", DEVICES)
def test_predictions_are_those_of_the_cpu(device):
    tables, mixtures = world(tokens=True), np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0.2, 0, 3, 1]])
    recipe = TrainingRecipe([1e-3] * 20, 8, fixed_steps=False)
    here = SubsetEstimator(*tables, 20, recipe=recipe)
    there = SubsetEstimator(*tables, 20, recipe=recipe, device=device)
    expected, found = here.predict(mixtures), there.predict(mixtures)
    assert np.abs(found.loss - expected.loss).max() < 1e-5
    assert np.abs(found.accuracy - expected.accuracy).max() < 1e-2
    toggled = [one.predict_toggled(mixtures[0], np.array([1, 2, 3])).loss for one in (here, there)]
    assert np.abs(toggled[0] - toggled[1]).max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [150, 30])
def test_principal_components_are_those_of_the_cpu(monkeypatch, device, rows):
    monkeypatch.setattr("hf_ensemble.store.features.BLOCK", 40 * 60)
    features = (np.random.default_rng(0).normal(size=(rows, 60)) * np.logspace(1, -1, 60)).astype(np.float16)
    here, there = FeatureReduction.fit(features, 12), FeatureReduction.fit(features, 12, torch.device(device))
    assert here.scale == there.scale
    # A direction is known up to its sign.
    signs = np.sign((here.components * there.components).sum(axis=0))
    assert np.abs(here.components - signs * there.components).max() < 1e-8


@pytest.mark.parametrize("device", ["abacus", "meta", 1.5, torch.device("meta")])
def test_a_device_that_holds_no_numbers_is_refused(device):
    with pytest.raises(ConfigurationError, match="device has to be a device of this machine that has float64"):
        SubsetEstimator(*world(), device=device)
