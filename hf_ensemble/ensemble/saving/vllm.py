"""What vLLM requires of adapters, and an ensemble as adapters for it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from torch import nn

from ..._files import write_atomically
from ...errors import EnsembleError

# vLLM's choices for max_lora_rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(config: LoraConfig) -> int | None:
    """The smallest `max_lora_rank` with which vLLM serves an adapter; `None` above its largest."""
    return next((rank for rank in VLLM_RANKS if rank >= config.r), None)


def vllm_obstacles(config: PeftConfig) -> list[str]:
    """Why vLLM would refuse an adapter or compute it wrongly; empty if it serves it."""
    if not isinstance(config, LoraConfig):
        return [f"an adapter of type {config.peft_type.value}"]
    obstacles = []
    if config.modules_to_save:
        obstacles.append(f"modules_to_save {sorted(config.modules_to_save)}")
    if config.use_dora:
        obstacles.append("DoRA")
    if config.bias != "none" or config.lora_bias:
        obstacles.append("biases")
    if config.rank_pattern or config.alpha_pattern:
        obstacles.append("different ranks or scalings (rank_pattern, alpha_pattern)")
    if config.trainable_token_indices or config.target_parameters:
        obstacles.append("trainable tokens or parameters")
    if vllm_rank(config) is None:
        obstacles.append(f"rank {config.r} above {VLLM_RANKS[-1]}")
    return obstacles


@dataclass(frozen=True)
class VllmExport:
    """What vLLM serves in place of an ensemble: one adapter for each task.

    Args:
        adapters (`dict[str, str]`): folder of each task's adapter.
        max_lora_rank (`int`): the least that holds them all.
        command (`str`): the line that serves them.
        script (`str`): the file with that line.
    """

    adapters: dict[str, str]
    max_lora_rank: int
    command: str
    script: str


def export_for_vllm(
    ensemble: nn.Module, folder: str | Path, tasks: Sequence[str] | None = None, rank: int | None = None
) -> VllmExport:
    """Merge the adapters of each task, and write the line that serves them with vLLM.

    A merged adapter is what the combination `weights` computes, see [`PeftEnsembleModel.merge`].

    Args:
        ensemble (`PeftEnsembleModel`): an ensemble of a language model.
        folder (`str` or `Path`): gets a folder for each task, and `serve.sh`.
        tasks (`Sequence[str]`, *optional*): the tasks; all by default.
        rank (`int`, *optional*): largest rank of an adapter; exact by default.

    Raises:
        `EnsembleError`: for classifiers and unknown tasks, and for adapters that vLLM would refuse or compute wrongly.
    """
    if not ensemble.can_generate():
        raise EnsembleError("vLLM serves adapters of language models, found a classifier. Load it in Python instead.")
    names = list(ensemble.weights) if tasks is None else list(tasks)
    if not names:
        raise EnsembleError("Expected an ensemble with weights by task, found none. Save it with weights.")
    merged = {task: ensemble.merge(task, rank) for task in names}
    obstacles = {task: own for task, adapter in merged.items() if (own := adapter.vllm_obstacles())}
    if obstacles:
        raise EnsembleError(f"vLLM would not serve these adapters: {obstacles}. Set rank, or load them in Python.")
    adapters = {}
    for task, adapter in merged.items():
        adapter.save_pretrained(Path(folder) / task)
        adapters[task] = str(Path(folder) / task)
    largest = max(adapter.vllm_rank for adapter in merged.values())
    base = ensemble.base_model_reference
    parts = ["vllm", "serve", base.name_or_path, *(["--revision", base.revision] if base.revision else [])]
    parts += ["--enable-lora", "--max-lora-rank", str(largest), "--max-loras", str(len(adapters)), "--lora-modules"]
    command = shlex.join([*parts, *(f"{task}={path}" for task, path in adapters.items())])
    script = Path(folder) / "serve.sh"
    write_atomically(script, lambda file: file.write(f"{command}\n".encode()))
    return VllmExport(adapters, largest, command, str(script))
