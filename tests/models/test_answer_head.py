"""Scores of the answer tokens without a whole batch's logits."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

from helpers import oracles, toy
from helpers.captures import causal_batch, relative_error
from hf_ensemble.capture import GradientExtractor, margins
from hf_ensemble.errors import ScoringError
from hf_ensemble.models import answer_head as head
from hf_ensemble.tasks import score_answers

WORDS = len(toy.VOCABULARY)


def gemma2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # The cap is low enough to change every logit.
    config = Gemma2Config(vocab_size=WORDS, final_logit_softcapping=0.5, initializer_range=0.3, **sizes, **heads)
    model = get_peft_model(Gemma2ForCausalLM(config), toy.lora(target_modules=["q_proj", "down_proj"]))
    toy.randomize(model)
    return model


def llama_with(**settings):
    return lambda: toy.with_lora(toy.llama(), **settings)


def prompt_tuned():
    torch.manual_seed(0)
    return get_peft_model(toy.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def whole_margin(logits, labels):
    """The default margin as an output function, which is given all logits."""
    return margins(score_answers(logits[:, -labels.shape[1] :], labels))


@pytest.fixture(params=[64 * 2**20, 4 * WORDS * 5])
def piece(request, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES", request.param)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    "make",
    [
        llama_with(),
        llama_with(modules_to_save=["lm_head"]),
        llama_with(target_modules=["q_proj", "lm_head"]),
        lambda: toy.with_lora(toy.llama(tie_word_embeddings=True), target_modules=["embed_tokens", "v_proj"]),
        gemma2,
        prompt_tuned,
    ],
    ids=["frozen head", "trained head", "adapted head", "tied", "capped", "virtual tokens"],
)
def test_features_are_those_of_the_whole_logits(make, padding_side, piece):
    rows, collator = causal_batch(padding_side)
    for row in rows[::2]:
        row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    found = GradientExtractor(make(), projection_dim=None)(collator(rows))
    expected = GradientExtractor(make(), projection_dim=None, margin=whole_margin)(collator(rows))
    assert relative_error(found.margin, expected.margin) < 1e-5
    assert relative_error(found.features, expected.features) < 1e-5
    assert found.num_tokens.tolist() == expected.num_tokens.tolist()
    # An output function's answers have no entropy: what the function makes of the logits is not known.
    assert expected.other_entropy.isnan().all()
    batch = collator(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = make()(**{key: value for key, value in batch.items() if torch.is_tensor(value)}).logits
    entropies = oracles.other_entropies(logits[:, -labels.shape[1] :], labels)
    # Answers of several tokens have none.
    is_single = found.num_tokens == 1
    assert is_single.tolist() == [True, False, True, False, True] == (~found.other_entropy.isnan()).tolist()
    assert relative_error(found.other_entropy[is_single], entropies[is_single]) < 1e-4


def test_an_encoder_decoder_runs_its_encoder_once(piece):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, target_modules=["q", "v"]))
    toy.randomize(model)
    runs = []
    model.get_base_model().encoder.block[0].register_forward_hook(lambda *_: runs.append(1))
    ids, labels = torch.randint(3, WORDS, (3, 6)), torch.randint(3, WORDS, (3, 7))
    labels[1, 4:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["decoder_input_ids"] = model.get_base_model().prepare_decoder_input_ids_from_labels(labels)
    extractor = GradientExtractor(model, projection_dim=None)
    # The first batch is also taken through the layers' own forward, to compare.
    extractor(batch)
    runs.clear()
    found = extractor(batch)
    assert len(runs) == 1

    def whole(logits, labels):
        return margins(score_answers(logits, labels, shift=False))

    expected = GradientExtractor(model, projection_dim=None, margin=whole)(batch)
    assert relative_error(found.features, expected.features) < 1e-5
    assert relative_error(found.loss, expected.loss) < 1e-5


def test_no_logits_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 * WORDS * 5)
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    sizes = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    GradientExtractor(model, projection_dim=16)(collator(rows))
    assert len(sizes) > 2 and max(sizes) <= 5 * WORDS


def test_an_exception_in_the_head_leaves_the_model_as_it_was():
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=16)
    expected = extractor(collator(rows)).features
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")

    handle = model.get_base_model().lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        extractor(collator(rows))
    handle.remove()
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    assert torch.equal(extractor(collator(rows)).features, expected)


def test_outputs_at_other_positions_than_the_labels_are_refused():
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")

    def lengthened(module, inputs, output):
        output.last_hidden_state = torch.nn.functional.pad(output.last_hidden_state, (0, 0, 2, 0))
        return output

    model.get_base_model().model.register_forward_hook(lengthened)
    with pytest.raises(ScoringError, match="which of them answer is not known"):
        GradientExtractor(model, projection_dim=16)(collator(rows))


def test_a_gpu_takes_larger_pieces(monkeypatch):
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    here, there = (head.tokens_at_once(8, 128_000, torch.device(device)) for device in ("cpu", "cuda"))
    assert (here, there) == (16, 81)
