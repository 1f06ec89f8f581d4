"""What a boosting step is trained on in place of the plain loss of its rows."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput
from trl.trainer.utils import FusedCausalLMOutput

from ...capture import log_odds
from ...ensemble import PeftEnsembleModel
from ...models.wrappers import evaluation_mode
from ...tasks import IGNORE_INDEX, restrict_to_labels


class StepLoss(Protocol):
    """A loss that a training is attached to; `identity` tells it from others when the training is resumed."""

    identity: str

    def attached(self, trainer: Trainer) -> Any:
        """A context in which the trainer trains with it."""

    def of_tokens(
        self, losses: torch.Tensor, labels: torch.Tensor, tasks: Sequence[str], ids: Sequence[str]
    ) -> torch.Tensor:
        """The loss of each token `(B, T)`.

        Args:
            losses (`torch.Tensor` of shape `(B, T)`): the plain loss of each.
            labels (`torch.Tensor` of shape `(B, T + 1)` or `(B,)`): the batch's labels.
            tasks (`Sequence[str]`): task of each row.
            ids (`Sequence[str]`): example id of each row.
        """


class RowWeightedLoss:
    """The loss with a weight for each row (AdaBoost).

    Args:
        weights (`dict[tuple[str, str], float]`): weight of each row, by task and example id.
        identity (`str`): tells it from others.
    """

    def __init__(self, weights: Mapping[tuple[str, str], float], identity: str):
        self.weights = weights
        self.identity = identity

    @contextmanager
    def attached(self, trainer: Trainer) -> Iterator[None]:
        with _replacing(trainer, self):
            yield

    def of_tokens(
        self, losses: torch.Tensor, labels: torch.Tensor, tasks: Sequence[str], ids: Sequence[str]
    ) -> torch.Tensor:
        own = [self.weights[key] for key in zip(tasks, ids)]
        return losses * torch.tensor(own, dtype=losses.dtype, device=losses.device).unsqueeze(1)


class BesideEnsembleLoss:
    """The loss of an ensemble with the adapter's own logits added to it: F + (f - f_0), where F and f_0 are fixed.

    While attached, the model that is trained gives these logits, so that the trainer's own loss, its evaluations and
    whatever a subclass makes of them are of the ensemble with the step. With `is_regression` the training loss is

        ((m_f - m_0) - (1 - p_F))^2

    at each answer token, with m its log-odds and p_F its probability in the ensemble: the residual fit of EnsembleLoRA
    (arXiv 2505.21930).

    Args:
        ensemble (`PeftEnsembleModel`): the ensemble on the model that is trained, with the weights of F.
        start (`str`): its member whose logits are f_0.
        identity (`str`): tells it from others.
        is_regression (`bool`): whether residuals are regressed on.
    """

    def __init__(self, ensemble: PeftEnsembleModel, start: str, identity: str, is_regression: bool = False):
        self.ensemble = ensemble
        self.start = start
        self.identity = identity
        self.is_regression = is_regression
        # Of the step's adapter, of the start and of the ensemble, in the last forward pass.
        self._logits: list[torch.Tensor] = []

    @contextmanager
    def attached(self, trainer: Trainer) -> Iterator[None]:
        model = trainer.model
        own, plain = model.__dict__.get("forward"), model.forward
        model.forward = functools.wraps(plain)(functools.partial(self._forward, plain, trainer))
        try:
            if self.is_regression:
                with _replacing(trainer, self):
                    yield
            else:
                yield
        finally:
            self._logits = []
            if own is None:
                model.__dict__.pop("forward", None)
            else:
                model.forward = own

    def of_tokens(
        self, losses: torch.Tensor, labels: torch.Tensor, tasks: Sequence[str], ids: Sequence[str]
    ) -> torch.Tensor:
        """Squared error at each answer token; 0 elsewhere."""
        logits, space = self._logits, self.ensemble.label_space
        if labels.dim() == 1:
            mask = None if space is None else space.mask(list(tasks))
            logits = [restrict_to_labels(own, mask).unsqueeze(1) for own in logits]
            labels = labels.unsqueeze(1)
        else:
            logits, labels = [own[:, :-1] for own in logits], labels[:, 1:]
        own, before, ensemble = (
            values.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) for values in logits
        )
        errors = (log_odds(own) - log_odds(before) + torch.expm1(ensemble)).square()
        return errors * (labels != IGNORE_INDEX)

    def _forward(
        self,
        plain: Any,
        trainer: Trainer,
        *args: Any,
        fused_lm_head: bool = False,
        num_items_in_batch: Any = None,
        **inputs,
    ) -> Any:
        """The model's output with the logits of ensemble and step; as `SFTTrainer` has it with `fused_lm_head`."""
        labels = inputs.pop("labels", None)
        outputs = plain(*args, **inputs)
        logits, tasks = outputs.logits.float(), trainer.batch_tasks
        fixed, start = self._fixed(inputs, tasks)
        combined = fixed - start + logits
        if self.is_regression:
            self._logits = [logits, start, fixed]
        if fused_lm_head:
            return fused_output(combined, labels, getattr(outputs, "aux_loss", None))
        loss = None if labels is None else _mean_loss(combined, labels, num_items_in_batch)
        kind = SequenceClassifierOutput if combined.dim() == 2 else CausalLMOutput
        return kind(loss=loss, logits=combined)

    @torch.no_grad()
    def _fixed(self, inputs: Mapping[str, Any], tasks: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the ensemble and of the start, over all labels of a classifier: the trainer restricts them."""
        ensemble = self.ensemble
        rows = {task: ensemble.row_weights(task, 1)[0] for task in set(tasks)}
        weights = torch.stack([rows[task] for task in tasks])
        alone = torch.zeros_like(weights)
        alone[:, ensemble.adapter_names.index(self.start)] = 1.0
        kept = {key: value for key, value in inputs.items() if key not in ("use_cache", "output_router_logits")}
        with evaluation_mode(ensemble.model):
            return ensemble.weighted_logits(weights, kept), ensemble.weighted_logits(alone, kept)


@contextmanager
def _replacing(trainer: Trainer, loss: StepLoss) -> Iterator[None]:
    """While open, a trainer's loss of each token is another one, averaged over the whole optimizer step."""
    trainer.step_loss, trainer.loss_is_scaled_for_ga = loss, True
    try:
        yield
    finally:
        trainer.step_loss = None


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor, num_items: Any) -> torch.Tensor:
    """Mean over the labels of a batch, or over `num_items` where these are counted over an optimizer step."""
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction=reduction)
    return loss if num_items is None else loss / torch.as_tensor(num_items, device=loss.device)


def fused_output(
    logits: torch.Tensor, labels: torch.Tensor, aux_loss: torch.Tensor | None = None
) -> FusedCausalLMOutput:
    """What `SFTTrainer` expects of a model that it has patched, from logits `(B, T, V)`.

    Scores of each next token are zero where it does not count.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:].to(logits.device)
    counts = labels != IGNORE_INDEX
    log_probs = logits.log_softmax(-1)
    own = log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return FusedCausalLMOutput(
        log_probs=own * counts,
        entropy=-(log_probs.exp() * log_probs).sum(-1) * counts,
        is_top1=(logits.argmax(-1) == labels) & counts,
        label_mask=counts,
        aux_loss=aux_loss,
    )
