import json
import re

import pytest
import yaml
from transformers import T5Config, T5ForConditionalGeneration

from helpers import toy
from helpers.architectures import MODELS
from helpers.task_files import flags, write_rows, write_tasks
from hf_ensemble.cli.arguments import FidelityArguments, RunArguments
from hf_ensemble.cli.choice_arguments import SelectArguments
from hf_ensemble.cli.command import COMMANDS
from hf_ensemble.cli.demo import flow
from hf_ensemble.cli.demo.flow import DemoResults
from hf_ensemble.cli.demo.world import CORRUPTED, FAMILIES, TARGET, build_world
from hf_ensemble.cli.main import main
from hf_ensemble.cli.parsing import parse
from hf_ensemble.cli.trainers import started
from hf_ensemble.cli.words import Words
from hf_ensemble.ensemble import PeftEnsembleModel
from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.train import EnsembleSFTConfig, EnsembleTrainer


def test_run_over_prompts_and_completions(tmp_path, base_folder, capsys):
    data = write_tasks(tmp_path / "data", toy.sft_tasks())
    config = {"bf16": False, "gradient_checkpointing": False, "num_groups": 3, "affinity_subsets": 10}
    config["lora_target_modules"] = ["q_proj", "v_proj"]
    config["answer_metrics"] = {"sums": {"extract": "last_number", "metrics": "exact_match", "max_new_tokens": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = {"data": data, "model_name_or_path": base_folder, "output_dir": tmp_path / "out", "num_groups": 2}
    assert main(["run", "--config", str(tmp_path / "run.yaml"), *flags(**arguments, fidelity_subsets=2)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["split"] == "test" and len(results["groups"]) == 2
    assert set(results["scores"]) == {"base", "ensemble", "baseline"}
    assert set(results["scores"]["base"]) == {"sums", "diffs", "more_sums"}
    assert results["mean_loss"]["ensemble"] > 0
    assert set(results["mean_metrics"]["base"]) == {"exact_match"}
    assert {task for task, own in results["scores"]["ensemble"].items() if own["metrics"]} == {"sums"}
    assert results["fidelity"]["mean_relative_error"] >= 0
    PeftEnsembleModel.from_pretrained(tmp_path / "out" / "ensemble")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Loss (nats per token, lower is better) on test rows" in printed and "Prediction against truth" in printed
    # No table of zeros.
    matched = any(means["exact_match"] for means in results["mean_metrics"].values())
    assert ("exact_match on test rows" in printed) == matched
    assert " ".join(results["verdict"].split()) in printed
    assert str(tmp_path / "out" / "ensemble" / "README.md") in printed


def test_fidelity_measures_draws_and_goes_on(tmp_path, base_folder, capsys):
    data = write_tasks(tmp_path / "data", toy.sft_tasks())
    arguments = {"data": data, "model_name_or_path": base_folder, "output_dir": tmp_path / "out", "bf16": "false"}
    command = ["fidelity", *flags(**arguments, fidelity_subsets=4, num_repeated=1, num_first_order=1)]
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "estimate" / "fidelity.json").read_text())
    assert 3 <= len(report["subsets"]) <= 4 and report["ceiling"]["num_subsets"] == 1
    assert (tmp_path / "out" / "estimate" / "fidelity.png").stat().st_size > 5000
    printed = " ".join(capsys.readouterr().out.split())
    assert "How far predictions are to be trusted" in printed and "mean relative error of the loss" in printed
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "estimate" / "fidelity.json").read_text())["true_loss"] == report["true_loss"]
    # Too few subsets for a rank correlation.
    assert re.search(r"mean per-task Spearman (-|-?\d)", printed) and "nan" not in printed
    assert main(["fidelity"]) == 1 and "hf-ensemble fidelity --help" in capsys.readouterr().err
    assert main([*command, "--fidelity_subsets", "0"]) == 1
    assert "fidelity_subsets has to be a positive integer" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["auto", "linear"])
def test_run_over_classification_for_a_target(tmp_path, head):
    base = toy.save_model(toy.bert(2).bert, tmp_path / "base")
    data = write_tasks(tmp_path / "data", toy.text_tasks())
    arguments = {"data": data, "model_name_or_path": base, "output_dir": tmp_path / "out", "target": "films"}
    arguments = {**arguments, "head": head, "max_train_rows": 8}
    assert main(["run", *flags(**arguments), "--lora_target_modules", "query", "value"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["selection"]["tasks"][0] == "films"
    assert set(results["scores"]) == {"base", "selection"}


def test_held_out_rows_are_as_many_as_asked_for_at_most(tmp_path, base_folder):
    tasks = {name: {"train": splits["train"]} for name, splits in toy.sft_tasks().items()}
    for name, splits in tasks.items():
        write_rows(tmp_path / "data" / f"{name}.jsonl", splits["train"])
    line = flags(data=tmp_path / "data", model_name_or_path=base_folder, output_dir=tmp_path / "out", bf16="false")
    line += ["--max_validation_rows", "2", "--lora_target_modules", "q_proj"]
    trainer = started(RunArguments, line, "run").trainer
    assert {len(task.splits["validation"]) for task in trainer.tasks.values()} == {2}
    assert len(trainer.train_dataset) == sum(len(splits["train"]) - 2 for splits in tasks.values())


def test_an_encoder_decoder_gets_the_trainer_that_takes_it(tmp_path):
    config = {**MODELS["t5"][1].to_dict(), "vocab_size": len(toy.VOCABULARY)}
    base = toy.save_model(T5ForConditionalGeneration(T5Config(**config)), tmp_path / "t5")
    data = write_tasks(tmp_path / "data", toy.sft_tasks())
    line = flags(data=data, model_name_or_path=base, output_dir=tmp_path / "out")
    trainer = started(RunArguments, [*line, "--lora_target_modules", "q", "v"], "run").trainer
    assert type(trainer) is EnsembleTrainer and trainer.adapter_model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    with pytest.raises(ConfigurationError, match="quantized for models of decoder layers alone"):
        started(RunArguments, [*line, "--load_in_4bit", "true"], "run")


def test_flags_of_adapters_are_taken_or_refused(tmp_path, base_folder, monkeypatch):
    data = write_tasks(tmp_path / "data", toy.sft_tasks())
    line = flags(data=data, model_name_or_path=base_folder, output_dir=tmp_path / "out")
    given = {}
    monkeypatch.setattr("hf_ensemble.cli.trainers.EnsembleSFTTrainer", lambda **options: given.update(options))
    started(RunArguments, [*line, "--lora_target_parameters", "mlp.experts", "--lora_task_type", "CAUSAL_LM"], "run")
    assert given["peft_config"].target_parameters == ["mlp.experts"]
    for word, value, message in (
        ("--use_peft", "false", "every dataset or group gets an adapter"),
        ("--lora_task_type", "SEQ_CLS", "the rows and the model make it 'CAUSAL_LM'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            started(RunArguments, [*line, word, value], "run")


def test_flags_without_an_effect_are_refused_and_errors_name_the_flag(tmp_path, base_folder, capsys):
    data = write_tasks(tmp_path / "data", toy.sft_tasks())
    line = flags(data=data, model_name_or_path=base_folder, output_dir=tmp_path / "out", bf16="false")
    for command in ("train", "capture", "eval", "compare"):
        assert main([command, *line, "--fidelity_subsets", "3"]) == 1
        assert "Unknown arguments: --fidelity_subsets" in capsys.readouterr().err
    for name, value in (
        ("num_compared_groups", "9"),
        ("num_compared_groups", "1"),
        ("num_compared_seeds", "1"),
        ("group_seed", "-1"),
        ("finetuned_length", "0"),
    ):
        assert main(["compare", *line, "--lora_target_modules", "q_proj", f"--{name}", value]) == 1
        assert name in capsys.readouterr().err
    assert not (tmp_path / "out" / "baseline").exists()


def test_errors_are_one_line_and_debug_shows_the_traceback(tmp_path, base_folder, capsys):
    bad = ["run", *flags(data=tmp_path / "none", model_name_or_path=base_folder, output_dir=tmp_path / "o")]
    assert main(bad) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("hf-ensemble: Dataset 'none': there is no file or folder")
    with pytest.raises(TaskError):
        main([*bad, "--debug"])
    assert main(["run"]) == 1
    data = write_tasks(tmp_path / "data", toy.sft_tasks())
    more = flags(data=data, model_name_or_path=base_folder, output_dir=tmp_path / "o", bf16="false")
    assert main(["run", *more, "--no_such_flag", "1"]) == 1
    assert "no_such_flag" in capsys.readouterr().err


def test_flags_win_over_the_configuration_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("tasks: [x, y]\ntarget: null\nfidelity_subsets: 3\nmax_train_rows: 5\n")
    words = Words.of(["--fidelity_subsets", "4", "--config", str(path)])
    assert words.line == ["--fidelity_subsets", "4"] and words.options["tasks"] == ["x", "y"]
    assert words.name("tasks") and words.name("fidelity_subsets") and not words.name("data")
    (own,), _ = parse([RunArguments], ["--fidelity_subsets", "4", f"--config={path}"])
    assert (own.tasks, own.target, own.fidelity_subsets, own.max_train_rows) == (["x", "y"], None, 4, 5)
    assert Words.of(["--a", "2"]) == Words(["--a", "2"])
    for text, message in [("- a\n", "map names to values"), ("a: [", "not YAML")]:
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            Words.of(["--config", str(path)])
    for line, message in {
        ("--config", str(tmp_path / "none.yaml")): "No configuration file",
        ("--config",): "takes a YAML file",
        ("--config", "a", "--config", "b"): "one --config, found several",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            Words.of(line)


def test_dashes_do_as_well_as_underscores(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max-train-rows: 5\nanswer_metrics: last-number\n")
    words = Words.of(["--output-dir", "my-run", "--fidelity-subsets=4", "--config", str(path)])
    assert words.line == ["--output_dir", "my-run", "--fidelity_subsets=4"] and words.name("output_dir")
    (own,), _ = parse([RunArguments], words, True)
    assert (own.max_train_rows, own.fidelity_subsets, own.answer_metrics) == (5, 4, "last-number")
    path.write_text("max-train-rows: 5\nmax_train_rows: 6\n")
    with pytest.raises(ConfigurationError, match="has max_train_rows in two spellings"):
        Words.of(["--config", str(path)])


def test_one_file_serves_every_command(tmp_path, caplog):
    """What another command has is left out, and said; what none has is refused."""
    path = tmp_path / "c.yaml"
    of_all = {"target": "sums", "split": "train", "stage": "adapter", "baselines": ["all"], "num_repeated": 1}
    path.write_text(
        yaml.safe_dump(
            {**of_all, "answer_metrics": "-1", "lora_r": 4, "num_groups": 2, "store": "run"}, sort_keys=False
        )
    )
    (own,), _ = parse([FidelityArguments], ["--config", str(path)], command="fidelity")
    assert (own.target, own.num_repeated, own.answer_metrics) == ("sums", 1, "-1")
    expected = f"{path} has for others: split, stage, baselines, lora_r, num_groups, store."
    assert caplog.messages == [f"hf-ensemble fidelity leaves out what {expected}"]
    path.write_text("num_repeatd: 1\nlora_r: 4\n")
    with pytest.raises(ConfigurationError, match=r"Unknown arguments: --num_repeatd, in .*yaml. Did .*--num_repeated"):
        parse([FidelityArguments], ["--config", str(path)], command="fidelity")
    with pytest.raises(ConfigurationError, match="Unknown arguments: --split. See"):
        parse([FidelityArguments], ["--split", "train"], command="fidelity")


def test_null_is_none_for_numbers_and_the_default_elsewhere():
    argv = ["--projection_dim", "null", "--report_to", "null", "--tasks", "null", "--fidelity_subsets", "null"]
    (own,), rest = parse([FidelityArguments], argv, True)
    assert own.tasks is None and own.fidelity_subsets == 20 and rest == Words(argv[:4])
    (config,), _ = parse([EnsembleSFTConfig], [*rest.line, "--use_cpu", "true", "--bf16", "false"])
    (joined,), _ = parse([SelectArguments], ["--store", "s", "--target", "a", "--search_rows=null"])
    assert joined.search_rows is None
    assert config.projection_dim is None and config.report_to == EnsembleSFTConfig(use_cpu=True, bf16=False).report_to


def test_world_is_the_same_for_a_seed_and_its_families_contradict_each_other():
    world = build_world(3)
    assert world.tasks() == build_world(3).tasks() != build_world(4).tasks()
    tasks = world.tasks()
    assert set(tasks) == {*(task for members in FAMILIES.values() for task in members), CORRUPTED}
    for task, splits in tasks.items():
        prompts = {split: {row["prompt"] for row in rows} for split, rows in splits.items()}
        assert not prompts["train"] & (prompts["validation"] | prompts["test"]), task
        words = {
            word for rows in splits.values() for row in rows for word in (row["prompt"] + row["completion"]).split()
        }
        assert words <= set(world.vocabulary())
    answers = [
        {row["prompt"]: row["completion"] for row in tasks[f"pick_{way}_size"]["test"]} for way in ("larger", "smaller")
    ]
    shared = set(answers[0]) & set(answers[1])
    assert shared and all(answers[0][prompt] != answers[1][prompt] for prompt in shared)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_keeps_its_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flow.torch, "set_num_threads", lambda count: None)
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), "--fidelity_subsets", "2"]) == 0
    outcome = DemoResults.load(tmp_path / "demo" / "demo.json")
    results = outcome.results
    assert outcome.target == TARGET and outcome.selected[0] == TARGET
    assert CORRUPTED not in outcome.selected
    assert results.mean_accuracy["ensemble"] > results.mean_accuracy["baseline"]
    assert outcome.reload_difference < 1e-5
    # Opposite guidelines never share a group.
    for tasks in results.groups.values():
        assert not (set(tasks) & set(FAMILIES["larger"]) and set(tasks) & set(FAMILIES["smaller"]))
    printed = capsys.readouterr().out
    tables = ("What helps", "Groups, one adapter each", "Accuracy on test rows", "Prediction against truth", "(as ")
    assert all(words in printed for words in tables)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_prints_its_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert not end.value.code and f"usage: hf-ensemble {command} " in printed and "--json" in printed
