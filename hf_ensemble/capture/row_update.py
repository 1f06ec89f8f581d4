"""A parameter update that is a weighted sum of the rows' own gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .._compat import keep_quantized_weights_in_place
from .._settings import check_at_least, check_one_of
from ..errors import CaptureError
from ..models.answer_scorer import AnswerScorer
from ..models.batches import HalvingOnFullMemory, length_sorted_batches
from ..models.usage import UsageCounter
from ..models.wrappers import evaluation_mode
from ..store import GradientStore
from ..tasks import TASK, LabelSpace, pop_meta
from .applied_update import check_theta0, checked_coefficients
from .margin import MARGIN_KINDS, margins
from .mixed_precision import capture_precision
from .preconditioner import Preconditioner

Rows = Sequence[Mapping[str, Any]]


def row_update(
    model: nn.Module,
    store: GradientStore,
    rows: Rows,
    coefficients: np.ndarray,
    data_collator: Callable[[list[Mapping[str, Any]]], Mapping[str, Any]],
    batch_size: int,
    label_space: LabelSpace | None = None,
) -> dict[str, torch.Tensor]:
    """The update S^2 sum_i a_i grad m_i(theta0), by parameter name, from one pass over the rows.

    For w = X^T a, with X the rows' captured features, its effect on the margins is that of w without the noise of the
    store's random projection: the update is the shortest one, as from a store of exact gradients. S is the store's
    preconditioner, or the identity.

    Args:
        model (`nn.Module`): model at theta0, without distributed wrappers.
        store (`GradientStore`): determines theta0, margin and S.
        rows (`Sequence[dict]`): token rows with labels, and `task` where label sets differ.
        coefficients (`np.ndarray` of shape `(n,)`): a, of each row.
        data_collator (`Callable`): from rows to a batch.
        batch_size (`int`): rows per backward pass; fewer where memory runs out.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.

    Raises:
        `StoreMismatchError`: when the model is not at the store's theta0.
        `CaptureError`:
            Without a row, for coefficients of the wrong shape or not finite, and for a batch size below one.
        `ConfigurationError`: for a store that was captured of a function of the outputs in place of a margin.
    """
    if len(rows) == 0:
        raise CaptureError("Expected at least one row to sum gradients of, found none.")
    config, coefficients = store.identity["config"], checked_coefficients(coefficients, len(rows))
    check_at_least("batch_size", batch_size, 1, error=CaptureError)
    check_one_of("The margin of the store", config["margin"], MARGIN_KINDS)
    check_theta0(model, store)
    keep_quantized_weights_in_place(model)
    scorer = AnswerScorer(model, label_space)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    # Sums stay on the device: copying would wait for it at every parameter.
    sums = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}

    def add(batch: list[int]) -> None:
        examples = [{key: value for key, value in rows[i].items() if value is not None} for i in batch]
        inputs = dict(data_collator(examples))
        with usage.batch(inputs):
            add_gradients(batch, inputs)

    def add_gradients(batch: list[int], inputs: dict[str, Any]) -> None:
        tasks = pop_meta(inputs).get(TASK)
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        margin = margins(scorer(inputs, inputs.pop("labels"), tasks), config["margin"])
        weights = torch.as_tensor(coefficients[batch], dtype=margin.dtype, device=margin.device)
        found = torch.autograd.grad((weights * margin).sum(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found):
            if gradient is not None:
                # Without a copy in float32: if memory ran out here, some sums would have the batch twice.
                sums[name] += gradient

    run = HalvingOnFullMemory(add, model)
    precision = capture_precision(model, device, config["mixed_precision"])
    with UsageCounter() as usage, torch.random.fork_rng(), evaluation_mode(model), torch.enable_grad(), precision:
        for batch in length_sorted_batches([len(row["input_ids"]) for row in rows], batch_size):
            run(batch)
    update = {name: total.cpu() for name, total in sums.items()}
    scales = store.preconditioner()
    if scales is not None:
        preconditioner = Preconditioner(scales)
        update = {name: preconditioner(name, preconditioner(name, own)) for name, own in update.items()}
    return update
