"""Differences between upstream versions and faults of theirs, each with what retires it."""

import contextlib
import importlib.metadata
from collections.abc import Iterator

import torch

_PACKAGES = (
    "hf_ensemble",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what an artefact holds."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name.replace("_", "-"))
    return versions


def keep_quantized_weights_in_place(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place.

    On CPUs with AVX512-BF16, `Linear4bit.forward` in eval mode without gradients repacks its weight for an inference
    kernel that has no backward, for good: every later gradient, merge or save is wrong without an error. Seen in
    bitsandbytes 0.50; retired when the packed form is undone before a backward or a save.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def preserve_active_adapter(model) -> Iterator[None]:
    """Switch adapters freely inside; the active adapter and what is trainable are restored, also after an exception.

    `PeftModel.set_adapter` also sets `requires_grad` of every adapter (peft 0.21), so looking through another adapter
    would change what an optimizer trains afterwards.
    """
    active = list(model.active_adapters)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        model.base_model.set_adapter(active)
        model.active_adapter = active[0] if len(active) == 1 else active
        for name, parameter in model.named_parameters():
            # An adapter that was loaded inside stays frozen.
            parameter.requires_grad_(trainable.get(name, False))
