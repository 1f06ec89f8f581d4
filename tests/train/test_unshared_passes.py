"""What trainings that are made at once cannot share, and steps by which gradients would be lost."""

import pytest
import torch

from helpers.concurrent import OPTIONS, assert_equal_trainings, sft, trained
from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.errors import ConfigurationError


class GoesBackwardAlone(EnsembleSFTTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


class GoesBackwardTwice(EnsembleSFTTrainer):
    """Through one forward pass."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss, retain_graph=True)
        self.accelerator.backward(loss)
        return loss.detach()


class GoesBackwardByPass(EnsembleSFTTrainer):
    """Through each of two forward passes."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        losses = [self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch) for _ in range(2)]
        for loss in losses:
            self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GoesBackwardAlone, r"Expected self.accelerator.backward\(loss\)"),
        (GoesBackwardTwice, "Expected one backward pass .* Add up the losses"),
        (GoesBackwardByPass, "Expected one backward pass .* Add up the losses"),
    ],
)
def test_gradients_that_would_be_lost_are_refused(kind, message, tmp_path, monkeypatch, uncounted):
    monkeypatch.setattr("helpers.trainers.EnsembleSFTTrainer", kind)
    monkeypatch.setitem(OPTIONS, "gradient_accumulation_steps", 1)
    trainer = sft(tmp_path, max_steps=1)
    with trainer.working():
        with pytest.raises(ConfigurationError, match=message):
            trained(trainer, 2, ("a", "d"))
        # No adapter that was not trained counts as trained.
        run = trainer.run_directory
        assert [run.trained_adapter(name).status for name in "ad"] == ["training", "training"]
        # The model is as it was.
        assert trainer.flow.training.distance() == 0


class AddsLosses(EnsembleSFTTrainer):
    """Of two forward passes, one after the other and together."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        loss = sum(self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch) for _ in range(2))
        self.accelerator.backward(loss, retain_graph=True)
        return loss.detach()


def test_a_step_may_go_forward_several_times(tmp_path, monkeypatch, passes, uncounted):
    monkeypatch.setattr("helpers.trainers.EnsembleSFTTrainer", AddsLosses)
    trainer = sft(tmp_path, max_steps=2)
    with trainer.working():
        separate, at_once = trained(trainer, 1, ("a", "d")), trained(trainer, 2, ("a", "d"))
    assert set(passes) == {2}
    assert_equal_trainings(separate, at_once)


def test_a_base_that_cannot_be_shared_is_run_by_each_training(tmp_path, monkeypatch, uncounted, caplog):
    trainer = sft(tmp_path, max_steps=2)
    # Outputs of which there is one for each layer.
    trainer.model.config.output_hidden_states = True
    with trainer.working():
        separate, at_once = trained(trainer, 1, ("a", "d")), trained(trainer, 2, ("a", "d"))
    assert_equal_trainings(separate, at_once, 0)
    assert [record.getMessage() for record in caplog.records if "without sharing" in record.getMessage()] == [
        "Trainings run at once without sharing passes through the base model: A BaseModelOutputWithPast of "
        "['hidden_states', 'last_hidden_state'] cannot be taken apart by rows."
    ]


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_see_the_rows_of_their_own_training(kind, tmp_path, passes, uncounted, caplog):
    trainer = sft(tmp_path, max_steps=2)
    seen = []

    def look(module, *given):
        if module.training:
            tensors = given[0] if isinstance(given[0], tuple) else given[:1]
            seen.append(len(tensors[0]))

    part = trainer.model.get_base_model().model.layers[1].mlp
    getattr(part, f"register_{kind}_hook")(look)
    with trainer.working():
        separate = trained(trainer, 1, ("a", "d"))
        alone, seen[:] = sorted(seen), []
        at_once = trained(trainer, 2, ("a", "d"))
    assert alone and sorted(seen) == alone and not passes
    assert_equal_trainings(separate, at_once, 0)
    warned = [record.getMessage() for record in caplog.records if "without sharing" in record.getMessage()]
    assert len(warned) == 1 and warned[0].endswith(
        "layers.1.mlp has a hook, which would be called for the rows of all or for none."
    )


def test_hooks_of_the_libraries_and_above_the_base_are_left_alone(tmp_path, passes, uncounted):
    trainer = sft(tmp_path, max_steps=2)
    base, seen = trainer.model.get_base_model(), []
    base.enable_input_require_grads()
    # Before the run, so that transformers has put its hooks on all layers.
    base(torch.ones(1, 1, dtype=torch.long), output_hidden_states=True)
    assert base.model.layers[0]._forward_hooks and base.model.embed_tokens._forward_hooks

    def look(module, inputs, output):
        if module.training:
            seen.append(len(output.last_hidden_state))

    base.model.register_forward_hook(look)
    with trainer.working():
        trained(trainer, 2, ("a", "d"))
    assert passes and set(passes) == {2} and max(seen) == 4
