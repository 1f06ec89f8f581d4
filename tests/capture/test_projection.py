"""The seeded projection: its matrix, its adjoint and its inner products."""

import pytest
import torch

from hf_ensemble.capture import SeededProjection
from hf_ensemble.capture.projection import _add_gathered, _add_in_turn
from hf_ensemble.errors import CaptureError


def projection(dim, seed=0, shapes=((7, 50), (3, 130), (11,))):
    return SeededProjection({f"p{i}": torch.Size(s) for i, s in enumerate(shapes)}, dim, seed)


def project(own, gradient):
    """Project flat gradients (n, P)."""
    features = torch.zeros(len(gradient), own.dim)
    offset = 0
    for name, shape in own.shapes.items():
        own.add(features, name, gradient[:, offset : offset + shape.numel()].reshape(-1, *shape))
        offset += shape.numel()
    return features


def test_projection_matrix_is_signs_with_unit_rows():
    own = projection(64)
    matrix = project(own, torch.eye(own.num_parameters))
    assert torch.equal(matrix.abs().sum(1), torch.ones(own.num_parameters))
    assert torch.equal((matrix != 0).sum(1), torch.ones(own.num_parameters, dtype=torch.long))
    assert 0.4 < (matrix.sum(1) > 0).float().mean() < 0.6
    assert torch.equal(matrix, project(projection(64), torch.eye(own.num_parameters)))
    assert not torch.equal(matrix, project(projection(64, seed=1), torch.eye(own.num_parameters)))


@pytest.mark.parametrize("dim", [64, 500, None])
def test_transpose_is_the_adjoint(dim):
    own = projection(dim)
    gradient, w = torch.randn(3, own.num_parameters), torch.randn(own.dim)
    moved = torch.cat([part.reshape(-1) for part in own.transpose(w).values()])
    assert torch.allclose(project(own, gradient) @ w, gradient @ moved, atol=1e-3)


def test_inner_products_are_unbiased_and_their_error_falls_with_the_root_of_dim():
    torch.manual_seed(0)
    shapes = ((40, 100), (4000,))
    x, y = torch.randn(2, 8000)
    y = 0.5 * x + y
    errors = {}
    for dim in (64, 256, 1024):
        products = []
        for seed in range(100):
            features = project(projection(dim, seed, shapes), torch.stack([x, y]))
            products.append(float(features[0] @ features[1]))
        difference = torch.tensor(products) - float(x @ y)
        errors[dim] = float(difference.std())
        assert abs(difference.mean()) < 4 * difference.std() / 10
        # A dense Rademacher projection has this standard deviation.
        dense = float(((x.norm() * y.norm()) ** 2 + (x @ y) ** 2) ** 0.5) / dim**0.5
        assert errors[dim] < 1.3 * dense
    assert 1.4 < errors[64] / errors[256] < 2.9
    assert 1.4 < errors[256] / errors[1024] < 2.9


def test_projection_needs_parameters_and_a_positive_size():
    with pytest.raises(CaptureError, match="Expected a trainable parameter, found none"):
        SeededProjection({}, 4)
    with pytest.raises(CaptureError, match="positive"):
        projection(0)
    assert projection(10**6).exact


@pytest.mark.parametrize("at_once", [1, 1000, 10**9])
def test_gathered_blocks_are_those_added_in_turn(monkeypatch, at_once):
    monkeypatch.setattr("hf_ensemble.capture.projection._GATHERED", at_once)
    for numel in (64, 64 * 7, 64 * 7 + 5, 3):
        own = SeededProjection({"p": torch.Size([numel]), "q": torch.Size([64])}, 64)
        gradient, before = torch.randn(3, numel), torch.randn(3, 64)
        in_turn, gathered = before.clone(), before.clone()
        parts = own._signs_and_starts("p", gradient.device)
        _add_in_turn(in_turn, gradient, *parts)
        _add_gathered(gathered, gradient, *parts)
        assert torch.allclose(gathered, in_turn, rtol=1e-5, atol=1e-5)


def test_the_number_of_gathering_operations_does_not_grow_with_the_blocks():
    def operations(numel):
        own = SeededProjection({"p": torch.Size([numel])}, 64)
        parts = own._signs_and_starts("p", torch.device("cpu"))
        with torch.profiler.profile() as profile:
            _add_gathered(torch.zeros(3, 64), torch.randn(3, numel), *parts)
        return len([event for event in profile.events() if event.cpu_parent is None])

    assert operations(64 * 40) == operations(64 * 4) < 20
