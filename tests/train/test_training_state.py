"""Nothing that one training does to the model, the callbacks or their state reaches the next."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import SMALL, sft_config, sft_trainer, text_trainer
from hf_ensemble import EnsembleSFTTrainer, EnsembleTrainer
from hf_ensemble.errors import ConfigurationError, EnsembleError
from hf_ensemble.train.flows.adapter_training import AdapterTraining
from hf_ensemble.train.model_state import ModelState
from hf_ensemble.train.task_trainer import TaskTrainer

TRAININGS = ["baseline", "group_0", "group_1"]
# Tags are those of the card, as in trl.
_STRUCTURE = ("_parameters", "_buffers", "_modules", "model_tags")


def preparation(model):
    """What trainers put on a model: attributes beyond its structure, numbers of hooks, modes, trainability."""
    found = {}
    for name, module in model.named_modules():
        attributes = {key for key in vars(module) if key not in _STRUCTURE}
        hooks = {key: len(value) for key, value in vars(module).items() if "hooks" in key and value is not None}
        found[name] = (attributes, hooks, module.training, getattr(module, "gradient_checkpointing", None))
    return found, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class Observer(TrainerCallback):
    """Keeps how the model is prepared, and the dtype and autocast state of its first forward."""

    def __init__(self):
        self.preparations, self.dtypes, self.autocast, self.wrappers = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.preparations.append(preparation(model))
        layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer

        def look(module, inputs, output):
            self.dtypes.append(output.dtype)
            self.autocast.append(torch.is_autocast_enabled("cpu"))

        self.handle = layer.register_forward_hook(look)

    def on_step_end(self, args, state, control, **kwargs):
        self.handle.remove()


class Recording:
    """Keeps what a trainer passes to its training steps."""

    def training_step(self, model, *args, **kwargs):
        wrappers = self.args.output_dir, type(model).__name__
        next(own for own in self.callback_handler.callbacks if isinstance(own, Observer)).wrappers.append(wrappers)
        return super().training_step(model, *args, **kwargs)


class RecordingEnsemble(Recording, EnsembleSFTTrainer):
    pass


class RecordingPlain(Recording, SFTTrainer):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True, "bf16": True},
        # Every length is compiled anew.
        {"torch_compile": True, "torch_compile_backend": "eager", "pad_to_multiple_of": 16},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_every_training_finds_the_model_that_a_fresh_trainer_finds(tmp_path, base_folder, changes):
    ours, fresh = Observer(), Observer()
    changes = {"num_train_epochs": 1, **changes}
    tasks = toy.sft_tasks(8, 4)
    RecordingEnsemble(
        model=base_folder,
        args=sft_config(tmp_path / "run", num_groups=2, **changes),
        train_dataset=tasks,
        peft_config=toy.lora(),
        callbacks=[ours],
    ).train()
    settings = {**SMALL, "bf16": False, "gradient_checkpointing": False, **changes}
    RecordingPlain(
        model=base_folder,
        args=SFTConfig(output_dir=str(tmp_path / "plain"), **settings),
        train_dataset=Dataset.from_list(tasks["sums"]["train"]),
        peft_config=toy.lora(),
        callbacks=[fresh],
    ).train()
    assert len(ours.preparations) == 3
    for found in ours.preparations:
        assert found == fresh.preparations[0]
    ((_, wrapper),) = set(fresh.wrappers)
    assert {name.rsplit("/", 1)[1]: own for name, own in ours.wrappers} == dict.fromkeys(TRAININGS, wrapper)
    assert wrapper == ("OptimizedModule" if "torch_compile" in changes else "PeftModelForCausalLM")
    if "torch_compile" not in changes:  # whose graph does not run Python hooks
        expected = torch.bfloat16 if changes.get("bf16") else torch.float32
        assert set(ours.dtypes) == set(fresh.dtypes) == {expected}
        assert set(ours.autocast) == set(fresh.autocast) == {changes.get("bf16", False)}
        assert len(ours.dtypes) == 3 * len(fresh.dtypes)


def test_a_finished_run_leaves_the_model_as_no_trainer_had_touched_it(tmp_path, base_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), toy.lora())
    before = preparation(model)
    config = model.config.to_dict()
    trainer = EnsembleSFTTrainer(
        model=model,
        args=sft_config(tmp_path / "run", num_groups=1, num_train_epochs=1, bf16=True, gradient_checkpointing=True),
        train_dataset=toy.sft_tasks(),
        processing_class=toy.tokenizer(),
    )
    trainer.train()
    found, trainable = preparation(model)
    assert {name: own for name, own in found.items() if name in before[0]} == before[0] and trainable == before[1]
    assert {**model.config.to_dict(), "use_cache": config["use_cache"]} == config


def test_state_can_be_recorded_anew():
    model = toy.with_lora(toy.llama())
    state = ModelState(model)
    model.train()
    state.record()
    with state.restored():
        model.eval()
    assert all(module.training for module in model.modules())


def test_state_is_restored_after_an_exception():
    model = toy.with_lora(toy.llama())
    before, state = preparation(model), ModelState(model)
    with pytest.raises(RuntimeError), state.restored():
        model.forward = lambda: None
        model.base_model.register_forward_hook(lambda *a: None)
        model.train().requires_grad_(False)
        raise RuntimeError
    assert preparation(model) == before


def test_a_run_resumed_after_the_baseline_trains_in_the_same_precision(tmp_path, base_folder, monkeypatch):
    def run(folder):
        sft_trainer(tmp_path / folder, base_folder, num_groups=2, bf16=True, num_train_epochs=1).train()

    run("whole")
    train = AdapterTraining.run

    def stopped(self, name, *args, **kwargs):
        if name == "group_0":
            raise KeyboardInterrupt
        return train(self, name, *args, **kwargs)

    monkeypatch.setattr(AdapterTraining, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    monkeypatch.setattr(AdapterTraining, "run", train)
    run("resumed")
    for name in ("group_0", "group_1"):
        whole, resumed = (
            load_file(tmp_path / folder / f"ensemble/adapters/{name}/adapter_model.safetensors")
            for folder in ("whole", "resumed")
        )
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


class Counting(TrainerCallback):
    def __init__(self):
        self.trainings, self.evaluations = 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1


def test_a_subclass_and_later_callbacks_reach_every_training(tmp_path, base_folder):
    class Mine(EnsembleSFTTrainer):
        def __init__(self, *args, scale, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale, self.calls = scale, {"loss": [], "step": [], "optimizer": []}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert "task" not in inputs and len(self.batch_tasks) == len(inputs["input_ids"])
            self.calls["loss"].append(self.args.output_dir)
            return self.scale * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def training_step(self, *args, **kwargs):
            self.calls["step"].append(self.args.output_dir)
            return super().training_step(*args, **kwargs)

        def create_optimizer(self, *args, **kwargs):
            self.calls["optimizer"].append(self.args.output_dir)
            return super().create_optimizer(*args, **kwargs)

    given, later, removed = Counting(), Counting(), Counting()
    trainer = Mine(
        model=base_folder,
        args=sft_config(tmp_path / "run", num_groups=2, num_train_epochs=1, max_grad_norm=0.0),
        train_dataset=toy.sft_tasks(),
        peft_config=toy.lora(),
        callbacks=[given, removed],
        scale=3.0,
    )
    trainer.add_callback(later)
    trainer.remove_callback(removed)
    trainer.train()
    for calls in trainer.calls.values():
        assert [name for name in TRAININGS if any(call.endswith(f"training/{name}") for call in calls)] == TRAININGS
    assert (given.trainings, later.trainings, removed.trainings) == (3, 3, 0)


def test_callbacks_with_state_of_their_own_begin_anew(tmp_path, base_folder):
    class Patience(EarlyStoppingCallback):
        """Stops after two evaluations, whatever they give."""

        seen = 0
        starts: list[int] = []

        def on_train_begin(self, args, state, control, **kwargs):
            Patience.starts.append(self.seen)

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            self.seen += 1

    callback = Patience()
    sft_trainer(
        tmp_path / "run", base_folder, num_groups=2, num_train_epochs=2, eval_strategy="epoch", callbacks=[callback]
    ).train()
    # It has seen the evaluation of the whole run, and none of a training.
    assert Patience.starts == [0, 0, 0] and callback.seen == 1


def test_a_second_run_on_a_used_model_equals_one_on_a_fresh_model(tmp_path, base_folder):
    def run(model, folder, learning_rate):
        trainer = EnsembleSFTTrainer(
            model=model,
            args=sft_config(tmp_path / folder, num_groups=2, learning_rate=learning_rate),
            train_dataset=toy.sft_tasks(),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora(),
        )
        return trainer, trainer.train().metrics

    def fresh():
        return AutoModelForCausalLM.from_pretrained(base_folder)

    _, expected = run(fresh(), "alone", 3e-3)
    used = fresh()
    first, _ = run(used, "first", 3e-2)
    _, found = run(used, "second", 3e-3)
    compared = [key for key in expected if key.endswith(("loss", "accuracy"))]
    assert {key: found[key] for key in compared} == {key: expected[key] for key in compared}
    with pytest.raises(EnsembleError, match="group_0|baseline|group_1"):
        first.ensemble(input_ids=torch.ones(3, 4, dtype=torch.long), task=list(first.tasks))


def test_a_second_run_goes_on_with_the_users_adapter_as_the_parent_does(tmp_path, base_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), toy.lora())
    runs = []
    for folder in ("first", "second"):
        trainer = EnsembleSFTTrainer(
            model=model,
            args=sft_config(tmp_path / folder, num_groups=1, num_train_epochs=1),
            train_dataset=toy.sft_tasks(),
            processing_class=toy.tokenizer(),
        )
        trainer.train()
        runs.append(trainer)
    begun = runs[1].flow.training.theta0
    saved = load_file(tmp_path / "first" / "baseline" / "adapter_model.safetensors")
    assert len(begun) == len(saved)
    assert all(torch.equal(own, saved[name.replace(".default", "")]) for name, own in begun.items())


@pytest.mark.parametrize("name", ["baseline", "group_0"])
def test_adapters_of_the_user_do_not_stand_in_for_trained_ones(tmp_path, base_folder, name):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), toy.lora())
    model.add_adapter(name, toy.lora())
    with pytest.raises(ConfigurationError, match=f"adapters named \\['{name}'\\].*Rename them"):
        EnsembleSFTTrainer(
            model=model,
            args=sft_config(tmp_path / "run"),
            train_dataset=toy.sft_tasks(),
            processing_class=toy.tokenizer(),
        )


def test_classification_trainings_share_nothing(tmp_path):
    class Mine(EnsembleTrainer):
        steps: list[str] = []

        def training_step(self, *args, **kwargs):
            Mine.steps.append(self.args.output_dir)
            return super().training_step(*args, **kwargs)

    trainer = text_trainer(tmp_path / "run", toy.bert(4), toy.text_tasks(), Mine, num_groups=2, num_train_epochs=1)
    assert isinstance(trainer, TaskTrainer)
    trainer.train()
    assert {step.rsplit("/", 1)[1] for step in Mine.steps} == set(TRAININGS)
