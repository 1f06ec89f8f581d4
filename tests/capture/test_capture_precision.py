"""Quantized bases and bfloat16: as near to the truth as autograd on each example alone."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import architectures as zoo
from helpers import capture_cells as cells
from hf_ensemble.capture import GradientExtractor

QUANTIZED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
ADAPTERS = ["lora", "rslora", "dora", "lora_bias", "lora_head", "lora_embedding", "save_norm", "ia3", "vera", "oft"]
ADAPTERS += ["prompt", "prefix"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name in ("llama", "qwen2"):
        zoo.model(name, hidden_size=64, intermediate_size=64, num_attention_heads=2, head_dim=32).save_pretrained(
            folder / name
        )
    return folder


# PEFT with bitsandbytes fails in the second forward pass of any such model.
NOT_RUN = {("dora", "int8")}
CELLS = [(adapter, kind) for adapter in ADAPTERS for kind in QUANTIZED if (adapter, kind) not in NOT_RUN]


@pytest.mark.parametrize(("adapter", "quantization"), CELLS)
def test_quantized_bases(folders, quantization, adapter):
    # Pairwise: the model and the side of the padding alternate.
    index = ADAPTERS.index(adapter) + list(QUANTIZED).index(quantization)
    name, side = ("llama", "qwen2")[index % 2], ("right", "left")[index // 2 % 2]
    base = AutoModelForCausalLM.from_pretrained(folders / name, quantization_config=QUANTIZED[quantization])
    model = zoo.adapted(base, name, adapter)
    rows = cells.examples(name)
    extractor = GradientExtractor(model, projection_dim=None)
    # An evaluation without gradients makes bitsandbytes repack 4-bit weights on some CPUs, unless it is told not to.
    with torch.no_grad():
        model(input_ids=rows[0]["input_ids"][None])
    found = extractor(cells.batch(rows, side)).features
    assert all("lora_A" not in own and "lora_B" not in own for own in extractor.fallback)
    wanted = cells.expected(model, rows)
    if quantization == "int8" and extractor.hooked:
        # Inputs above a threshold are taken out of the 8-bit product for the whole batch, so an example's own output
        # depends on the others. What hooks read is compared with autograd through the same batch, in evaluation mode.
        together = cells.expected_in_batch(model, cells.batch(rows))
        wanted = torch.where(cells.columns(model, extractor.hooked), together, wanted)
    assert cells.error(model, found, wanted) < 1e-5


def distance(found, wanted):
    """Relative to the norm of each example's gradient, the mean over examples."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


def exact(model, rows):
    """Each example's gradient in float64, at the parameters as they are."""
    return cells.expected(copy.deepcopy(model).double(), rows)


# Autograd's own error is a draw too: hooks round once where it rounds per example, in another order.
FACTOR = 1.5
IN_LOWER_PRECISION = [("llama", "lora"), ("gemma2", "dora"), ("gpt2", "lora"), ("qwen3", "ia3"), ("mixtral", "experts")]
IN_LOWER_PRECISION += [("t5", "lora_embedding"), ("modernbert", "lora"), ("llama", "prompt"), ("mistral", "save_norm")]


@pytest.mark.parametrize(("name", "adapter"), IN_LOWER_PRECISION)
@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16, adapter too", "autocast"])
def test_bfloat16_is_no_further_from_float64_than_autograd(name, adapter, kind):
    base = zoo.model(name)
    model = zoo.adapted(base if kind == "autocast" else base.bfloat16(), name, adapter)
    if kind == "bfloat16, adapter too":
        model.bfloat16()
    rows = cells.examples(name, 12)
    wanted = exact(model, rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        own = cells.expected(model, rows).double()
    extractor = GradientExtractor(model, projection_dim=None, mixed_precision="bf16" if kind == "autocast" else "no")
    found = extractor(cells.batch(rows)).features.double()
    assert 1e-4 < distance(own, wanted) < 0.5
    assert distance(found, wanted) < FACTOR * distance(own, wanted)
    # Rounding is not taken for hooks that are wrong.
    if adapter == "lora":
        assert not extractor.fallback
