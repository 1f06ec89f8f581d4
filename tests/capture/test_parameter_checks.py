"""Trained parameters that no example reaches, inputs that a model needs, wrappers around it."""

import copy
import logging

import peft
import pytest
import torch

from helpers import architectures as zoo
from helpers import capture_cells as cells
from helpers import captures, toy
from helpers.captures import relative_error
from hf_ensemble.capture import GradientExtractor
from hf_ensemble.errors import CaptureError, ScoringError


def capture(model, name="llama"):
    return GradientExtractor(model, projection_dim=None)(cells.batch(cells.examples(name))).features


def test_an_adapter_that_is_not_active_is_named():
    model = zoo.adapted(zoo.model("llama"), "llama", "lora")
    model.add_adapter("other", zoo.ADAPTERS["lora"]("llama"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(CaptureError, match=r"12 are unused: .*lora_A\.other\.weight.* Activate their adapter, or"):
        capture(model)
    model.set_adapter("other")
    capture(model)
    # One that is active but switched off.
    with model.disable_adapter(), pytest.raises(CaptureError, match="every trainable parameter"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("other" in name)
        capture(model)


def test_an_adapter_on_a_module_that_the_model_does_not_call_is_named():
    # T5's encoder and decoder hold the embedding themselves, the outer one is called by nothing.
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "shared"])
    with pytest.raises(CaptureError, match="2 are unused: base_model.model.shared.lora_embedding_A.default"):
        capture(peft.get_peft_model(zoo.model("t5"), config), "t5")


def test_an_example_that_depends_on_nothing_trained():
    model = toy.llama().requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(CaptureError, match="2 are unused: unused.weight, unused.bias"):
        capture(model)


@pytest.mark.parametrize("adapter", ["lora", "dora", "lora_embedding", "ia3"])
def test_gradients_of_zeros_are_no_error(adapter):
    model = zoo.model("llama")
    config = zoo.ADAPTERS[adapter]("llama")
    config.task_type = "CAUSAL_LM"
    # At its start a LoRA's B is zero, and with it the gradient of its A.
    model = peft.get_peft_model(model, config)
    extractor = GradientExtractor(model, projection_dim=None)
    rows = cells.examples("llama")
    found = extractor(cells.batch(rows)).features
    assert cells.error(model, found, cells.expected(model, rows)) < 1e-5
    assert extractor.unused == [] and all("lora_A" not in name for name in extractor.fallback)


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    # Its weights are a slice of a parameter that other tokens reach.
    model = zoo.adapted(zoo.model("mixtral", num_local_experts=32), "mixtral", "experts")
    rows = cells.examples("mixtral", 2)
    extractor = GradientExtractor(model, projection_dim=None)
    found = extractor(cells.batch(rows)).features
    assert cells.error(model, found, cells.expected(model, rows)) < 1e-5
    assert extractor.unused == [] and (found == 0).all(dim=0).any()


class FirstExpert(torch.nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.experts = torch.nn.ModuleList([expert, copy.deepcopy(expert)])

    def forward(self, x):
        return self.experts[0](x)


def test_parameters_that_no_example_uses_are_named(tmp_path, caplog):
    model = toy.with_lora(toy.llama(), target_modules=["up_proj"])
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.up_proj = FirstExpert(mlp.up_proj)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("hf_ensemble").propagate = True
        captures.capture(tmp_path / "store", model)
    assert "No example depends on base_model.model.model.layers.0.mlp.up_proj.experts.1.lora_A" in caplog.text


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_decoder_inputs_are_made_of_the_labels(adapter):
    model = zoo.adapted(zoo.model("t5"), "t5", adapter)
    batch = cells.batch(cells.examples("t5"))
    given = {"decoder_input_ids": model.get_base_model().prepare_decoder_input_ids_from_labels(batch["labels"])}
    extractor = GradientExtractor(model, projection_dim=None)
    assert torch.equal(extractor(batch).features, extractor({**batch, **given}).features)
    base = model.get_base_model()
    base.prepare_decoder_input_ids_from_labels = base._shift_right = None
    assert torch.isfinite(extractor({**batch, **given}).features).all()
    with pytest.raises(ScoringError, match="Expected decoder_input_ids in the batch, as T5ForConditionalGeneration"):
        extractor(batch)


def test_an_output_function_is_given_logits_at_the_labels_positions():
    model = zoo.adapted(zoo.model("llama"), "llama", "prompt")
    rows, shapes = cells.examples("llama"), []

    def last_logit(logits, labels):
        shapes.append((logits.shape[1], labels.shape[1]))
        return logits[:, :, 5].mul(labels != -100).sum(dim=1)

    GradientExtractor(model, 16, margin=last_logit)(cells.batch(rows))
    assert shapes and all(own == other for own, other in shapes)


def test_left_padding_that_cannot_be_moved_is_refused_behind_virtual_tokens():
    model = zoo.adapted(zoo.model("llama"), "llama", "prompt")
    batch = cells.batch(cells.examples("llama"), "left")
    with pytest.raises(ScoringError, match="padding on the right.*with 'extra' that cannot be moved"):
        GradientExtractor(model, 16)({**batch, "extra": torch.zeros(3, 2)})


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_are_taken_off(one_process):
    model = zoo.adapted(zoo.model("llama"), "llama", "dora")
    batch = cells.batch(cells.examples("llama"))
    plain = GradientExtractor(model, 64)
    wrapped = GradientExtractor(torch.nn.parallel.DistributedDataParallel(model), 64)
    assert wrapped.parameters.keys() == plain.parameters.keys() and wrapped.model is model
    assert torch.equal(wrapped(batch).features, plain(batch).features)
    compiled = GradientExtractor(torch.compile(model), 64)
    assert relative_error(compiled(batch).features, plain(batch).features) < 1e-6
