"""What each adapter adds to the weights of each module of the base model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ...errors import EnsembleError
from ..forward.adapter_layers import adapter_layers, is_linear_lora


@dataclass(frozen=True)
class AdapterDelta:
    """One adapter's change of one module's weight, `up @ down`, or `dense` where it has no such factors (DoRA).

    Args:
        down (`torch.Tensor` of shape `(r, in)`): A, in float32.
        up (`torch.Tensor` of shape `(out, r)`): B with the adapter's scaling, in float32.
        dense (`torch.Tensor` of shape `(out, in)`, *optional*): the whole change.
    """

    down: torch.Tensor
    up: torch.Tensor
    dense: torch.Tensor | None = None

    def matrix(self) -> torch.Tensor:
        """The change, `(out, in)`; of an embedding `(dim, vocabulary)`."""
        return self.up @ self.down if self.dense is None else self.dense


def lora_modules(model: PeftModel, names: Iterable[str]) -> Iterator[tuple[str, LoraLayer]]:
    """Path and layer of each module of the base model that one of these adapters changes.

    Raises:
        `EnsembleError`: for adapters of other modules than whole linear layers and embeddings.
    """
    base = model.get_base_model()
    paths = {module: path for path, module in base.named_modules()}
    for layer in adapter_layers(base):
        if isinstance(layer, ModulesToSaveWrapper) or not set(names) & set(layer._get_available_adapters()):
            continue
        path = paths[layer]
        if not (is_linear_lora(layer) or type(layer) is LoraEmbedding):
            held = next(name for name in names if name in layer._get_available_adapters())
            kind = model.peft_config[held].peft_type.value
            if kind == "LORA":
                kind = type(layer).__name__ if isinstance(layer, BaseTunerLayer) else "trainable tokens"
            raise EnsembleError(f"{path!r} has adapters of type {kind}, which cannot be merged into one LoRA adapter.")
        yield path, layer


def adapter_delta(path: str, layer: LoraLayer, name: str) -> AdapterDelta | None:
    """What an adapter adds to the layer's weight; `None` if it does not have the layer.

    Raises:
        `EnsembleError`: for a LoRA bias, which does not change the weight.
    """
    scaling = layer.scaling.get(name)
    if name in layer.lora_embedding_A:
        return AdapterDelta(layer.lora_embedding_A[name].float(), layer.lora_embedding_B[name].float() * scaling)
    if name not in layer.lora_A:
        return None
    if layer.lora_bias.get(name):
        raise EnsembleError(f"Adapter {name!r} has a LoRA bias at {path!r}, which cannot be merged into one adapter.")
    down, up = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float() * scaling
    variant = layer.lora_variant.get(name)
    if variant is None:
        return AdapterDelta(down, up)
    base = base_weight(layer)
    dense = variant.merge_safe(layer, name, base.clone()) - base
    return AdapterDelta(down, up, dense.T if layer.fan_in_fan_out else dense)


def base_weight(layer: LoraLayer) -> torch.Tensor:
    """The base layer's weight in float32, dequantized."""
    return dequantize_module_weight(layer.get_base_layer()).detach().float()


def saved_modules(model: PeftModel, weights: Mapping[str, float]) -> dict[str, dict[str, torch.Tensor]]:
    """Weighted parameters of the modules that adapters replace (`modules_to_save`): base + sum_k w_k (own_k - base).

    Returns:
        `dict[str, dict[str, torch.Tensor]]`: by path of the module, and by name within it.
    """
    result: dict[str, dict[str, torch.Tensor]] = {}
    base = model.get_base_model()
    for path, wrapper in base.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        used = [name for name in weights if name in wrapper.modules_to_save]
        if not used:
            continue
        own = {name: _parameters(wrapper.modules_to_save[name]) for name in used}
        result[path] = {
            key: value.float() + sum(weights[name] * (own[name][key].float() - value.float()) for name in used)
            for key, value in _parameters(wrapper.original_module).items()
        }
    return result


def _parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}
