"""Tiny models and adapters of the kinds that people fine-tune, by name."""

import peft
import torch
import transformers as hf

from helpers import toy

WORDS = len(toy.VOCABULARY)
_LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_BERT = {key: _LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
_BERT |= {"num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0}
_T5 = {"vocab_size": WORDS, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}

# By name: class, configuration, attention and other linear layers, embedding, head, a norm.
MODELS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA)),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_LLAMA)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_LLAMA)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**_LLAMA, sliding_window=4)),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**_LLAMA)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**_LLAMA, final_logit_softcapping=2.0, attn_logit_softcapping=2.0, sliding_window=4),
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2),
    ),
    "gpt_neox": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**{key: _LLAMA[key] for key in _LLAMA if key not in ("num_key_value_heads", "head_dim")}),
    ),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**_T5, decoder_start_token_id=0, pad_token_id=0)),
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**_BERT)),
    "modernbert": (
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(**_BERT, bos_token_id=2, eos_token_id=2, cls_token_id=2, sep_token_id=2),
    ),
}
_COMMON = {"linear": ["q_proj", "v_proj", "down_proj"], "embedding": "embed_tokens", "head": "lm_head", "norm": "norm"}
_PARTS = {
    "gemma": {},
    "mixtral": {"linear": ["q_proj", "v_proj", "o_proj"]},
    "gpt2": {"linear": ["c_attn", "c_proj", "c_fc"], "embedding": "wte", "norm": "ln_f"},
    "gpt_neox": {
        "linear": ["query_key_value", "dense_4h_to_h"],
        "embedding": "embed_in",
        "norm": "final_layer_norm",
    },
    "t5": {"linear": ["q", "v", "wo"], "norm": "final_layer_norm"},
    "bert": {"linear": ["query", "value"], "embedding": "word_embeddings", "head": "classifier", "norm": "LayerNorm"},
    "modernbert": {
        "linear": ["Wqkv", "Wo"],
        "embedding": "tok_embeddings",
        "head": "classifier",
        "norm": "final_norm",
    },
}
CLASSIFIERS = ("bert", "modernbert")


def parts(name: str) -> dict:
    return {**_COMMON, **_PARTS.get(name, {})}


def task_type(name: str) -> str:
    return "SEQ_CLS" if name in CLASSIFIERS else "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"


def model(name: str, seed: int = 0, **changes):
    torch.manual_seed(seed)
    make, config = MODELS[name]
    config = config.__class__(**{**config.to_dict(), **changes})
    found = make(config).eval()
    if hasattr(config, "num_local_experts"):
        # The grouped product of all experts is not there in float64.
        found.set_experts_implementation("eager")
    return found


def _lora(**settings):
    def make(name):
        own = parts(name)
        named = {key: [own[part] for part in value] for key, value in settings.items() if key == "modules_to_save"}
        targets = own["linear"] if "also" not in settings else [*own["linear"], own[settings["also"]]]
        rest = {key: value for key, value in settings.items() if key not in ("also", "modules_to_save")}
        return peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **rest, **named)

    return make


def _linear(kind, **settings):
    return lambda name: kind(target_modules=parts(name)["linear"], **settings)


def _ia3(name):
    own = parts(name)["linear"]
    return peft.IA3Config(target_modules=own, feedforward_modules=own[-1:])


ADAPTERS = {
    "lora": _lora(),
    "rslora": _lora(use_rslora=True),
    "dora": _lora(use_dora=True),
    "lora_bias": _lora(bias="lora_only"),
    "lora_b_bias": _lora(lora_bias=True),
    "lora_embedding": _lora(also="embedding"),
    "dora_embedding": _lora(also="embedding", use_dora=True),
    "lora_head": _lora(also="head"),
    "save_head": _lora(modules_to_save=["head"]),
    "save_norm": _lora(modules_to_save=["norm"]),
    "save_embedding": _lora(modules_to_save=["embedding"]),
    "new_tokens": lambda name: peft.LoraConfig(
        r=2, target_modules=parts(name)["linear"], trainable_token_indices={parts(name)["embedding"]: [3, 20, 25]}
    ),
    "loha": _linear(peft.LoHaConfig, r=2),
    "lokr": _linear(peft.LoKrConfig, r=2),
    "vera": _linear(peft.VeraConfig, r=4),
    "oft": _linear(peft.OFTConfig, oft_block_size=4, r=0),
    "boft": _linear(peft.BOFTConfig, boft_block_size=4),
    "hra": _linear(peft.HRAConfig, r=2),
    "adalora": _linear(peft.AdaLoraConfig, init_r=2, target_r=1, total_step=10),
    "fourier": _linear(peft.FourierFTConfig, n_frequency=8),
    "randlora": _linear(peft.RandLoraConfig, r=2),
    "miss": _linear(peft.MissConfig, r=2),
    "ia3": _ia3,
    "layer_norms": lambda name: peft.LNTuningConfig(target_modules=[parts(name)["norm"]]),
    "prompt": lambda name: peft.PromptTuningConfig(num_virtual_tokens=3),
    "prefix": lambda name: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "prefix_projected": lambda name: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "p_tuning": lambda name: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}

# Of mixtures of experts, whose weights are three-dimensional parameters.
OF_EXPERTS = {
    "experts": lambda name: peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj", "gate.weight"]
    )
}


def adapted(base, name: str, adapter: str, seed: int = 0):
    """The model with an adapter away from its start, where every parameter has a gradient."""
    config = (ADAPTERS | OF_EXPERTS)[adapter](name)
    config.task_type = task_type(name)
    torch.manual_seed(seed)
    found = peft.get_peft_model(base, config)
    move(found)
    return found


def move(model, scale: float = 0.1) -> None:
    """Put noise on everything that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=scale)
