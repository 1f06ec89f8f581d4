"""Ensembles exported as one adapter for each task."""

import itertools
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from helpers import architectures, ensembles, toy
from helpers.member_kinds import KINDS, NAMES, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.saving.export import export_for_servers
from hf_ensemble.errors import ConfigurationError, EnsembleError, EnsembleLoadError


def ensemble_of(model, tasks):
    return PeftEnsembleModel(model, NAMES, {task: {name: 1.0} for task, name in zip(tasks, itertools.cycle(NAMES))})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return make(type(llama()).from_pretrained(base), [{"r": 1}] * 3)


def test_no_task_is_written_outside_of_the_folder_or_over_another(model, tmp_path):
    tasks = ["../up", "/etc/x", "user/set", "user set", "User-Set", "..", "serve.sh", "a=b", "a,b", "-dashed"]
    folder = tmp_path / "inner" / "served"
    exported = export_for_servers(ensemble_of(model, tasks), folder)
    assert list(exported.adapters) == tasks and exported.max_lora_rank == 8
    assert {Path(own).parent for own in exported.adapters.values()} == {folder}
    assert len({own.casefold() for own in exported.adapters.values()}) == len(tasks)
    assert {path.name for path in tmp_path.iterdir()} == {"inner"}
    for task, path in exported.adapters.items():
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        assert config["r"] == 8, task
    # vLLM takes an entry with one '=' and no ',' as a name and a path, others as JSON; one with a dash in front of it
    # would be an option.
    line = shlex.split(Path(exported.script).read_text())
    entries = line[line.index("--lora-modules") + 1 :]
    plain = [entry.split("=") for entry in entries if "," not in entry]
    parsed = [json.loads(entry) for entry in entries if "," in entry]
    assert dict(plain) | {own["name"]: own["path"] for own in parsed} == exported.adapters
    assert {own["name"] for own in parsed} == {"a=b", "a,b", "-dashed"}
    assert not any(entry.startswith("-") for entry in entries)


@pytest.mark.parametrize("kind", ["ranks and scalings", "targets", "embeddings", "output layer"])
@torch.no_grad()
def test_a_served_folder_is_a_plain_adapter_that_computes_the_weights(base, kind, tmp_path):
    model = make(type(llama()).from_pretrained(base), KINDS[kind])
    ensemble = PeftEnsembleModel(model, NAMES, {task: WEIGHTS[task] for task in "xyz"}, combination="weights")
    exported = export_for_servers(ensemble, tmp_path)
    for task, path in exported.adapters.items():
        folder = Path(path)
        files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert {file.name for file in folder.iterdir()} == files
        config = json.loads((folder / "adapter_config.json").read_text())
        # Scaling 1, which no reader can take for anything else.
        assert config["lora_alpha"] == config["r"] and config["r"] in (8, 16, 32) and not config["use_rslora"]
        assert (config["peft_type"], config["bias"], config["base_model_name_or_path"]) == ("LORA", "none", base)
        assert not any(config[key] for key in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern"))
        assert isinstance(config["target_modules"], list) and config["init_lora_weights"] is True
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            module, side = re.fullmatch(
                r"base_model\.model\.(model\..+|lm_head)\.(?:lora_([AB])\.weight|lora_embedding_[AB])", key
            ).groups()
            is_down = side == "A" or key.endswith("lora_embedding_A")
            assert value.shape[0 if is_down else 1] == config["r"]
            assert module.rpartition(".")[2] in config["target_modules"]
        served = PeftModel.from_pretrained(llama(), folder).eval()
        batch = ensembles.prompts()
        assert torch.allclose(served(**batch).logits, ensemble(**batch, task=task).logits, atol=1e-5)


def test_what_is_not_served_is_refused_before_anything_is_written(base, model, tmp_path):
    unnamed = make(llama(), [{"r": 1}] * 3)
    encoder_decoder = make(
        architectures.model("t5"), [{"r": 1, "task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}] * 3
    )
    classifier = make(toy.bert(2), [{"task_type": "SEQ_CLS", "target_modules": ["query"]}] * 3)
    for own, error, message in (
        (ensemble_of(unnamed, ["x"]), EnsembleError, "folder or Hub id.*has neither.*base_model="),
        (ensemble_of(encoder_decoder, ["x"]), EnsembleError, "causal language model.*found the encoder-decoder T5"),
        (ensemble_of(classifier, ["x"]), EnsembleError, "causal language model.*found a classifier"),
        (ensemble_of(model, []), EnsembleError, "weights by task, found none"),
    ):
        with pytest.raises(error, match=message):
            export_for_servers(own, tmp_path)
    with pytest.raises(EnsembleError, match=r"Unknown tasks \['z'\]"):
        export_for_servers(ensemble_of(model, ["x"]), tmp_path, tasks=["z"])
    with pytest.raises(EnsembleError, match=r"Expected tasks to export, found \[\]; the tasks are \[.x.\]"):
        export_for_servers(ensemble_of(model, ["x"]), tmp_path, tasks=[])
    with pytest.raises(EnsembleError, match="num_shards has to be a positive integer, found 0"):
        export_for_servers(ensemble_of(model, ["x"]), tmp_path, num_shards=0)
    with pytest.raises(EnsembleError, match="rank 528 above 512"):
        wide = make(type(llama()).from_pretrained(base), [{"r": 513}] * 3)
        export_for_servers(ensemble_of(wide, ["x"]), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match="takes no \\['branch'\\]"):
        ensemble_of(model, ["x"]).merge("x").push_to_hub("user/x", branch="dev")


def test_the_base_that_is_served_is_the_loaded_one(model, base, tmp_path):
    """Not the one that the ensemble was saved with, which may be gone."""
    ensemble_of(model, ["x"]).save_pretrained(tmp_path / "saved")
    moved = toy.save_model(llama(), tmp_path / "moved")
    ensemble = PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=moved)
    exported = export_for_servers(ensemble, tmp_path / "served")
    served = str(Path(moved).resolve())
    assert shlex.split(exported.command)[:4] == ["vllm", "serve", served, "--enable-lora"]
    assert PeftConfig.from_pretrained(exported.adapters["x"]).base_model_name_or_path == served
    # Each name has its own revision.
    ensemble.model.get_base_model().config._commit_hash = "loaded"
    for saved, revision in ((base, "loaded"), (served, "saved")):
        ensemble.base_model_reference = replace(
            ensemble.base_model_reference, name_or_path=str(saved), revision="saved"
        )
        line = shlex.split(export_for_servers(ensemble, tmp_path / "served").command)
        assert line[:5] == ["vllm", "serve", served, "--revision", revision]


def test_paths_are_absolute(model, tmp_path, monkeypatch):
    """vLLM takes relative ones, from another folder, for repositories of the Hub."""
    monkeypatch.chdir(tmp_path)
    exported = export_for_servers(ensemble_of(model, ["x"]), "served")
    folder = (tmp_path / "served").resolve()
    assert exported.adapters == {"x": str(folder / "x")} and exported.script == str(folder / "serve.sh")
    assert f"x={folder / 'x'}" in shlex.split((folder / "serve.sh").read_text())
    # The card names no path of the machine.
    assert "'served/x'" in (folder / "x" / "README.md").read_text().replace('"', "'")


def test_a_task_has_its_folder_whichever_are_exported(model, tmp_path):
    ensemble = ensemble_of(model, ["a b", "a-b"])
    both = export_for_servers(ensemble, tmp_path)
    first = (tmp_path / "a-b" / "adapter_model.safetensors").read_bytes()
    second = export_for_servers(ensemble, tmp_path, tasks=["a-b"])
    assert both.adapters == {"a b": str(tmp_path / "a-b"), "a-b": str(tmp_path / "a-b-2")}
    assert second.adapters == {"a-b": both.adapters["a-b"]}
    assert (tmp_path / "a-b" / "adapter_model.safetensors").read_bytes() == first


def test_long_names_of_tasks_are_cut(model, tmp_path):
    tasks = ["x" * 300, "x" * 301, "字" * 300, "字" * 301, "x" * 100]
    exported = export_for_servers(ensemble_of(model, tasks), tmp_path)
    names = [Path(path).name for path in exported.adapters.values()]
    assert names[0] == "x" * 100 and names[1] == f"{names[0]}-2" and names[4] == f"{names[0]}-3"
    assert len(set(names)) == len(tasks) and all(len(name.encode()) < 220 for name in names)
    for task, path in exported.adapters.items():
        PeftConfig.from_pretrained(path)
        assert task in exported.command


@pytest.mark.parametrize("step", range(5))
def test_an_interrupted_export_leaves_no_mixture(base, tmp_path, monkeypatch, step):
    """Neither an old configuration beside new tensors, nor a line that serves old adapters beside new ones."""

    def ensemble_with(rank):
        return ensemble_of(make(type(llama()).from_pretrained(base), [{"r": rank}] * 3), ["x", "y"])

    export_for_servers(ensemble_with(3), tmp_path)
    (tmp_path / "x" / "README.md").write_text("Mine.\n")
    (tmp_path / "x" / "notes").touch()
    replaced, replace_file = [], os.replace

    def interrupted(source, target):
        replaced.append(Path(target).name)
        if len(replaced) > step:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_for_servers(ensemble_with(20), tmp_path)
    assert not (tmp_path / "serve.sh").exists()
    for folder in (tmp_path / "x", tmp_path / "y"):
        assert not list(folder.glob(".*"))
        if (folder / "adapter_config.json").exists():
            rank = json.loads((folder / "adapter_config.json").read_text())["r"]
            tensors = load_file(folder / "adapter_model.safetensors")
            assert {value.shape[0] for key, value in tensors.items() if ".lora_A." in key} == {rank}
    exported = export_for_servers(ensemble_with(20), tmp_path)
    assert exported.max_lora_rank == 32 and Path(exported.script).is_file()
    assert "Mine." in (tmp_path / "x" / "README.md").read_text() and (tmp_path / "x" / "notes").exists()


@pytest.mark.parametrize("count, options", [(1, ["1"]), (4, ["4"]), (9, ["4", "--max-cpu-loras", "9"])])
def test_vllm_reserves_memory_for_few_adapters_at_once(model, tmp_path, count, options):
    exported = export_for_servers(ensemble_of(model, [f"t{number}" for number in range(count)]), tmp_path)
    line = shlex.split(exported.command)
    assert line[line.index("--max-loras") + 1 : line.index("--lora-modules")] == options
    assert len(line) - line.index("--lora-modules") - 1 == count


def test_a_resized_vocabulary_is_refused_until_its_base_is_saved(base, tmp_path):
    resized = type(llama()).from_pretrained(base)
    resized.resize_token_embeddings(resized.config.vocab_size + 3, mean_resizing=False)
    ensemble = ensemble_of(make(resized, [{"r": 1}] * 3), ["x"])
    tokens = resized.config.vocab_size
    with pytest.raises(EnsembleError, match=f"resized to {tokens} tokens. Save the resized base.*base_model=FOLDER"):
        export_for_servers(ensemble, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    assert ensemble.vllm_obstacles() == dict.fromkeys(NAMES, ["a resized vocabulary"])
    ensemble.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert card.count(f"base.resize_token_embeddings({tokens}, mean_resizing=False)") == 2 and "vllm" not in card
    # What it says works.
    batch = ensembles.prompts()
    batch["input_ids"][:, -1] = tokens - 1
    with torch.no_grad():
        expected = ensemble(**batch, task="x").logits
        ensemble.model.unload().save_pretrained(tmp_path / "base")
        again = PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=str(tmp_path / "base"))
        assert torch.allclose(again(**batch, task="x").logits, expected, atol=1e-6)
        exported = export_for_servers(again, tmp_path / "served")
        assert shlex.split(exported.command)[2] == str((tmp_path / "base").resolve())
        stock = type(llama()).from_pretrained(tmp_path / "base")
        served = PeftModel.from_pretrained(stock, exported.adapters["x"]).eval()
        assert torch.allclose(served(**batch).logits, expected, atol=1e-5)


def test_a_base_that_the_ensemble_does_not_name_is_the_one_it_was_loaded_with(base, tmp_path):
    ensemble_of(make(llama(), [{"r": 1}] * 3), ["x"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(EnsembleLoadError, match="does not name its base model.*base_model="):
        PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    ensemble = PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=base)
    exported = export_for_servers(ensemble, tmp_path / "served")
    served = str(Path(base).resolve())
    assert shlex.split(exported.command)[:3] == ["vllm", "serve", served]
    assert PeftConfig.from_pretrained(exported.adapters["x"]).base_model_name_or_path == served
    PeftModel.from_pretrained(llama(), exported.adapters["x"])
    ensemble.save_pretrained(tmp_path / "again")
    assert PeftEnsembleModel.from_pretrained(tmp_path / "again").base_model_reference == ensemble.base_model_reference
