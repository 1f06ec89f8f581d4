"""An ensemble as adapters for vLLM and LoRAX: one for each task, and the line that serves them."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..._files import write_atomically, writing
from ..._settings import check_at_least, checked_names, checked_path
from ...errors import EnsembleError
from ...models.inputs import is_encoder_decoder
from ..members import BaseModelReference
from .files import loaded_base
from .lorax import lorax_obstacles, lorax_rank
from .vocabulary import is_resized

_SCRIPT = "serve.sh"
# vLLM reserves GPU memory for so many adapters of the largest rank when it starts.
_MAX_LORAS = 4
# Of a folder's name, which file systems cut at 255 bytes.
_MAX_CHARACTERS, _MAX_BYTES = 100, 200


@dataclass(frozen=True)
class ServerExport:
    """What a server serves in place of an ensemble: one adapter for each task.

    Args:
        adapters (`dict[str, str]`): absolute path of each task's adapter.
        max_lora_rank (`int`): vLLM's least that holds them all.
        command (`str`): the line that serves them with vLLM.
        script (`str`): the file with that line.
        lorax_obstacles (`dict[str, list[str]]`):
            why LoRAX would leave out parts of a task's adapter; tasks whose adapter it computes are not listed.
    """

    adapters: dict[str, str]
    max_lora_rank: int
    command: str
    script: str
    lorax_obstacles: dict[str, list[str]]


def export_for_servers(
    ensemble: nn.Module,
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    rank: int | None = None,
    num_shards: int = 1,
) -> ServerExport:
    """Merge the adapters of each task, and write the line that serves them with vLLM.

    A merged adapter is what the combination `weights` computes, see [`PeftEnsembleModel.merge`], filled up with zeros
    to a rank that LoRAX computes right, see `lorax_rank`. Its folder is called after the task, with a dash in place of
    whatever does not belong in the name of a folder, and is the same whichever tasks are exported. What an export into
    the same folder wrote before is replaced: `serve.sh` goes first and comes last.

    Args:
        ensemble (`PeftEnsembleModel`): an ensemble of a causal language model.
        folder (`str` or `Path`): gets a folder for each task, and `serve.sh`.
        tasks (`Sequence[str]`, *optional*): the tasks; all by default.
        rank (`int`, *optional*): largest rank of an adapter before it is filled up; exact by default.
        num_shards (`int`, *optional*, defaults to 1): GPUs that LoRAX shards the base model over.

    Raises:
        `EnsembleError`: for classifiers, encoder-decoders, bases without a name and unknown tasks, and for adapters
            that vLLM would refuse or compute wrongly; for a base whose vocabulary was resized.
        `WriteError`: where the folder cannot be written.
    """
    target = checked_path("the folder to export into", folder, EnsembleError)
    # A relative path is another folder, or a repository of the Hub, where the line is run from elsewhere.
    absolute = target.resolve()
    check_at_least("num_shards", num_shards, 1, error=EnsembleError)
    base = _served_base(ensemble)
    names = list(ensemble.weights) if tasks is None else checked_names("tasks", tasks, ensemble.weights, EnsembleError)
    if not names and ensemble.weights:
        raise EnsembleError(
            f"Expected tasks to export, found {tasks!r}; the tasks are {list(ensemble.weights)}. Name some, or "
            "leave tasks out for all of them."
        )
    if not names:
        raise EnsembleError("Expected an ensemble with weights by task, found none. Save it with weights.")
    merged = {task: ensemble.merge(task, rank) for task in names}
    merged = {task: adapter.padded(lorax_rank(adapter.rank, num_shards)) for task, adapter in merged.items()}
    obstacles = {task: own for task, adapter in merged.items() if (own := adapter.vllm_obstacles())}
    if obstacles:
        raise EnsembleError(f"vLLM would not serve these adapters: {obstacles}. Set rank, or load them in Python.")
    folders = _folder_names(ensemble.weights)
    adapters = {task: str(absolute / folders[task]) for task in names}
    script = absolute / _SCRIPT
    with writing(script):
        script.unlink(missing_ok=True)
    for task, adapter in merged.items():
        # LoRAX compares it with the model that it serves.
        adapter.config.base_model_name_or_path, adapter.config.revision = base.name_or_path, base.revision
        # As it was given, since the card shows it.
        adapter.save_pretrained(target / folders[task])
    largest = max(adapter.vllm_rank for adapter in merged.values())
    parts = ["vllm", "serve", base.name_or_path, *(["--revision", base.revision] if base.revision else [])]
    parts += ["--enable-lora", "--max-lora-rank", str(largest), "--max-loras", str(min(len(adapters), _MAX_LORAS))]
    if len(adapters) > _MAX_LORAS:
        # Or it would read the others from disk again whenever they are asked for.
        parts += ["--max-cpu-loras", str(len(adapters))]
    parts += ["--lora-modules", *(_module(task, path) for task, path in adapters.items())]
    command = shlex.join(parts)
    write_atomically(script, lambda file: file.write(f"{command}\n".encode()))
    modules = [path for path, _ in ensemble.model.get_base_model().named_modules()]
    ignored = {task: own for task, adapter in merged.items() if (own := lorax_obstacles(adapter.state_dict, modules))}
    return ServerExport(adapters, largest, command, str(script), ignored)


def _served_base(ensemble: nn.Module) -> BaseModelReference:
    """The base that vLLM loads by its name."""
    if not ensemble.can_generate():
        raise EnsembleError(
            "Expected an ensemble of a causal language model to export, found a classifier. Load it in Python instead."
        )
    if is_encoder_decoder(ensemble.model):
        raise EnsembleError(
            "Expected an ensemble of a causal language model to export, found the encoder-decoder "
            f"{type(ensemble.model.get_base_model()).__name__}. Load it in Python instead."
        )
    base = loaded_base(ensemble.base_model_reference, ensemble.model)
    if not base.name_or_path:
        raise EnsembleError(
            "vLLM loads the base model by its folder or Hub id, and this ensemble's base has neither. Save the base "
            "model, and load the ensemble with base_model= and its folder."
        )
    if is_resized(ensemble.model.get_base_model()):
        tokens = ensemble.model.get_input_embeddings().weight.shape[0]
        raise EnsembleError(
            f"Expected a base model with the vocabulary of its checkpoint {base.name_or_path!r}, which a server loads, "
            f"found one that was resized to {tokens} tokens. Save the resized base with its tokenizer "
            "(ensemble.model.unload().save_pretrained(FOLDER)), and load the ensemble with base_model=FOLDER."
        )
    return base


def _folder_names(tasks: Iterable[str]) -> dict[str, str]:
    """A folder name for each task of an ensemble, none of which leads elsewhere, is another's or is too long."""
    names: dict[str, str] = {}
    taken = {_SCRIPT}
    for task in tasks:
        plain = re.sub(r"[^\w.-]+", "-", task).lstrip(".")[:_MAX_CHARACTERS] or "task"
        plain = plain.encode()[:_MAX_BYTES].decode(errors="ignore")
        name, number = plain, 2
        # Some file systems take two spellings for the same name.
        while name.casefold() in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name.casefold())
        names[task] = name
    return names


def _module(task: str, path: str) -> str:
    """An entry of `--lora-modules`, which is JSON where it would be parted elsewhere or taken for an option."""
    if any(mark in task + path for mark in "=,") or task.startswith("-"):
        return json.dumps({"name": task, "path": path}, ensure_ascii=False)
    return f"{task}={path}"
