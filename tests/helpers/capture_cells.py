"""A batch of examples, and each one's gradient taken alone by autograd."""

import torch

from helpers import architectures as zoo
from helpers import oracles


def examples(name: str, count: int = 3) -> list[dict]:
    """Token ids and labels of different lengths, with `-100` where nothing is asked."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        length = 9 - 2 * (i % 3)
        ids = torch.randint(3, zoo.WORDS, (length,), generator=generator)
        labels = torch.cat([torch.full((length - 3,), -100), ids[-3:]])
        if zoo.task_type(name) == "SEQ_CLS":
            labels = torch.tensor(i % 3)
        elif zoo.task_type(name) == "SEQ_2_SEQ_LM":
            labels = torch.randint(3, zoo.WORDS, (2 + i,), generator=generator)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def batch(rows: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    """Padded rows."""

    def padded(values, fill):
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill, padding_side=side)

    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    mask = padded([torch.ones_like(own) for own in ids], 0)
    if labels[0].dim() == 0:
        return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": torch.stack(labels)}
    # An encoder-decoder model's answers are padded on the right whatever the side of the questions.
    same = len(labels[0]) == len(ids[0])
    pad_labels = padded if same else lambda own, fill: torch.nn.utils.rnn.pad_sequence(own, True, fill)
    return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": pad_labels(labels, -100)}


def margin_alone(model, row: dict, kind: str = "geometric_mean") -> torch.Tensor:
    """The margin of one example without padding, in the model's precision up to its logits."""
    ids, labels = row["input_ids"][None], row["labels"][None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, labels[:, :-1]], dim=1)
    logits = model(**inputs).logits
    if labels.dim() == 2:
        logits = logits[:, -labels.shape[1] :]
        if "decoder_input_ids" in inputs:
            # The oracle's position t predicts label t + 1.
            logits, labels = logits[:, [*range(logits.shape[1]), 0]], torch.cat([labels[:, :1] * 0 - 100, labels], 1)
    return oracles.margins(logits, labels, kind)[0]


def expected(model, rows: list[dict], kind: str = "geometric_mean") -> torch.Tensor:
    """Gradients `(B, P)`, in evaluation mode."""
    model.eval()
    return oracles.per_example_gradients(model, lambda i: margin_alone(model, rows[i], kind), len(rows))


def expected_in_batch(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gradients `(B, P)` of a language model's examples, each through a forward pass of the whole batch."""
    model.eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return oracles.per_example_gradients(
        model, lambda i: oracles.margins(model(**inputs).logits, batch["labels"])[i], len(batch["labels"])
    )


def columns(model, names) -> torch.Tensor:
    """Which of the `P` entries belong to these parameters, bool `(P,)`."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.cat([torch.full((p.numel(),), name in names) for name, p in trained])


def error(model, found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference relative to the largest entry, of all parameters and, a hundredth of it, of each one."""
    scale = float(wanted.abs().max())
    worst, start = float((found - wanted).abs().max()) / scale, 0
    assert scale > 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = slice(start, start + parameter.numel())
            start = part.stop
            own = float(wanted[:, part].abs().max())
            if own > 1e-4 * scale:
                worst = max(worst, 0.01 * float((found[:, part] - wanted[:, part]).abs().max()) / own)
    return worst
