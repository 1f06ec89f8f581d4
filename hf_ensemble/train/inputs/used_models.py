"""Models that an earlier run has trained on: its adapters are told apart from the user's own, and removed."""

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import ConfigurationError
from ...logging import get_logger

logger = get_logger(__name__)

# On the configuration object of an adapter, which lives and dies with the adapter.
_MARK = "_hf_ensemble_run"


def mark_as_of_a_run(config: PeftConfig) -> None:
    """Remember that a run has put the adapter of this configuration on its model."""
    setattr(config, _MARK, True)


def is_of_a_run(config: PeftConfig) -> bool:
    return getattr(config, _MARK, False)


def without_adapters_of_earlier_runs(model: nn.Module) -> nn.Module:
    """Remove the adapters that earlier runs have left on a model, so that a new run finds what a fresh model has.

    An ensemble of the earlier run raises when it is used afterwards: load it from its folder.

    Args:
        model (`nn.Module`): a base model, or a `PeftModel`, whose own adapters stay.

    Returns:
        `nn.Module`: the same model.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    left = [name for name, config in configs.items() if is_of_a_run(config)]
    if not left:
        return model
    if isinstance(model, PeftModel):
        own = [name for name in configs if name not in left]
        if not own:
            # The run's own starting point: the user passed the PeftModel that the run has made.
            left.remove(model.active_adapters[0])
        for name in left:
            model.delete_adapter(name)
    elif len(left) == len(configs):
        _unload(model)
    if left:
        logger.warning(
            "The model was used by an earlier run, whose adapters %s are removed. To keep using the ensemble of "
            "that run, load it from its folder.",
            left,
        )
    return model


def check_adapter_names(model: PeftModel, reserved: set[str]) -> None:
    """Raise `ConfigurationError` for adapters of the user whose names the run gives to its own."""
    taken = sorted(name for name, config in model.peft_config.items() if name in reserved and not is_of_a_run(config))
    if taken:
        raise ConfigurationError(
            f"The model has adapters named {taken}, which are names of adapters that the run trains. Rename them, or "
            "pass the base model with peft_config instead."
        )


def _unload(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            parent, _, child = path.rpartition(".")
            wrapped = isinstance(module, AuxiliaryTrainingWrapper)
            plain = module.original_module if wrapped else module.get_base_layer()
            setattr(model.get_submodule(parent), child, plain)
    # PEFT keeps the configurations on the base model too, and would take their names for adapters that are there.
    del model.peft_config
    for parameter in model.parameters():
        # PEFT froze the base; a trainer with a new adapter freezes it again.
        parameter.requires_grad_(parameter.is_floating_point())
