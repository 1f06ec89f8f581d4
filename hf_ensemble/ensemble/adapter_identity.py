"""Whether a model still holds the adapters that an ensemble was made of. A name alone does not say so."""

from collections.abc import Iterator, Sequence

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import EnsembleError

_HOLDERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


class AdapterIdentity:
    """Remembers the objects behind each adapter's name.

    Args:
        model (`PeftModel`): holds the adapters.
        names (`Sequence[str]`): adapter names.

    Raises:
        `EnsembleError`: for an adapter that no layer of the model holds.
    """

    def __init__(self, model: PeftModel, names: Sequence[str]):
        self._configs = {name: model.peft_config[name] for name in names}
        holders = [module for module in model.modules() if isinstance(module, _HOLDERS)]
        self._parts = {
            name: [(module, list(_parts(module, name))) for module in holders if _holds(module, name)] for name in names
        }
        for name, parts in self._parts.items():
            if not parts:
                raise EnsembleError(
                    f"Expected layers with the adapter {name!r}, found none in the model. Load the adapter again."
                )

    def check(self, model: PeftModel) -> None:
        """Make sure that the model still holds the same adapters, apart from its base.

        Raises:
            `EnsembleError`: for an adapter that was deleted, replaced or merged, and for layers that were removed.
        """
        remedy = "Load the adapters again and make a new PeftEnsembleModel."
        deleted = sorted(set(self._configs) - set(model.peft_config))
        if deleted:
            raise EnsembleError(f"The adapters {deleted} were deleted since the ensemble was made of them. {remedy}")
        present = {module for module in model.modules() if isinstance(module, _HOLDERS)}
        for name, parts in self._parts.items():
            if any(module not in present for module, _ in parts):
                raise EnsembleError(
                    f"Layers with the adapter {name!r} were removed from the model since the ensemble was made of it, "
                    f"as unload() and merge_and_unload() do. {remedy}"
                )
            same = model.peft_config[name] is self._configs[name]
            if not same or any(not _same(module, name, own) for module, own in parts):
                raise EnsembleError(
                    f"The adapter {name!r} was replaced by another one of the same name since the ensemble was made of "
                    f"it. {remedy}"
                )
        merged = sorted({name for module in present for name in module.merged_adapters})
        if merged:
            raise EnsembleError(
                f"The adapters {merged} are merged into the base model, whose weights all members share. Call "
                "unmerge_adapter() on the PeftModel."
            )


def _holds(module: nn.Module, name: str) -> bool:
    return name in module._get_available_adapters()


def _parts(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that a layer keeps for an adapter."""
    for attribute in (*module.adapter_layer_names, *module.other_param_names):
        container = getattr(module, attribute, None)
        if isinstance(container, nn.ModuleDict) and name in container:
            yield container[name]


def _same(module: nn.Module, name: str, parts: list[nn.Module]) -> bool:
    found = list(_parts(module, name))
    return _holds(module, name) and len(found) == len(parts) and all(a is b for a, b in zip(found, parts))
