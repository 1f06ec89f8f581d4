"""What each system of a run costs."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import safe_open

from ...models.usage import Usage
from ...runs import SystemCost, TrainedAdapter


def system_cost(trainings: Sequence[TrainedAdapter], folders: Iterable[Path], forward: Usage) -> SystemCost:
    """The cost of a system.

    Args:
        trainings (`Sequence[TrainedAdapter]`): those that its adapters come from.
        folders (`Iterable[Path]`): where its adapters lie.
        forward (`Usage`): what scoring rows with it took.
    """
    # Padding is computed, too.
    computed = forward.tokens + forward.padding
    return SystemCost(
        training_flops=sum(own.flops for own in trainings),
        training_tokens=sum(own.tokens for own in trainings),
        training_seconds=round(sum(own.seconds for own in trainings), 3),
        trained_parameters=sum(own.num_parameters for own in trainings),
        stored_parameters=sum(map(stored_parameters, folders)),
        inference_flops=forward.flops / computed if forward.flops and computed else None,
        trainings=[own.name for own in trainings],
    )


def stored_parameters(folder: Path) -> int:
    """Numbers in an adapter's file."""
    count = 0
    with safe_open(str(folder / "adapter_model.safetensors"), framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  (the file is no dict)
            size = 1
            for length in file.get_slice(name).get_shape():
                size *= length
            count += size
    return count
