"""What vLLM requires of adapters."""

from peft import LoraConfig, PeftConfig

# vLLM's choices for max_lora_rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(config: LoraConfig) -> int | None:
    """The smallest `max_lora_rank` with which vLLM serves an adapter; `None` above its largest."""
    return next((rank for rank in VLLM_RANKS if rank >= config.r), None)


def vllm_obstacles(config: PeftConfig, is_resized: bool = False) -> list[str]:
    """Why vLLM would refuse an adapter or compute it wrongly; empty if it serves it.

    Args:
        config (`PeftConfig`): the adapter's.
        is_resized (`bool`, *optional*, defaults to `False`):
            Whether the base has another vocabulary than its checkpoint, which vLLM would load.
    """
    obstacles = ["a resized vocabulary"] if is_resized else []
    if not isinstance(config, LoraConfig):
        return [f"an adapter of type {config.peft_type.value}", *obstacles]
    if config.modules_to_save:
        obstacles.append(f"modules_to_save {sorted(config.modules_to_save)}")
    if config.use_dora:
        obstacles.append("DoRA")
    if config.bias != "none" or config.lora_bias:
        obstacles.append("biases")
    # vLLM 0.33 reads them, 0.28 passed over them.
    if config.rank_pattern or config.alpha_pattern:
        obstacles.append("different ranks or scalings (rank_pattern, alpha_pattern)")
    if config.trainable_token_indices or config.target_parameters:
        obstacles.append("trainable tokens or parameters")
    if vllm_rank(config) is None:
        obstacles.append(f"rank {config.r} above {VLLM_RANKS[-1]}")
    return obstacles
