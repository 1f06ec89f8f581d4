"""`evaluate` and `predict` called by a callback during a training: of its adapter, which goes on as if alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, text_trainer, without_speed
from hf_ensemble import SelectionConfig, SelectionSFTConfig, SelectionSFTTrainer, SelectionTrainer
from hf_ensemble.errors import ConfigurationError

_OWN_METRICS = ("_loss", "_entropy", "_mean_token_accuracy")


class Evaluating(TrainerCallback):
    """Keeps what the run's trainer answers at the end of each epoch of a training, and how the training begins."""

    def __init__(self, ask=None):
        self.trainer, self.ask = None, ask
        self.found, self.hooks = {}, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        wrappers, forward = 0, model.forward
        while hasattr(forward, "__wrapped__"):
            forward, wrappers = forward.__wrapped__, wrappers + 1
        self.hooks.append((sum(len(module._forward_hooks) for module in model.modules()), wrappers))

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if self.ask is not None:
            before = torch.get_rng_state(), model.training, [own.requires_grad for own in model.parameters()]
            self.found.setdefault(args.output_dir.rsplit("/", 1)[1], []).append(self.ask(self.trainer))
            after = torch.get_rng_state(), model.training, [own.requires_grad for own in model.parameters()]
            assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def evaluated(trainer):
    return trainer.evaluate(metric_key_prefix="mid")


def predicted(trainer):
    return trainer.predict(trainer.raw_rows).metrics


def observed(make, ask):
    """The metrics of a run, its callback, and its trainer."""
    callback = Evaluating(ask)
    trainer = make([callback])
    trainer.raw_rows = split(toy.sft_tasks(), "validation")
    callback.trainer = trainer
    return without_speed(trainer.train().metrics), callback, trainer


@pytest.mark.parametrize(
    ("ask", "changes"),
    [
        (evaluated, {"neftune_noise_alpha": 5.0}),
        (predicted, {"neftune_noise_alpha": 5.0}),
        (evaluated, {"bf16": True, "gradient_checkpointing": True}),
        (evaluated, {"concurrent_groups": 2}),
        (evaluated, {"boosting_steps": 1, "boosting_method": "finetuning"}),
    ],
    ids=["noise", "predictions", "bf16", "at once", "boosting"],
)
def test_a_run_that_is_asked_during_its_trainings_equals_one_that_is_not(tmp_path, base_folder, ask, changes):
    def make(folder, callbacks):
        return sft_trainer(
            tmp_path / folder,
            base_folder,
            num_groups=2,
            callbacks=callbacks,
            processing_class=toy.tokenizer(),
            **changes,
        )

    expected, alone, _ = observed(lambda callbacks: make("alone", callbacks), None)
    found, asked, trainer = observed(lambda callbacks: make("asked", callbacks), ask)
    assert found == expected
    assert asked.hooks == alone.hooks and set(map(len, asked.found.values())) == {2}
    assert {"baseline", "group_0", "group_1"} <= set(asked.found)
    # The clean model is what is left.
    assert not trainer.adapter_model.get_input_embeddings()._forward_hooks
    assert not hasattr(trainer.adapter_model.forward, "__wrapped__")


@pytest.mark.parametrize("changes", [{}, {"concurrent_groups": 2}], ids=["alone", "at once"])
def test_what_is_evaluated_is_the_adapter_that_is_being_trained(tmp_path, base_folder, changes):
    def make(callbacks):
        return sft_trainer(
            tmp_path / "run", base_folder, num_groups=2, eval_strategy="epoch", callbacks=callbacks, **changes
        )

    _, asked, trainer = observed(make, evaluated)
    for training in trainer.run_directory.trainings():
        logged = [entry for entry in training.log_history if "eval_loss" in entry]
        for own, mid in zip(logged, asked.found[training.name], strict=True):
            names = [f"{task}{metric}" for task in training.mixture for metric in _OWN_METRICS]
            assert [mid[f"mid_{name}"] for name in names] == [own[f"eval_{name}"] for name in names]


def test_the_final_training_of_a_selection_is_evaluated_as_any_other(tmp_path, base_folder):
    def make(folder, callbacks):
        tasks = toy.sft_tasks()
        return SelectionSFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base_folder),
            args=sft_config(tmp_path / folder, SelectionSFTConfig, neftune_noise_alpha=5.0, calibration_runs=0),
            train_dataset=split(tasks, "train"),
            eval_dataset=split(tasks, "validation"),
            peft_config=toy.lora(),
            processing_class=toy.tokenizer(),
            callbacks=callbacks,
            target="sums",
        )

    expected, alone, _ = observed(lambda callbacks: make("alone", callbacks), None)
    found, asked, trainer = observed(lambda callbacks: make("asked", callbacks), evaluated)
    assert found == expected and asked.hooks == alone.hooks
    (last,) = asked.found.values()
    # No scores of a run: neither the base model's, nor any that are kept.
    assert "mid_loss" in last[0] and not any(name.startswith("mid_base") for name in last[0])
    assert "evaluation:mid" not in trainer.run_directory.record.stages


@pytest.mark.parametrize("name", ["capture", "selector", "train", "scores", "run_stage"])
def test_what_would_start_the_run_anew_from_within_is_refused(tmp_path, name):
    class Asking(TrainerCallback):
        trainer = None

        def on_epoch_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("training/adapter"):
                given = ("gradients",) if name == "run_stage" else ()
                with pytest.raises(ConfigurationError, match="from within a training.*evaluate\\(\\) or predict\\(\\)"):
                    getattr(self.trainer, name)(*given)
                self.asked = True

    trainer = text_trainer(
        tmp_path / "run", toy.bert(4), toy.text_tasks(), SelectionTrainer, SelectionConfig, target="films"
    )
    asking = Asking()
    asking.trainer = trainer
    trainer.add_callback(asking)
    trainer.args.calibration_runs = 0
    trainer.train()
    assert asking.asked and trainer.scores()
