"""Methods that merge changes of weights, against their plain definitions."""

import itertools

import pytest
import torch
from peft.utils import merge_utils

from hf_ensemble.ensemble.merging import task_vectors
from hf_ensemble.ensemble.merging.low_rank import truncated, truncated_matrix
from hf_ensemble.errors import EnsembleError


def plain_ties(deltas, weights, density):
    kept = [merge_utils.magnitude_based_pruning(delta, density) for delta in deltas]
    result = torch.zeros_like(kept[0])
    for index in range(result.numel()):
        values = [float(k.reshape(-1)[index]) for k in kept]
        sign = 1 if sum(values) >= 0 else -1
        chosen = [w * v for w, v in zip(weights, values) if v * sign > 0]
        result.view(-1)[index] = sum(chosen) / max(len(chosen), 1)
    return result


def plain_pcb(deltas, weights, density):
    """The paper's formulas entry by entry, with the balancing of its code."""
    flat = torch.stack([d.reshape(-1) for d in deltas]).double()
    result = torch.zeros(flat.shape[1], dtype=torch.float64)
    scores = []
    for row in flat:
        size = row.abs().sort().values
        size = row.abs().clamp(size[int(1e-4 * len(row))], size[int((1 - 1e-4) * len(row) - 1)])
        unit = (size - size.min()) / (size.max() - size.min())
        scores.append(torch.exp(len(flat) * unit**2) * torch.tanh(row * flat.sum(0)))
    norm = torch.zeros_like(result)
    for weight, row, score in zip(weights, flat, scores):
        ordered = score.sort().values
        score = score.clamp(ordered[int((1 - density) * len(row))], ordered[int(1.0 * len(row) - 1)])
        score = (score - score.min()) / (score.max() - score.min())
        size = row.abs().sort().values
        size = row.abs().clamp(size[int(1e-4 * len(row))], size[int((1 - 1e-4) * len(row) - 1)])
        result += score * weight * row.sign() * size
        norm += score
    return (result / norm.clamp(min=1e-12)).view_as(deltas[0])


def test_mergers_equal_their_plain_definitions():
    torch.manual_seed(0)
    deltas, weights = [torch.randn(12, 10) for _ in range(3)], torch.tensor([0.5, 0.25, 0.25])
    thrice = (3 * weights).tolist()
    assert torch.allclose(task_vectors.ties(deltas, weights, 0.3), plain_ties(deltas, thrice, 0.3), atol=1e-6)
    assert torch.allclose(task_vectors.pcb(deltas, weights, 0.2).double(), plain_pcb(deltas, thrice, 0.2), atol=1e-5)
    once = task_vectors.dare_linear(deltas, weights, "q", 0.5, seed=3)
    assert torch.equal(once, task_vectors.dare_linear(deltas, weights, "q", 0.5, seed=3))
    assert not torch.equal(once, task_vectors.dare_linear(deltas, weights, "q", 0.5, seed=4))
    # On average over seeds, DARE is the weighted sum.
    many = sum(task_vectors.dare_linear(deltas, weights, "q", 0.5, seed=s) for s in range(400)) / 400
    assert (many - sum(w * d for w, d in zip(weights, deltas))).abs().mean() < 0.05
    trail = task_vectors.breadcrumbs(deltas[:1], torch.ones(1), 0.5, 0.1)
    order = deltas[0].abs().reshape(-1).argsort()
    assert (trail.reshape(-1)[order[:60]] == 0).all() and (trail.reshape(-1)[order[108:]] == 0).all()
    assert torch.equal(trail.reshape(-1)[order[60:108]], deltas[0].reshape(-1)[order[60:108]])
    factors = [task_vectors.lines_factor(layer, 5, 0.2, 0.8) for layer in (0, 2, 4, None)]
    assert factors == pytest.approx([0.2, 0.6, 1.0, 0.2])


@pytest.mark.parametrize("method", [task_vectors.dare_linear, task_vectors.dare_ties])
def test_dare_drops_entries_of_each_module_and_adapter_independently(method):
    ones, only_first = [torch.ones(100, 100)] * 2, torch.tensor([1.0, 0.0])
    kept = [method(ones, only_first, f"layers.{layer}.q_proj") != 0 for layer in range(2)]
    kept.append(method(ones, 1 - only_first, "layers.0.q_proj") != 0)
    for first, second in itertools.combinations(kept, 2):
        # Independent halves agree on half of the entries, to within 4 standard deviations.
        assert abs(float((first == second).float().mean()) - 0.5) < 0.02


class WithoutDouble(torch.Tensor):
    """On the CPU, what a tensor of a device without float64 is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


@pytest.mark.parametrize("method", ["tsv", "knots"])
def test_a_device_without_float64_leaves_it_to_the_cpu(method):
    torch.manual_seed(0)
    plain, weights = [torch.randn(12, 10) for _ in range(2)], torch.tensor([0.5, 0.5])
    there = [delta.as_subclass(WithoutDouble) for delta in plain]
    with pytest.raises(TypeError):
        there[0].double()
    found = getattr(task_vectors, method)(there, weights.as_subclass(WithoutDouble))
    assert torch.equal(torch.Tensor(found), getattr(task_vectors, method)(plain, weights))
    for own, expected in (
        (truncated_matrix(there[0], 3), truncated_matrix(plain[0], 3)),
        (truncated(there[0], there[1].T, 3), truncated(plain[0], plain[1].T, 3)),
    ):
        assert all(torch.equal(x, y) for x, y in zip(own[:2], expected[:2])) and own[2:] == expected[2:]
        assert {own[0].dtype, own[1].dtype} == {torch.float32}


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_dare_refuses_an_impossible_density(density):
    with pytest.raises(EnsembleError, match="above 0 and at most 1"):
        task_vectors.dare_linear([torch.ones(2, 2)], torch.ones(1), "q", density)
