"""A surrogate's optimum in the model."""

import numpy as np
import pytest
import torch

from helpers import toy
from hf_ensemble.capture import (
    CaptureConfig,
    applied_update,
    capture_gradients,
    encoded_splits,
    model_identity,
    parameter_update,
    row_update,
)
from hf_ensemble.errors import CaptureError, ConfigurationError, StoreMismatchError
from hf_ensemble.tasks import TaskSet, data_collator_for


def mean_logit(logits, labels):
    return logits.float().mean(dim=(1, 2))


def captured(folder, model, dim):
    tasks = TaskSet.from_datasets(toy.sft_tasks(8, 4))
    config = CaptureConfig(projection_dim=dim, feature_dtype="float32")
    return capture_gradients(model, tasks, config, folder, toy.tokenizer(), disable_tqdm=True), tasks


@pytest.mark.parametrize("dim", [None, 64])
def test_margins_move_as_the_features_say(tmp_path, dim):
    model = toy.with_lora(toy.llama())
    store, tasks = captured(tmp_path / "at_theta0", model, dim)
    before = store.table("validation")
    w = store.table("train").features[0].astype(np.float64)
    w *= 1e-3 / np.linalg.norm(w)
    theta0 = model_identity(model)["theta0"]
    with applied_update(model, store, w) as moved:
        assert moved is model and model_identity(model)["theta0"] != theta0
        after = captured(tmp_path / "moved", model, dim)[0].table("validation")
    assert model_identity(model)["theta0"] == theta0
    change, linear = after.margin - before.margin, before.features @ w
    assert np.abs(linear).max() > 1e-4
    assert np.abs(change - linear).max() < 0.05 * np.abs(linear).max()


def test_theta0_comes_back_after_an_exception(tmp_path):
    model = toy.with_lora(toy.llama())
    store, _ = captured(tmp_path, model, 64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), applied_update(model, store, np.ones(64)):
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_foreign_parameters_and_coefficients_are_refused(tmp_path):
    model = toy.with_lora(toy.llama())
    store, _ = captured(tmp_path, model, 64)
    for w in (np.ones(63), np.full(64, np.nan), "many"):
        with pytest.raises(CaptureError, match="Expected 64 finite coefficients"), applied_update(model, store, w):
            pass
    toy.randomize(model)
    with pytest.raises(StoreMismatchError, match="differ from those"), applied_update(model, store, np.ones(64)):
        pass


@pytest.mark.parametrize("dim", [None, 64])
def test_a_weighted_sum_of_the_rows_gradients_is_the_update_of_exact_features(tmp_path, dim):
    """Also from a store of projected gradients, whose noise it does not have."""
    model = toy.with_lora(toy.llama())
    exact, tasks = captured(tmp_path / "exact", model, None)
    store = exact if dim is None else captured(tmp_path / "projected", model, dim)[0]
    table = exact.table("train")
    a = np.random.default_rng(0).normal(size=len(table))
    expected = parameter_update(model, exact, table.features[:].astype(np.float64).T @ a)
    rows = encoded_splits(model, tasks, toy.tokenizer(), None)["train"]
    assert rows["example_id"][:] == table.example_id.tolist()
    collator = data_collator_for(tasks.row_format, toy.tokenizer(), labels_are_tokens=True)
    found = row_update(model, store, rows, a, collator, batch_size=5)
    assert set(found) == set(expected)
    for name, update in expected.items():
        assert torch.allclose(found[name], update.float(), atol=1e-4 * float(update.abs().max()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "at least one row to sum gradients of"),
        ({"coefficients": np.ones(2)}, r"Expected 3 finite coefficients, found shape \(2,\)"),
        ({"coefficients": [1.0, np.nan, 1.0]}, "with 1 values that are not finite"),
        ({"coefficients": "many"}, "Expected 3 finite coefficients, found 'many'"),
        ({"batch_size": 0}, "batch_size has to be a positive integer"),
    ],
)
def test_rows_and_coefficients_are_checked_before_any_pass(tmp_path, changes, message):
    model = toy.with_lora(toy.llama())
    store, _ = captured(tmp_path, model, 64)
    given = {"rows": [{"input_ids": [1]}] * 3, "coefficients": np.ones(3), "batch_size": 2, **changes}
    with pytest.raises(CaptureError, match=message):
        row_update(model, store, data_collator=lambda rows: pytest.fail("a pass was made"), **given)


def test_rows_are_summed_without_further_memory(tmp_path, monkeypatch):
    model = toy.with_lora(toy.llama())
    toy.randomize(model)
    store, tasks = captured(tmp_path, model, 64)
    rows = list(encoded_splits(model, tasks, toy.tokenizer(), None)["train"])[:4]
    collator = data_collator_for(tasks.row_format, toy.tokenizer(), labels_are_tokens=True)
    expected = row_update(model, store, rows, np.ones(4), collator, batch_size=4)
    grad, add, found, added = torch.autograd.grad, torch.Tensor.__iadd__, [], []

    def recorded(*args, **options):
        gradients = grad(*args, **options)
        found.extend(gradients)
        return gradients

    def counted(total, own):
        # A copy of it, in whichever way it is made, would take memory after some parameters have been added.
        assert any(own is one for one in found)
        added.append(total)
        return add(total, own)

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    monkeypatch.setattr(torch.Tensor, "__iadd__", counted)
    again = row_update(model, store, rows, np.ones(4), collator, batch_size=4)
    assert len(added) == len(expected)
    assert all(torch.equal(again[name], own) for name, own in expected.items())


def test_gradients_of_a_function_are_none_of_a_margin(tmp_path):
    model, tasks = toy.with_lora(toy.llama()), TaskSet.from_datasets(toy.sft_tasks(8, 4))
    config = CaptureConfig(projection_dim=64, margin=mean_logit)
    store = capture_gradients(model, tasks, config, tmp_path, toy.tokenizer(), disable_tqdm=True)
    with pytest.raises(ConfigurationError, match="The margin of the store has to be one of"):
        row_update(model, store, [{"input_ids": [1]}], [1.0], lambda rows: rows, 1)
