"""How the commands over a saved ensemble load its base: its own code, precision and bits."""

import json
import textwrap

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from helpers import toy
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.cli import saved
from hf_ensemble.cli.main import main

CODE = """
    from transformers import LlamaConfig, LlamaForCausalLM

    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    class OwnForCausalLM(LlamaForCausalLM):
        config_class = OwnConfig
"""


def save_ensemble(folder, **loading):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", **loading)
    model = get_peft_model(base, toy.lora(target_modules=["q_proj", "v_proj"]), "one")
    toy.randomize(model)
    PeftEnsembleModel(model, ["one"], {"t": {"one": 1.0}}).save_pretrained(folder / "saved")


@pytest.fixture
def own_code(tmp_path):
    """A saved ensemble whose base is a class of the base's repository."""
    toy.save_model(toy.llama(), tmp_path / "base")
    (tmp_path / "base" / "own.py").write_text(textwrap.dedent(CODE))
    path = tmp_path / "base" / "config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own_llama", "auto_map": auto}))
    save_ensemble(tmp_path, trust_remote_code=True)
    return tmp_path


def flags_of(command, folder):
    line = [command, "--ensemble", str(folder / "saved")]
    line += [] if command == "export" else ["--task", "t"]
    own = ["--prompts", "1 + 1"] if command == "generate" else ["--output_dir", str(folder / "out")]
    return [*line, *own]


@pytest.mark.parametrize("command", ["generate", "merge", "export"])
def test_code_of_a_bases_repository_runs_for_who_asks(own_code, command, capsys):
    assert main(flags_of(command, own_code)) == 1
    assert "--trust_remote_code" in capsys.readouterr().err
    assert main([*flags_of(command, own_code), "--trust_remote_code"]) == 0


def test_a_run_trains_such_a_base(own_code):
    for task in "ab":
        for split in ("train", "validation"):
            file = own_code / "data" / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(map(json.dumps, toy.sum_rows(6))))
    line = ["run", "--data", str(own_code / "data"), "--model_name_or_path", str(own_code / "base")]
    line += ["--output_dir", str(own_code / "run"), "--lora_target_modules", "q_proj", "--num_train_epochs", "1"]
    assert main([*line, "--use_cpu", "--bf16", "false", "--trust_remote_code"]) == 0
    config = json.loads((own_code / "run" / "ensemble" / "ensemble_config.json").read_text())
    assert config["base_model"]["name_or_path"] == str(own_code / "base")


@pytest.fixture
def loaded(monkeypatch):
    """The ensembles that commands load."""
    found, load = [], saved.PeftEnsembleModel.from_pretrained

    def remember(*args, **kwargs):
        found.append(load(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(saved.PeftEnsembleModel, "from_pretrained", remember)
    return found


@pytest.mark.parametrize("command", ["generate", "merge", "export"])
def test_the_precision_of_the_base(tmp_path, command, loaded):
    toy.save_model(toy.llama(), tmp_path / "base")
    save_ensemble(tmp_path)
    for flags in ([], ["--dtype", "bfloat16"], ["--dtype", "auto"]):
        assert main([*flags_of(command, tmp_path), *flags]) == 0
    assert [own.model.get_base_model().dtype for own in loaded] == [torch.float32, torch.bfloat16, torch.float32]


def test_a_base_of_4_bits(tmp_path, loaded):
    toy.save_model(toy.llama(hidden_size=64, intermediate_size=128), tmp_path / "base")
    save_ensemble(tmp_path)
    assert main([*flags_of("generate", tmp_path), "--load_in_4bit"]) == 0
    (own,) = loaded
    assert own.model.get_base_model().is_loaded_in_4bit
