"""The precision of a capture: the trainer's own, part of the store's identity, and harmless for estimates."""

from dataclasses import dataclass, fields
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import HfArgumentParser, TrainingArguments

from helpers import toy
from helpers.captures import capture, causal_batch
from hf_ensemble.capture import CaptureConfig, FeatureSettings, GradientExtractor
from hf_ensemble.errors import ConfigurationError, StoreMismatchError
from hf_ensemble.estimate import ObservedRun, SubsetEstimator


def arguments(folder, **changes):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **changes)


def test_auto_follows_the_trainer(tmp_path):
    assert CaptureConfig().resolved() == CaptureConfig(preconditioner="adam", mixed_precision="no")
    found = CaptureConfig().resolved(arguments(tmp_path, bf16=True, optim="sgd"))
    assert (found.preconditioner, found.mixed_precision) == ("none", "bf16")
    assert CaptureConfig().resolved(arguments(tmp_path)).mixed_precision == "no"
    explicit = CaptureConfig(preconditioner="optimizer", mixed_precision="no")
    assert explicit.resolved(arguments(tmp_path, bf16=True)) == explicit


def test_fp16_trainings_are_captured_without_it(monkeypatch):
    logged = []
    monkeypatch.setattr("hf_ensemble.capture.config.logger.info", logged.append)
    args = SimpleNamespace(bf16=False, fp16=True, optim="adamw_torch")
    assert CaptureConfig().resolved(args).mixed_precision == "no"
    assert len(logged) == 1 and "underflow" in logged[0]


def test_feature_settings_become_a_config():
    settings = FeatureSettings(projection_dim=8, margin="mean_log_odds", non_finite="exclude")
    config = CaptureConfig.from_settings(settings, batch_size=3)
    assert (config.projection_dim, config.margin, config.non_finite) == (8, "mean_log_odds", "exclude")
    assert config.batch_size == 3 and config.preconditioner == "auto"


@dataclass
class MixedArguments(FeatureSettings, TrainingArguments):
    pass


def test_feature_settings_mix_into_training_arguments(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--optim", "sgd", "--bf16", "--projection_dim", "8"]
    (args,) = HfArgumentParser(MixedArguments).parse_args_into_dataclasses(flags)
    config = CaptureConfig.from_settings(args, batch_size=args.per_device_eval_batch_size).resolved(args)
    assert (config.projection_dim, config.preconditioner, config.mixed_precision) == (8, "none", "bf16")
    own = fields(FeatureSettings)
    assert all(each.metadata["help"] for each in own)
    assert not {each.name for each in own} & {each.name for each in fields(TrainingArguments)}
    with pytest.raises(ConfigurationError, match="margin has to be one of"):
        MixedArguments(output_dir=str(tmp_path), use_cpu=True, margin="mean")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {
        precision: capture(folder / precision, get_peft_model(toy.llama(), toy.lora()), mixed_precision=precision)
        for precision in ("no", "bf16")
    }


def test_the_model_runs_in_bfloat16_and_everything_else_in_float32():
    model = toy.with_lora(toy.llama())
    layers = [module for name, module in model.named_modules() if name.endswith("q_proj.base_layer")]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None, mixed_precision="bf16")
    found = extractor(collator(rows))
    extractor.add_second_moments(collator(rows), moments := {})
    assert set(seen) == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")
    assert {found.features.dtype, found.margin.dtype, found.loss.dtype} == {torch.float32}
    assert {moment.dtype for moment in moments.values()} == {torch.float32}


def test_the_precision_is_part_of_the_identity(stores):
    assert {name: store.identity["config"]["mixed_precision"] for name, store in stores.items()} == {
        "no": "no",
        "bf16": "bf16",
    }
    assert stores["no"].identity["config"]["preconditioner"] == "adam"
    with pytest.raises(StoreMismatchError, match="config.mixed_precision: found 'bf16', expected 'no'"):
        capture(stores["bf16"].folder, get_peft_model(toy.llama(), toy.lora()))


def test_estimates_from_bfloat16_features_agree(stores):
    tables = {name: (store.table("train"), store.table("validation")) for name, store in stores.items()}
    base = SubsetEstimator(*tables["no"]).base_loss()
    names = tables["no"][0].task_names
    run = ObservedRun(dict.fromkeys(names, 1.0), dict(zip(names, 0.8 * base)))
    subsets = [own for size in (1, 2) for own in combinations(names, size)]
    found = {
        name: SubsetEstimator(*table, observed_runs=[run]).predict_subsets(subsets).loss
        for name, table in tables.items()
    }
    change = np.abs(found["no"] - base).mean()
    assert change > 0.3
    assert np.abs(found["bf16"] - found["no"]).mean() < 0.01 * change
    assert np.abs(found["bf16"] / found["no"] - 1).max() < 0.01


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_forward_wrapped_by_accelerate_is_put_aside(mixed_precision):
    rows, collator = causal_batch("right")
    plain = toy.with_lora(toy.llama())
    expected = GradientExtractor(plain, projection_dim=None, mixed_precision=mixed_precision)(collator(rows))
    wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(toy.with_lora(toy.llama()))
    forward = wrapped.forward
    found = GradientExtractor(wrapped, projection_dim=None, mixed_precision=mixed_precision)(collator(rows))
    assert torch.equal(found.features, expected.features)
    assert wrapped.forward is forward
