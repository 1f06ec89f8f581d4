import json
import shutil
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from helpers import toy
from helpers.architectures import MODELS
from helpers.hub_server import local_hub, run_against_hub
from helpers.markdown import code_blocks, plain, tables, tokens
from hf_ensemble import (
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    PeftEnsembleModel,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
    collect_results,
    push_run_to_hub,
    write_model_card,
)
from hf_ensemble._cards import own_text
from hf_ensemble.errors import EnsembleLoadError, RecordError
from hf_ensemble.publish import renew_model_card
from hf_ensemble.runs import RunDirectory, TrainedAdapter
from hf_ensemble.tasks import LabelSpace

SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "num_train_epochs": 1,
    "projection_dim": 64,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    toy.save_model(toy.llama(), folder / "base")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """The directory of a finished run, whose systems are scored."""
    args = EnsembleSFTConfig(output_dir=str(folder / "run"), num_groups=2, affinity_subsets=10, **SETTINGS)
    base = str(folder / "base")
    trainer = EnsembleSFTTrainer(model=base, args=args, train_dataset=toy.sft_tasks(), peft_config=toy.lora())
    trainer.train()
    collect_results(trainer)
    return folder / "run"


@pytest.fixture(scope="module")
def selection(folder):
    """The directory of a finished selection."""
    args = SelectionSFTConfig(output_dir=str(folder / "selection"), card_examples=False, **SETTINGS)
    tasks = {"train_dataset": toy.sft_tasks(), "peft_config": toy.lora(), "target": "sums"}
    SelectionSFTTrainer(model=str(folder / "base"), args=args, **tasks).train()
    return folder / "selection"


def table(text, first):
    """Rows below the header of the table whose first header begins like this, by their first cells."""
    rows = next(rows for rows in tables(text) if rows[0][0].startswith(first))
    return {row[0]: row[1:] for row in rows[1:]}


def test_card_says_what_was_trained_on_what_and_how_well(run):
    card = ModelCard.load(run / "ensemble" / "README.md")
    groups = json.loads((run / "groups.json").read_text())
    results = json.loads((run / "results.json").read_text())["scores"]
    weights = json.loads((run / "estimate" / "weights.json").read_text())
    members = [m["name"] for m in json.loads((run / "ensemble" / "ensemble_config.json").read_text())["members"]]
    assert card.data.library_name == "hf-ensemble" and {"hf-ensemble", "peft", "lora"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model is None
    by_task = table(card.text, "dataset")
    losses, accuracies, *_ = [rows for rows in tables(card.text) if rows[0][:2] == ["task", "base model"]] + [None]
    verdict = json.loads((run / "results.json").read_text())["verdict"]
    assert verdict in "".join(plain(token) for token in tokens(card.text) if token.type == "inline")
    trained, shares = table(card.text, "adapter"), next(t for t in tables(card.text) if t[0][-1] == members[-1])
    for group, tasks in groups["groups"].items():
        length = f"{groups['lengths'][group]:g}"
        assert trained[group] == [", ".join(tasks), ", ".join(f"{task} 1.00" for task in tasks), length]
        for task in tasks:
            assert by_task[task][:3] == [group, "12", "6"]
            shown = next(row for row in losses if row[0] == task)
            for cell, system in zip(shown[1:], ("base", "baseline", "ensemble")):
                assert cell.startswith(f"{results[system][task]['loss']:.3f} (")
            own = weights["weights"][task]
            assert [task, *(f"{own.get(name, 0.0):.2f}" for name in members)] in shares
            validated = weights["cross_validated"][task]
            assert f"{validated['chosen']:.4f}" in table(card.text, "loss on rows that")[task]
    mean = sum(score["loss"] for score in results["ensemble"].values()) / 3
    assert losses[-1][0] == "mean" and losses[-1][3].startswith(f"{mean:.3f}")
    assert accuracies is None or accuracies[0] == losses[0]
    assert groups["summary"] in card.text and f"{groups['baselines']['random']:.4f}" in card.text
    configuration = json.loads(card.text.split("```json\n")[1].split("```")[0])
    record = json.loads((run / "run.json").read_text())
    assert configuration["choices"] == record["choices"]
    assert configuration["configuration"]["arguments"] == record["configuration"]["arguments"]
    assert configuration["configuration"]["model"]["name"] == "base" and str(run.parent) not in str(card)
    assert {"one adapter for all", "ensemble"} <= set(table(card.text, "system"))
    assert {"gradients", "baseline", "group"} <= set(table(card.text, "stage"))
    assert "2409.19458" in card.text and "2505.21930" in card.text and "torch 2." in card.text
    assert "(assets/affinity.png)" in card.text and "(assets/predictions.png)" in card.text
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for task, score in results["ensemble"].items():
        assert found[task, "accuracy"] == round(score["accuracy"], 4) and found[task, "loss"] == round(score["loss"], 4)
    assert [entry["example_title"] for entry in card.data["widget"]] == list(results["ensemble"])


def test_card_of_a_selection(selection):
    card = ModelCard.load(selection / "adapter" / "README.md")
    choice = json.loads((selection / "selection.json").read_text())
    assert card.data.library_name == "peft" and card.data.model_name == "adapter"
    shown = table(card.text, "dataset")
    for task in choice["tasks"]:
        assert shown[f"{task} (target)" if task == "sums" else task][2] == f"{choice['weights'][task]:.2f}"
    assert choice["summary"] in card.text and "assets/selection_path.png" in card.text
    assert "2409.19458" in card.text and "2505.21930" not in card.text
    # Rows are not shown.
    assert "sum : " not in str(card) and "widget" not in card.data.to_dict()


@pytest.mark.parametrize("kind", ["ensemble", "adapter", "merged", "saved"])
def test_the_code_of_a_card_runs_as_it_stands(run, selection, tmp_path, monkeypatch, kind):
    """All but vLLM's, which is not installed, from another directory than where things were trained."""
    monkeypatch.chdir(tmp_path)
    folder = {"ensemble": run / "ensemble", "adapter": selection / "adapter"}.get(kind, Path(kind))
    if kind in ("merged", "saved"):
        ensemble = PeftEnsembleModel.from_pretrained(run / "ensemble")
        (ensemble.merge("sums") if kind == "merged" else ensemble).save_pretrained(kind)
    else:
        shutil.copytree(folder, kind)
    text = (Path(kind) / "README.md").read_text().replace(f"path/to/{folder.name}", kind)
    blocks = code_blocks(text, "python")
    assert len(blocks) == (5 if kind in ("ensemble", "saved") else 2)
    namespace: dict = {}
    for number, block in enumerate(blocks):
        if "vllm" in block:
            compile(block, f"{kind}, block {number}", "exec")
        else:
            exec(compile(block.replace("=64)", "=4)"), f"{kind}, block {number}", "exec"), namespace)
    assert len(namespace["answers"]) == len(namespace["batch"]["input_ids"])
    if kind == "ensemble":
        merged = PeftEnsembleModel.from_pretrained("ensemble").merge("sums")
        assert Path("merged-sums/README.md").is_file() and merged.rank == namespace["merged"].rank


def test_the_code_of_a_classifiers_card_runs_as_it_stands(tmp_path, monkeypatch):
    model = get_peft_model(toy.bert(4), toy.lora("SEQ_CLS"), adapter_name="a")
    model.get_base_model().config._name_or_path = toy.save_model(toy.bert(4), tmp_path / "base")
    space = LabelSpace(("negative", "positive", "no", "yes"), {"films": (0, 1), "songs": (2, 3)})
    weights = {"films": {"a": 1.0}, "songs": {"a": 1.0}}
    monkeypatch.chdir(tmp_path)
    PeftEnsembleModel(model, ["a"], weights, label_space=space).save_pretrained("saved")
    card = ModelCard.load("saved/README.md")
    assert card.data.pipeline_tag == "text-classification"
    namespace: dict = {}
    for block in code_blocks(card.text, "python"):
        exec(block, namespace)
    films, songs = [namespace["model"].label_space.names[index] for index in namespace["logits"].argmax(-1)]
    assert films in ("negative", "positive") and songs in ("no", "yes")
    assert namespace["answer"](namespace["texts"][0])[0]["label"] in ("negative", "positive")


def test_the_code_of_an_encoder_decoders_card_runs_as_it_stands(tmp_path, monkeypatch):
    config = T5Config(**{**MODELS["t5"][1].to_dict(), "vocab_size": len(toy.VOCABULARY)})
    base = toy.save_model(T5ForConditionalGeneration(config), tmp_path / "base")
    args = SelectionConfig(output_dir=str(tmp_path / "run"), max_auxiliary=1, **SETTINGS)
    lora = toy.lora("SEQ_2_SEQ_LM", target_modules=["q", "v"])
    SelectionTrainer(model=base, args=args, train_dataset=toy.sft_tasks(), peft_config=lora, target="sums").train()
    monkeypatch.chdir(tmp_path / "run")
    card = ModelCard.load("adapter/README.md")
    (block,) = code_blocks(card.text.replace("path/to/adapter", "adapter"), "python")
    namespace: dict = {}
    exec(block.replace("=64)", "=4)"), namespace)
    assert len(namespace["answers"]) == 1 and "AutoModelForSeq2SeqLM" in block


def test_a_written_card_and_another_runs_card_stay(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "ensemble" / "README.md"
    path.write_text("---\nlicense: mit\n---\n\n# By hand\n")
    for _ in range(2):
        card = ModelCard.load(write_model_card(tmp_path / "run", metadata={"tags": ["mine"], "license": "bsd"}))
        assert "# By hand" in card.text and card.data.license == "mit" and "mine" in card.data.tags
        assert card.text.count("## Results") == 1
    # The choice is made anew in the same directory.
    record = RunDirectory(tmp_path / "run").record
    RunDirectory.open(tmp_path / "run", record.configuration, {**record.choices, "num_groups": 1}, overwrite=True)
    assert "# By hand" in path.read_text() and list(path.parent.iterdir()) == [path]


def test_a_card_that_fails_stops_nothing(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_ensemble.publish.card.render", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_model_card(run)
    renew_model_card(RunDirectory(run), run / "ensemble")
    assert "README.md" not in caplog.text and "was not written: ZeroDivisionError: division by zero" in caplog.text
    monkeypatch.setattr("hf_ensemble.ensemble.saving.card.render", lambda *a, **k: 1 / 0)
    PeftEnsembleModel.from_pretrained(run / "ensemble").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ensemble_config.json").is_file()


def test_picture_is_a_png_of_readable_size(run):
    from matplotlib.image import imread

    height, width = imread(run / "ensemble" / "assets" / "affinity.png").shape[:2]
    assert height > 300 and width > 300


def test_a_card_without_evaluation_or_picture_is_still_a_card(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "ensemble" / "README.md").unlink()
    (tmp_path / "run" / "evaluation.json").unlink()
    monkeypatch.setattr("hf_ensemble.publish.card.draw_choice", lambda *a: 1 / 0)
    text = write_model_card(tmp_path / "run", "user/name").read_text()
    assert "Not evaluated yet." in text and "affinity.png" not in text
    assert 'from_pretrained("user/name", base_model=base_model)' in text


def test_an_incomplete_ensemble_is_not_uploaded(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "ensemble" / "adapters" / "group_1" / "adapter_model.safetensors").unlink()
    with pytest.raises(EnsembleLoadError, match="'group_1': adapter_model.safetensors is missing"):
        push_run_to_hub(tmp_path / "run", "user/name")
    with pytest.raises(EnsembleLoadError, match="holds no ensemble_config.json"):
        push_run_to_hub(tmp_path, "user/name")


@pytest.mark.parametrize("kind", ["run", "selection"])
def test_a_copy_of_what_was_made_is_uploaded(request, kind, tmp_path, monkeypatch):
    source = request.getfixturevalue(kind)
    copy = shutil.copytree(source / ("ensemble" if kind == "run" else "adapter"), tmp_path / "copy")
    (copy / "notes.txt").write_text("of the copy")
    (copy / "README.md").write_text("# By hand\n")
    uploaded = {}

    def push(repository, folder, replaced, card, again):
        uploaded["files"] = {path.name for path in folder.rglob("*")}
        uploaded["card"] = card(None)

    monkeypatch.setattr("hf_ensemble.ensemble.saving.pushing.push_folder", push)
    push_run_to_hub(source, "user/name", folder=str(copy))
    assert {"notes.txt", "adapter_model.safetensors"} <= uploaded["files"]
    assert own_text(uploaded["card"]) == "# By hand" and '"user/name"' in uploaded["card"]
    with pytest.raises(EnsembleLoadError, match="holds no ensemble_config.json"):
        push_run_to_hub(source, "user/name", folder=tmp_path / "other")


def test_a_single_adapter_of_an_ensemble_is_no_selection(run):
    member = run / "ensemble" / "adapters" / "group_1"
    for act in (push_run_to_hub, write_model_card):
        with pytest.raises(EnsembleLoadError, match="found a single adapter.*has made no selection"):
            act(run, "user/name", folder=member)
    assert not (member / "assets").exists()


def test_the_runs_own_adapter_is_checked_whatever_its_path(selection, tmp_path, monkeypatch):
    copy = shutil.copytree(selection, tmp_path / "run")
    files = {"adapter_model.safetensors": "of another adapter"}
    trained = TrainedAdapter("adapter", {"sums": 1.0}, 0, "theta0", status="done", files=files)
    RunDirectory(copy).write_trained_adapter(trained)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordError, match="adapter_model.safetensors"):
        push_run_to_hub(copy, "user/name", folder=Path("run") / "adapter")


def test_push_and_load_from_a_hub(run, tmp_path):
    members = [path.name for path in (run / "ensemble" / "adapters").iterdir()]
    assert set(members) >= {"group_0", "group_1"}
    with local_hub(tmp_path / "hub") as endpoint:
        code = f"""
            import torch
            from pathlib import Path
            from huggingface_hub import HfApi, ModelCard
            from peft import PeftModel
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from hf_ensemble import PeftEnsembleModel, push_run_to_hub
            from hf_ensemble.errors import EnsembleLoadError

            commit = push_run_to_hub({str(run)!r}, "hub-user/animals")
            files = set(HfApi().list_repo_files("hub-user/animals"))
            expected = {{"README.md", "assets/affinity.png", "assets/predictions.png", "ensemble_config.json"}}
            expected |= {{"tokenizer.json", "tokenizer_config.json"}}
            kinds = ("config.json", "model.safetensors")
            expected |= {{f"adapters/{{name}}/adapter_{{kind}}" for name in {members} for kind in kinds}}
            assert files - {{".gitattributes"}} == expected, files
            assert 'from_pretrained("hub-user/animals", ' in ModelCard.load("hub-user/animals").text
            folder = HfApi().snapshot_download("hub-user/animals")
            texts = [path.read_text() for path in Path(folder).rglob("*.*") if path.suffix in (".json", ".md")]
            assert texts and not any({str(run.parent)!r} in text for text in texts)
            local = PeftEnsembleModel.from_pretrained({str(run / "ensemble")!r})
            base = AutoModelForCausalLM.from_pretrained({str(run.parent / "base")!r})
            remote = PeftEnsembleModel.from_pretrained("hub-user/animals", revision=commit.oid, base_model=base)
            ids = torch.arange(3, 9).unsqueeze(0)
            with torch.no_grad():
                assert torch.equal(local(ids, task="sums").logits, remote(ids, task="sums").logits)
            base = AutoModelForCausalLM.from_pretrained({str(run.parent / "base")!r})
            PeftModel.from_pretrained(base, "hub-user/animals", subfolder="adapters/group_0")
            assert AutoTokenizer.from_pretrained("hub-user/animals")("sum : 1").input_ids
            # A folder here that is called as the base model was there is another model.
            import shutil
            shutil.copytree({str(run.parent / "base")!r}, "base")
            from huggingface_hub import snapshot_download
            adapters = Path(snapshot_download("hub-user/animals")) / "adapters"
            for load in (
                lambda: PeftEnsembleModel.from_pretrained("hub-user/animals"),
                lambda: PeftEnsembleModel.from_pretrained(adapters.parent),
                lambda: PeftEnsembleModel.from_adapters(None, {{"group_0": adapters / "group_0"}}),
            ):
                try:
                    load()
                except EnsembleLoadError as error:
                    assert "does not name its base model" in str(error) and "Pass base_model=" in str(error)
                else:
                    raise AssertionError("another machine's base model was taken")
            try:
                PeftEnsembleModel.from_pretrained("hub-user/nothing")
            except EnsembleLoadError as error:
                assert "hub-user/nothing" in str(error)
            else:
                raise AssertionError("a missing repository was loaded")
        """
        run_against_hub(textwrap.dedent(code), endpoint, tmp_path / "home")


def test_trainers_push_what_they_made(run, tmp_path):
    """With the arguments of a trl script's last line; a selection uploads its adapter and no gradients."""
    with local_hub(tmp_path / "hub") as endpoint:
        code = f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parents[1])!r})
            from helpers import toy
            from huggingface_hub import HfApi
            from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, SelectionSFTConfig, SelectionSFTTrainer

            settings = dict(
                use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", num_train_epochs=1,
                projection_dim=64, gradient_checkpointing=False,
            )
            tasks = {{"train_dataset": toy.sft_tasks(), "peft_config": toy.lora()}}
            base = {str(run.parent / "base")!r}
            args = EnsembleSFTConfig(output_dir="e", hub_model_id="hub-user/e", num_groups=2, **settings)
            trainer = EnsembleSFTTrainer(model=base, args=args, **tasks)
            trainer.train()
            trainer.push_to_hub(dataset_name="sums")
            args = SelectionSFTConfig(output_dir="s", hub_model_id="hub-user/s", **settings)
            trainer = SelectionSFTTrainer(model=base, args=args, target="sums", **tasks)
            trainer.train()
            trainer.push_to_hub(private=False)
            files = {{name: set(HfApi().list_repo_files(f"hub-user/{{name}}")) for name in "es"}}
            assert {{"ensemble_config.json", "README.md"}} <= files["e"], files
            assert {{"adapter_model.safetensors", "README.md"}} <= files["s"], files
            assert not any("gradients" in file for file in files["s"]), files
        """
        run_against_hub(textwrap.dedent(code), endpoint, tmp_path / "home")
