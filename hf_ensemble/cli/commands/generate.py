"""`hf-ensemble generate`: answers of a saved ensemble."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.text import Text

from ...ensemble import PeftEnsembleModel
from ...evaluate.answers import answer_text, end_tokens
from ...logging import get_logger
from ...models.inputs import is_encoder_decoder
from ...tasks.encoding import length_limit
from ..arguments import needed
from ..parsing import parse
from ..prompts import prompts_of, texts_of
from ..saved import loaded_ensemble, tokenizer_of
from ..saved_arguments import GenerateArguments
from ..tables import console

logger = get_logger(__name__)


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Answer prompts, or name the label of texts where the ensemble is a classifier.

    Returns:
        `dict`: `answers`, each with its prompt (a text, or a chat's messages), task and answer.

    Raises:
        `HfEnsembleError`: for bad arguments and ensembles, and prompts of unknown tasks.
    """
    (arguments,), _ = parse([GenerateArguments], argv, command="generate")
    needed("generate", ensemble=arguments.ensemble)
    prompts = prompts_of(arguments)
    ensemble = loaded_ensemble(arguments, "generate")
    tokenizer = tokenizer_of(arguments, ensemble, arguments.tokenizer)
    texts, are_chats = texts_of(prompts, tokenizer, arguments.chat)
    tasks = [own.task for own in prompts]
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt", "add_special_tokens": not are_chats}
    if not ensemble.can_generate():
        options |= {"truncation": True, "max_length": _longest_text(texts, tokenizer, ensemble)}
    answers: list[str] = []
    for start in range(0, len(prompts), arguments.batch_size):
        part = slice(start, start + arguments.batch_size)
        batch = tokenizer(texts[part], **options)
        answers += _answers(ensemble, tokenizer, batch.to(ensemble.device), tasks[part], arguments)
    out = console()
    for own, answer in zip(prompts, answers):
        line = Text.assemble(f"{own.last_text} ", (answer, "bold")) if len(prompts) > 1 else Text(answer)
        out.print(line, soft_wrap=True)
    found = zip(prompts, answers)
    return {"answers": [{"prompt": own.content, "task": own.task, "answer": answer} for own, answer in found]}


def _longest_text(texts: Sequence[str], tokenizer: Any, ensemble: PeftEnsembleModel) -> int | None:
    """Tokens after which a classifier's texts are cut off, as in training; says how many are."""
    limit = length_limit(tokenizer) or getattr(ensemble.config, "max_position_embeddings", None)
    if limit is not None and (long := sum(len(ids) > limit for ids in tokenizer(list(texts))["input_ids"])):
        logger.warning(
            "%d of %d texts are cut off after %d tokens, the most that the model reads.", long, len(texts), limit
        )
    return limit


@torch.no_grad()
def _answers(
    ensemble: PeftEnsembleModel, tokenizer: Any, batch: Any, tasks: list[str | None], arguments: GenerateArguments
) -> list[str]:
    options: dict[str, Any] = {"task": tasks, "routing": arguments.routing}
    if ensemble.can_generate():
        ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
        ends = end_tokens(ensemble, tokenizer)
        options |= {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "eos_token_id": ends or None}
        generated = ensemble.generate(**ids, **options)
        # A decoder's first token is its start token.
        start = 1 if is_encoder_decoder(ensemble) else batch["input_ids"].shape[1]
        return [answer_text(tokens, ends, tokenizer) for tokens in generated[:, start:].tolist()]
    labels = ensemble(**batch, **options).logits.argmax(-1).tolist()
    if ensemble.label_space is not None:
        return [ensemble.label_space.names[label] for label in labels]
    return [str(ensemble.config.id2label[label]) for label in labels]
