"""Every kind of model with every kind of adapter: captured gradients are those of each example alone.

An example alone has no padding beside it. Where nothing else is said the largest difference is below 1e-5 of the
largest entry, in float32.
"""

import pytest
import torch

from helpers import architectures as zoo
from helpers import capture_cells as cells
from hf_ensemble.capture import GradientExtractor

# PEFT does not make these: its own layers for GPT-2's Conv1D are missing, and ModernBERT has no cache for a prefix.
_LINEAR_ONLY = ("loha", "lokr", "oft", "boft", "hra", "miss")
NOT_MADE = {("gpt2", adapter) for adapter in _LINEAR_ONLY}
NOT_MADE |= {("modernbert", adapter) for adapter in ("prefix", "prefix_projected")}
CELLS = [(name, adapter) for name in zoo.MODELS for adapter in zoo.ADAPTERS if (name, adapter) not in NOT_MADE]


def captured(model, rows, side="right"):
    extractor = GradientExtractor(model, projection_dim=None)
    return extractor, extractor(cells.batch(rows, side)).features


@pytest.mark.parametrize(("name", "adapter"), CELLS, ids=[f"{name}-{adapter}" for name, adapter in CELLS])
def test_every_model_with_every_adapter(name, adapter):
    model = zoo.adapted(zoo.model(name), name, adapter)
    rows = cells.examples(name)
    if adapter == "randlora":
        # Its bases are badly scaled: autograd's own float32 gradients are off by up to 1e-3.
        model.double()
    # BERT reads its answer off the first position, so only right padding leaves a row what it is alone.
    left = name not in zoo.CLASSIFIERS and CELLS.index((name, adapter)) % 2
    extractor, found = captured(model, rows, "left" if left else "right")
    assert cells.error(model, found, cells.expected(model, rows)) < 1e-5
    # Matrices of a LoRA are read by hooks, where they are layers; so are heads.
    layers = {f"{own}.{kind}" for own, layer in model.named_modules() for kind in ("weight", "bias") if "lora_" in own}
    assert not [own for own in extractor.fallback if own in layers and "magnitude" not in own]
    if adapter == "save_head":
        assert any("modules_to_save" in own for own in extractor.hooked)


REPRESENTATIVE = [(name, adapter) for name in ("llama", "t5") for adapter in ("lora", "dora", "save_norm", "prefix")]
REPRESENTATIVE += [("gpt2", "p_tuning"), ("gemma2", "ia3"), ("mixtral", "experts"), ("mixtral", "lokr")]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "adapter"), REPRESENTATIVE)
def test_padding_on_either_side(name, adapter, side):
    model = zoo.adapted(zoo.model(name), name, adapter)
    rows = cells.examples(name, 5)
    extractor, found = captured(model, rows, side)
    assert cells.error(model, found, cells.expected(model, rows)) < 1e-5
    if adapter == "experts":
        # PEFT adds their product to three-dimensional weights, where no layer is called.
        assert all("mlp" in own for own in extractor.fallback) and all("self_attn" in own for own in extractor.hooked)
        assert extractor.fallback and extractor.hooked


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ["lora_embedding", "lora_head", "save_embedding", "save_head", "whole"])
def test_embeddings_and_heads_tied_or_not(name, tied, adapter):
    base = zoo.model(name, tie_word_embeddings=tied)
    if adapter == "whole":
        model = base
        zoo.move(model)
    else:
        model = zoo.adapted(base, name, adapter)
    rows = cells.examples(name)
    extractor, found = captured(model, rows)
    assert cells.error(model, found, cells.expected(model, rows)) < 1e-5
    if adapter == "whole":
        # A tied matrix is a parameter of the embedding and of the head.
        shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert shared == (tied or name == "t5") and ("lm_head.weight" in extractor.hooked) != shared


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("name", "adapter"), [("llama", "lora"), ("llama", "ia3"), ("gpt2", "dora"), ("t5", "lora")])
def test_activation_checkpointing_in_training_mode(name, adapter, use_reentrant):
    model = zoo.adapted(zoo.model(name), name, adapter)
    rows = cells.examples(name)
    plain = captured(model, rows)[1]
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    # Evaluation mode, in which models do not checkpoint, is only for the time of the capture.
    found = captured(model.train(), rows)[1]
    assert torch.equal(found, plain) and model.training


@pytest.mark.parametrize("kind", ["geometric_mean", "mean_log_odds"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "prompt"])
def test_either_margin(adapter, kind):
    model = zoo.adapted(zoo.model("qwen3"), "qwen3", adapter)
    rows = cells.examples("qwen3")
    found = GradientExtractor(model, projection_dim=None, margin=kind)(cells.batch(rows))
    assert cells.error(model, found.features, cells.expected(model, rows, kind)) < 1e-5
    margin = torch.stack([cells.margin_alone(model, row, kind) for row in rows]).detach().float()
    assert torch.allclose(found.margin, margin, rtol=1e-5, atol=1e-6)
