"""What a store's gradients depend on is part of its identity, in every entry."""

import functools
import json

import pytest
import torch
from peft import get_peft_model

from helpers import toy
from hf_ensemble.capture import model_identity
from hf_ensemble.capture.margin import margin_identity


def adapted(**settings):
    torch.manual_seed(0)
    return get_peft_model(toy.llama(), toy.lora(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"q_proj": 32}},
        {"lora_alpha": 9},
        {"target_modules": ["q_proj", "v_proj"]},
        {"use_rslora": True},
    ],
)
def test_every_setting_of_an_adapter_counts(settings):
    plain, other = model_identity(adapted()), model_identity(adapted(**settings))
    assert plain["adapter"] != other["adapter"]
    assert json.loads(json.dumps(other)) == other == model_identity(adapted(**settings))


def test_one_entry_of_the_trained_parameters_counts():
    model = adapted()
    before = model_identity(model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[parameter.numel() // 2] += 1e-3
    after = model_identity(model)
    assert after["theta0"] != before["theta0"] and after["base_weights"] == before["base_weights"], name


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, logits, labels):
        return self.scale * logits.sum(-1)

    def method(self, logits, labels):
        return self(logits, labels)


def closure(scale):
    def margin(logits, labels):
        return scale * logits.sum(-1)

    return margin


def default(scale):
    def margin(logits, labels, scale=scale):
        return scale * logits.sum(-1)

    return margin


def plain(logits, labels, scale=1.0):
    return scale * logits.sum(-1)


@pytest.mark.parametrize(
    "make",
    [Scaled, closure, default, lambda scale: functools.partial(plain, scale=scale), lambda scale: Scaled(scale).method],
    ids=["object", "closure", "default", "partial", "method"],
)
def test_what_a_margin_holds_counts(make):
    assert margin_identity(make(1.0)) == margin_identity(make(1.0)) != margin_identity(make(2.0))
    weights = torch.ones(5000)
    other = weights.clone()
    other[2500] = 0
    assert margin_identity(make(weights)) == margin_identity(make(weights.clone())) != margin_identity(make(other))
