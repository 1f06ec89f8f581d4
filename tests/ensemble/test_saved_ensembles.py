"""What a saved ensemble keeps: its base, its vocabulary, its labels, and the ensemble that was there before."""

import textwrap

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub
from helpers.member_kinds import KINDS, NAMES, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.capture import model_identity
from hf_ensemble.ensemble import AdapterSource
from hf_ensemble.ensemble.saving.card import is_hub_id, public_name
from hf_ensemble.errors import EnsembleError, EnsembleLoadError

WEIGHTS = {"sums": {"first": 0.5, "second": 0.5}}


def ensemble(folder, scale=0.15, **changes):
    base = AutoModelForCausalLM.from_pretrained(folder)
    return PeftEnsembleModel(make(base, KINDS["ranks and scalings"], scale), NAMES, WEIGHTS, **changes)


@pytest.fixture
def base(tmp_path):
    """A base in a folder whose relative path could be a name on the Hub; the working directory is above it."""
    toy.save_model(toy.llama(), tmp_path / "models" / "base")
    return tmp_path / "models" / "base"


def test_a_relative_path_is_never_taken_for_a_name_on_the_hub(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = ensemble("models/base")
    assert model_identity(made.model)["name"] == "./models/base" and public_name("./models/base") == "base"
    made.save_pretrained("saved")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert not any(is_hub_id(name) for name in ("", "./models/base", "../base", str(base)))
    loaded = PeftEnsembleModel.from_pretrained("../saved")
    assert loaded.model.peft_config["first"].base_model_name_or_path == "models/base"
    for one in (made, loaded):
        assert one.merge("sums").config.base_model_name_or_path == str(base)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_weights_and_scales(base, tmp_path, kind):
    made = ensemble(base, scales={"sums": kind(2)})
    made.weights["sums"] = {"first": kind(1)}
    made.save_pretrained(tmp_path / "saved")
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    assert loaded.weights == {"sums": {"first": 1.0}} and loaded.scales == {"sums": 2.0}
    assert all(type(value) is float for value in ensemble(base, scales={"sums": kind(2)}).scales.values())


@pytest.mark.parametrize(
    "name, value",
    [
        ("weights", {"sums": {"first": float("nan")}}),
        ("weights", {"sums": {"fourth": 1.0}}),
        ("default_weights", {"first": 0.0}),
        ("scales", {"sums": -1.0}),
        ("combination", "median"),
        ("routing", "dice"),
        ("routing_temperature", 0.0),
    ],
)
def test_what_could_not_be_loaded_replaces_nothing(base, tmp_path, name, value):
    ensemble(base).save_pretrained(tmp_path / "saved")
    files = {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    other = ensemble(base, scale=0.3)
    setattr(other, name, value)
    with pytest.raises(EnsembleError):
        other.save_pretrained(tmp_path / "saved")
    assert {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()} == files


def test_separate_adapters_have_revisions_of_their_own(base, tmp_path):
    ensemble(base).save_pretrained(tmp_path / "saved")
    sources = {"a": AdapterSource(str(tmp_path / "saved"), subfolder="adapters/first")}
    with pytest.raises(EnsembleLoadError, match=r"found 'v2'. Give each its own: AdapterSource"):
        PeftEnsembleModel.from_pretrained(sources, revision="v2")


def test_a_resized_vocabulary_of_a_base_in_another_cache(base, tmp_path):
    with local_hub(tmp_path / "hub") as endpoint:
        code = f"""
            from huggingface_hub import HfApi
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM
            from hf_ensemble import PeftEnsembleModel

            HfApi().create_repo("tester/base")
            HfApi().upload_folder(repo_id="tester/base", folder_path={str(base)!r})
            base = AutoModelForCausalLM.from_pretrained("tester/base", cache_dir="my_cache")
            base.resize_token_embeddings(base.config.vocab_size + 2)
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), "a")
            PeftEnsembleModel(model, ["a"]).save_pretrained("saved")
            loaded = PeftEnsembleModel.from_pretrained("saved")
            assert loaded.config.vocab_size == base.config.vocab_size, loaded.config.vocab_size
        """
        run_against_hub(textwrap.dedent(code), endpoint, tmp_path / "client")


def test_a_base_that_is_gone_is_said(base, tmp_path, caplog):
    made = ensemble(base)
    base.rename(tmp_path / "moved")
    made.save_pretrained(tmp_path / "saved")
    assert "its vocabulary is taken not to have been resized" in caplog.text


@torch.no_grad()
def test_what_a_classifiers_outputs_are_called(tmp_path):
    toy.bert(num_labels=2).bert.save_pretrained(tmp_path / "encoder")
    names = {0: "sad", 1: "fine", 2: "happy"}
    given = {"num_labels": 3, "id2label": names, "label2id": {own: number for number, own in names.items()}}
    given["problem_type"] = "multi_label_classification"
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", **given)
    made = PeftEnsembleModel(get_peft_model(base, toy.lora("SEQ_CLS"), "a"), ["a"])
    made.save_pretrained(tmp_path / "saved")
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved").config
    assert (loaded.id2label, loaded.label2id) == (names, given["label2id"])
    assert loaded.problem_type == "multi_label_classification"


def two_adapters(base, first, second):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), first, "first")
    model.add_adapter("second", second)
    toy.randomize(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "first, second",
    [
        ({"r": 16, "rank_pattern": {"q_proj": 4, "v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}, {}),
        ({"trainable_token_indices": [3, 4]}, {}),
        ({}, {"trainable_token_indices": [3, 4]}),
    ],
)
def test_members_that_differ_come_back_as_they_were(base, tmp_path, first, second):
    """A rank that no module gets, and rows of tokens that one of them has."""
    own = two_adapters(base, *(toy.lora(**{"target_modules": ["q_proj"], **given}) for given in (first, second)))
    made = PeftEnsembleModel(own, ["first", "second"], WEIGHTS).eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "task": "sums"}
    made.save_pretrained(tmp_path / "saved")
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    assert torch.allclose(loaded(**batch).logits, made(**batch).logits, atol=1e-6)


def test_a_merged_adapter_is_added_beside_one_with_rows_of_tokens(base):
    own = two_adapters(base, toy.lora(trainable_token_indices=[3, 4]), toy.lora())
    merged = PeftEnsembleModel(own, ["first", "second"], {"sums": {"second": 1.0}}).merge("sums")
    ids = torch.tensor([[3, 4, 5]])
    own.set_adapter("second")
    expected = own(ids).logits
    assert torch.allclose(merged.add_to(own, "merged")(ids).logits, expected, atol=1e-5)


def test_layers_within_a_module_that_another_member_has_saved_are_refused(base):
    first, second = toy.lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), toy.lora()
    message = r"\['second'\] have layers in 'lm_head' of the adapter 'first'.*before 'first'"
    with pytest.raises(EnsembleError, match=message):
        PeftEnsembleModel(two_adapters(base, first, second), ["first", "second"])
    PeftEnsembleModel(two_adapters(base, second, first), ["first", "second"])


def test_the_temperature_of_routing_is_saved(base, tmp_path):
    ensemble(base, routing="prompt", routing_temperature=2).save_pretrained(tmp_path / "saved")
    assert PeftEnsembleModel.from_pretrained(tmp_path / "saved").routing_temperature == 2.0
    with pytest.raises(EnsembleError, match="routing_temperature has to be"):
        ensemble(base, routing_temperature=-1.0)
