"""Gradient features of batches: each example's projected margin gradient."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._compat import keep_quantized_weights_in_place
from .._processes import run_in_step
from ..errors import CaptureError
from ..models.answer_scorer import AnswerScorer, rows_without_answer
from ..models.inputs import row_of
from ..models.sharding import is_sharded
from ..models.wrappers import evaluation_mode, unwrapped
from ..tasks import TASK, AnswerScores, LabelSpace, pop_meta, score_answers
from .autograd_check import Agreement, tolerance
from .linear_hooks import HookState, LinearHooks
from .lora_hooks import LoraHooks
from .margin import MarginKind, margins
from .mixed_precision import capture_precision
from .parameter_checks import check_not_sharded, check_units, check_used
from .preconditioner import Preconditioner
from .projection import SeededProjection

# Called with a parameter's name, float32 gradients `(b, *shape)` and the batch's examples that they belong to.
_Receiver = Callable[[str, torch.Tensor, slice], None]


@dataclass
class BatchGradients:
    """Features `(B, dim)`, margin, loss, num_tokens and entropy of the other answers `(B,)` of a batch, on the CPU.

    The entropy is that of an answer of one token; it is NaN for longer ones, and for custom margins.
    """

    features: torch.Tensor
    margin: torch.Tensor
    loss: torch.Tensor
    num_tokens: torch.Tensor
    other_entropy: torch.Tensor


class GradientExtractor:
    """Computes gradient features of batches.

    Hooks on linear layers (an adapter's A and B, a head) compute per-example gradients from a single backward pass over
    the batch. All other trainable parameters, and those whose hooks disagree with autograd on the first batch that uses
    them, take one forward and backward pass per example.

    A base that is sharded over processes is run by all of them together: each has to be given as many batches as the
    others, of as many examples.

    Args:
        model (`nn.Module`): model of which exactly the trainable parameters require gradients. Wrappers are removed.
        projection_dim (`int` or `Sequence[int]`, *optional*):
            Number of features per example; `None` keeps the exact gradient. The features of multiple projections are
            concatenated.
        seed (`int` or `Sequence[int]`, *optional*, defaults to 0): seed of the projection, or of each projection.
        margin (`str` or `Callable`, *optional*, defaults to `"geometric_mean"`):
            See [`margins`]; or a function from logits and labels to one number per example, `(B,)`, that depends on
            this example only.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        preconditioner (`Preconditioner`, *optional*): applied to every gradient before the projection.
        mixed_precision (`str`, *optional*, defaults to `"no"`):
            `"bf16"` runs the model under autocast to bfloat16; margins, losses and sums of gradients stay float32.

    Raises:
        `CaptureError`: when no parameter is trainable, or a trainable one is sharded over devices; and for modules of a
            sharded base that share a unit.
    """

    def __init__(
        self,
        model: nn.Module,
        projection_dim: int | None | Sequence[int | None] = 4096,
        seed: int | Sequence[int] = 0,
        margin: MarginKind = "geometric_mean",
        label_space: LabelSpace | None = None,
        preconditioner: Preconditioner | None = None,
        mixed_precision: str = "no",
    ):
        self.model = model = unwrapped(model)
        keep_quantized_weights_in_place(model)
        self.margin = margin
        self.preconditioner = preconditioner
        self.mixed_precision = mixed_precision
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_not_sharded(self.parameters)
        check_units(model)
        self._in_step = is_sharded(model)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        dims = projection_dim if isinstance(projection_dim, Sequence) else [projection_dim]
        seeds = seed if isinstance(seed, Sequence) else [seed] * len(dims)
        self.projections = [SeededProjection(shapes, *pair) for pair in zip(dims, seeds, strict=True)]
        self.dim = sum(projection.dim for projection in self.projections)
        self.linear_hooks = LinearHooks(model, self.parameters)
        self.lora_hooks = LoraHooks(model, self.parameters)
        self.hooked = [name for name in self.parameters if name in self.linear_hooks.covered]
        # Parameters whose hooks agreed with autograd, by (on more than one row, fused).
        self._agreeing: dict[tuple[bool, bool], set[str]] = defaultdict(set)
        self._used: set[str] | None = None
        self._scorer = AnswerScorer(model, label_space, with_entropy=True)

    @property
    def fallback(self) -> list[str]:
        """Parameters that take one pass per example."""
        hooked = set(self.hooked)
        return [name for name in self.parameters if name not in hooked]

    @property
    def unused(self) -> list[str]:
        """Parameters that no example so far depends on, such as an expert that was never routed to."""
        return [name for name in self.parameters if name not in (self._used or ())]

    def __call__(self, batch: Mapping[str, Any]) -> BatchGradients:
        """Compute the features of a batch.

        Args:
            batch (`dict`): model inputs with `labels`, and `task` (a list of names) if label sets differ.

        Raises:
            `CaptureError`:
                For an example without answer tokens, for packed rows, and on the first batch for trainable parameters
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
        entropy = torch.full_like(margin, float("nan"))
        if scores.other_entropy is not None:
            is_single = scores.num_tokens == 1
            entropy = torch.where(is_single, scores.mean_over_tokens(scores.other_entropy), entropy)
        columns = features, margin, scores.loss.detach(), scores.num_tokens, entropy
        return BatchGradients(*(column.cpu() for column in columns))

    def add_second_moments(self, batch: Mapping[str, Any], moments: dict[str, torch.Tensor]) -> None:
        """Add the squared loss gradients of a batch's examples to `moments`.

        The loss is the surrogate's, log(1 + exp(-m)). Gradients that are not finite are skipped. If a layer is called
        repeatedly, each call's gradient is squared separately.

        Args:
            batch (`dict`): as for [`__call__`].
            moments (`dict[str, torch.Tensor]`):
                Sums so far by parameter, in its shape and on its device; empty at the start.
        """
        squares: dict[str, torch.Tensor] = {}

        def begin(batch_size: int, device: torch.device) -> _Receiver:
            squares.clear()

            def receive(name: str, gradient: torch.Tensor, rows: slice) -> None:
                flat = gradient.flatten(start_dim=1)
                finite = flat.isfinite().all(dim=1, keepdim=True)
                # Rows are masked and sums stay on the device: choosing and copying would wait for it at every layer.
                own = torch.where(finite, flat, 0.0).square_().sum(dim=0).view(gradient.shape[1:])
                squares[name] = squares[name].add_(own) if name in squares else own

            return receive

        self._gradients(batch, lambda margin: torch.nn.functional.softplus(-margin), begin)
        # All memory is taken first: if it ran out between two sums, some would have the batch twice.
        for name, parameter in self.parameters.items():
            if name not in moments:
                moments[name] = torch.zeros(parameter.shape, device=parameter.device)
        for name, own in squares.items():
            moments[name] += own

    def _gradients(
        self,
        batch: Mapping[str, Any],
        objective: Callable[[torch.Tensor], torch.Tensor],
        begin: Callable[[int, torch.device], _Receiver],
    ) -> tuple[torch.Tensor, AnswerScores]:
        """Compute each example's gradient of `objective(margin)`; `begin` is called for each attempt."""
        inputs = dict(batch)
        meta = pop_meta(inputs)
        device = next(iter(self.parameters.values())).device
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        inputs, labels = self._scorer.prepare(inputs, inputs.pop("labels"))
        if rows_without_answer(labels, self._scorer.shift):
            raise CaptureError(
                "Expected at least one answer token per example, found an example with no answer token: all of its "
                "labels are -100. Drop such rows."
            )
        tasks = meta.get(TASK)
        precision = capture_precision(self.model, device, self.mixed_precision)
        with evaluation_mode(self.model), torch.enable_grad(), precision:
            while True:
                receive = begin(labels.shape[0], labels.device)
                attempt = self._attempt(inputs, labels, tasks, objective, receive)
                if attempt is not None:
                    return attempt

    def _attempt(self, inputs, labels, tasks, objective, receive) -> tuple[torch.Tensor, AnswerScores] | None:
        """One pass; `None` if it has to be repeated because some hooks were wrong and have been disabled."""
        found, used = None, set()
        if self.hooked:
            batched = self._batched(inputs, labels, tasks, objective, receive)
            if batched is None:
                return None
            found, used = batched
        if self.fallback:
            single, used_singly = self._one_by_one(inputs, labels, tasks, objective, receive)
            found, used = found or single, used | used_singly
        used = self._agreed(used)
        if self._used is None:
            check_used(self.model, self.parameters, used)
        self._used = used | (self._used or set())
        return found

    def _batched(self, inputs, labels, tasks, objective, receive):
        """One pass with hooks: margin and scores, and the parameters used; `None` if hooks were wrong."""
        size = labels.shape[0]
        agreement = Agreement(size)
        # Indexed by whether the layer runs fused.
        unchecked = [
            set(self.hooked) - self._agreeing[True, fused] - (self._agreeing[False, fused] if size == 1 else set())
            for fused in (False, True)
        ]

        def hooked(name: str, gradient: torch.Tensor) -> None:
            receive(name, gradient, slice(None))
            if name in to_check:
                agreement.add(name, gradient)

        state = HookState(size)
        with (
            self.lora_hooks.attached(state, set(self.hooked), hooked),
            self.linear_hooks.attached(state, self.hooked, hooked),
        ):
            margin, scores = self._scored(inputs, labels, tasks)
            values = objective(margin)
            # Flat inputs are checked on every batch, since one row per example may be a coincidence.
            new = (unchecked[False] - state.fused) | (unchecked[True] & state.fused) | state.flat
            new = self._agreed(new)
            to_check = [name for name in self.hooked if name in new]
            in_graph = [name for name in to_check if name not in state.fused]
            weighted = self._autograd(agreement.total(values), in_graph, retain_graph=True)
            state.active = True
            summed = self._autograd(values.sum(), self.hooked)
        # The gradients of the layers' own forward, without which a fused one cannot be checked. Not for layers that
        # gave none, such as those of a part of the model that no batch uses: every batch would take another pass.
        delivered = self._agreed(set(summed)) if to_check else set()
        by_layers = [name for name in to_check if name in state.fused and name in delivered]
        if by_layers:
            values = objective(self._scored(inputs, labels, tasks)[0])
            weighted |= self._autograd(agreement.total(values), by_layers)
        allowed = tolerance(self.model, labels.device) if to_check else 0.0
        # The fused forward rounds differently, which accumulates over the layers.
        allowances = {name: 3 * allowed if name in state.fused else allowed for name in to_check}
        verdicts = {name: agreement.verdict(name, weighted.get(name), allowances[name]) for name in to_check}
        wrong = self._agreed(state.unusable | {name for name, verdict in verdicts.items() if verdict is False})
        if wrong:
            # A fused layer falls back to hooks on its parts first, and to one pass per example after that.
            self.lora_hooks.disabled |= wrong & state.fused
            self.hooked = [name for name in self.hooked if name not in wrong - state.fused]
            return None
        for name, verdict in verdicts.items():
            if verdict:
                self._agreeing[size > 1, name in state.fused].add(name)
        return (margin.detach(), scores), set(summed)

    def _agreed(self, names: set[str]) -> set[str]:
        """The names that any process has found, where all run the model together: passes depend on them."""
        return set().union(*run_in_step(lambda: names)) if self._in_step else names

    def _one_by_one(self, inputs, labels, tasks, objective, receive):
        """One pass per example: margin and scores of the batch, and the parameters used."""
        names, rows, used = self.fallback, [], set()
        for i in range(labels.shape[0]):
            own, label = row_of(inputs, labels, i)
            margin, scores = self._scored(own, label, tasks[i : i + 1] if tasks is not None else None)
            for name, gradient in self._autograd(objective(margin).sum(), names).items():
                receive(name, gradient.unsqueeze(0).float(), slice(i, i + 1))
                used.add(name)
            rows.append((margin.detach(), scores))
        return (torch.cat([margin for margin, _ in rows]), _joined([scores for _, scores in rows])), used

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
                "Reentrant activation checkpointing does not support gradients of single parameters. Set "
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
    """Scores of a batch from the scores of its rows."""
    return AnswerScores(
        torch.cat([own.log_probs.detach() for own in scores]),
        torch.cat([own.correct for own in scores]),
        torch.cat([torch.full_like(own.rows, i) for i, own in enumerate(scores)]),
        torch.cat([own.num_tokens for own in scores]),
        None if scores[0].other_entropy is None else torch.cat([own.other_entropy for own in scores]),
    )
