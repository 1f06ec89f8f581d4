"""What groups cannot be trained at once with is refused by name."""

import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import architectures, toy
from helpers.trainers import sft_config, sft_trainer, text_trainer
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.train.inputs.concurrency import check_concurrency, check_concurrent_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grouping_method": "mixtures", "sequential_groups": True}, "sequential_groups=True, which chooses"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0, whose noise depends on"),
        ({"optim": "adalomo"}, "optim='adalomo', which steps in the backward pass"),
        ({"packing": True}, "packing=True, whose rows are parts of one sequence"),
        ({"padding_free": True}, "padding_free=True, whose rows are parts of one sequence"),
        ({"torch_compile": True}, "torch_compile=True, whose graphs hold"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True, which replaces layers"),
        ({"activation_offloading": True}, "activation_offloading=True, which follows the activations"),
        ({"world_size": 3}, "3 processes, on each of which other trainings would wait"),
        ({"report_to": ["mlflow"]}, "report_to='mlflow', which has a run of its own in each thread"),
        ({"report_to": ["tensorboard", "dagshub"]}, "report_to='dagshub', which"),
        # Whole rows that were cut to one length.
        ({"packing": True, "packing_strategy": "wrapped"}, None),
        ({"report_to": ["trackio"]}, None),
    ],
)
def test_arguments_are_refused(tmp_path, changes, message):
    known = vars(sft_config(tmp_path, concurrent_groups=2)) | {"world_size": 1}
    refused = pytest.raises(
        ConfigurationError, match=f"concurrent_groups=2 does not go with {message}.* Set concurrent"
    )
    with nullcontext() if message is None else refused:
        check_concurrency(SimpleNamespace(**known | changes))


TEXTS = {task: {split: toy.text_rows(4, 1) for split in ("train", "validation")} for task in "ab"}


@pytest.mark.parametrize("make", [sft_trainer, partial(text_trainer, tasks=TEXTS)], ids=["sft", "text"])
def test_trainers_refuse_them_before_the_model_is_loaded(make, tmp_path):
    with pytest.raises(ConfigurationError, match="concurrent_groups=2 does not go with optim='adalomo'"):
        make(tmp_path, "no/such-model", concurrent_groups=2, optim="adalomo")


@pytest.mark.parametrize(
    ("name", "num_gpus", "device_map", "message"),
    [
        ("t5", 1, {"": 0}, "a T5ForConditionalGeneration, which has no part below its head"),
        ("llama", 2, {}, "2 GPUs in one process"),
        ("llama", 1, {"model": 0, "lm_head": 1}, "a model that is spread over several devices"),
        ("llama", 1, {"": 0}, None),
    ],
)
def test_models_and_devices_are_refused(name, num_gpus, device_map, message):
    model = architectures.adapted(architectures.model(name), name, "lora")
    model.hf_device_map = device_map
    refused = pytest.raises(ConfigurationError, match=f"concurrent_groups=2 does not go with {message}")
    with nullcontext() if message is None else refused:
        check_concurrent_model(model, SimpleNamespace(concurrent_groups=2, n_gpu=num_gpus))


@pytest.mark.parametrize(
    ("attribute", "named"),
    [
        (threading.Lock(), "cannot pickle '_thread.lock' object"),
        (torch.ones(1, requires_grad=True) * 2, "Only Tensors created explicitly"),
    ],
    ids=["lock", "activation"],
)
def test_a_model_that_cannot_be_copied_is_refused_by_the_constructor(attribute, named, tmp_path):
    base = toy.llama()
    base.model.layers[0].own = attribute
    options = {"processing_class": toy.tokenizer(), "concurrent_groups": 2}
    with pytest.raises(ConfigurationError, match=f"does not go with a model that cannot be copied: {named}") as caught:
        sft_trainer(tmp_path, base, **options)
    assert ".." not in str(caught.value) and str(caught.value).endswith("train one group after the other.")
    # It is trained one group after the other.
    sft_trainer(tmp_path, base, **options | {"concurrent_groups": "auto"})
