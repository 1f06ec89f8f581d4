"""Scores of each example's answer, from logits. Pure functions, one convention for all model classes.

An example's answer is its label tokens that are not -100. In classification, the answer is one token whose "vocabulary"
is the task's own labels, so logits outside the row's label set are ignored.
"""

from dataclasses import dataclass

import torch

IGNORE_INDEX = -100


@dataclass
class AnswerScores:
    """Scores of `n` answer tokens in a batch of `B` examples.

    Args:
        log_probs (`torch.Tensor` of shape `(n,)`): log-probability of each answer token, float32.
        correct (`torch.Tensor` of shape `(n,)`): whether the answer token has the largest logit.
        rows (`torch.Tensor` of shape `(n,)`): index of the example each token belongs to.
        num_tokens (`torch.Tensor` of shape `(B,)`): number of answer tokens per example.
        other_entropy (`torch.Tensor` of shape `(n,)`, *optional*): see [`other_entropy`].
    """

    log_probs: torch.Tensor
    correct: torch.Tensor
    rows: torch.Tensor
    num_tokens: torch.Tensor
    other_entropy: torch.Tensor | None = None

    def mean_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a per-token quantity over each example's answer, from `(n,)` to `(B,)`."""
        total = torch.zeros(len(self.num_tokens), dtype=values.dtype, device=values.device)
        return total.index_add(0, self.rows, values) / self.num_tokens.clamp(min=1)

    @property
    def loss(self) -> torch.Tensor:
        """Mean token loss of each example, `(B,)`."""
        return -self.mean_over_tokens(self.log_probs)

    @property
    def exact_match(self) -> torch.Tensor:
        """Whether greedy decoding generates the whole answer, bool `(B,)`.

        This is the case if and only if every answer token has the largest logit given the previous ones, so a single
        teacher-forced forward pass is enough.
        """
        return self.mean_over_tokens(self.correct.float()) == 1.0


def restrict_to_labels(logits: torch.Tensor, label_mask: torch.Tensor | None) -> torch.Tensor:
    """Set classification logits `(B, C)` outside each row's label set to minus infinity."""
    if label_mask is None:
        return logits
    return logits.masked_fill(~label_mask.to(logits.device), float("-inf"))


def answer_positions(logits: torch.Tensor, labels: torch.Tensor, shift: bool = True):
    """Select the logits and targets of the answer tokens.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)` or `(B, C)`): logits of a language model or a classifier.
        labels (`torch.Tensor` of shape `(B, T)` or `(B,)`): -100 for tokens to ignore.
        shift (`bool`, *optional*, defaults to `True`):
            Whether position t predicts label t + 1 (decoder-only models); `False` for encoder-decoder models.

    Returns:
        `tuple`: logits `(n, V)` in float32, targets `(n,)`, rows `(n,)`.
    """
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(1), labels.reshape(-1, 1)
    elif shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    rows, positions = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return logits[rows, positions].float(), labels[rows, positions], rows


def token_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target (float32) and whether its logit is the largest, both `(...)`."""
    logits = logits.float()
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return log_probs, logits.detach().argmax(-1) == targets


def other_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Entropy, in nats, of the distribution over all tokens but the target, `(...)` float32; 0 where there is but one.

    With it, the log-odds z of the target tell how they change with the scale of the logits: those of logits times s are
    s z + (s - 1) H to first order in s - 1.
    """
    others = logits.detach().float().scatter(-1, targets.unsqueeze(-1), float("-inf"))
    entropy = torch.special.entr(torch.softmax(others, dim=-1)).sum(-1)
    return entropy.masked_fill(others.isneginf().all(-1), 0.0)


def score_answers(
    logits: torch.Tensor, labels: torch.Tensor, shift: bool = True, with_entropy: bool = False
) -> AnswerScores:
    """Score each example's answer, on request with [`other_entropy`]. See [`answer_positions`] for the arguments."""
    batch_size = labels.shape[0]
    logits, targets, rows = answer_positions(logits, labels, shift)
    log_probs, correct = token_scores(logits, targets)
    num_tokens = torch.zeros(batch_size, dtype=torch.long, device=rows.device).index_add(0, rows, torch.ones_like(rows))
    entropy = other_entropy(logits, targets) if with_entropy else None
    return AnswerScores(log_probs, correct, rows, num_tokens, entropy)
