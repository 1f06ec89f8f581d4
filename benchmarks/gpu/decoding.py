"""Four adapters that decode at once, next to one adapter and to PEFT's ways to run several."""

from argparse import Namespace
from dataclasses import asdict, dataclass

import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig

from ..capture.models import LLAMAS
from ..ensemble_inference.run import generation
from ..ensemble_inference.run import measure as measure_methods
from ..models import llama_on_device, randomize_lora_b

METHODS = (
    "one adapter, B rows",
    "one adapter, m x B rows",
    "set_adapter in turn",
    "mixed batch",
    "ensemble, all at once",
    "ensemble, weights",
)


@dataclass(frozen=True)
class Shape:
    """What is decoded."""

    model: str = "llama-8b"
    members: int = 4
    batch_sizes: tuple[int, ...] = (1, 8)
    length: int = 64
    tokens: int = 8
    repetitions: int = 2
    rank: int = 16


TINY = Shape(model="llama-tiny", members=2, batch_sizes=(1, 2), length=8, tokens=3, repetitions=1, rank=4)


def measure(device: torch.device, tiny: bool, layers: int | None) -> dict:
    """Milliseconds of a prefill, of a decoded token and of `generate`, by method and number of rows."""
    shape = TINY if tiny else Shape()
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = LlamaConfig(**{**LLAMAS[shape.model], **changes}, max_position_embeddings=1024, tie_word_embeddings=False)
    model = _with_adapters(llama_on_device(config, device), shape)
    result = {"shape": asdict(shape), "layers": config.num_hidden_layers, "dtype": str(model.dtype), "rows": {}}
    for rows in shape.batch_sizes:
        own = Namespace(
            batch_size=rows,
            length=shape.length,
            tokens=shape.tokens,
            repetitions=shape.repetitions,
            vocabulary=config.vocab_size,
        )
        result["rows"][str(rows)] = {
            "methods": measure_methods(model, shape.members, own, device, METHODS),
            "generate": generation(model, shape.members, own, device),
        }
    return result


def _with_adapters(base: torch.nn.Module, shape: Shape) -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(r=shape.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = PeftModel(base, lora, adapter_name="m0")
    for number in range(1, shape.members):
        model.add_adapter(f"m{number}", lora)
    # PEFT makes adapters in float32, which would make every layer change the precision twice.
    for parameter in randomize_lora_b(model).requires_grad_(False).parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()
