"""One small vector per example: the projected gradient of its margin."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._compat import keep_quantized_weights_in_place
from ..errors import CaptureError
from ..models.answer_scorer import AnswerScorer, rows_without_answer
from ..models.inputs import row_of
from ..models.wrappers import evaluation_mode, unwrapped
from ..tasks import TASK, AnswerScores, LabelSpace, pop_meta, score_answers
from .autograd_check import Agreement, tolerance
from .linear_hooks import LinearTaps, Reading
from .lora_hooks import LoraTaps
from .margin import MarginKind, margins
from .parameter_checks import check_reached, check_whole
from .preconditioner import Preconditioner
from .projection import SeededProjection

# Takes a parameter's name, gradients `(b, *shape)` in float32 and the examples of the batch that they belong to.
_Receiver = Callable[[str, torch.Tensor, slice], None]


@dataclass
class BatchGradients:
    """Of a batch of `B` examples: features `(B, dim)`, margin, loss and num_tokens `(B,)`, all on the CPU."""

    features: torch.Tensor
    margin: torch.Tensor
    loss: torch.Tensor
    num_tokens: torch.Tensor


class GradientExtractor:
    """Computes gradient features of batches.

    Linear layers (an adapter's A and B, a head) are read by hooks from one backward pass over the whole batch. Every
    other trained parameter, and every one whose hooks do not agree with autograd on the first batch that reaches it, is
    taken by a forward and backward pass of each example alone.

    Args:
        model (`nn.Module`):
            A model whose trained parameters require gradients, all others not. Distributed wrappers are taken off.
        projection_dim (`int` or `Sequence[int]`, *optional*):
            Features per example; `None` keeps the exact gradient. Several projections' features stand side by side.
        seed (`int` or `Sequence[int]`, *optional*, defaults to 0): seed of the projection, or of each.
        margin (`str` or `Callable`, *optional*, defaults to `"geometric_mean"`):
            See [`margins`]; or a function from logits and labels to one number per example, `(B,)`, each of which
            depends on its own example alone.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        preconditioner (`Preconditioner`, *optional*): applied to every gradient before the projection.

    Raises:
        `CaptureError`: when no parameter is trainable, or a trainable one is sharded over devices.
    """

    def __init__(
        self,
        model: nn.Module,
        projection_dim: int | None | Sequence[int | None] = 4096,
        seed: int | Sequence[int] = 0,
        margin: MarginKind = "geometric_mean",
        label_space: LabelSpace | None = None,
        preconditioner: Preconditioner | None = None,
    ):
        self.model = model = unwrapped(model)
        keep_quantized_weights_in_place(model)
        self.margin = margin
        self.preconditioner = preconditioner
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_whole(self.parameters)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        dims = projection_dim if isinstance(projection_dim, Sequence) else [projection_dim]
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(dims)
        self.projections = [SeededProjection(shapes, *pair) for pair in zip(dims, seeds, strict=True)]
        self.dim = sum(projection.dim for projection in self.projections)
        self.taps = LinearTaps(model, self.parameters)
        self.lora_taps = LoraTaps(model, self.parameters)
        self.hooked = [name for name in self.parameters if name in self.taps.covered]
        # Whose hooks were found to agree with autograd, by whether on several rows and whether read as a whole.
        self._agreeing: dict[tuple[bool, bool], set[str]] = defaultdict(set)
        self._reached: set[str] | None = None
        self._scorer = AnswerScorer(model, label_space)

    @property
    def fallback(self) -> list[str]:
        """Parameters that each example's own pass is taken for."""
        hooked = set(self.hooked)
        return [name for name in self.parameters if name not in hooked]

    @property
    def unreached(self) -> list[str]:
        """Parameters that no example so far depends on, such as an expert that was never chosen."""
        return [name for name in self.parameters if name not in (self._reached or ())]

    def __call__(self, batch: Mapping[str, Any]) -> BatchGradients:
        """Features of one batch.

        Args:
            batch (`dict`): the model's inputs with `labels`; `task` (a list of names) where label sets differ.

        Raises:
            `CaptureError`:
                For an example without an answer token, for packed rows, and on the first batch for trained parameters
                that no example depends on.
        """
        features = torch.empty(0)

        def begin(batch_size: int, device: torch.device) -> _Receiver:
            nonlocal features
            features = torch.zeros(batch_size, self.dim, device=device)

            def receive(name: str, gradient: torch.Tensor, rows: slice) -> None:
                gradient = gradient.to(device)
                if self.preconditioner is not None:
                    gradient = self.preconditioner(name, gradient)
                first = 0
                for projection in self.projections:
                    projection.add(features[rows, first : first + projection.dim], name, gradient)
                    first += projection.dim

            return receive

        margin, scores = self._gradients(batch, lambda margin: margin, begin)
        return BatchGradients(features.cpu(), margin.cpu(), scores.loss.detach().cpu(), scores.num_tokens.cpu())

    def add_second_moments(self, batch: Mapping[str, Any], moments: dict[str, torch.Tensor]) -> None:
        """Add the squares of the examples' loss gradients, parameter by parameter, to `moments`.

        The loss is the surrogate's own, log(1 + exp(-m)). Gradients that are not finite are left out; those of a layer
        that is called several times count call by call.

        Args:
            batch (`dict`): as for a call.
            moments (`dict[str, torch.Tensor]`): sums so far, by parameter in its shape; empty at the start.
        """
        squares: dict[str, torch.Tensor] = {}

        def begin(batch_size: int, device: torch.device) -> _Receiver:
            squares.clear()

            def receive(name: str, gradient: torch.Tensor, rows: slice) -> None:
                finite = gradient.flatten(start_dim=1).isfinite().all(dim=1)
                squares[name] = squares.get(name, 0) + gradient[finite].square().sum(dim=0).cpu()

            return receive

        self._gradients(batch, lambda margin: torch.nn.functional.softplus(-margin), begin)
        for name, parameter in self.parameters.items():
            moments[name] = moments.get(name, torch.zeros(parameter.shape)) + squares.get(name, 0)

    def _gradients(
        self,
        batch: Mapping[str, Any],
        objective: Callable[[torch.Tensor], torch.Tensor],
        begin: Callable[[int, torch.device], _Receiver],
    ) -> tuple[torch.Tensor, AnswerScores]:
        """Every example's gradient of `objective(margin)`; `begin` is called anew for each attempt."""
        inputs = dict(batch)
        meta = pop_meta(inputs)
        device = next(iter(self.parameters.values())).device
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        inputs, labels = self._scorer.prepare(inputs, inputs.pop("labels"))
        if rows_without_answer(labels, self._scorer.shift):
            raise CaptureError("An example of the batch has no answer token: every label is -100. Drop such rows.")
        tasks = meta.get(TASK)
        with evaluation_mode(self.model), torch.enable_grad():
            while True:
                receive = begin(labels.shape[0], labels.device)
                attempt = self._attempt(inputs, labels, tasks, objective, receive)
                if attempt is not None:
                    return attempt

    def _attempt(self, inputs, labels, tasks, objective, receive) -> tuple[torch.Tensor, AnswerScores] | None:
        """One pass; `None` when it has to be taken again, since hooks were found wrong and are no longer used."""
        found, reached = None, set()
        if self.hooked:
            together = self._together(inputs, labels, tasks, objective, receive)
            if together is None:
                return None
            found, reached = together
        if self.fallback:
            alone, reached_alone = self._one_by_one(inputs, labels, tasks, objective, receive)
            found, reached = found or alone, reached | reached_alone
        if self._reached is None:
            check_reached(self.model, self.parameters, reached)
        self._reached = reached | (self._reached or set())
        return found

    def _together(self, inputs, labels, tasks, objective, receive):
        """Hooks on one batched pass: margin and scores, and the parameters reached; `None` when hooks were wrong."""
        size = labels.shape[0]
        agreement = Agreement(size)
        # By whether they are read as a whole.
        unchecked = [
            set(self.hooked) - self._agreeing[True, whole] - (self._agreeing[False, whole] if size == 1 else set())
            for whole in (False, True)
        ]

        def hooked(name: str, gradient: torch.Tensor) -> None:
            receive(name, gradient, slice(None))
            if name in to_check:
                agreement.add(name, gradient)

        # What the layers' own forward gives, before any stands in for it.
        by_layers = [name for name in self.lora_taps.readable(set(self.hooked)) if name in unchecked[True]]
        weighted = {}
        if by_layers:
            values = objective(self._scored(inputs, labels, tasks)[0])
            weighted = self._autograd(agreement.total(values), by_layers)
        reading = Reading(size)
        with (
            self.lora_taps.reading(reading, set(self.hooked), hooked),
            self.taps.reading(reading, self.hooked, hooked),
        ):
            margin, scores = self._scored(inputs, labels, tasks)
            values = objective(margin)
            # Whether one row is one example is only ever known of the batch at hand.
            new = (unchecked[False] - reading.whole) | (unchecked[True] & reading.whole) | reading.flat
            to_check = [name for name in self.hooked if name in new]
            in_graph = [name for name in to_check if name not in reading.whole]
            weighted |= self._autograd(agreement.total(values), in_graph, retain_graph=True)
            reading.active = True
            summed = self._autograd(values.sum(), self.hooked)
        allowed = tolerance(self.model, labels.device) if to_check else 0.0
        # Another forward rounds in another way, one layer after the other.
        allowances = {name: 3 * allowed if name in reading.whole else allowed for name in to_check}
        verdicts = {name: agreement.verdict(name, weighted.get(name), allowances[name]) for name in to_check}
        wrong = reading.unusable | {name for name, verdict in verdicts.items() if verdict is False}
        if wrong:
            # A layer that was read as a whole is read part by part, and only then row by row.
            self.lora_taps.refused |= wrong & reading.whole
            self.hooked = [name for name in self.hooked if name not in wrong - reading.whole]
            return None
        for name, verdict in verdicts.items():
            if verdict:
                self._agreeing[size > 1, name in reading.whole].add(name)
        return (margin.detach(), scores), set(summed)

    def _one_by_one(self, inputs, labels, tasks, objective, receive):
        """Each example in a batch of its own: margin and scores of the batch, and the parameters reached."""
        names, rows, reached = self.fallback, [], set()
        for i in range(labels.shape[0]):
            own, label = row_of(inputs, labels, i)
            margin, scores = self._scored(own, label, tasks[i : i + 1] if tasks is not None else None)
            for name, gradient in self._autograd(objective(margin).sum(), names).items():
                receive(name, gradient.unsqueeze(0).float(), slice(i, i + 1))
                reached.add(name)
            rows.append((margin.detach(), scores))
        return (torch.cat([margin for margin, _ in rows]), _joined([scores for _, scores in rows])), reached

    def _autograd(self, value: torch.Tensor, names: list[str], retain_graph: bool = False) -> dict[str, torch.Tensor]:
        """Gradients of the parameters that `value` depends on, by name."""
        if not names or not value.requires_grad:
            return {}
        wanted = [self.parameters[name] for name in names]
        try:
            gradients = torch.autograd.grad(value, wanted, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise CaptureError(
                "Expected gradients of single parameters, which reentrant activation checkpointing does not give. Set "
                "use_reentrant=False."
            ) from error
        return {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}

    def _scored(self, inputs, labels, tasks) -> tuple[torch.Tensor, AnswerScores]:
        """Margin and scores of a batch."""
        if not callable(self.margin):
            scores = self._scorer(inputs, labels, tasks)
            return margins(scores, self.margin), scores
        logits = self._scorer.logits(inputs, labels, tasks)
        return self._outputs(logits, labels), score_answers(logits, labels, self._scorer.shift)

    def _outputs(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The margin that an output function gives."""
        values = self.margin(logits, labels)
        if not torch.is_tensor(values) or values.shape != labels.shape[:1] or not values.requires_grad:
            found = f"shape {tuple(values.shape)}" if torch.is_tensor(values) else type(values).__name__
            raise CaptureError(
                f"The output function has to return a differentiable tensor with one number per example, of shape "
                f"{tuple(labels.shape[:1])}; found {found}."
            )
        return values.float()


def _joined(scores: list[AnswerScores]) -> AnswerScores:
    """Scores of a batch from those of its rows."""
    return AnswerScores(
        torch.cat([own.log_probs.detach() for own in scores]),
        torch.cat([own.correct for own in scores]),
        torch.cat([torch.full_like(own.rows, i) for i, own in enumerate(scores)]),
        torch.cat([own.num_tokens for own in scores]),
    )
