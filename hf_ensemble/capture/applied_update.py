"""A predicted parameter update applied to the model."""

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
def applied_update(model: nn.Module, store: GradientStore, coefficients: np.ndarray) -> Iterator[nn.Module]:
    """While open, the trainable parameters of `model` are theta0 + S P w. They are restored on exit.

    To first order, the model's margins are then m_i + x_i.w, so an estimate can be checked and any metric evaluated by
    real forward passes (GradEx, arXiv 2409.19458, and its published code). S is the store's preconditioner, or the
    identity.

    With a random projection, the update is longer than the one that training needs for the same effect, much longer
    with a preconditioner, and the first-order approximation only holds for short updates. A store of exact gradients
    (`projection_dim=None`) gives the shortest update.

    Args:
        model (`nn.Module`): model at theta0, where the store's gradients were captured.
        store (`GradientStore`): determines theta0, P and S.
        coefficients (`np.ndarray` of shape `(d,)`):
            Coefficients w of the captured features, see [`SubsetEstimator.parameters_at`].

    Raises:
        `StoreMismatchError`: when the model is not at the store's theta0.
        `CaptureError`: for coefficients of the wrong shape or not finite.
    """
    update = parameter_update(model, store, coefficients)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theta0 = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(update[name].to(parameter.device, parameter.dtype))
        yield model
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(theta0[name])


def parameter_update(model: nn.Module, store: GradientStore, coefficients: np.ndarray) -> dict[str, torch.Tensor]:
    """The update S P w by parameter name; arguments and errors as for [`applied_update`]."""
    check_theta0(model, store)
    config = store.identity["config"]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in parameters.items()}
    projection = SeededProjection(shapes, config["projection_dim"], config["projection_seed"])
    update = projection.transpose(torch.as_tensor(checked_coefficients(coefficients, projection.dim)))
    scales = store.preconditioner()
    if scales is not None:
        preconditioner = Preconditioner(scales)
        update = {name: preconditioner(name, change) for name, change in update.items()}
    return update


def checked_coefficients(coefficients: np.ndarray, count: int) -> np.ndarray:
    """Coefficients as float64, `(count,)`.

    Raises:
        `CaptureError`: for other numbers of coefficients, and for those that are not finite or no numbers.
    """
    try:
        found = np.asarray(coefficients, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CaptureError(f"Expected {count} finite coefficients, found {coefficients!r:.60}.") from error
    if found.shape != (count,) or not np.isfinite(found).all():
        raise CaptureError(
            f"Expected {count} finite coefficients, found shape {found.shape} with "
            f"{int((~np.isfinite(found)).sum())} values that are not finite."
        )
    return found


def check_theta0(model: nn.Module, store: GradientStore) -> None:
    """Raise `StoreMismatchError` for a model that is not where the store's gradients were captured."""
    if model_identity(model)["theta0"] != store.identity["model"]["theta0"]:
        raise StoreMismatchError(
            f"The model's trainable parameters differ from those that the gradients in {str(store.folder)!r} were "
            "captured at. Load those parameters first."
        )
