"""Whether a model still holds the adapters that an ensemble was made of. A name alone does not say so."""

from collections.abc import Iterator, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import EnsembleError
from .forward.adapter_layers import adapter_layers


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
        # Of each adapter: outermost layer, what it keeps adapters in, and what it keeps for this one.
        self._parts: dict[str, list[tuple[nn.Module, Any, Any]]] = {name: [] for name in names}
        for layer in adapter_layers(model):
            for container in map(_container, _holders(layer)):
                for name in names:
                    if name in container:
                        self._parts[name].append((layer, container, _part(container, name)))
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
        layers = set(adapter_layers(model))
        for name, parts in self._parts.items():
            if any(layer not in layers for layer, _, _ in parts):
                raise EnsembleError(
                    f"Layers with the adapter {name!r} were removed from the model since the ensemble was made of it, "
                    f"as unload() and merge_and_unload() do. {remedy}"
                )
            same = model.peft_config[name] is self._configs[name]
            if not same or any(_part(container, name) is not part for _, container, part in parts):
                raise EnsembleError(
                    f"The adapter {name!r} was replaced by another one of the same name since the ensemble was made of "
                    f"it. {remedy}"
                )
        merged = sorted({name for layer in layers for holder in _holders(layer) for name in holder.merged_adapters})
        if merged:
            raise EnsembleError(
                f"The adapters {merged} are merged into the base model, whose weights all members share. Call "
                "unmerge_adapter() on the PeftModel."
            )


def _holders(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer with adapters, and those that it wraps."""
    yield layer
    for inner in (getattr(layer, "token_adapter", None), layer._modules.get("base_layer")):
        if isinstance(inner, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from _holders(inner)


def _container(holder: nn.Module) -> Any:
    """What has an entry for each adapter: modules where there are some, as these are made anew with an adapter."""
    found = [getattr(holder, name, {}) for name in (*holder.adapter_layer_names, *holder.other_param_names)]
    return next(
        (own for own in found if isinstance(own, nn.ModuleDict) and len(own)), next(iter(filter(len, found)), {})
    )


def _part(container: Any, name: str) -> Any:
    """The adapter's module; for parameters, which `to()` may replace, only whether there are some."""
    return container._modules.get(name) if isinstance(container, nn.ModuleDict) else name in container
