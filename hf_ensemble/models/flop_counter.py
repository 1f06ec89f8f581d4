"""Counts the floating point operations of whatever runs under it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


def _attention(query, key, value, *args: Any, **kwargs: Any) -> int:
    """Scores and their products with the values; query heads may share keys and values (GQA)."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(grad_out, query, key, value, *args: Any, **kwargs: Any) -> int:
    """Scores once more, then the gradients of scores, queries and keys, and of values."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _product(left: torch.Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Of `(..., in)` with a matrix `(in, out)`, however that is stored."""
    out = out_val[0] if isinstance(out_val, tuple) else out_val
    return 2 * math.prod(out.shape) * left.shape[-1]


def _expert_product(left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """Of tokens `(N, in)` with the matrix of each token's own expert, `(experts, in, out)`."""
    return 2 * math.prod(left.shape) * right.shape[-1]


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
# Operations that torch has no formula for, or one that fails where query heads share keys and values.
_FURTHER: dict[Any, Callable[..., int]] = {
    **{getattr(_aten, f"_scaled_dot_product_{kernel}"): _attention for kernel in _KERNELS},
    **{getattr(_aten, f"_scaled_dot_product_{kernel}_backward"): _attention_backward for kernel in _KERNELS},
    _aten._grouped_mm: _expert_product,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
}
# By name, since bitsandbytes may not be installed.
_QUANTIZED = {
    f"bitsandbytes::{name}"
    for name in ("gemm_4bit", "gemv_4bit", "int8_linear_matmul", "int8_scaled_mm", "int8_mixed_scaled_mm")
}


class FlopCounter(TorchDispatchMode):
    """While open, adds up the floating point operations of matrix products, convolutions and attention.

    Formulas are those of `torch.utils.flop_counter.FlopCounterMode`: an addition and a multiplication are two, the
    whole square of causal attention counts, elementwise operations do not. Attention on the CPU, products in
    place, with quantized weights and with the weights of experts count too. Kernels that are no operations of torch,
    such as those of the package flash-attn, and compiled graphs are not seen.

    Attributes:
        flops (`int`): operations so far.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        formula = _formula(func)
        if formula is None and torch.is_inference_mode_enabled():
            # There a linear layer is one operation, which autograd would have taken apart.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _formula(func: Any) -> Callable[..., int] | None:
    packet = getattr(func, "_overloadpacket", None)
    found = _FURTHER.get(packet) or flop_registry.get(packet)
    if found is None and packet is not None and func.name().split(".")[0] in _QUANTIZED:
        return _product
    return found
