"""Ensembles exported as one adapter for each task."""

import itertools
import json
import re
import shlex
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
