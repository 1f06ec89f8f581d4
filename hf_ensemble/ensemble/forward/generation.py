"""Text generation with an ensemble: the base model's own `generate`, whose forward is the ensemble's."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from ...errors import EnsembleError
from .cache import EnsembleCache, cache_maker
from .inference import MemberForward
from .rows import NO_STATES, batch_size_of

_DEFAULT_NEW_TOKENS = 20
_REFUSED_OPTIONS = {
    "output_attentions": NO_STATES,
    "output_hidden_states": NO_STATES,
    "penalty_alpha": NO_STATES,
    "dola_layers": NO_STATES,
    "use_mtp": NO_STATES,
    "assistant_early_exit": "an ensemble has no logits after a part of its layers; use assistant_model or "
    "prompt_lookup_num_tokens",
    "token_healing": "it generates for one prompt after the other, whose tasks are not known; cut the prompts' last "
    "tokens yourself",
}


def check_generation(base: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse models and options that an ensemble cannot generate with.

    Raises:
        `EnsembleError`: for a model that does not generate, and for options that need more than combined logits.
    """
    if not (hasattr(base, "can_generate") and base.can_generate()):
        raise EnsembleError(f"{type(base).__name__} does not generate. Call the ensemble itself for logits.")
    for option in ("past_key_values", "encoder_outputs"):
        if kwargs.get(option) is not None:
            raise EnsembleError(f"{option} cannot be set: each adapter of an ensemble keeps its own states.")
    config = kwargs.get("generation_config") or base.generation_config
    for option, reason in _REFUSED_OPTIONS.items():
        if kwargs.get(option, getattr(config, option, None)):
            raise EnsembleError(f"{option} cannot be set: {reason}.")


def generate_by_outputs(
    run: MemberForward,
    base: nn.Module,
    weights: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """`base.generate`, with the combined outputs of the adapters as each step's logits.

    Args:
        run (`MemberForward`): runs the adapters.
        base (`PreTrainedModel`): the base model.
        weights (`torch.Tensor` of shape `(B, adapters)`): weights of each prompt.
        input_ids (`torch.Tensor` of shape `(B, T)`): prompts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
        kwargs: see `generate`.
    """
    encoder_decoder = base.config.is_encoder_decoder
    kwargs, cache = _cache(base, 1 if encoder_decoder else input_ids.shape[1], kwargs)
    if cache is not None:
        kwargs["past_key_values"] = cache
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    with run:
        if encoder_decoder:
            if attention_mask is None:
                pad = getattr(base.config, "pad_token_id", None)
                attention_mask = torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
                kwargs["attention_mask"] = attention_mask
            run.encode(base.get_encoder(), weights, {"input_ids": input_ids, "attention_mask": attention_mask})
            # `generate` reads their shape only; the adapters' own states replace them.
            empty = torch.zeros(*input_ids.shape, 1, device=input_ids.device)
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=empty)
        with _replaced_forward(base, run, weights):
            return base.generate(input_ids=input_ids, **kwargs)


def _cache(base: nn.Module, prompt_length: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], EnsembleCache | None]:
    """The arguments without those about the cache, and the cache that they ask for."""
    kwargs = dict(kwargs)
    config = kwargs.get("generation_config") or base.generation_config
    kind = kwargs.pop("cache_implementation", None) or config.cache_implementation
    if config.cache_implementation is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].cache_implementation = None
    if kind not in (None, "dynamic", "static"):
        raise EnsembleError(f"Expected cache_implementation 'dynamic' or 'static', found {kind!r}.")
    if not kwargs.get("use_cache", config.use_cache if config.use_cache is not None else True):
        return kwargs, None
    length = None
    if kind == "static":
        new = kwargs.get("max_new_tokens", config.max_new_tokens)
        longest = kwargs.get("max_length", config.max_length) or 0
        length = prompt_length + new if new is not None else max(longest, prompt_length + _DEFAULT_NEW_TOKENS)
    return kwargs, EnsembleCache(cache_maker(base.config, length))


@contextmanager
def _replaced_forward(base: nn.Module, run: MemberForward, weights: torch.Tensor) -> Iterator[None]:
    """While open, the base model's forward is the ensemble's."""
    patched: Callable | None = base.__dict__.get("forward")
    output = Seq2SeqLMOutput if base.config.is_encoder_decoder else CausalLMOutputWithPast

    @functools.wraps(base.forward)
    def ensemble_forward(input_ids: Any = None, past_key_values: Any = None, **inputs: Any):
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        cache = past_key_values
        if not isinstance(cache, EnsembleCache):
            # A second text beside the prompts, such as guidance by a negative prompt, starts with states of its own.
            wanted = cache is not None or inputs.get("use_cache")
            cache = EnsembleCache(cache_maker(base.config)) if wanted else None
        # Beams and returned sequences are adjacent: each row of the prompts becomes a run of rows.
        rows = weights.repeat_interleave(batch_size_of(inputs) // len(weights), dim=0)
        return output(logits=run(rows, inputs, cache), past_key_values=cache)

    base.forward = ensemble_forward
    try:
        yield
    finally:
        if patched is None:
            del base.forward
        else:
            base.forward = patched
