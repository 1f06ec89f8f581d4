"""Ensembles with a base from elsewhere than they say: what they name, and which arguments load it."""

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.member_kinds import KINDS, NAMES, make
from hf_ensemble import PeftEnsembleModel

IDS = torch.arange(3, 12).unsqueeze(0)


@pytest.fixture
def folder(tmp_path):
    """Of a saved ensemble and its base."""
    toy.save_model(toy.llama(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    weights = {"sums": {"first": 0.5, "second": 0.5}}
    PeftEnsembleModel(make(base, KINDS["ranks and scalings"]), NAMES, weights).save_pretrained(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize("is_module", [False, True])
@torch.no_grad()
def test_what_is_saved_and_merged_names_the_base_that_was_loaded(folder, is_module):
    moved = str(shutil.move(folder / "base", folder / "moved"))
    base = AutoModelForCausalLM.from_pretrained(moved) if is_module else moved
    ensemble = PeftEnsembleModel.from_pretrained(folder / "saved", base_model=base)
    expected = ensemble(IDS, task="sums").logits
    ensemble.save_pretrained(folder / "again")
    again = PeftEnsembleModel.from_pretrained(folder / "again")
    assert torch.allclose(again(IDS, task="sums").logits, expected, atol=1e-6)
    alone = AutoPeftModelForCausalLM.from_pretrained(folder / "again/adapters/first")
    ensemble.default_weights = {"first": 1.0}
    assert torch.allclose(alone(IDS).logits, ensemble(IDS, routing="default").logits, atol=1e-5)
    ensemble.merge("sums").save_pretrained(folder / "merged")
    merged = AutoPeftModelForCausalLM.from_pretrained(folder / "merged")
    ensemble.combination = "weights"
    assert torch.allclose(merged(IDS).logits, ensemble(IDS, task="sums").logits, atol=1e-5)


def test_a_base_that_is_not_known_by_a_name_leaves_the_saved_one(folder):
    ensemble = PeftEnsembleModel.from_pretrained(folder / "saved", base_model=toy.llama())
    ensemble.save_pretrained(folder / "again")
    assert PeftEnsembleModel.from_pretrained(folder / "again").base_model_reference.name_or_path == str(folder / "base")
