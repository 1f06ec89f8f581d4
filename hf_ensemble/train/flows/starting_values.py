"""The values that a run's adapter begins at, for scripts that draw them anew each time they are started."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..._files import write_atomically
from ..._processes import run_on_main
from ...capture.identity import parameter_fingerprint
from ...logging import get_logger
from ...runs import RunDirectory, RunRecord

logger = get_logger(__name__)

# Factors of LoRA that are drawn at random, and those that are zero in a new adapter, whatever the others are.
_DRAWN, _ZERO = {"lora_A", "lora_embedding_A"}, {"lora_B", "lora_embedding_B"}


def keep_start(model: PeftModel, run: RunDirectory) -> None:
    """Write the values that a run begins at, where they are not there."""
    if run_on_main(run.start.is_file):
        return
    values = {name: own.detach().cpu().contiguous().clone() for name, own in _trainable(model).items()}
    run_on_main(lambda: write_atomically(run.start, lambda file: file.write(save(values))))


def take_up_start(model: PeftModel, run: RunDirectory, configuration: Mapping[str, Any]) -> bool:
    """Put the values that a run began at into an adapter that is new and differs from it in its random values alone.

    Args:
        model (`PeftModel`): has the adapter.
        run (`RunDirectory`): the run, or a folder without one.
        configuration (`dict`): what the run would be begun with.

    Returns:
        `bool`: whether they were put in.
    """
    begun = run_on_main(lambda: _start_of(run, configuration))
    own = _trainable(model)
    if begun is None or not _is_drawn_anew(own, begun):
        return False
    with torch.no_grad():
        for name, value in begun.items():
            own[name].copy_(value)
    logger.warning(
        "The random starting values of the adapter are others than those that the run in %r began with, which are "
        "taken in their place. With transformers.set_seed before it is made, or peft_config, they are the same.",
        str(run.path),
    )
    return True


def _trainable(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: own for name, own in model.named_parameters() if own.requires_grad}


def _start_of(run: RunDirectory, configuration: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """The values that a run began at, where it differs in nothing else that trainings depend on."""
    if not (run.has(RunRecord) and run.start.is_file()):
        return None
    known = run.read(RunRecord).configuration
    theta0 = known["model"]["theta0"]
    wanted = {**configuration, "model": {**configuration["model"], "theta0": theta0}, "capture": known["capture"]}
    if theta0 == configuration["model"]["theta0"] or wanted != known:
        return None
    try:
        values = load_file(run.start)
    except SafetensorError:
        return None
    return values if parameter_fingerprint(values) == theta0 else None


def _is_drawn_anew(own: Mapping[str, torch.Tensor], begun: Mapping[str, torch.Tensor]) -> bool:
    """Whether both are new adapters, which leave the base model as it is, with other random values."""
    differing = {name for name, value in own.items() if not torch.equal(value.detach().cpu(), begun[name])}
    has_effect = any(bool(value.any()) for name, value in own.items() if _ZERO & set(name.split(".")))
    return not has_effect and all(_DRAWN & set(name.split(".")) for name in differing)
