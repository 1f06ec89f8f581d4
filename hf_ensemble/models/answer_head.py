"""The head of a language model at the answer tokens alone, a few of them at a time."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..tasks import IGNORE_INDEX, AnswerScores, token_scores
from .virtual_tokens import positions_before

# Logits at once, in float32; a few copies of them live beside (their log-softmax and its gradient).
LOGITS_BYTES = 64 * 2**20


class AnswerHead:
    """Scores of answer tokens without the logits `(B, T, V)` of a whole batch.

    The model runs once with its head on one position a row. The hidden states of the answer tokens are then put in the
    place of its body's output, piece by piece, so that whatever the model does behind its body (scaling, capping) is
    done by its own code. Where the head is not trained, the gradient of every token's log-probability in its hidden
    state is taken with the piece, after which the piece's logits are dropped.

    Args:
        model (`nn.Module`): its trained parameters require gradients, all others do not.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        body, encoder = _part(base, "decoder"), _part(base, "encoder")
        # The one whose output the head is given comes first.
        self._bodies = [part for part in (body, encoder) if part is not None]
        find_head = getattr(base, "get_output_embeddings", None)
        self.usable = body is not None and callable(find_head) and find_head() is not None

    def __call__(self, inputs: Mapping[str, Any], labels: torch.Tensor, shift: bool) -> AnswerScores:
        """Scores of a batch.

        Args:
            inputs (`dict`): what the model takes, without labels.
            labels (`torch.Tensor` of shape `(B, T)`): -100 where a token does not count.
            shift (`bool`): whether position t predicts label t + 1.
        """
        index, targets = _answer_positions(labels, shift)
        wanted = targets != IGNORE_INDEX
        with _recording(self._bodies) as outputs:
            # The body's output with all positions goes on to the head with one.
            hidden, vocabulary = self._hidden(inputs, outputs, index, labels.shape[1])
        # Adapters differ in whether they train the head.
        if torch.is_grad_enabled() and self._logits(inputs, outputs, hidden[:, :1].detach()).requires_grad:
            log_probs, correct = token_scores(self._logits(inputs, outputs, hidden), targets.clamp(min=0))
        else:
            log_probs, correct = self._in_pieces(inputs, outputs, hidden, targets, vocabulary)
        rows, _ = wanted.nonzero(as_tuple=True)
        return AnswerScores(log_probs[wanted], correct[wanted], rows, wanted.sum(dim=1))

    def _hidden(self, inputs, outputs: dict, index: torch.Tensor, length: int) -> tuple[torch.Tensor, int]:
        """Hidden states of the answer tokens `(B, n, H)`, and the number of the head's outputs."""
        found = []

        def keep(module, arguments, output):
            states = output.last_hidden_state
            positions = index + positions_before(self._model, states.shape[1], length)
            found.append(states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1])))
            return _with_states(output, found[-1][:, :1])

        # After the recording hook, which is to see the body's own output.
        handle = self._bodies[0].register_forward_hook(keep)
        try:
            logits = self._model(**inputs).logits
        finally:
            handle.remove()
        return found[0], logits.shape[-1]

    def _logits(self, inputs, outputs: dict, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logits behind given hidden states: `(B, n, H)` to `(B, n, V)`."""
        replaced = {body: outputs[body] for body in self._bodies if body in outputs}
        replaced[self._bodies[0]] = _with_states(outputs[self._bodies[0]], hidden)
        with _answering(replaced):
            return self._model(**inputs).logits

    def _in_pieces(self, inputs, outputs, hidden, targets, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = max(1, LOGITS_BYTES // (4 * vocabulary * len(hidden)))
        with_gradient = torch.is_grad_enabled() and hidden.requires_grad
        log_probs, correct, slopes = [], [], []
        for states, tokens in zip(hidden.detach().split(size, dim=1), targets.split(size, dim=1)):
            states.requires_grad_(with_gradient)
            found, right = token_scores(self._logits(inputs, outputs, states), tokens.clamp(min=0))
            if with_gradient:
                # Each token's log-probability depends on its own hidden state alone.
                slopes.append(torch.autograd.grad(found.sum(), states)[0])
            log_probs.append(found.detach())
            correct.append(right)
        values = torch.cat(log_probs, dim=1)
        if with_gradient:
            # Zero, with the log-probabilities' gradient.
            values = values + ((hidden - hidden.detach()).float() * torch.cat(slopes, dim=1).float()).sum(dim=-1)
        return values, torch.cat(correct, dim=1)


def _answer_positions(labels: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that predict each row's answer tokens, and these tokens, `(B, n)`; -100 where a row has fewer."""
    tokens = labels[:, 1:] if shift else labels
    counts = (tokens != IGNORE_INDEX).sum(dim=1)
    # A stable sort puts the answer's positions first, in their order.
    index = (tokens == IGNORE_INDEX).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    return index, tokens.gather(1, index)


def _part(base: nn.Module, name: str) -> nn.Module | None:
    find = getattr(base, f"get_{name}", None)
    part = find() if callable(find) else None
    return part if isinstance(part, nn.Module) and part is not base else None


def _with_states(output: Any, states: torch.Tensor) -> Any:
    changed = copy.copy(output)
    changed["last_hidden_state"] = states
    return changed


@contextmanager
def _recording(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """While open, the latest output of each module, by module."""
    outputs: dict[nn.Module, Any] = {}

    def record(module, arguments, output):
        outputs[module] = output

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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
