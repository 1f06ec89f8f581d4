"""`hf-ensemble generate`: answers of a saved ensemble."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...ensemble import PeftEnsembleModel
from ...errors import ConfigurationError
from ...tasks.sources.reading import read_file
from ..arguments import needed, parse, with_config
from ..saved import loaded_ensemble, tokenizer_of
from ..saved_arguments import GenerateArguments
from ..tables import console


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Answer prompts, or name the label of texts where the ensemble is a classifier.

    Returns:
        `dict`: `answers`, each with its prompt, task and answer.

    Raises:
        `HfEnsembleError`: for bad arguments and ensembles, and prompts of unknown tasks.
    """
    (arguments,), _ = parse([GenerateArguments], with_config(argv), command="generate")
    needed("generate", ensemble=arguments.ensemble)
    rows = _rows(arguments)
    ensemble = loaded_ensemble(arguments, "generate")
    tokenizer = tokenizer_of(arguments, ensemble, arguments.tokenizer)
    if arguments.chat and tokenizer.chat_template is None:
        raise ConfigurationError("Expected a tokenizer with a chat template for --chat, found none. Leave it out.")
    texts = [_as_chat(tokenizer, text) if arguments.chat else text for text, _ in rows]
    answers: list[str] = []
    for start in range(0, len(rows), arguments.batch_size):
        part = slice(start, start + arguments.batch_size)
        batch = tokenizer(texts[part], padding=True, return_tensors="pt", add_special_tokens=not arguments.chat)
        answers += _answers(ensemble, tokenizer, batch.to(ensemble.device), [task for _, task in rows[part]], arguments)
    out = console()
    for (text, _), answer in zip(rows, answers):
        out.print(f"{text} [bold]{answer}[/bold]" if len(rows) > 1 else answer, highlight=False, soft_wrap=True)
    found = zip(rows, answers)
    return {"answers": [{"prompt": text, "task": task, "answer": answer} for (text, task), answer in found]}


def _rows(arguments: GenerateArguments) -> list[tuple[str, str | None]]:
    """Prompts and their tasks."""
    if arguments.prompts is not None and arguments.file is not None:
        raise ConfigurationError("Expected --prompts or --file, found both. Leave one of them out.")
    if arguments.file is not None:
        path = Path(arguments.file)
        if not path.is_file():
            raise ConfigurationError(f"There is no file {arguments.file!r}. Correct --file.")
        table = read_file(path.stem, path)
        column = next((name for name in ("prompt", "text") if name in table.column_names), None)
        if column is None:
            raise ConfigurationError(
                f"Expected a column prompt or text in {arguments.file!r}, found {table.column_names}. Rename one."
            )
        return [(str(row[column]), row.get("task") or arguments.task) for row in table]
    prompts = arguments.prompts
    if prompts is None:
        prompts = [] if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().splitlines()
    if not prompts:
        raise ConfigurationError("Expected --prompts TEXT ..., --file FILE, or lines on stdin; found none.")
    return [(prompt, arguments.task) for prompt in prompts]


def _as_chat(tokenizer: Any, text: str) -> str:
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def _answers(
    ensemble: PeftEnsembleModel, tokenizer: Any, batch: Any, tasks: list[str | None], arguments: GenerateArguments
) -> list[str]:
    options: dict[str, Any] = {"task": tasks, "routing": arguments.routing}
    if ensemble.can_generate():
        ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
        generated = ensemble.generate(**ids, **options, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        start = 0 if ensemble.config.is_encoder_decoder else batch["input_ids"].shape[1]
        return [text.strip() for text in tokenizer.batch_decode(generated[:, start:], skip_special_tokens=True)]
    labels = ensemble(**batch, **options).logits.argmax(-1).tolist()
    if ensemble.label_space is not None:
        return [ensemble.label_space.names[label] for label in labels]
    return [str(ensemble.config.id2label[label]) for label in labels]
