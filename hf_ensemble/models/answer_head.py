"""The head of a language model at the answer tokens alone, a few of them at a time."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .._processes import run_in_step
from ..tasks import IGNORE_INDEX, AnswerScores, other_entropy, token_scores
from .sharding import is_sharded
from .virtual_tokens import positions_before

# Logits at once, in float32; a few copies of them live beside (their log-softmax and its gradient).
LOGITS_BYTES = 64 * 2**20
# A GPU takes larger pieces: every piece reads the head's weights once more. This is their part of its memory.
_LOGITS_SHARE = 256


@dataclass
class BodyRun:
    """One run of a model's body, from which its head can go on.

    Args:
        inputs (`dict`): what the model was given.
        outputs (`dict[nn.Module, Any]`): output of the body and, of an encoder-decoder, of the encoder.
        hidden (`torch.Tensor` of shape `(B, n, H)`): hidden states at the positions that were asked for.
        width (`int`): number of the head's outputs, `V`.
    """

    inputs: Mapping[str, Any]
    outputs: dict[nn.Module, Any]
    hidden: torch.Tensor
    width: int


class AnswerHead:
    """Logits and scores of answer tokens without the logits `(B, T, V)` of a whole batch.

    The model runs once with its head on one position per row. The hidden states of the answer tokens then take the
    place of its body's output, piece by piece, so that everything behind the body (scaling, capping) is done by the
    model's own code. Where the head is not trained, the gradient of each token's log-probability in its hidden state is
    taken together with the piece, after which the piece's logits are dropped.

    Args:
        model (`nn.Module`): a model, or a `PeftModel`.
        with_entropy (`bool`, *optional*, defaults to `False`): also give the entropy of the other tokens.

    Attributes:
        usable (`bool`): whether the model has a body and a head to tell apart.
        width (`int`, *optional*): number of the head's outputs, where the head tells it.
    """

    def __init__(self, model: nn.Module, with_entropy: bool = False):
        self._model, self._with_entropy = model, with_entropy
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        body, encoder = _part(base, "decoder"), _part(base, "encoder")
        # The one whose output the head is given comes first.
        self.bodies = [part for part in (body, encoder) if part is not None]
        self.usable = body is not None and _output_layer(base) is not None
        self.width = head_width(base)
        self._is_sharded = is_sharded(model)

    def __call__(self, inputs: Mapping[str, Any], labels: torch.Tensor, shift: bool) -> AnswerScores:
        """Scores of a batch.

        Args:
            inputs (`dict`): the model's inputs, without labels.
            labels (`torch.Tensor` of shape `(B, T)`): -100 where a token does not count.
            shift (`bool`): whether position t predicts label t + 1.
        """
        index, targets = answer_tokens(labels, shift)
        run = self.run_body(inputs, index, labels.shape[1])
        # Adapters differ in whether they train the head.
        if torch.is_grad_enabled() and self.logits(run, run.hidden[:, :1].detach()).requires_grad:
            values = self._scores(self.logits(run, run.hidden), targets)
        else:
            values = self._in_pieces(run, targets)
        return select_answers(*values[:2], targets, *values[2:])

    def _scores(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Log-probability of each target, whether it is the most probable token, and the entropy of the others."""
        targets = targets.clamp(min=0)
        return (*token_scores(logits, targets), *([other_entropy(logits, targets)] if self._with_entropy else []))

    def run_body(self, inputs: Mapping[str, Any], index: torch.Tensor | None, length: int) -> BodyRun:
        """Run the model up to its head.

        Args:
            inputs (`dict`): the model's inputs, without labels.
            index (`torch.Tensor` of shape `(B, n)`, *optional*): positions to keep of each row; all by default.
            length (`int`): number of positions that the index counts from; virtual tokens come before them.
        """
        outputs: dict[nn.Module, Any] = {}
        kept: list[torch.Tensor] = []

        def record(module, arguments, output):
            if module is not self.bodies[0]:
                outputs[module] = output
                return output
            states = output.last_hidden_state
            if index is not None:
                positions = index + positions_before(self._model, states.shape[1], length)
                states = states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
            kept.append(states)
            outputs[module] = _with_states(output, states[:, :1])
            return outputs[module]

        handles = [body.register_forward_hook(record) for body in self.bodies]
        try:
            width = self._model(**inputs).logits.shape[-1]
        finally:
            for handle in handles:
                handle.remove()
        return BodyRun(inputs, outputs, kept[-1], width)

    def logits(self, run: BodyRun, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logits behind given hidden states, `(B, n, H)` to `(B, n, V)`."""
        body = self.bodies[0]
        with _answering({**run.outputs, body: _with_states(run.outputs[body], hidden)}):
            return self._model(**run.inputs).logits

    def _in_pieces(self, run: BodyRun, targets: torch.Tensor) -> list[torch.Tensor]:
        with_gradient = torch.is_grad_enabled() and run.hidden.requires_grad
        scores, slopes = [], []
        size = tokens_at_once(len(targets), run.width, run.hidden.device)
        pieces = list(zip(run.hidden.detach().split(size, dim=1), targets.split(size, dim=1)))
        count = len(pieces)
        if self._is_sharded:
            # Every process runs the head as often as the one with the longest answers.
            pieces += pieces[-1:] * (max(run_in_step(lambda: count)) - count)
        for states, tokens in pieces:
            states.requires_grad_(with_gradient)
            found, *others = self._scores(self.logits(run, states), tokens)
            if with_gradient:
                # Each token's log-probability depends on its own hidden state alone.
                slopes.append(torch.autograd.grad(found.sum(), states)[0])
            scores.append((found.detach(), *others))
        values, *others = (torch.cat(parts, dim=1) for parts in zip(*scores[:count]))
        if with_gradient:
            # Zero, with the log-probabilities' gradient.
            hidden, slope = run.hidden, torch.cat(slopes[:count], dim=1)
            values = values + ((hidden - hidden.detach()).float() * slope.float()).sum(dim=-1)
        return [values, *others]


def head_width(base: nn.Module) -> int | None:
    """Number of outputs of a language model's head; `None` without a head, or where it does not tell."""
    layer = _output_layer(base)
    if isinstance(layer, AuxiliaryTrainingWrapper):
        # An adapter's copy that is tied to the embeddings tells their sizes.
        layer = layer.original_module
    return getattr(layer, "out_features", None)


def tokens_at_once(rows: int, width: int, device: torch.device) -> int:
    """How many tokens of each row go through a head of this width together; at least 1."""
    size = LOGITS_BYTES
    if device.type == "cuda":
        size = max(size, torch.cuda.get_device_properties(device).total_memory // _LOGITS_SHARE)
    return max(1, size // max(4 * rows * width, 1))


def answer_tokens(labels: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that predict each row's answer tokens, and these tokens, `(B, n)`; -100 where a row has fewer.

    A label per row, `(B,)`, is one answer token at position 0.
    """
    if labels.dim() == 1:
        return torch.zeros_like(labels).unsqueeze(1), labels.unsqueeze(1)
    tokens = labels[:, 1:] if shift else labels
    counts = (tokens != IGNORE_INDEX).sum(dim=1)
    # A stable sort puts the answer's positions first, in their order.
    index = (tokens == IGNORE_INDEX).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    return index, tokens.gather(1, index)


def select_answers(
    log_probs: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, entropy: torch.Tensor | None = None
) -> AnswerScores:
    """Scores of the tokens that count, from values for all `(B, n)` of [`answer_tokens`]."""
    wanted = targets != IGNORE_INDEX
    rows, _ = wanted.nonzero(as_tuple=True)
    entropy = None if entropy is None else entropy[wanted]
    return AnswerScores(log_probs[wanted], correct[wanted], rows, wanted.sum(dim=1), entropy)


def _output_layer(base: nn.Module) -> nn.Module | None:
    find = getattr(base, "get_output_embeddings", None)
    return find() if callable(find) else None


def _part(base: nn.Module, name: str) -> nn.Module | None:
    find = getattr(base, f"get_{name}", None)
    part = find() if callable(find) else None
    return part if isinstance(part, nn.Module) and part is not base else None


def _with_states(output: Any, states: torch.Tensor) -> Any:
    changed = copy.copy(output)
    changed["last_hidden_state"] = states
    return changed


@contextmanager
def _answering(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """While open, each module gives its output without running."""
    own = {module: module.__dict__.get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            module.forward = lambda *args, output=output, **kwargs: output
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
