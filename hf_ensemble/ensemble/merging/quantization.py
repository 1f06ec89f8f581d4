"""The rounding of a merged change when it is folded into a quantized base."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ...logging import get_logger
from .deltas import adapter_delta, base_weight, lora_modules
from .low_rank import in_double

logger = get_logger(__name__)


def warn_of_requantization(model: PeftModel, weights: Mapping[str, float]) -> float | None:
    """Warn about how much of the merged change rounding would lose in the weights of a quantized base.

    The merged adapter itself is exact on such a base. Folding it in (`merge_and_unload`) rounds the changed weights
    again.

    Returns:
        `float`, *optional*: |rounded - changed| / |change| over all quantized modules; `None` for a plain base.
    """
    rounding = change = 0.0
    bits = set()
    for path, layer in lora_modules(model, weights):
        kind = _bits(layer)
        deltas = {name: adapter_delta(path, layer, name) for name in weights} if kind else {}
        deltas = {name: delta for name, delta in deltas.items() if delta is not None}
        if not deltas:
            continue
        bits.add(kind)
        total = sum(weights[name] * delta.matrix() for name, delta in deltas.items())
        wanted = base_weight(layer) + total
        rounding += float((in_double(_rounded(layer, wanted) - wanted) ** 2).sum())
        change += float((in_double(total) ** 2).sum())
    if not bits or not change:
        return None
    ratio = (rounding / change) ** 0.5
    logger.warning(
        "The base model is quantized (%s bits). The merged adapter is exact on it, but folding it into these weights "
        "(merge_and_unload) would round them by %.2f times the size of the merged change. Load it as an adapter, or "
        "fold it into the unquantized base.",
        " and ".join(map(str, sorted(bits))),
        ratio,
    )
    return ratio


def _bits(layer: LoraLayer) -> int | None:
    weight = layer.get_base_layer().weight
    if getattr(weight, "quant_state", None) is not None:
        return 4
    return 8 if weight.dtype == torch.int8 else None


def _rounded(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """`weight` quantized as the layer's own is, and back."""
    if _bits(layer) == 8:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return (weight / scale).round() * scale
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    state = layer.get_base_layer().weight.quant_state
    packed, new = quantize_4bit(weight.contiguous(), blocksize=state.blocksize, quant_type=state.quant_type)
    return dequantize_4bit(packed, new).float()
