import json
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub
from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, push_ensemble_to_hub, write_model_card
from hf_ensemble.errors import EnsembleLoadError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run."""
    folder = tmp_path_factory.mktemp("publish")
    args = EnsembleSFTConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        num_train_epochs=1,
        num_groups=2,
        affinity_subsets=10,
        projection_dim=64,
        gradient_checkpointing=False,
    )
    trainer = EnsembleSFTTrainer(
        model=toy.save_model(toy.llama(), folder / "base"),
        args=args,
        train_dataset=toy.sft_tasks(),
        peft_config=toy.lora(),
    )
    trainer.train()
    return folder / "run"


def table_rows(text, heading):
    """Cells of the first table below a heading."""
    lines = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_card_says_what_was_trained_on_what_and_how_well(run):
    card = ModelCard.load(run / "ensemble" / "README.md")
    groups = json.loads((run / "groups.json").read_text())["groups"]
    results = json.loads((run / "evaluation.json").read_text())["scores"]["eval"]
    weights = json.loads((run / "estimate" / "weights.json").read_text())["weights"]
    members = [m["name"] for m in json.loads((run / "ensemble" / "ensemble_config.json").read_text())["members"]]
    assert card.data.library_name == "peft" and "hf-ensemble" in card.data.tags
    by_task = {row[0]: row for row in table_rows(card.text, "Datasets and groups")[2:]}
    shown = {row[0]: row for row in table_rows(card.text, "Results")[2:]}
    shares = {row[0]: row for row in table_rows(card.text, "Weights")[2:]}
    for group, tasks in groups.items():
        for task in tasks:
            assert by_task[task][1:4] == [group, "12", "6"]
            own, baseline = results["ensemble"][task], results["baseline"][task]
            figures = [f"{own['accuracy']:.3f}", f"{own['loss']:.4f}", f"{baseline['accuracy']:.3f}"]
            assert shown[task][1:5] == [group, *figures]
            assert shares[task][1:] == [f"{weights[task].get(name, 0.0):.2f}" for name in members]
    mean = sum(score["accuracy"] for score in results["ensemble"].values()) / 3
    assert shown["**mean**"][2] == f"{mean:.3f}"
    configuration = json.loads(card.text.split("```json\n")[1].split("```")[0])
    record = json.loads((run / "run.json").read_text())
    assert configuration["choices"] == record["choices"]
    assert configuration["configuration"]["arguments"] == record["configuration"]["arguments"]
    assert configuration["configuration"]["model"]["name"] == "base" and str(run.parent) not in str(card)
    assert "2409.19458" in card.text and "2505.21930" in card.text
    assert "torch 2." in card.text and "subfolder=" in card.text
    assert "(assets/affinity.png)" in card.text
    assert {r.metric_value for r in card.data.eval_results} == {
        round(score["accuracy"], 4) for score in results["ensemble"].values()
    }


def test_picture_is_a_png_of_readable_size(run):
    from matplotlib.image import imread

    height, width = imread(run / "ensemble" / "assets" / "affinity.png").shape[:2]
    assert height > 300 and width > 300


def test_a_card_without_evaluation_or_picture_is_still_a_card(run, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    monkeypatch.setattr("hf_ensemble.publish.card.draw_choice", lambda *a: 1 / 0)
    text = write_model_card(tmp_path / "run", "user/name").read_text()
    assert "Not evaluated yet." in text and 'from_pretrained("user/name")' in text and "affinity.png" not in text


def test_an_incomplete_ensemble_is_not_uploaded(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "ensemble" / "adapters" / "group_1" / "adapter_model.safetensors").unlink()
    with pytest.raises(EnsembleLoadError, match="'group_1': adapter_model.safetensors is missing"):
        push_ensemble_to_hub(tmp_path / "run", "user/name")
    with pytest.raises(EnsembleLoadError, match="holds no ensemble_config.json"):
        push_ensemble_to_hub(tmp_path, "user/name")


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
            from hf_ensemble import PeftEnsembleModel, push_ensemble_to_hub
            from hf_ensemble.errors import EnsembleLoadError

            commit = push_ensemble_to_hub({str(run)!r}, "hub-user/animals")
            files = set(HfApi().list_repo_files("hub-user/animals"))
            expected = {{"README.md", "assets/affinity.png", "ensemble_config.json"}}
            expected |= {{"tokenizer.json", "tokenizer_config.json"}}
            kinds = ("config.json", "model.safetensors")
            expected |= {{f"adapters/{{name}}/adapter_{{kind}}" for name in {members} for kind in kinds}}
            assert files - {{".gitattributes"}} == expected, files
            assert 'from_pretrained("hub-user/animals")' in ModelCard.load("hub-user/animals").text
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
