"""Adapters that are trained at once equal those that are trained one after the other."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from helpers import architectures, toy
from helpers.concurrent import assert_equal_trainings, sft, text, trained
from helpers.trainers import sft_trainer
from hf_ensemble._files import write_folder_atomically
from hf_ensemble.runs.systems import BASELINE
from hf_ensemble.train.concurrent import turns
from hf_ensemble.train.concurrent.copies import sharing_frozen
from hf_ensemble.train.flows import calibration


@pytest.mark.parametrize("make", [sft, text])
def test_trainings_at_once_equal_separate_ones(make, tmp_path, passes):
    # 50 steps of a; the others end before.
    trainer = make(tmp_path, num_train_epochs=25)
    with trainer.working():
        at_once = trained(trainer, 4)
        separate = trained(trainer, 1)
    assert [own.global_step for own in at_once[1]] == [50, 25, 25, 25]
    assert {2, 4} <= set(passes) and len(passes) >= 40
    assert_equal_trainings(separate, at_once)


CHECKPOINTING = {"gradient_checkpointing": None, "activation_checkpointing": True}
EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    "options",
    [
        CHECKPOINTING | EVALUATIONS | {"load_best_model_at_end": True},
        CHECKPOINTING | {"activation_checkpointing_kwargs": {"use_reentrant": True}, "bf16": True},
    ],
    ids=["evaluations", "bf16"],
)
def test_whatever_a_training_does_it_does_at_once_too(options, tmp_path, passes):
    trainer = sft(tmp_path, max_steps=4, **options)
    with trainer.working():
        separate, at_once = trained(trainer, 1, ("a", "d")), trained(trainer, 2, ("a", "d"))
    assert passes and set(passes) == {2}
    assert_equal_trainings(separate, at_once, 2e-3 if "bf16" in options else 1e-5)


def passed_through(model, ids, mask, turn=None):
    """Logits of rows and the adapter's gradients, by the model alone or in its turn."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(backward=lambda loss: loss.backward()), training_step=None)
    if turn is not None:
        turn.share_backbone(model)
        turn.share_backward(trainer)
    logits = model(input_ids=ids, attention_mask=mask).logits
    real = logits[mask.bool()] if logits.dim() == 3 else logits
    trainer.accelerator.backward(real.square().mean())
    gradients = [own.grad for own in model.parameters() if own.requires_grad]
    model.zero_grad()
    return [real.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_passes_equal(model, passes, tolerance):
    """Three copies of a model give the same alone and at once, for rows of different numbers, lengths and padding."""
    copies = [sharing_frozen(model.train()) for _ in range(3)]
    frozen = {own.data_ptr() for own in model.parameters() if not own.requires_grad}
    masks = [torch.ones(size, length, dtype=torch.long) for size, length in ((2, 5), (2, 7), (1, 4))]
    masks[0][1, 3:] = 0
    rows = [(torch.randint(3, 40, mask.shape) * mask, mask) for mask in masks]
    for own in copies:
        assert frozen == {value.data_ptr() for value in own.parameters() if not value.requires_grad}
        architectures.move(own)
    alone = [passed_through(own, *given) for own, given in zip(copies, rows)]
    at_once = turns.Turns(3).run([partial(passed_through, own, *given) for own, given in zip(copies, rows)])
    assert passes == [3]
    for expected, found in zip(alone, at_once):
        assert any(gradient.any() for gradient in expected[1:])
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


KINDS = ("lora_b_bias", "lora_embedding", "dora_embedding", "save_norm", "new_tokens", "loha", "vera", "oft", "ia3")
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [(name, "lora") for name in architectures.MODELS if name != "t5"] + [("llama", kind) for kind in KINDS],
)
def test_a_shared_pass_equals_passes_of_their_own(name, adapter, passes):
    base = architectures.model(name, **dict.fromkeys(DROPOUTS, 0.0)).double()
    assert_passes_equal(architectures.adapted(base, name, adapter), passes, 1e-6)


def test_adapters_of_experts_are_run_by_each_training(passes, caplog):
    # Experts receive tokens of any rows.
    model = architectures.adapted(architectures.model("mixtral").double(), "mixtral", "experts")
    assert_passes_equal(model, passes, 1e-6)
    assert "without sharing passes through the base model: The forward of ParamWrapper" in caplog.text


def test_dropout_of_adapters_is_that_of_their_layers(passes):
    config = architectures.ADAPTERS["save_norm"]("llama")
    # All of it, so that it is the same whatever is drawn.
    config.lora_dropout = 1.0
    assert_passes_equal(get_peft_model(architectures.model("llama").double(), config), passes, 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_shared(bits, tmp_path, passes):
    toy.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    model = get_peft_model(base, toy.lora())
    with torch.no_grad():
        # It then keeps more of a quantized weight.
        model(torch.ones(1, 1, dtype=torch.long))
    assert_passes_equal(model, passes, 1e-4)


class Interrupts(TrainerCallback):
    """Ends the process, as it were, in one training."""

    def __init__(self, task, step):
        self.task, self.step = task, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.task) and state.global_step == self.step:
            raise KeyboardInterrupt


def test_random_numbers_of_shared_passes_are_those_of_the_seed(tmp_path, passes, uncounted, monkeypatch):
    monkeypatch.setattr("helpers.toy.lora", partial(toy.lora, lora_dropout=0.5))
    trainer = sft(tmp_path, max_steps=2)
    found = []
    with trainer.working():
        for seed in (0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(trained(trainer, 2, ("a", "d")))
            assert torch.equal(torch.get_rng_state(), before)
    assert set(passes) == {2}
    assert_equal_trainings(*found)


def test_an_adapter_is_copied_once(tmp_path, monkeypatch):
    copies = []

    def counted(folder, *args):
        copies.append(folder.name)
        return write_folder_atomically(folder, *args)

    monkeypatch.setattr(calibration, "write_folder_atomically", counted)
    base = toy.save_model(toy.llama(), tmp_path / "base")
    # One group of all tasks, whose adapter is that for all.
    trainer = sft_trainer(tmp_path / "run", base, num_groups=1, concurrent_groups=2, max_steps=1)
    trainer.train_groups()
    assert copies == ["group_0"]


def test_trainings_that_were_killed_go_on_from_their_checkpoints(tmp_path, passes, uncounted):
    trainer = sft(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    interrupts = Interrupts("d", 3)
    with trainer.working():
        separate = trained(trainer, 1, ("a", "d"))
        trainer.add_callback(interrupts)
        with pytest.raises(KeyboardInterrupt):
            trained(trainer, 2, ("a", "d"))
        trainer.remove_callback(interrupts)
        run = trainer.run_directory
        assert [run.trained_adapter(name).status for name in "ad"] == ["training", "training"]
        count = len(passes)
        again = trained(trainer, 2, ("a", "d"), forgets=False)
    # a has made 4 steps until then, and d goes on from its second one.
    assert count == 6 and len(passes) - count == 3
    assert_equal_trainings(separate, again)


def test_a_run_trains_its_groups_at_once(tmp_path, passes):
    base = toy.save_model(toy.llama(), tmp_path / "base")
    trainer = sft_trainer(tmp_path / "run", base, num_groups=2, concurrent_groups=2, max_steps=6)
    # Captures and trains the baseline, which the groups do not pay for.
    trainer.group_tasks()
    began = time.perf_counter()
    trainer.train_groups()
    passed = time.perf_counter() - began
    assert passes
    run, mixtures = trainer.run_directory, trainer.grouping.mixtures
    records = [run.trained_adapter(name) for name in (BASELINE, *mixtures)]
    # The log counts the steps of one training after those of the other.
    assert [record.first_step for record in records] == [0, 6, 12]
    assert trainer.state.global_step == 18
    # Each training counts its own time and operations, and so does its stage.
    costs = [run.record.stages[f"adapter:{name}"].cost for name in mixtures]
    assert sum(cost.seconds for cost in costs) < passed
    for record, cost in zip(records[1:], costs):
        # Rows are looked at before and after, too.
        assert record.tokens <= cost.tokens <= 3 * record.tokens
        assert record.seconds <= cost.seconds and record.flops <= cost.flops
    with trainer.working():
        for name, mixture in mixtures.items():
            trainer.flow.training.run("alone", mixture, tmp_path / name)
            one, other = (
                load_file(folder / "adapter_model.safetensors") for folder in (run.member(name), tmp_path / name)
            )
            assert max(float((one[key] - other[key]).abs().max()) for key in one) <= 1e-5


class EndsEarly(TrainerCallback):
    """Ends one group's training at its second step, and the process when the next has begun."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("group_1") and state.global_step == 2:
            control.should_training_stop = True
        if args.output_dir.endswith("group_2"):
            raise KeyboardInterrupt


def test_groups_that_were_not_begun_are_counted_after_those_that_were(tmp_path, uncounted):
    options = {"num_groups": 4, "train_baseline": False, "calibration_runs": 0, "max_steps": 4, "concurrent_groups": 2}
    first = sft(tmp_path, **options)
    first.add_callback(EndsEarly())
    with pytest.raises(KeyboardInterrupt):
        first.train_groups()
    groups = [f"group_{number}" for number in range(4)]
    run = first.run_directory
    assert list(first.grouping.groups) == groups
    known = [run.trained_adapter(name) for name in groups[:3]]
    assert [(own.status, own.first_step) for own in known] == [("training", 0), ("done", 4), ("training", 8)]
    assert run.trained_adapter(groups[3]) is None
    second = sft(tmp_path, **options)
    second.train_groups()
    assert [second.run_directory.trained_adapter(name).first_step for name in groups] == [0, 4, 8, 12]
