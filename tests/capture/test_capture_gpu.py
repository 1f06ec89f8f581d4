"""Capture on a GPU next to the CPU."""

import numpy as np
import pytest
import torch

from helpers import toy
from helpers.captures import capture, causal_batch, relative_error
from hf_ensemble.capture import GradientExtractor

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [None, 64, 4096])
@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}]
)
def test_features_on_a_gpu_are_those_of_the_cpu(dim, settings):
    rows, collator = causal_batch("right")
    here = GradientExtractor(toy.with_lora(toy.llama(), **settings), dim)(collator(rows))
    there = GradientExtractor(toy.with_lora(toy.llama(), **settings).cuda(), dim)(collator(rows))
    assert there.features.device.type == "cpu"
    assert relative_error(there.features, here.features) < 1e-4
    assert relative_error(there.margin, here.margin) < 1e-4


def test_a_store_from_a_gpu_is_that_of_the_cpu(tmp_path):
    here = capture(tmp_path / "cpu")
    there = capture(tmp_path / "gpu", toy.with_lora(toy.llama()).cuda())
    for split in ("train", "validation"):
        found, expected = (store.table(split).features[:] for store in (there, here))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_bfloat16_on_a_gpu_is_near_float32():
    rows, collator = causal_batch("right")
    expected = GradientExtractor(toy.with_lora(toy.llama()).cuda(), 64)(collator(rows)).features
    found = GradientExtractor(toy.with_lora(toy.llama()).cuda().to(torch.bfloat16), 64)(collator(rows)).features
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.99
