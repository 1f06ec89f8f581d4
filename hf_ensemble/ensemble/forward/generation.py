"""Text generation with an ensemble: the base model's own `generate`, whose forward is the ensemble's."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from ...errors import EnsembleError
from ...logging import get_logger
from .cache import EnsembleCache, cache_argument, cache_maker, keep_weights, makes_caches
from .inference import MemberForward
from .rows import EACH_ITS_OWN, NO_STATES, batch_size_of

logger = get_logger(__name__)

_DEFAULT_NEW_TOKENS = 20
# Kinds of caches, and what transformers makes of them. Checkpoints of Gemma 2 and 3 ask for `hybrid`, which it drops.
_CACHES = {None: "dynamic", "dynamic": "dynamic", "hybrid": "dynamic", "static": "static"}
_CACHES |= {"sliding_window": "static", "hybrid_chunked": "static"}
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


def _setting(base: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """A setting as `generate` finds it: of the call, else of the configuration given to it, else of the model's own."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(base.generation_config, name, None) if given is None else given


def check_generation(base: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse models and options that an ensemble cannot generate with.

    Raises:
        `EnsembleError`: for a model that does not generate, and for options that need more than combined logits.
    """
    if not (hasattr(base, "can_generate") and base.can_generate()):
        raise EnsembleError(f"{type(base).__name__} does not generate. Call the ensemble itself for logits.")
    for option in ("past_key_values", "encoder_outputs"):
        if kwargs.get(option) is not None:
            raise EnsembleError(f"{option} cannot be set: {EACH_ITS_OWN}.")
    for option, reason in _REFUSED_OPTIONS.items():
        if _setting(base, kwargs, option):
            raise EnsembleError(f"{option} cannot be set: {reason}.")


def prompt_mask(base: nn.Module, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Attention mask `(B, T)` of prompts that came without one; `None` where nothing tells padding from text.

    `generate` takes tokens for padding by the same rule, but tells nobody: the weights of the prompts would count them.

    Args:
        base (`PreTrainedModel`): the base model.
        input_ids (`torch.Tensor` of shape `(B, T)`): prompts.
        kwargs (`dict`): see `generate`.
    """
    pad, end = (_setting(base, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    takes_mask = "attention_mask" in inspect.signature(base.forward).parameters
    if pad is None or not takes_mask or input_ids.dim() != 2 or input_ids.is_floating_point():
        return None
    padding = input_ids == int(pad)
    # A text may hold its end itself.
    is_end = end is not None and bool((torch.as_tensor(end) == int(pad)).any())
    return None if is_end or not padding.any() else (~padding).long()


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
        kwargs[cache_argument(base.forward)] = cache
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    with run:
        if encoder_decoder:
            if attention_mask is None:
                attention_mask = kwargs["attention_mask"] = torch.ones_like(input_ids)
            run.encode(base.get_encoder(), weights, {"input_ids": input_ids, "attention_mask": attention_mask})
            # `generate` reads their shape only; the adapters' own states replace them.
            empty = torch.zeros(*input_ids.shape, 1, device=input_ids.device)
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=empty)
        with _replaced_forward(base, run, weights):
            return base.generate(input_ids=input_ids, **kwargs)


def _cache(base: nn.Module, prompt_length: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], EnsembleCache | None]:
    """The arguments without those about the cache, and the cache that they ask for."""
    kwargs = dict(kwargs)
    kind = _setting(base, kwargs, "cache_implementation")
    kwargs.pop("cache_implementation", None)
    given = kwargs.get("generation_config")
    if getattr(given, "cache_implementation", None) is not None:
        kwargs["generation_config"] = copy.deepcopy(given)
        kwargs["generation_config"].cache_implementation = None
    if base.generation_config.cache_implementation not in (None, "hybrid"):
        # `generate` takes the model's own setting where none is given, and must not make a cache beside this one.
        kwargs["cache_implementation"] = None
    if kind not in _CACHES:
        raise EnsembleError(
            f"Expected cache_implementation 'dynamic' or 'static', found {kind!r}. Set one of them, or use_cache=False."
        )
    if _setting(base, kwargs, "use_cache") is False:
        return kwargs, None
    if not makes_caches(base):
        logger.warning_once(
            f"{type(base).__name__} keeps states of a kind of its own, which an ensemble cannot keep for each adapter: "
            "every step runs on the whole text, which takes longer."
        )
        return {**kwargs, "use_cache": False}, None
    length = None
    if _CACHES[kind] == "static":
        new = _setting(base, kwargs, "max_new_tokens")
        longest = _setting(base, kwargs, "max_length") or 0
        length = prompt_length + new if new is not None else max(longest, prompt_length + _DEFAULT_NEW_TOKENS)
    return kwargs, EnsembleCache(cache_maker(base.config, length))


@contextmanager
def _replaced_forward(base: nn.Module, run: MemberForward, weights: torch.Tensor) -> Iterator[None]:
    """While open, the base model's forward is the ensemble's."""
    patched: Callable | None = base.__dict__.get("forward")
    name = cache_argument(base.forward)
    output = Seq2SeqLMOutput if base.config.is_encoder_decoder else CausalLMOutputWithPast

    @functools.wraps(base.forward)
    def ensemble_forward(input_ids: Any = None, **inputs: Any):
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        cache = inputs.pop(name, None)
        if not isinstance(cache, EnsembleCache):
            # A second text beside the prompts, such as guidance by a negative prompt, starts with states of its own.
            wanted = cache is not None or inputs.get("use_cache")
            cache = EnsembleCache(cache_maker(base.config)) if wanted else None
        # Beams and returned sequences are adjacent: each row of the prompts becomes a run of rows.
        rows = weights.repeat_interleave(batch_size_of(inputs) // len(weights), dim=0)
        keep_weights(cache, rows)
        # Of another name, `generate` keeps the cache itself.
        states = {"past_key_values": cache} if name == "past_key_values" else {}
        return output(logits=run(rows, inputs, cache), **states)

    base.forward = ensemble_forward
    try:
        yield
    finally:
        if patched is None:
            del base.forward
        else:
            base.forward = patched
