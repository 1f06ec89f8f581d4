"""Gradients of the margin, example by example, against one backward pass each."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import oracles, toy
from helpers.captures import causal_batch, relative_error
from hf_ensemble.capture import GradientExtractor, log_odds, margins
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.tasks import TaskSet, data_collator_for, encode, score_answers


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_absolute_positions_do_not_count_padding(padding_side):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(toy.VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"]))
    toy.randomize(model)
    rows, collator = causal_batch(padding_side)
    extractor = GradientExtractor(model, projection_dim=None)
    together = extractor(collator(rows)).features
    alone = torch.cat([extractor(collator([row])).features for row in rows])
    assert not extractor.fallback and relative_error(together, alone) < 1e-5


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["geometric_mean", "mean_log_odds"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}])
def test_causal_lm_gradients_equal_one_backward_per_example(padding_side, kind, settings):
    model = toy.with_lora(toy.llama(), **settings).train()
    rows, collator = causal_batch(padding_side)
    found = GradientExtractor(model, projection_dim=None, margin=kind)(collator(rows))
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()

    def margin_alone(i):
        ids, labels = (torch.tensor([rows[i][key]]) for key in ("input_ids", "labels"))
        return oracles.margins(model(input_ids=ids).logits, labels, kind)[0]

    expected = oracles.per_example_gradients(model, margin_alone, len(rows))
    assert relative_error(found.features, expected) < 1e-5
    assert relative_error(found.margin, torch.stack([margin_alone(i) for i in range(len(rows))])) < 1e-5
    assert torch.allclose(nn.functional.softplus(-found.margin), found.loss, atol=1e-6) or kind == "mean_log_odds"


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_classifier_gradients_equal_one_backward_per_example(padding_side):
    tokenizer = toy.tokenizer(padding_side)
    tasks = TaskSet.from_datasets(toy.text_tasks(train=3))
    space = tasks.label_space
    model = toy.with_lora(toy.bert(len(space)), r=3)
    rows = list(encode(tasks.table("train"), tokenizer, tasks.row_format, space))
    collator = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=False)
    extractor = GradientExtractor(model, projection_dim=None, label_space=space)
    found = extractor(collator(rows))
    # The head is trained too, with its bias, and read by hooks like the adapter.
    assert any("classifier" in name and name.endswith("bias") for name in extractor.hooked)
    assert not extractor.fallback

    def margin_alone(i):
        # BERT reads its answer off the first position and numbers positions from the padding on, so what it says
        # depends on the side: right-padded rows are checked alone, left-padded ones as they stand in the batch.
        inputs = {"input_ids": torch.tensor([rows[i]["input_ids"]])}
        if padding_side == "left":
            inputs = {key: collator(rows)[key][i : i + 1] for key in ("input_ids", "attention_mask")}
        own = list(space.task_labels[rows[i]["task"]])
        return oracles.margins(model(**inputs).logits[:, own], torch.tensor([own.index(rows[i]["labels"])]))[0]

    expected = oracles.per_example_gradients(model, margin_alone, len(rows))
    assert relative_error(found.features, expected) < 1e-5
    batch = collator(rows)
    with torch.no_grad():
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    entropies = oracles.other_entropies(logits, [row["labels"] for row in rows])
    everywhere = GradientExtractor(model, projection_dim=None)(collator(rows))
    assert torch.allclose(everywhere.other_entropy.double(), entropies, atol=1e-4)
    # Labels of other tasks are no answers: a task of two has a single other one.
    assert {len(own) for own in space.task_labels.values()} == {2} and not found.other_entropy.any()


def test_any_batch_size_and_order_gives_the_same_features():
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right", count=6)
    extractor = GradientExtractor(model, projection_dim=256)
    together = extractor(collator(rows)).features
    alone = torch.cat([extractor(collator([row])).features for row in rows])
    backward = extractor(collator(rows[::-1])).features.flip(0)
    assert relative_error(alone, together) < 1e-5
    assert relative_error(backward, together) < 1e-5


def test_activation_checkpointing_changes_nothing():
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    plain = GradientExtractor(model, projection_dim=None)(collator(rows)).features
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(GradientExtractor(model.train(), projection_dim=None)(collator(rows)).features, plain)


class Flattened(nn.Module):
    """A layer that mixes examples into one long batch, as a mixture of experts does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def test_layers_that_hooks_cannot_read_take_the_exact_fallback():
    model = toy.with_lora(toy.llama())
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.up_proj = Flattened(mlp.up_proj)
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    for row in rows[1:]:
        row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    batch = extractor(collator(rows))
    found = batch.features
    assert {name.split(".")[-3] for name in extractor.fallback} == {"lora_A", "lora_B"}
    plain = GradientExtractor(toy.with_lora(toy.llama()), projection_dim=None)(collator(rows))
    assert torch.allclose(batch.other_entropy, plain.other_entropy, atol=1e-5, equal_nan=True)
    assert batch.other_entropy.isnan().tolist() == [True, False, False, False, False]
    # Neither do they depend on it where no parameter is left to the hooks.
    extractor.hooked = []
    assert torch.allclose(extractor(collator(rows)).other_entropy, plain.other_entropy, atol=1e-5, equal_nan=True)

    def margin_alone(i):
        ids, labels = (torch.tensor([rows[i][key]]) for key in ("input_ids", "labels"))
        return oracles.margins(model(input_ids=ids).logits, labels)[0]

    assert relative_error(found, oracles.per_example_gradients(model, margin_alone, len(rows))) < 1e-5


class Reweighted(nn.Module):
    """A layer whose weight is also used outside of its forward, which a hook cannot see."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + nn.functional.linear(x, self.layer.weight)


def test_hooks_that_do_not_add_up_to_autograd_are_replaced():
    model = toy.bert(4)
    model.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    model.classifier = Reweighted(model.classifier)
    extractor = GradientExtractor(model, projection_dim=None)
    ids = torch.randint(3, 20, (3, 6))
    labels = torch.tensor([0, 3, 1])
    found = extractor({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}).features
    assert extractor.fallback == ["classifier.layer.weight"]

    def margin_alone(i):
        return oracles.margins(model(input_ids=ids[i : i + 1]).logits, labels[i : i + 1])[0]

    assert relative_error(found, oracles.per_example_gradients(model, margin_alone, 3)) < 1e-5


def test_margin_is_finite_for_any_probability():
    log_probs = torch.tensor([-200.0, -30.0, -1.0, -1e-3, -1e-9, 0.0])
    assert torch.isfinite(log_odds(log_probs)).all()
    assert torch.isclose(log_odds(torch.tensor(0.25).log()), torch.tensor(1 / 3).log())
    with pytest.raises(ConfigurationError, match="margin has to be one of"):
        margins(score_answers(torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.long)), "mean")
