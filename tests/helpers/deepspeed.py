"""What tests of bases that DeepSpeed cuts share."""

import importlib.util

import pytest

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
# The least that DeepSpeed takes.
ZERO = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}
