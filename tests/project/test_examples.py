"""Every example script runs at toy size and leaves what it promises."""

import difflib
import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from helpers import toy
from hf_ensemble import GradientStore, PeftEnsembleModel, Selection

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = "--use_cpu --num_train_epochs 1 --report_to none --logging_strategy no --save_strategy no --disable_tqdm True"


def write_folder(folder: Path, tasks: dict) -> Path:
    for name, splits in tasks.items():
        for split, rows in splits.items():
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs a script of `examples/`; gives its output directory and what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(script: str, model: str, tasks: dict, *flags: str, model_flag: str = "--model") -> tuple[Path, str]:
        data, out = write_folder(tmp_path / "data", tasks), tmp_path / Path(script).stem
        arguments = [model_flag, model, "--data", str(data), "--output_dir", str(out), *QUICK.split(), *flags]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return out, capsys.readouterr().out

    return run


def test_every_example_is_run_and_listed():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {
        "sft_before.py",
        "sft_after.py",
        "selection.py",
        "capture_callback.py",
        "classification.py",
        "sft_script.py",
        "classification_script.py",
    }
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{script}`" in listed for script in scripts)


def test_after_differs_from_before_in_few_lines():
    before, after = (
        (EXAMPLES / name).read_text(encoding="utf-8").splitlines() for name in ("sft_before.py", "sft_after.py")
    )
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    removed = [line for line in changes if line[0] == "-"]
    added = [line for line in changes if line[0] == "+"]
    assert 1 <= len(removed) <= 12, "\n".join(removed)
    assert 1 <= len(added) <= 12, "\n".join(added)


def test_sft_before_and_after(run_example, base_folder):
    out, printed = run_example("sft_before.py", base_folder, toy.sft_tasks(), "--learning_rate", "0.01")
    for name in toy.sft_tasks():
        assert f"{name}: loss " in printed
    one_adapter = load_file(out / "adapter_model.safetensors")

    out, printed = run_example("sft_after.py", base_folder, toy.sft_tasks(), "--learning_rate", "0.01")
    for name in toy.sft_tasks():
        assert f"{name}: loss " in printed
    assert set(json.loads((out / "evaluation.json").read_text())["scores"]["eval"]) == {"base", "ensemble", "baseline"}
    config = json.loads((out / "ensemble" / "ensemble_config.json").read_text())
    assert set(config["weights"]) == set(toy.sft_tasks())
    model = PeftEnsembleModel.from_pretrained(out / "ensemble")
    assert {task for member in model.members for task in member.tasks} == set(toy.sft_tasks())

    # The ensemble's baseline is what the script trained before the swap.
    baseline = load_file(out / "baseline" / "adapter_model.safetensors")
    assert baseline.keys() == one_adapter.keys()
    assert any(one_adapter[name].abs().max() > 0 for name in one_adapter if "lora_B" in name)
    for name, tensor in baseline.items():
        torch.testing.assert_close(tensor, one_adapter[name], rtol=0, atol=1e-6)


def test_selection(run_example, base_folder):
    out, printed = run_example("selection.py", base_folder, toy.sft_tasks(), "--target", "sums")
    selection = Selection.load(out / "selection.json")
    assert list(selection.targets) == selection.tasks[:1] == ["sums"]
    assert selection.summary in printed
    for task in selection.auxiliary:
        assert f"{task}: taken" in printed
    assert "sums: loss " in printed
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_capture_callback(run_example, base_folder):
    out, printed = run_example("capture_callback.py", base_folder, toy.sft_tasks(), "--target", "sums")
    store = GradientStore(out / "gradients")
    rows = sum(len(split) for splits in toy.sft_tasks().values() for split in splits.values())
    assert len(store) == rows
    assert set(store.task_names) == set(toy.sft_tasks())
    assert (out / "adapter_model.safetensors").is_file()
    assert "group_0: " in printed
    assert "Predicted loss of sums after training on diffs, more_sums, sums: " in printed


def test_classification(run_example, tmp_path):
    names = ("negative", "positive", "no", "yes")
    model = toy.save_model(toy.bert(num_labels=len(names)), tmp_path / "bert")
    out, printed = run_example("classification.py", model, toy.text_tasks())
    for task, splits in toy.text_tasks().items():
        assert f"{task}: accuracy " in printed
        text = splits["validation"][0]["text"]
        answers = names[2:] if task == "songs" else names[:2]
        assert any(f"{task}: {text!r} is {answer}\n" in printed for answer in answers)
    model = PeftEnsembleModel.from_pretrained(out / "ensemble")
    assert set(model.label_space.names) == set(names)


def test_sft_script(run_example, base_folder):
    flags = [
        "--use_peft",
        "--lora_r",
        "4",
        "--lora_target_modules",
        "all-linear",
        "--dtype",
        "float32",
        "--num_groups",
        "2",
    ]
    out, _ = run_example("sft_script.py", base_folder, toy.sft_tasks(), *flags, model_flag="--model_name_or_path")
    results = json.loads((out / "train_results.json").read_text())
    assert {"train_loss", "train_runtime", "eval_loss", "eval_sums_loss"} <= set(results)
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("train_loss" in entry for entry in logged)
    for folder in (out, out / "ensemble"):
        model = PeftEnsembleModel.from_pretrained(folder)
        assert set(model.weights) == set(toy.sft_tasks())
    assert (out / "tokenizer.json").is_file() and (out / "README.md").is_file()


def test_classification_script(run_example, tmp_path):
    tasks = toy.text_tasks()
    for name, splits in tasks.items():
        splits["test"] = toy.text_rows(5, 7, name.removesuffix("s"))
    model = toy.save_model(toy.bert(num_labels=2), tmp_path / "bert")
    flags = ("--do_train", "--do_eval", "--do_predict", "--learning_rate", "0.01")
    out, _ = run_example("classification_script.py", model, tasks, *flags)
    train, evaluated = (json.loads((out / f"{kind}_results.json").read_text()) for kind in ("train", "eval"))
    assert {"train_loss", "train_runtime"} <= set(train) and {"eval_loss", "eval_accuracy"} <= set(evaluated)
    served = PeftEnsembleModel.from_pretrained(out / "ensemble")
    lines = (out / "predictions.txt").read_text().splitlines()
    # In the order of the table: all of the first dataset, then all of the second.
    rows = [(name, row) for name in sorted(tasks) for row in tasks[name]["test"]]
    batch = toy.tokenizer()([row["text"] for _, row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = served(**batch, task=[name for name, _ in rows]).logits
    assert lines == [f"{number}\t{label}" for number, label in enumerate(logits.argmax(-1).tolist())]
    assert (out / "ensemble" / "README.md").is_file()
