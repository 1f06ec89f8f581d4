"""What the cards of saved ensembles and adapters say of how they are loaded, merged and weighted."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, BertModel, TrainerState

from helpers import toy
from hf_ensemble import LabelSimilarityForSequenceClassification, PeftEnsembleModel
from hf_ensemble.errors import EnsembleError
from hf_ensemble.publish.training_card import results_by_task

WEIGHTS = {"sums": {"a": 0.5, "b": 0.5}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(toy.llama(num_hidden_layers=1), tmp_path_factory.mktemp("cards") / "base")


def ensemble(base, adapter=None, **options):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter or toy.lora(), "a")
    model.add_adapter("b", toy.lora())
    toy.randomize(model)
    return PeftEnsembleModel(model, ["a", "b"], WEIGHTS, **options)


def card_of(made, folder):
    made.save_pretrained(folder)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"trainable_token_indices": [3]}, {"use_dora": True}])
def test_adapters_that_cannot_be_merged_are_not_shown_merged(base, tmp_path, settings):
    made = ensemble(base, toy.lora(**settings))
    assert "model.merge(" not in card_of(made, tmp_path / "saved")
    with pytest.raises(EnsembleError):
        made.merge("sums")


@pytest.mark.parametrize(
    "combination, words",
    [
        ("logits", "close to the ensemble, which sums their logits"),
        ("probs", "close to the ensemble, which sums their probabilities"),
        ("weights", "the same model as the ensemble"),
    ],
)
def test_what_the_merged_adapter_is_to_the_ensemble(base, tmp_path, combination, words):
    card = card_of(ensemble(base, combination=combination), tmp_path / "saved")
    assert words in card and card.count("close to the ensemble") == (combination != "weights")


def test_scales_stand_beside_the_weights(base, tmp_path):
    sentence = "Combined logits are multiplied, for sums by 0.50."
    assert sentence in card_of(ensemble(base, scales={"sums": 0.5, "other": 1.0}), tmp_path / "scaled")
    # Mixtures of distributions have none.
    assert sentence not in card_of(ensemble(base, scales={"sums": 0.5}, combination="probs"), tmp_path / "probs")
    assert "multiplied" not in card_of(ensemble(base), tmp_path / "plain")


def test_the_merged_card_of_labels_texts_shows_no_other_head(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(toy.VOCABULARY), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    encoder = LabelSimilarityForSequenceClassification.from_encoder(
        str(tmp_path / "encoder"), toy.tokenizer(), ["bad film", "good film"]
    )
    model = get_peft_model(encoder, toy.lora("SEQ_CLS"), "a")
    toy.randomize(model)
    PeftEnsembleModel(model, ["a"], {"films": {"a": 1.0}}).merge("films").save_pretrained(tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "LabelSimilarityForSequenceClassification" in card and "AutoModelForSequenceClassification" not in card
    assert not re.search("```python", card)


def test_how_long_an_evaluation_took_is_no_result():
    log = {"eval_sums_loss": 0.5, "eval_sums_runtime": 1.5, "eval_sums_samples_per_second": 9.5}
    log |= {"eval_sums_steps_per_second": 2.5, "eval_sums_model_preparation_time": 0.5}
    assert results_by_task(TrainerState(log_history=[log]), {"sums": None}) == {"sums": {"loss": 0.5}}
