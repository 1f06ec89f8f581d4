"""Every option of `generate`: as with one model, or refused by name."""

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, GenerationConfig, MistralConfig, MistralForCausalLM, StaticCache

from helpers import ensembles, toy
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError

STEPS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
SAMPLED = {"do_sample": True}
BEAMS = {"num_beams": 3}
# Options that work, with a value that changes something, or at least is used.
WORKING = {
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.3, "assistant_model": True},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5, "assistant_model": True},
    "assistant_lookbehind": {"assistant_lookbehind": 5, "assistant_model": True},
    "bad_words_ids": {"bad_words_ids": [[9], [12, 4]]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [9, 12]},
    "bos_token_id": {"bos_token_id": 3},
    "cache_implementation": {"cache_implementation": "static"},
    "do_sample": SAMPLED,
    "early_stopping": {"early_stopping": True, "eos_token_id": 9, **BEAMS},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "eos_token_id": {"eos_token_id": 9},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, **SAMPLED},
    "eta_cutoff": {"eta_cutoff": 0.02, **SAMPLED},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 2.0), "eos_token_id": 9},
    "forced_bos_token_id": {"forced_bos_token_id": 4},
    "forced_eos_token_id": {"forced_eos_token_id": 4},
    "guidance_scale": {"guidance_scale": 1.5},
    "length_penalty": {"length_penalty": 2.0, "eos_token_id": 9, **BEAMS},
    "max_length": {"max_length": 11, "max_new_tokens": None},
    "max_matching_ngram_size": {"max_matching_ngram_size": 2, "prompt_lookup_num_tokens": 3},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_time": {"max_time": 60.0},
    "min_length": {"min_length": 12, "eos_token_id": 9},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": 9},
    "min_p": {"min_p": 0.05, **SAMPLED},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "num_assistant_tokens": {"num_assistant_tokens": 2, "assistant_model": True},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant", "assistant_model": True},
    "num_beams": BEAMS,
    "num_return_sequences": {"num_return_sequences": 2, **BEAMS},
    "output_logits": {"output_logits": True},
    "output_scores": {"output_scores": True},
    "pad_token_id": {"pad_token_id": 1, "eos_token_id": 9},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, **BEAMS},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "sequence_bias": {"sequence_bias": [[[7], 5.0]]},
    "suppress_tokens": {"suppress_tokens": [9, 12]},
    "target_lookbehind": {"target_lookbehind": 5, "assistant_model": True},
    "temperature": {"temperature": 2.0, **SAMPLED},
    "top_h": {"top_h": 0.5, **SAMPLED},
    "top_k": {"top_k": 3, **SAMPLED},
    "top_p": {"top_p": 0.7, **SAMPLED},
    "typical_p": {"typical_p": 0.5, **SAMPLED},
    "use_cache": {"use_cache": False},
    "watermarking_config": {"watermarking_config": {"bias": 3.0, "seeding_scheme": "selfhash"}},
    # Arguments of `generate` that are not in its configuration.
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[8, 6], [4, 5]])},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [4, 5, 6 + row]},
    "assistant_model": {"assistant_model": True},
}
REFUSED = {
    "assistant_early_exit": 1,
    "cache_implementation": "quantized",
    "dola_layers": "low",
    "output_attentions": True,
    "output_hidden_states": True,
    "penalty_alpha": 0.6,
    "token_healing": True,
    "use_mtp": True,
}
# What `generate` itself refuses without code from the Hub or a tokenizer of bytes, does not read, or reads of
# encoder-decoders only.
OTHERS = {
    "_from_model_config",
    "cache_config",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "diversity_penalty",
    "force_words_ids",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "num_beam_groups",
    "speculation_type",
    "stop_strings",
    "transformers_version",
}
# Assisted decoding takes one prompt at a time.
ALONE = ("assistant_model", "prompt_lookup_num_tokens")


def pair(base):
    """Two adapters with the same weights: whatever their weights in the ensemble, it is one of them."""
    model = get_peft_model(base, toy.lora(), adapter_name="a")
    model.add_adapter("b", toy.lora())
    for name in ("a", "b"):
        ensembles.randomize_adapters(model, [name], 0.5, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return pair(toy.llama())


@pytest.fixture(scope="module")
def assistant():
    return toy.llama(seed=5)


def generated(generate, options, **extra):
    torch.manual_seed(3)
    output = generate(**options, **extra)
    if torch.is_tensor(output):
        return {"sequences": output}
    return {name: output[name] for name in ("sequences", "scores", "logits") if output.get(name) is not None}


def test_every_option_is_in_a_table():
    known = set(GenerationConfig().to_dict())
    assert known - {*WORKING, *REFUSED} == OTHERS & known
    assert not OTHERS - known


@pytest.mark.parametrize("combination", ["logits", "probs", "weights"])
@torch.no_grad()
def test_options_do_what_they_do_with_one_model(model, assistant, combination, request):
    ensemble = PeftEnsembleModel(model, ["a", "b"], {"t": {"a": 0.4, "b": 0.6}}, combination=combination).eval()
    wrong = []
    if combination == "probs":  # its logits are log-probabilities

        def normalise(module, inputs, output):
            output.logits = torch.log_softmax(output.logits, -1)

        handle = model.get_base_model().register_forward_hook(normalise)
        request.addfinalizer(handle.remove)
    for name, changes in WORKING.items():
        options = {**STEPS, **changes, "input_ids": torch.tensor([[5, 6, 7, 5, 6], [9, 9, 4, 8, 3]])}
        if any(key in options for key in ALONE):
            options["input_ids"] = options["input_ids"][:1]
        if "assistant_model" in options:
            options["assistant_model"] = assistant
        options["attention_mask"] = torch.ones_like(options["input_ids"])
        if options.get("output_scores") or options.get("output_logits"):
            options["return_dict_in_generate"] = True
        expected = generated(model.get_base_model().generate, options)
        found = generated(ensemble.generate, options, task="t")
        same = expected.keys() == found.keys() and torch.equal(expected["sequences"], found["sequences"])
        steps = [(e, f) for key in ("scores", "logits") for e, f in zip(expected.get(key, ()), found.get(key, ()))]
        if not same or not all(torch.allclose(e, f, atol=1e-4) for e, f in steps):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_an_ensemble_has_no_answer_to_are_refused(model, name):
    ensemble = PeftEnsembleModel(model, ["a", "b"]).eval()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(EnsembleError, match=f"{name} cannot be set|Expected {name} 'dynamic' or 'static'"):
        ensemble.generate(ids, **{name: REFUSED[name]})
    with pytest.raises(EnsembleError, match=f"{name} cannot be set|Expected {name} 'dynamic' or 'static'"):
        ensemble.generate(ids, generation_config=GenerationConfig(**{name: REFUSED[name]}))


@pytest.mark.parametrize("kind", ["static", "dynamic", "hybrid", "sliding_window", "hybrid_chunked"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"generation_config": GenerationConfig(**STEPS)},
        {"generation_config": GenerationConfig(**STEPS, cache_implementation="hybrid")},
        {"cache_implementation": "static"},
    ],
)
@torch.no_grad()
def test_caches_that_checkpoints_ask_for(kind, given):
    model = pair(toy.llama())
    ensemble = PeftEnsembleModel(model, ["a", "b"], {"t": {"a": 0.4, "b": 0.6}})
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    steps = {} if "generation_config" in given else STEPS
    ensemble.generation_config.eos_token_id = None
    expected = ensemble.generate(ids, task="t", **STEPS)
    ensemble.generation_config.cache_implementation = kind
    made = []
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, inputs, kwargs: made.append(type(kwargs["past_key_values"])), with_kwargs=True
    )
    assert torch.equal(ensemble.generate(ids, task="t", **steps, **given), expected)
    handle.remove()
    config = given.get("generation_config")
    asked = given.get("cache_implementation") or (config and config.cache_implementation) or kind
    is_static = asked not in ("dynamic", "hybrid")
    assert set(made) == {StaticCache if is_static else DynamicCache}
    assert ensemble.generation_config.cache_implementation == kind


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_guidance_combines_the_adapters_on_the_negative_prompt_too(fused):
    model = get_peft_model(toy.llama(), toy.lora(), adapter_name="a")
    model.add_adapter("b", toy.lora(use_rslora=True))
    ensembles.randomize_adapters(model, ["a", "b"], 0.4)
    weights = {"a": 0.4, "b": 0.6}
    ensemble = PeftEnsembleModel(model.eval(), ["a", "b"], {"t": weights}).eval()
    ensemble.fused = fused
    ids, negative = torch.tensor([[5, 6, 7, 5]]), torch.tensor([[8, 9]])
    expected, start = ids, ids.shape[1]

    def log_probs(text):
        logits = ensembles.weighted_logits(model, ["a", "b"], {"input_ids": text}, [weights])
        return torch.log_softmax(logits[:, -1], -1)

    for _ in range(6):
        own, other = log_probs(expected), log_probs(torch.cat([negative, expected[:, start:]], 1))
        expected = torch.cat([expected, (other + 1.7 * (own - other)).argmax(-1, keepdim=True)], 1)
    options = {**STEPS, "guidance_scale": 1.7, "negative_prompt_ids": negative}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(ensemble.generate(ids, task="t", **options, **cache), expected), cache


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combination", ["logits", "weights"])
@torch.no_grad()
def test_assisted_decoding_beyond_a_sliding_window(combination, fused):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=45, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=None, sliding_window=4,
    )  # fmt: skip
    model = get_peft_model(MistralForCausalLM(config).eval(), toy.lora(), adapter_name="a")
    model.add_adapter("b", toy.lora())
    ensembles.randomize_adapters(model, ["a", "b"], 0.5)
    ensemble = PeftEnsembleModel(model.eval(), ["a", "b"], {"t": {"a": 0.6, "b": 0.4}}, combination=combination)
    ensemble.fused = fused
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    expected = ensemble.generate(ids, task="t", **STEPS)
    for assisted in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": toy.llama(seed=5, eos_token_id=None)}):
        assert torch.equal(ensemble.generate(ids, task="t", **STEPS, **assisted), expected)
