"""Copies of a model with adapters of their own, which share what is frozen."""

import copy

from peft import PeftModel

_QUANTIZED = ("quant_state", "state")


def sharing_frozen(model: PeftModel) -> PeftModel:
    """A copy of a model whose trainable parameters are its own, and whose frozen parameters and buffers are the same.

    Args:
        model (`PeftModel`): as no trainer has prepared it.
    """
    shared = [own for own in model.parameters() if not own.requires_grad] + list(model.buffers())
    # What bitsandbytes keeps of a quantized weight beside it.
    shared += [vars(module)[name] for module in model.modules() for name in _QUANTIZED if name in vars(module)]
    return copy.deepcopy(model, {id(own): own for own in shared})
