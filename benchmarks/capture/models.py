"""Models and rows of the capture study."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, LlamaForCausalLM

from hf_ensemble.tasks import EXAMPLE_ID, TASK

from ..models import llama_on_device, randomize_lora_b

NUM_LABELS = 4
ENCODER = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
LLAMAS = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "llama-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-34b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
MODELS = ("encoder", *LLAMAS)


@dataclass
class Setting:
    """A section of the tables: a model and the shape of its rows."""

    model: str
    batch: int = 8
    length: int = 128
    answer: int = 32
    dim: int = 1024
    rank: int | None = None
    target_modules: tuple[str, ...] | None = None
    device: str = "cpu"
    quantization: str | None = None
    path: str | None = None
    changes: dict = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        return self.model != "encoder"

    @property
    def name(self) -> str:
        if not self.causal:
            return self.model
        return f"{self.model}, {'all' if self.answer >= self.length else self.answer} tokens of a row are its answer"


def make_model(setting: Setting) -> nn.Module:
    """The model in evaluation mode, with a LoRA in which every parameter has a gradient."""
    torch.manual_seed(0)
    if not setting.causal:
        base, task_type = _encoder(setting), "SEQ_CLS"
    else:
        base, task_type = _llama(setting), "CAUSAL_LM"
    lora = LoraConfig(
        r=setting.rank or 8,
        target_modules=setting.target_modules or "all-linear",
        # Blocks only: Bergson cannot handle the pooler, which gets one vector per row.
        exclude_modules=["pooler.dense"],
        task_type=task_type,
    )
    return randomize_lora_b(get_peft_model(base, lora)).to(setting.device).eval()


def _encoder(setting: Setting) -> nn.Module:
    if setting.path:
        return AutoModelForSequenceClassification.from_pretrained(setting.path, num_labels=NUM_LABELS)
    config = BertConfig(**{**ENCODER, **setting.changes}, num_labels=NUM_LABELS)
    return AutoModelForSequenceClassification.from_config(config)


def _llama(setting: Setting) -> nn.Module:
    shape = {**LLAMAS[setting.model], **setting.changes}
    config = LlamaConfig(**shape, max_position_embeddings=max(1024, setting.length), tie_word_embeddings=False)
    if setting.quantization is None:
        return LlamaForCausalLM(config)
    return llama_on_device(config, torch.device(setting.device), setting.quantization)


def make_rows(setting: Setting, count: int, seed: int = 1) -> Dataset:
    """A token table of random tokens without padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = LLAMAS[setting.model] if setting.causal else ENCODER
    vocabulary = {**shape, **setting.changes}["vocab_size"]
    ids = torch.randint(5, vocabulary, (count, setting.length), generator=generator)
    columns = {TASK: ["t"] * count, EXAMPLE_ID: [str(i) for i in range(count)], "input_ids": ids.tolist()}
    if setting.causal:
        labels = ids.clone()
        labels[:, : setting.length - setting.answer] = -100
        columns["labels"] = labels.tolist()
    else:
        columns["labels"] = torch.randint(0, NUM_LABELS, (count,), generator=generator).tolist()
    return Dataset.from_dict(columns)


def make_batches(setting: Setting, rows: Dataset) -> list[dict[str, torch.Tensor]]:
    """Batches of tensors, without the identity columns."""
    names = ("input_ids", "labels")
    return [
        {name: torch.tensor(rows[start : start + setting.batch][name]).to(setting.device) for name in names}
        for start in range(0, len(rows), setting.batch)
    ]


def largest_layer_gradients(model: nn.Module, batch: int) -> int:
    """Bytes of the per-example gradients of a batch in the largest layer, in float32."""
    return 4 * batch * max(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def multiplied_weights(model: nn.Module) -> int:
    """Number of weights in all linear layers, including packed 4-bit ones."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
