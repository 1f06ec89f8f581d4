"""One scorer for every model, equal to scoring all logits."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, T5Config, T5ForConditionalGeneration

from helpers import toy
from helpers.captures import causal_batch
from hf_ensemble.errors import CaptureError, ConfigurationError, ScoringError
from hf_ensemble.models import answer_head as head
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.models.precision import autocast
from hf_ensemble.tasks import LabelSpace, pop_meta, score_answers

WORDS = len(toy.VOCABULARY)


def causal(side):
    rows, collator = causal_batch(side)
    batch = collator(rows)
    pop_meta(batch)
    return batch, batch.pop("labels")


def assert_equal(found, expected, atol=1e-5):
    assert torch.equal(found.num_tokens, expected.num_tokens) and torch.equal(found.rows, expected.rows)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=atol)
    assert torch.equal(found.correct, expected.correct)


def plain(model, inputs, labels):
    """Each row alone, without its padding, by the model's own logits."""
    losses = []
    for row in range(len(labels)):
        own = inputs["attention_mask"][row].bool()
        logits = model(input_ids=inputs["input_ids"][row][own][None]).logits[:, -int(own.sum()) :]
        losses.append(score_answers(logits, labels[row][own][None]).loss)
    return torch.cat(losses)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_scores_do_not_depend_on_padding(side):
    model = toy.with_lora(toy.llama()).eval()
    inputs, labels = causal(side)
    scores = AnswerScorer(model)(inputs, labels)
    assert torch.allclose(scores.loss, plain(model, inputs, labels), atol=1e-5)
    prompt = get_peft_model(toy.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert torch.allclose(AnswerScorer(prompt)(inputs, labels).loss, plain(prompt, inputs, labels), atol=1e-5)


@torch.no_grad()
def test_the_adapter_of_the_call_counts(monkeypatch):
    """One scorer follows `set_adapter` and `disable_adapter`, also between adapted and plain heads."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * WORDS * 5)
    model = toy.with_lora(toy.llama(), modules_to_save=["lm_head"]).eval()
    model.add_adapter("other", toy.lora(target_modules=["q_proj"]))
    toy.randomize(model)
    inputs, labels = causal("right")
    scorer, found = AnswerScorer(model), []
    for name in ("default", "other"):
        model.set_adapter(name)
        found.append(scorer(inputs, labels).loss)
        assert_equal(scorer(inputs, labels), score_answers(model(**inputs).logits, labels))
    with model.disable_adapter():
        found.append(scorer(inputs, labels).loss)
        assert_equal(scorer(inputs, labels), score_answers(model(**inputs).logits, labels))
    assert not any(torch.allclose(found[i], found[j], atol=1e-3) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "trained head"])
def test_no_logits_larger_than_a_piece_without_gradients(targets, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * WORDS * 5)
    model = toy.with_lora(toy.llama(), target_modules=targets).eval()
    inputs, labels = causal("right")
    scorer = AnswerScorer(model)
    scorer(inputs, labels)  # with gradients first, which must not change what follows
    sizes = []
    layer = model.get_base_model().lm_head
    layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    with torch.no_grad():
        scorer(inputs, labels)
    assert len(sizes) > 1 and max(sizes) <= 5 * WORDS


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "trained head"])
def test_gradients_are_those_of_all_logits(targets):
    model = toy.with_lora(toy.llama(), target_modules=targets).eval()
    inputs, labels = causal("right")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(AnswerScorer(model)(inputs, labels).loss.sum(), parameters)
    expected = torch.autograd.grad(score_answers(model(**inputs).logits, labels).loss.sum(), parameters)
    assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(found, expected))


@torch.no_grad()
def test_autocast_is_that_of_a_trainer():
    model = toy.with_lora(toy.llama()).eval()
    inputs, labels = causal("right")
    dtypes = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    exact = AnswerScorer(model)(inputs, labels)
    with autocast("cpu", "bf16"):
        rounded = AnswerScorer(model)(inputs, labels)
        expected = score_answers(model(**inputs).logits, labels)
    assert dtypes[0] == torch.float32 and set(dtypes[2:]) == {torch.bfloat16}
    assert rounded.log_probs.dtype == torch.float32
    assert torch.allclose(rounded.loss, expected.loss, atol=1e-2)
    assert torch.allclose(rounded.loss, exact.loss, atol=0.1) and not torch.equal(rounded.loss, exact.loss)
    with autocast(torch.device("cpu"), "no"):
        assert torch.equal(AnswerScorer(model)(inputs, labels).loss, exact.loss)
    with pytest.raises(ConfigurationError, match="mixed_precision has to be one of .*, found 'fp8'"):
        autocast("cpu", "fp8")


@torch.no_grad()
def test_classifiers_answer_within_their_label_sets():
    space = LabelSpace(("no", "yes", "maybe", "never"), {"x": (0, 1), "y": (1, 2, 3)})
    model = toy.with_lora(toy.bert(4)).eval()
    inputs, labels = {"input_ids": torch.randint(3, 20, (3, 5))}, torch.tensor([0, 3, 1])
    tasks = ["x", "y", "x"]
    scores = AnswerScorer(model, space)(inputs, labels, tasks)
    logits = model(**inputs).logits
    for row, task in enumerate(tasks):
        own = list(space.task_labels[task])
        expected = torch.log_softmax(logits[row, own], -1)[own.index(int(labels[row]))]
        assert torch.allclose(scores.log_probs[row], expected, atol=1e-6)
    assert not torch.allclose(AnswerScorer(model)(inputs, labels).loss, scores.loss, atol=1e-3)
    with pytest.raises(ScoringError, match="Expected the task of each row"):
        AnswerScorer(model, space)(inputs, labels)


@torch.no_grad()
def test_encoder_decoders_need_only_labels():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes)).eval()
    inputs, labels = {"input_ids": torch.randint(3, WORDS, (3, 6))}, torch.randint(3, WORDS, (3, 7))
    labels[1, 4:] = -100
    expected = score_answers(model(**inputs, labels=labels).logits, labels, shift=False)
    assert_equal(AnswerScorer(model)(inputs, labels), expected)


@torch.no_grad()
def test_quantized_bases(tmp_path):
    folder = toy.save_model(toy.llama(hidden_size=64, intermediate_size=128), tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    model = toy.with_lora(base).eval()
    inputs, labels = causal("right")
    assert_equal(AnswerScorer(model)(inputs, labels), score_answers(model(**inputs).logits, labels), atol=1e-4)


@pytest.mark.parametrize("make", [lambda: toy.llama(), lambda: toy.bert()])
def test_a_row_without_an_answer_is_named(make):
    model = make()
    labels = torch.tensor([[5, 6, 7], [5, -100, -100]]) if model.can_generate() else torch.tensor([1, -100])
    with pytest.raises(ScoringError, match="an answer token in every row, found none in row 1 of the batch") as error:
        AnswerScorer(model)({"input_ids": torch.tensor([[4, 5, 6], [5, 6, 7]])}, labels)
    assert not isinstance(error.value, CaptureError) and issubclass(CaptureError, ScoringError)


def test_packed_rows_are_refused():
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ScoringError, match="found position_ids that start again"):
        AnswerScorer(toy.llama())(inputs, inputs["input_ids"])
