"""Ensembles with a base from elsewhere than they say: what they name, and which arguments load it."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub
from helpers.member_kinds import KINDS, NAMES, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.cli.main import main
from hf_ensemble.errors import ConfigurationError, EnsembleError, EnsembleLoadError

IDS = torch.arange(3, 12).unsqueeze(0)


@pytest.fixture
def folder(tmp_path):
    """Of a saved ensemble and its base."""
    toy.save_model(toy.llama(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    weights = {"sums": {"first": 0.5, "second": 0.5}}
    PeftEnsembleModel(make(base, KINDS["ranks and scalings"]), NAMES, weights).save_pretrained(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize("is_module", [False, True])
@torch.no_grad()
def test_what_is_saved_and_merged_names_the_base_that_was_loaded(folder, is_module):
    moved = str(shutil.move(folder / "base", folder / "moved"))
    base = AutoModelForCausalLM.from_pretrained(moved) if is_module else moved
    ensemble = PeftEnsembleModel.from_pretrained(folder / "saved", base_model=base)
    expected = ensemble(IDS, task="sums").logits
    ensemble.save_pretrained(folder / "again")
    again = PeftEnsembleModel.from_pretrained(folder / "again")
    assert torch.allclose(again(IDS, task="sums").logits, expected, atol=1e-6)
    alone = AutoPeftModelForCausalLM.from_pretrained(folder / "again/adapters/first")
    ensemble.default_weights = {"first": 1.0}
    assert torch.allclose(alone(IDS).logits, ensemble(IDS, routing="default").logits, atol=1e-5)
    ensemble.merge("sums").save_pretrained(folder / "merged")
    merged = AutoPeftModelForCausalLM.from_pretrained(folder / "merged")
    ensemble.combination = "weights"
    assert torch.allclose(merged(IDS).logits, ensemble(IDS, task="sums").logits, atol=1e-5)


def test_a_base_that_is_not_known_by_a_name_leaves_the_saved_one(folder):
    ensemble = PeftEnsembleModel.from_pretrained(folder / "saved", base_model=toy.llama())
    ensemble.save_pretrained(folder / "again")
    assert PeftEnsembleModel.from_pretrained(folder / "again").base_model_reference.name_or_path == str(folder / "base")


def test_a_repository_is_fetched_as_its_base_is(folder, tmp_path):
    """Into the cache that is given, again where that is asked for, and not at all without a network."""
    with local_hub(tmp_path / "hub") as endpoint:
        code = f"""
            import huggingface_hub
            from huggingface_hub import HfApi
            from hf_ensemble import PeftEnsembleModel
            from hf_ensemble.ensemble import AdapterSource
            from hf_ensemble.errors import EnsembleLoadError
            from pathlib import Path

            HfApi().create_repo("tester/base")
            HfApi().upload_folder(repo_id="tester/base", folder_path={str(folder / "base")!r})
            HfApi().create_repo("tester/ens")
            HfApi().upload_folder(repo_id="tester/ens", folder_path={str(folder / "saved")!r}, path_in_repo="runs/one")

            def load(source="tester/ens", subfolder="runs/one", **options):
                base = "tester/base"
                return PeftEnsembleModel.from_pretrained(source, base_model=base, subfolder=subfolder, **options)

            parts = {{"first": AdapterSource("tester/ens", subfolder="runs/one/adapters/first")}}
            for options in ({{}}, {{"source": parts, "subfolder": ""}}):
                try:
                    load(cache_dir="mine", local_files_only=True, **options)
                except EnsembleLoadError as error:
                    assert "tester/ens" in str(error), error
                else:
                    raise AssertionError("nothing is there yet")
            assert load(cache_dir="mine").base_model_reference.name_or_path == "tester/base"
            load(cache_dir="mine", local_files_only=True)
            load(parts, "", cache_dir="mine", local_files_only=True)
            assert not list(Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--*/snapshots"))
            weights = next(Path("mine").glob("models--tester--ens/snapshots/*/runs/one/adapters/first/*.safetensors"))
            weights.resolve().write_bytes(b"damaged")
            load(cache_dir="mine", force_download=True)
        """
        run_against_hub(textwrap.dedent(code), endpoint, tmp_path / "client")


def test_an_ensemble_in_a_subfolder(folder):
    (folder / "runs").mkdir()
    shutil.move(folder / "saved", folder / "runs" / "one")
    assert PeftEnsembleModel.from_pretrained(folder, subfolder="runs/one").adapter_names == NAMES
    with pytest.raises(EnsembleLoadError, match="The subfolder '../x' leads out of"):
        PeftEnsembleModel.from_pretrained(folder, subfolder="../x")
    with pytest.raises(EnsembleLoadError, match=r"no subfolder of separate adapters, found 'a'. Give each its own"):
        PeftEnsembleModel.from_pretrained({"x": folder}, subfolder="a")


@pytest.mark.parametrize("is_separate", [False, True])
def test_arguments_of_a_base_that_is_loaded_are_refused(folder, is_separate):
    source = {"first": folder / "saved/adapters/first"} if is_separate else folder / "saved"
    message = r"beside base_model=LlamaForCausalLM\(...\), which is loaded, found \['dtpye'\]. Load it with them"
    with pytest.raises(EnsembleLoadError, match=message):
        PeftEnsembleModel.from_pretrained(source, base_model=toy.llama(), dtpye="auto", local_files_only=True)
    PeftEnsembleModel.from_pretrained(source, base_model=toy.llama(), cache_dir="mine", local_files_only=True)


def test_pickled_weights_of_a_base_are_not_read(folder, capsys):
    with pytest.raises(EnsembleLoadError, match="since reading a pickle may run code; found use_safetensors=False"):
        PeftEnsembleModel.from_pretrained(folder / "saved", use_safetensors=False)
    PeftEnsembleModel.from_pretrained(folder / "saved", use_safetensors=True)
    weights, pickled = (folder / "base" / name for name in ("model.safetensors", "pytorch_model.bin"))
    torch.save(AutoModelForCausalLM.from_pretrained(folder / "base").state_dict(), pickled)
    weights.unlink()
    with pytest.raises(EnsembleLoadError, match=r"\(.bin\) are not read.*convert it") as found:
        PeftEnsembleModel.from_pretrained(folder / "saved")
    # What it advises works.
    advised = re.search(r"AutoModel\S+\(.*\)\.save_pretrained\(FOLDER\)", str(found.value))[0]
    exec(advised, {"AutoModelForCausalLM": AutoModelForCausalLM, "FOLDER": folder / "converted"})
    PeftEnsembleModel.from_pretrained(folder / "saved", base_model=str(folder / "converted"))
    assert main(["merge", "--ensemble", str(folder / "saved"), "--task", "sums", "--output_dir", "out"]) == 1
    assert "pass --base_model FOLDER" in capsys.readouterr().err
    # A folder without any weights is another one than was meant.
    pickled.unlink()
    with pytest.raises(EnsembleLoadError, match="Pass base_model= if it is somewhere else"):
        PeftEnsembleModel.from_pretrained(folder / "saved")


def test_arguments_with_which_peft_saves(folder):
    ensemble = PeftEnsembleModel.from_pretrained(folder / "saved")
    ensemble.save_pretrained(folder / "again", safe_serialization=True, is_main_process=True)
    config = json.loads((folder / "again" / "ensemble_config.json").read_text())
    assert [member["name"] for member in config["members"]] == NAMES
    for push in (False, True):
        ensemble.save_pretrained(folder / "other", push_to_hub=push, is_main_process=False)
    with pytest.raises(EnsembleError, match="as safetensors.*found safe_serialization=False. Leave it out"):
        ensemble.save_pretrained(folder / "other", safe_serialization=False)
    with pytest.raises(ConfigurationError, match=r"takes no \['selected_adapters'\]"):
        ensemble.save_pretrained(folder / "other", selected_adapters=["first"])
    with pytest.raises(EnsembleError, match=r"\['private'\] are for an upload"):
        ensemble.save_pretrained(folder / "other", private=True)
    assert not Path(folder / "other").exists()
