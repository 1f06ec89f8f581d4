"""A surrogate's optimum put into the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..errors import CaptureError, StoreMismatchError
from ..store import GradientStore
from .identity import model_identity
from .preconditioner import Preconditioner
from .projection import SeededProjection


@contextmanager
def transplanted(model: nn.Module, store: GradientStore, coefficients: np.ndarray) -> Iterator[nn.Module]:
    """While open, the trained parameters of `model` are theta0 + S P w; afterwards theta0, also after an exception.

    S is the store's preconditioner, the identity where it has none.

    To first order the model's margins are then m_i + x_i.w: what an estimate says of a mixture can be checked, or any
    metric of the task taken, by real forward passes (GradEx, arXiv 2409.19458, and its published code).

    Over a random projection the move is longer than the way that training goes to the same effect, many times so with a
    preconditioner, and first order describes short ways. A store of exact gradients (`projection_dim=None`) takes the
    shortest way.

    Args:
        model (`nn.Module`): at theta0, where the store's gradients were taken.
        store (`GradientStore`): says theta0, P and S.
        coefficients (`np.ndarray` of shape `(d,)`): w of the captured features, see [`SubsetEstimator.parameters_at`].

    Raises:
        `StoreMismatchError`: when the model is not at the store's theta0.
        `CaptureError`: for coefficients of another dimension, or not finite.
    """
    if model_identity(model)["theta0"] != store.identity["model"]["theta0"]:
        raise StoreMismatchError(
            f"The model's trained parameters are not those of the store in {str(store.folder)!r}: its gradients say "
            "nothing about them. Put the parameters back that the gradients were captured at."
        )
    config = store.identity["config"]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in parameters.items()}
    projection = SeededProjection(shapes, config["projection_dim"], config["projection_seed"])
    w = torch.as_tensor(np.asarray(coefficients, dtype=np.float64))
    if w.shape != (projection.dim,) or not torch.isfinite(w).all():
        raise CaptureError(f"Expected {projection.dim} finite coefficients, found an array of {tuple(w.shape)}.")
    moves = projection.transpose(w)
    scales = store.preconditioner()
    if scales is not None:
        preconditioner = Preconditioner(scales)
        moves = {name: preconditioner(name, move) for name, move in moves.items()}
    theta0 = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(moves[name].to(parameter.device, parameter.dtype))
        yield model
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(theta0[name])
