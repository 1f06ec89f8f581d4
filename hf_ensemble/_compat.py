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


@contextlib.contextmanager
def tied_modules_under_adapters() -> Iterator[None]:
    """Let PEFT find the modules that are tied to the embeddings while adapters are on them.

    peft 0.21 looks for the embeddings' own parameter names, which an earlier adapter on the embeddings changes: a
    second one with `ensure_weight_tying` silently gets the embeddings alone, and its output layer is the base's.
    Retired when `_get_module_names_tied_with_embedding` finds them under `modules_to_save` and LoRA.
    """
    import peft.tuners.tuners_utils as peft_tuners
    import peft.utils.other as peft_other

    find = peft_other._get_module_names_tied_with_embedding

    def names(model) -> list[str]:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base = base.model if hasattr(base, "tuner_layer_cls") else base
        embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
        wrapped = isinstance(embeddings, (peft_other.ModulesToSaveWrapper, peft_tuners.BaseTunerLayer))
        return _tied_by_paths(base, embeddings) if wrapped else find(model)

    peft_other._get_module_names_tied_with_embedding = names
    peft_tuners._get_module_names_tied_with_embedding = names
    try:
        yield
    finally:
        peft_other._get_module_names_tied_with_embedding = find
        peft_tuners._get_module_names_tied_with_embedding = find


@contextlib.contextmanager
def tokens_of_their_own_adapters() -> Iterator[None]:
    """Let PEFT save and load an adapter without single tokens' rows beside one that has them.

    peft 0.21 asks every `TrainableTokensWrapper` for the rows of every adapter, and fails for those that it does not
    hold; `ModulesToSaveWrapper` says that it has none. Retired when both do.
    """
    from peft.utils.other import TrainableTokensWrapper

    names = ("adapter_state_dict", "adapter_state_dict_load_map")
    methods = {name: getattr(TrainableTokensWrapper, name) for name in names}

    def own_only(method):
        def of_adapter(self, adapter_name, *args):
            held = adapter_name in self.token_adapter.trainable_tokens_delta
            return method(self, adapter_name, *args) if held else {}

        return of_adapter

    for name, method in methods.items():
        setattr(TrainableTokensWrapper, name, own_only(method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(TrainableTokensWrapper, name, method)


def _tied_by_paths(base: torch.nn.Module, embeddings: torch.nn.Module) -> list[str]:
    """Paths of the modules that are tied to the embeddings, which wrappers leave as they are."""
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return []
    path = next(path for path, module in base.named_modules() if module is embeddings)
    tied = set()
    for parent, module in base.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        start = f"{parent}." if parent else ""
        if isinstance(keys, dict):
            own = [target for target, source in keys.items() if f"{start}{source}" == f"{path}.weight"]
            tied |= {f"{start}{target}".rpartition(".")[0] for target in own}
    return sorted(tied)
