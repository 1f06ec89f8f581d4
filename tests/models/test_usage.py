"""Floating point operations: against torch's own counter, and against the formula of active parameters."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig, BitsAndBytesConfig

from helpers import toy
from hf_ensemble.capture.gradients import GradientExtractor
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.models.flop_counter import FlopCounter
from hf_ensemble.models.label_similarity import LabelSimilarityConfig, LabelSimilarityForSequenceClassification
from hf_ensemble.models.usage import Usage, UsageCounter, measured_usage
from hf_ensemble.tasks import LabelSpace

# Rows and tokens of some batches, as batches of similar length come, and the last one smaller.
SHAPES = [(4, length) for length in (5, 6, 6, 9, 11, 14, 20, 20, 21, 22, 24, 26, 28, 30, 30, 31)] + [(3, 33)]


def llama(**changes):
    # Attention on the CPU is one operation, which torch's counter does not know; eager attention is two it knows.
    return toy.llama(attn_implementation="eager", **changes)


def classifier():
    """Like an encoder with the embeddings of its labels for a head."""
    small = toy.bert().config
    encoder = BertConfig(**{**small.to_diff_dict(), "vocab_size": small.vocab_size, "hidden_size": 32})
    torch.manual_seed(0)
    names = ["no", "yes", "maybe", "never"]
    config = LabelSimilarityConfig({**encoder.to_dict(), "model_type": "bert"}, id2label=dict(enumerate(names)))
    model = LabelSimilarityForSequenceClassification(config)
    model.set_attn_implementation("eager")
    return model.eval()


MODELS = {
    "llama": llama,
    "llama-lora": lambda: toy.with_lora(llama()),
    "classifier": classifier,
    "classifier-lora": lambda: toy.with_lora(classifier()),
}


def batches(model, shapes=SHAPES):
    torch.manual_seed(1)
    for rows, length in shapes:
        ids = torch.randint(3, 20, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        if model == "llama":
            labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
            labels[:, 2] = ids[:, 2]
        else:
            labels = torch.randint(0, 4, (rows,))
        yield {"input_ids": ids, "attention_mask": mask}, labels


class EveryModule(nullcontext):
    parents = ("Global",)


def forward(model, inputs, labels):
    with torch.no_grad():
        model(**inputs)


def training_step(model, inputs, labels):
    logits = model(**inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()


def capture_step(model):
    is_classifier = hasattr(model.config, "encoder")
    space = LabelSpace(["a", "b", "c", "d"], {"t": [0, 1, 2, 3]}) if is_classifier else None
    extractor = GradientExtractor(model, [8], [0], "geometric_mean", space)

    def step(model, inputs, labels):
        extractor({**inputs, "labels": labels, "task": ["t"] * len(labels)})

    return step


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("work", ["forward", "training", "capture"])
def test_a_loop_takes_what_torch_counts(name, work):
    model = MODELS[name]()
    if work == "capture" and "lora" not in name:
        pytest.skip("gradients of adapters are captured")
    step = {"forward": forward, "training": training_step}.get(work) or capture_step(model)
    usage, counted, looked_at = UsageCounter(), [], 0
    with measured_usage() as outer, usage:
        for number, (inputs, labels) in enumerate(batches(name.split("-")[0])):
            before = len(usage.samples._flops)
            with usage.batch(inputs, labels, is_typical=work != "capture" or number > 0):
                # Torch's counter sees what ours passes on.
                truth = FlopCounterMode(display=False)
                # Its names of modules do not stand every use of autograd.
                truth.mod_tracker = EveryModule()
                with truth:
                    step(model, inputs, labels)
            counted.append(truth.get_total_flops())
            looked_at += len(usage.samples._flops) > before
    total = usage.total()
    # Heads and hooks of the capture are not quite linear in a batch's shape.
    assert total.flops == pytest.approx(sum(counted), rel=0.02 if work == "capture" else 1e-6) and outer == total
    assert total.tokens == sum(rows * length - 2 for rows, length in SHAPES) and total.padding == 2 * len(SHAPES)
    # Most batches were not counted.
    assert looked_at <= 9 < len(SHAPES)


def test_the_forward_is_two_operations_for_each_active_parameter():
    model = llama()
    rows, length, config = 3, 11, model.config
    inputs, labels = next(batches("llama", [(rows, length)]))
    with FlopCounter() as whole:
        forward(model, inputs, labels)
    with FlopCounter() as at_answers, torch.no_grad():
        AnswerScorer(model)(inputs, labels)
    layers = sum(own.numel() for name, own in model.model.named_parameters() if own.dim() == 2 and "embed" not in name)
    head = model.lm_head.weight.numel()
    attention = 4 * config.num_hidden_layers * rows * length**2 * config.hidden_size
    assert whole.flops == 2 * rows * length * (layers + head) + attention
    # One token more tells whether the head is trained, and one the width of the logits.
    answers = (int((labels[:, 1:] != -100).sum(1).max()) + 1) * rows
    assert at_answers.flops == 2 * rows * length * layers + 2 * answers * head + attention


def test_training_skips_what_is_frozen_and_repeats_what_is_checkpointed():
    def of(model):
        inputs, labels = next(batches("llama", [(4, 12)]))
        with FlopCounter() as once:
            forward(model, inputs, labels)
        with FlopCounter() as step:
            training_step(model, inputs, labels)
        return step.flops / once.flops

    assert of(llama()) == pytest.approx(3.0, abs=0.05)
    adapted = toy.with_lora(llama())
    assert 2.0 < of(adapted) < 2.3
    again = toy.with_lora(llama())
    again.enable_input_require_grads()
    again.activation_checkpointing_enable({"use_reentrant": False})
    assert of(again.train()) > of(adapted) + 0.8


def test_attention_quantized_weights_and_inference_mode_count_alike(tmp_path):
    inputs, labels = next(batches("llama", [(4, 12)]))

    def of(model, **context):
        with FlopCounter() as counter:
            forward(model, inputs, labels)
        return counter.flops

    expected = of(llama(hidden_size=64, intermediate_size=64))
    model = toy.llama(hidden_size=64, intermediate_size=64)
    assert of(model) == expected
    with torch.inference_mode(), FlopCounter() as counter:
        model(**inputs)
    assert counter.flops == expected
    toy.save_model(model, tmp_path)
    for bits in ("load_in_4bit", "load_in_8bit"):
        quantized = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True})
        )
        assert of(quantized) == expected


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_attention_on_a_gpu_counts_like_torch_and_with_shared_keys_too(kernel):
    forward_of = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")

    def of(num_key_heads, counter):
        query = torch.empty(2, 8, 16, 32, device="meta", dtype=torch.bfloat16)
        key = torch.empty(2, num_key_heads, 24, 32, device="meta", dtype=torch.bfloat16)
        with counter:
            forward_of(query, key, key, *(() if kernel == "flash_attention" else (None, False)))
        return counter

    equal = of(8, FlopCounter()).flops
    assert equal == of(8, FlopCounterMode(display=False)).get_total_flops()
    assert of(2, FlopCounter()).flops == equal


def test_counts_of_attention_backward_are_those_of_torch():
    def of(counter):
        query, key = torch.randn(2, 4, 6, 8, requires_grad=True), torch.randn(2, 4, 10, 8, requires_grad=True)
        with counter:
            torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()
        return counter

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        as_products = of(FlopCounterMode(display=False)).get_total_flops()
    # Fused attention computes the scores once more for its backward.
    assert of(FlopCounter()).flops == as_products + 2 * (2 * 4 * 6 * 10 * 8)


def test_counts_go_on_and_do_not_mix():
    model = llama()
    with measured_usage() as outer:
        with measured_usage() as inner, UsageCounter() as usage:
            usage.resume(Usage(1000.0, 10, 1, 2.5))
            for inputs, labels in batches("llama", SHAPES[:3]):
                with usage.batch(inputs, labels):
                    forward(model, inputs, labels)
        with pytest.raises(KeyboardInterrupt), UsageCounter() as second:
            inputs, labels = next(batches("llama", SHAPES[3:]))
            with second.batch(inputs, labels):
                forward(model, inputs, labels)
            with second.batch(inputs, labels):
                raise KeyboardInterrupt
    assert inner.seconds == 2.5 and inner.flops > 1000 and inner.tokens == 10 + sum(4 * t - 2 for _, t in SHAPES[:3])
    # What an interrupted loop had done was done.
    assert outer.flops > inner.flops and outer.tokens == inner.tokens + 34
    with UsageCounter() as after:
        pass
    assert after.total() == Usage()


def test_compiled_graphs_are_not_guessed():
    model = llama()
    with UsageCounter(is_compiled=True) as usage:
        for inputs, labels in batches("llama", SHAPES[:2]):
            with usage.batch(inputs, labels):
                forward(model, inputs, labels)
    assert usage.total().flops == 0 and usage.total().tokens == 4 * 11 - 4
