"""Local stand-ins for the models that trl's tests load: the same architectures, two narrow layers, random weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from . import vision
from .tokenizers import CHATML, Vocabulary, make_tokenizer

# A folder of the cache of the Hub is named after a commit.
REVISION = 40 * "0"
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}


@dataclasses.dataclass(frozen=True)
class StandIn:
    """How to build a model.

    Args:
        architecture (`str`): class of transformers, `XForCausalLM` with the configuration `XConfig`.
        vocabulary (`Vocabulary`): its tokenizer.
        options (`dict`): what its configuration has beside `vision.TEXT`.
    """

    architecture: str
    vocabulary: Vocabulary
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _chatml(template: str) -> Vocabulary:
    return dataclasses.replace(CHATML, template=template)


COHERE2 = Vocabulary(
    "cohere2",
    eos="<|END_OF_TURN_TOKEN|>",
    pad="<PAD>",
    bos="<BOS_TOKEN>",
    more=("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
)
GLM = Vocabulary("glm4moe", pad="<|pad|>", more=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"))
GPT_OSS = Vocabulary(
    "gptoss",
    eos="<|return|>",
    pad="<|endoftext|>",
    bos="<|startoftext|>",
    more=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"),
)
LFM2 = dataclasses.replace(CHATML, pad="<|pad|>", bos="<|startoftext|>")
LFM2_OPTIONS = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}

MODELS = {
    "tiny-Cohere2ForCausalLM": StandIn(
        "Cohere2ForCausalLM", COHERE2, {"layer_types": ["sliding_attention", "full_attention"]}
    ),
    "tiny-Glm4MoeForCausalLM": StandIn(
        "Glm4MoeForCausalLM", GLM, {**EXPERTS, "n_routed_experts": 4, "num_mtp_layers": 0, "head_dim": 16}
    ),
    "tiny-GptOssForCausalLM": StandIn(
        "GptOssForCausalLM", GPT_OSS, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    ),
    "tiny-GPTNeoXForCausalLM": StandIn("GPTNeoXForCausalLM", Vocabulary()),
    "tiny-Lfm2ForCausalLM": StandIn("Lfm2ForCausalLM", dataclasses.replace(LFM2, template="lfm2"), LFM2_OPTIONS),
    "tiny-Lfm2ForCausalLM-2.5": StandIn(
        "Lfm2ForCausalLM", dataclasses.replace(LFM2, template="lfm2_2_5"), LFM2_OPTIONS
    ),
    "tiny-NemotronHForCausalLM-nano": StandIn(
        "NemotronHForCausalLM",
        _chatml("nemotron_3_nano"),
        {
            **EXPERTS,
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
            "moe_shared_expert_intermediate_size": 64,
            "n_routed_experts": 4,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "tiny-Olmo3ForCausalLM": StandIn(
        "Olmo3ForCausalLM", CHATML, {"layer_types": ["sliding_attention", "full_attention"]}
    ),
    "tiny-Qwen2ForCausalLM-2.5": StandIn("Qwen2ForCausalLM", _chatml("qwen2_5")),
    "tiny-Qwen3ForCausalLM": StandIn("Qwen3ForCausalLM", _chatml("qwen3"), {"head_dim": 16}),
    "tiny-Qwen3MoeForCausalLM": StandIn(
        "Qwen3MoeForCausalLM", _chatml("qwen3"), {**EXPERTS, "num_experts": 4, "head_dim": 16}
    ),
}
REMOTE_CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def write_models(folder: Path) -> list[str]:
    """Write every stand-in the way the Hub's cache keeps a model, so that it loads by its name without a network.

    Returns:
        `list[str]`: the names that `from_pretrained` can be asked for.
    """
    makers: dict[str, Callable[[Path], None]] = {
        f"trl-internal-testing/{name}": lambda path, stand_in=stand_in: _write_model(stand_in, path)
        for name, stand_in in MODELS.items()
    }
    makers |= {f"trl-internal-testing/{name}": make for name, make in vision.MODELS.items()}
    makers["trl-internal-testing/tiny-RemoteForCausalLM"] = _write_remote_model
    # Only its tokenizer is read.
    makers["Qwen/Qwen3-4B"] = lambda path: _write_model(MODELS["tiny-Qwen3ForCausalLM"], path)
    for name, make in makers.items():
        cached = folder / f"models--{name.replace('/', '--')}"
        snapshot = cached / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(REVISION)
        make(snapshot)
    return list(makers)


def _write_model(stand_in: StandIn, path: Path) -> PreTrainedModel:
    tokenizer = make_tokenizer(stand_in.vocabulary)
    config = getattr(transformers, stand_in.architecture.replace("ForCausalLM", "Config"))(
        **vision.TEXT,
        **stand_in.options,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = getattr(transformers, stand_in.architecture)(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def _write_remote_model(path: Path) -> None:
    """A Llama whose class is defined in its own repository."""
    config = _write_model(StandIn("LlamaForCausalLM", _chatml("qwen2_5")), path).config.to_dict()
    config |= {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "modeling_remote.py").write_text(REMOTE_CODE)
