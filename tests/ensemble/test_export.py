"""Ensembles exported as one adapter for each task."""

import json
import shlex
from pathlib import Path

import pytest
from peft import PeftModel

from helpers import architectures, toy
from helpers.member_kinds import NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.saving.export import export_for_vllm
from hf_ensemble.errors import ConfigurationError, EnsembleError, EnsembleLoadError


def ensemble_of(model, tasks):
    return PeftEnsembleModel(model, NAMES, {task: {name: 1.0} for task, name in zip(tasks, NAMES * 3)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return make(type(llama()).from_pretrained(base), [{"r": 1}] * 3)


def test_no_task_is_written_outside_of_the_folder_or_over_another(model, tmp_path):
    tasks = ["../up", "/etc/x", "user/set", "user set", "User-Set", "..", "serve.sh", "a=b", "a,b"]
    folder = tmp_path / "inner" / "served"
    exported = export_for_vllm(ensemble_of(model, tasks), folder)
    assert list(exported.adapters) == tasks and exported.max_lora_rank == 1
    assert {Path(own).parent for own in exported.adapters.values()} == {folder}
    assert len({own.casefold() for own in exported.adapters.values()}) == len(tasks)
    assert {path.name for path in tmp_path.iterdir()} == {"inner"}
    for task, path in exported.adapters.items():
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        assert config["r"] == 1, task
    # vLLM takes an entry with one '=' and no ',' as a name and a path, others as JSON.
    line = shlex.split(Path(exported.script).read_text())
    entries = line[line.index("--lora-modules") + 1 :]
    plain = [entry.split("=") for entry in entries if "," not in entry]
    parsed = [json.loads(entry) for entry in entries if "," in entry]
    assert dict(plain) | {own["name"]: own["path"] for own in parsed} == exported.adapters
    assert {own["name"] for own in parsed} == {"a=b", "a,b"}


def test_what_is_not_served_is_refused_before_anything_is_written(model, tmp_path):
    unnamed = make(llama(), [{"r": 1}] * 3)
    encoder_decoder = make(
        architectures.model("t5"), [{"r": 1, "task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}] * 3
    )
    classifier = make(toy.bert(2), [{"task_type": "SEQ_CLS", "target_modules": ["query"]}] * 3)
    for own, error, message in (
        (ensemble_of(unnamed, ["x"]), EnsembleError, "folder or Hub id.*has neither.*base_model="),
        (ensemble_of(encoder_decoder, ["x"]), EnsembleError, "found the encoder-decoder T5"),
        (ensemble_of(classifier, ["x"]), EnsembleError, "found a classifier"),
        (ensemble_of(model, []), EnsembleError, "weights by task, found none"),
    ):
        with pytest.raises(error, match=message):
            export_for_vllm(own, tmp_path)
    with pytest.raises(EnsembleError, match=r"Unknown tasks \['z'\]"):
        export_for_vllm(ensemble_of(model, ["x"]), tmp_path, tasks=["z"])
    with pytest.raises(EnsembleError, match=r"Expected tasks to export, found \[\]; the tasks are \[.x.\]"):
        export_for_vllm(ensemble_of(model, ["x"]), tmp_path, tasks=[])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match="takes no \\['branch'\\]"):
        ensemble_of(model, ["x"]).merge("x").push_to_hub("user/x", branch="dev")


def test_a_base_that_the_ensemble_does_not_name_is_the_one_it_was_loaded_with(base, tmp_path):
    ensemble_of(make(llama(), [{"r": 1}] * 3), ["x"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(EnsembleLoadError, match="does not name its base model.*base_model="):
        PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    ensemble = PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=base)
    exported = export_for_vllm(ensemble, tmp_path / "served")
    assert shlex.split(exported.command)[:3] == ["vllm", "serve", str(Path(base).resolve())]
    PeftModel.from_pretrained(llama(), exported.adapters["x"])
    ensemble.save_pretrained(tmp_path / "again")
    assert PeftEnsembleModel.from_pretrained(tmp_path / "again").base_model_reference == ensemble.base_model_reference
