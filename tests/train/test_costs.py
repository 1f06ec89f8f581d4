"""What a run costs: of its stages, its trainings and its systems."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.trainers import sft_trainer
from hf_ensemble import collect_results
from hf_ensemble.publish import write_model_card
from hf_ensemble.runs import Costs, RunDirectory
from hf_ensemble.runs.costs import figure_with_prefix, measured_cost
from hf_ensemble.train.task_trainer import TaskSFTTrainer

# trl's head adds up its gradient in place, for which torch's counter has no formula of its own.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, left, right, **kwargs: 2 * left[0] * left[1] * right[1]}


def test_every_stage_of_a_run_has_its_cost(finished):
    run = RunDirectory(finished[0].run_directory.path)
    costs = run.record.stage_costs()
    assert set(costs) == set(run.record.stages) >= {"gradients", "baseline", "group", "weights", "evaluation:eval"}
    assert all(cost.seconds > 0 and cost.peak_memory > 1e6 for cost in costs.values())
    without_model = {name for name, cost in costs.items() if not cost.flops}
    assert without_model == {"group"}
    # A training's stage holds it and what is scored beside it.
    for name in ("baseline", "group_0"):
        trained = run.trained_adapter(name)
        stage = costs[name if name == "baseline" else f"adapter:{name}"]
        assert 0 < trained.flops < stage.flops and trained.tokens < stage.tokens and trained.seconds < stage.seconds
        assert trained.num_parameters == sum(
            p.numel() for n, p in finished[0].model.model.named_parameters() if "group_0" in n
        )
    epochs = finished[0].args.num_train_epochs
    lengths = [len(row) for row in finished[0].train_dataset["input_ids"]]
    assert run.trained_adapter("baseline").tokens == epochs * sum(lengths)
    # One pass over training and validation rows.
    captured = sum(lengths) + sum(len(ids) for rows in finished[0].eval_dataset.values() for ids in rows["input_ids"])
    assert costs["gradients"].tokens >= captured


def test_groups_without_overlap_cost_what_one_adapter_for_all_costs(tmp_path):
    """A budget of 1.0: every row is trained on once an epoch, by one adapter."""
    rows = toy.sft_tasks(train=32)
    base = toy.save_model(toy.llama(), tmp_path / "base")
    trainer = sft_trainer(tmp_path / "run", base, rows, num_groups=3, num_train_epochs=1, ensemble_weights="own_group")
    trainer.train()
    systems = trainer.run_directory.read(Costs).systems
    ensemble, baseline = systems["ensemble"], systems["baseline"]
    assert sorted(ensemble.trainings) == ["group_0", "group_1", "group_2"] and baseline.trainings == ["baseline"]
    assert ensemble.training_tokens == baseline.training_tokens
    assert ensemble.training_flops == pytest.approx(baseline.training_flops, rel=0.02)
    assert ensemble.trained_parameters == ensemble.stored_parameters == 3 * baseline.stored_parameters
    assert ensemble.inference_flops == pytest.approx(baseline.inference_flops, rel=0.02)


def test_a_training_takes_what_torch_counts(tmp_path, monkeypatch):
    folder = toy.save_model(toy.llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    trainer = sft_trainer(tmp_path / "run", model, processing_class=toy.tokenizer())
    trainer.open_run()
    step, counted = TaskSFTTrainer.training_step, []

    def watched(self, *args, **kwargs):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as truth:
            loss = step(self, *args, **kwargs)
        counted.append(truth.get_total_flops())
        return loss

    monkeypatch.setattr(TaskSFTTrainer, "training_step", watched)
    trained = trainer.flow.training.run("one", ["sums", "diffs"], tmp_path / "adapter")
    assert len(counted) == trained.global_step == 12
    assert trained.flops == pytest.approx(sum(counted), rel=0.02)


def test_a_killed_training_ends_with_the_figures_of_a_whole_one(tmp_path, base_folder, monkeypatch):
    def trained(folder, kill_at=None):
        trainer = sft_trainer(tmp_path / folder, base_folder, save_strategy="steps", save_steps=2)
        trainer.open_run()
        step = TaskSFTTrainer.training_step

        def killed(self, *args, **kwargs):
            if self.state.global_step == kill_at:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch, trainer.run_directory.stage("adapter:one"):
            patch.setattr(TaskSFTTrainer, "training_step", killed)
            found = trainer.flow.training.run("one", ["sums"], tmp_path / folder / "adapter")
        return found, trainer.run_directory.record

    whole, _ = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("killed", kill_at=5)
    resumed, record = trained("killed")
    assert resumed.flops == pytest.approx(whole.flops, rel=1e-6) and resumed.tokens == whole.tokens
    stage = record.stages["adapter:one"]
    assert stage.is_resumed and stage.cost.flops > resumed.flops and stage.cost.tokens > resumed.tokens


def test_costs_are_in_the_results_and_the_card(finished):
    trainer, _, _ = finished
    results = collect_results(trainer)
    run = trainer.run_directory
    assert list(results.system_costs) == ["base", "ensemble", "baseline"]
    assert results.system_costs["base"].training_flops == 0 < results.system_costs["base"].inference_flops
    # The adapter runs beside the base, and members beside each other.
    flops = [results.system_costs[system].inference_flops for system in ("base", "baseline", "ensemble")]
    assert flops == sorted(flops) and flops[0] < flops[1]
    assert results.stage_costs["evaluation:eval"].tokens == 3 * sum(
        len(ids) for rows in trainer.eval_dataset.values() for ids in rows["input_ids"]
    )
    card = write_model_card(run.path).read_text()
    assert f"| ensemble | {figure_with_prefix(results.system_costs['ensemble'].training_flops)} |" in card
    assert "| gradients |" in card and "peak memory" in card


def test_figures_have_the_prefix_of_their_thousands():
    values = (0, 7, 999.4, 999.6, 1234, 12345, 123456, 9.999e6, 3.2e12, 5e21)
    figures = [figure_with_prefix(value) for value in values]
    assert figures == ["0", "7", "999", "1.00 k", "1.23 k", "12.3 k", "123 k", "10.0 M", "3.20 T", "5000 E"]
    assert figure_with_prefix(2.5e9, "B") == "2.50 GB"


def test_measurements_that_overlap_have_their_own_peaks(monkeypatch):
    """Those of trainings that take turns do not end in the order in which they began."""
    memory = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=0))
    first, second = measured_cost(), measured_cost()
    of_first = first.__enter__()
    memory["peak"] = 100
    of_second = second.__enter__()
    memory["peak"] = 10
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (of_first.cost.peak_memory, of_second.cost.peak_memory) == (100, 10)
