"""What LoRAX requires of adapters."""

import re
from collections import defaultdict
from collections.abc import Iterable

_SMALLEST_RANK = 8
_RANK_STEP = 16


def lorax_rank(rank: int, num_shards: int = 1) -> int:
    """The smallest rank, from an adapter's own on, that LoRAX computes right: 8 for each shard, or more by 16.

    LoRAX fills other ranks up with zeros when it loads the first kind of module, and then takes the larger rank for the
    adapter's: it divides the scaling of all other kinds by it.

    Args:
        rank (`int`): the adapter's rank.
        num_shards (`int`): GPUs that the base model is sharded over.
    """
    smallest = _SMALLEST_RANK * num_shards
    return smallest if rank <= smallest else -(-rank // _RANK_STEP) * _RANK_STEP


def lorax_obstacles(tensors: Iterable[str], modules: Iterable[str]) -> list[str]:
    """What of an adapter LoRAX would leave out without an error; empty if it computes all of it.

    It reads the matrices of linear layers alone, and those of a module (`q_proj`) only if every layer has them.

    Args:
        tensors (`Iterable[str]`): names of the adapter's tensors.
        modules (`Iterable[str]`): paths of all modules of the base model.
    """
    obstacles, adapted = [], defaultdict(set)
    for key in sorted(tensors):
        path, mark, _ = key.removeprefix("base_model.model.").partition(".lora_")
        if key.endswith(".lora_embedding_A"):
            obstacles.append(f"embeddings ({path})")
        elif mark:
            adapted[_kind(path)].add(path)
    layers = defaultdict(set)
    for path in modules:
        layers[_kind(path)].add(path)
    for kind, own in adapted.items():
        if layers[kind] - own:
            obstacles.append(f"{kind} (in {len(own & layers[kind])} of {len(layers[kind])} layers)")
    return obstacles


def _kind(path: str) -> str:
    """A module's path without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", path, count=1)
