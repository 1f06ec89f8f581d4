"""Which kinds of PEFT adapters can stand beside others on one base model."""

from collections.abc import Mapping
from typing import Any

# What PEFT calls an adapter's tensors in each layer, by type; other types change more than the layers that they adapt.
LAYER_TENSORS = {
    "LORA": (
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "token_adapter.trainable_tokens_delta",
    ),
    "IA3": ("ia3_l",),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT": ("oft_R.weight", "oft_embedding_R.weight"),
    "BOFT": ("boft_R", "boft_s"),
    "HRA": ("hra_u",),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "FOURIERFT": ("fourierft_spectrum",),
    "C3A": ("c3a_kernel",),
}
# Tensors of an adapter that all of its layers share.
SHARED_TENSORS = {"VERA": ("base_model.vera_A", "base_model.vera_B")}
ADAPTER_TYPES = tuple(LAYER_TENSORS)
# Initializations after which the base model is as it was.
_PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", "kaiming")
# Fields that make PEFT read other files, import code, change the base that all adapters share, or draw at random.
_REFUSED = {
    "megatron_config": "which imports code that an ensemble does not support",
    "layer_replication": "which changes the base model that all adapters share",
    "alora_invocation_tokens": "whose adapter waits for tokens (aLoRA), which an ensemble does not support",
    "arrow_config": "which routes between adapters on its own",
    "use_qalora": "which an ensemble cannot compute",
    "use_bdlora": "which an ensemble cannot compute",
    "kasa_config": "which changes the base model that all adapters share",
    "velora_config": "whose gradients are approximations that nothing can be predicted from",
    "monteclora_config": "whose outputs are random",
}


def adapter_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why an adapter cannot be one of several on a base model, and what to do about it; `None` if it can.

    Args:
        config (`dict`): the adapter's configuration, as `PeftConfig.to_dict` or `adapter_config.json` holds it.
    """
    kind = str(getattr(config["peft_type"], "value", config["peft_type"]))
    if kind not in ADAPTER_TYPES:
        advice = "LoraConfig(trainable_token_indices=...)" if kind == "TRAINABLE_TOKENS" else "LoraConfig"
        return f"has the peft_type {kind!r}, expected one of {', '.join(ADAPTER_TYPES)}. Use {advice}"
    for key, reason in _REFUSED.items():
        if config.get(key):
            return f"sets {key}, {reason}. Leave it out"
    if kind == "VERA" and not config.get("save_projection", True):
        return (
            "has save_projection False, and its random projections are drawn anew on another machine. Use "
            "save_projection=True"
        )
    if config.get("init_lora_weights") not in _PLAIN_INITIALIZATIONS:
        return (
            f"has init_lora_weights {config['init_lora_weights']!r}, which changes the base model that all adapters "
            "share. Use True, 'gaussian', 'orthogonal' or 'eva'; an adapter that is trained already is saved with "
            "path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        return (
            f"has bias {config['bias']!r}, which trains the biases of the base model that all adapters share. Use "
            "bias='none', with lora_bias=True for biases of the adapter's own"
        )
    return None
