"""Ensembles of adapters from everywhere: the Hub's cache, folders and repositories apart, every kind of adapter."""

import json
import shutil
import textwrap

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import AdapterSource
from hf_ensemble.ensemble.saving.files import save_adapter
from hf_ensemble.errors import EnsembleLoadError

ADAPTER = "adapter_config.json"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A saved ensemble and its base."""
    folder = tmp_path_factory.mktemp("origin")
    toy.save_model(toy.llama(), folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    ensemble = PeftEnsembleModel(make(base, KINDS["ranks and scalings"]), NAMES, {"x": {"first": 0.5, "second": 0.5}})
    ensemble.save_pretrained(folder / "saved")
    return folder


def test_links_within_the_hubs_cache_are_followed(origin, tmp_path):
    """A snapshot of the Hub consists of links to files beside it."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in (origin / "saved").rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(number))
        target = snapshot / path.relative_to(origin / "saved")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(blobs / str(number))
    assert PeftEnsembleModel.from_pretrained(snapshot).adapter_names == NAMES


# PEFT (0.21) cannot save an adapter without token rows beside one that has them.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tokens"])
@torch.no_grad()
def test_every_kind_of_adapter_passes_the_checks(kind, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ensemble = PeftEnsembleModel(make(base, KINDS[kind]), NAMES, {"x": {"first": 0.5, "third": 0.5}})
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    ids = torch.randint(3, 20, (3, 5))
    assert torch.allclose(loaded(ids, task="x").logits, ensemble(ids, task="x").logits, atol=1e-6)


@torch.no_grad()
def test_adapters_of_different_folders(origin, tmp_path):
    shutil.copytree(origin / "saved/adapters/first", tmp_path / "alone")
    sources = {"a1": tmp_path / "alone", "b2": AdapterSource(str(origin / "saved"), subfolder="adapters/second")}
    made = PeftEnsembleModel.from_pretrained(sources)
    made.weights = {"x": {"a1": 0.5, "b2": 0.5}}
    ids = torch.randint(3, 20, (3, 5))
    expected = PeftEnsembleModel.from_pretrained(origin / "saved")(ids, task="x").logits
    assert torch.allclose(made(ids, task="x").logits, expected, atol=1e-6)
    made.combination, made.routing = "log_probs", "prompt"
    made.save_pretrained(tmp_path / "saved")
    again = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    assert torch.allclose(again(ids, task="x").logits, expected.log_softmax(-1), atol=1e-5)
    assert (again.combination, again.routing) == ("log_probs", "prompt")
    stock = PeftModel.from_pretrained(toy.llama(), tmp_path / "saved", subfolder="adapters/b2")
    assert stock(ids).logits.isfinite().all()
    for bad, message in [
        ({}, "at least one adapter"),
        ({"../x": tmp_path / "alone"}, "not a valid folder name"),
        ({"c": AdapterSource(str(origin / "saved"), subfolder="../saved")}, "leads out of"),
        ({"c": tmp_path / "nothing"}, "neither a folder nor a repository"),
    ]:
        with pytest.raises(EnsembleLoadError, match=message):
            PeftEnsembleModel.from_pretrained(bad)
    path = tmp_path / "alone" / ADAPTER
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "other/base"}))
    with pytest.raises(EnsembleLoadError, match="Expected adapters of one base model and task type"):
        PeftEnsembleModel.from_pretrained(sources)
    with_base = PeftEnsembleModel.from_pretrained(sources, base_model=str(origin / "base"))
    assert with_base.adapter_names == ["a1", "b2"]


def test_adapters_of_different_repositories(origin, tmp_path):
    with local_hub(tmp_path / "hub") as endpoint:
        code = f"""
            import torch
            from huggingface_hub import HfApi
            from transformers import AutoModelForCausalLM
            from hf_ensemble import PeftEnsembleModel
            from hf_ensemble.ensemble import AdapterSource
            from hf_ensemble.errors import EnsembleLoadError

            api, saved = HfApi(), {str(origin / "saved")!r}
            for name in ("one", "two"):
                api.create_repo(f"tester/{{name}}")
            api.upload_folder(repo_id="tester/one", folder_path=f"{{saved}}/adapters/first")
            first = api.upload_folder(repo_id="tester/two", folder_path=saved)
            api.upload_file(
                repo_id="tester/two", path_in_repo="adapters/second/adapter_config.json", path_or_fileobj=b"broken"
            )
            base = AutoModelForCausalLM.from_pretrained({str(origin / "base")!r})
            sources = {{"a1": "tester/one", "b2": AdapterSource("tester/two", first.oid, "adapters/second")}}
            made = PeftEnsembleModel.from_adapters(base, sources, {{"x": {{"a1": 0.5, "b2": 0.5}}}})
            ids = torch.arange(3, 9).unsqueeze(0)
            expected = PeftEnsembleModel.from_pretrained(saved)(ids, task="x").logits
            assert torch.allclose(made(ids, task="x").logits, expected, atol=1e-6)
            base = AutoModelForCausalLM.from_pretrained({str(origin / "base")!r})
            try:
                PeftEnsembleModel.from_adapters(base, {{"b2": AdapterSource("tester/two", None, "adapters/second")}})
            except EnsembleLoadError as error:
                assert "adapter_config.json is damaged" in str(error)
            else:
                raise AssertionError("the newest revision is damaged")
        """
        run_against_hub(textwrap.dedent(code), endpoint, tmp_path / "client")


def test_sets_of_an_adapters_configuration_are_written_in_one_order(tmp_path):
    """In whichever order a process has them, so that checksums of the file agree."""
    model = get_peft_model(toy.llama(), toy.lora())

    class Backwards(set):
        def __iter__(self):
            return iter(sorted(super().__iter__(), reverse=True))

    files = []
    for number, kind in enumerate((set, Backwards)):
        model.peft_config["default"].target_modules = kind(["q_proj", "v_proj"])
        save_adapter(model, "default", tmp_path / str(number))
        files.append((tmp_path / str(number) / ADAPTER).read_bytes())
    assert files[0] == files[1] and json.loads(files[0])["target_modules"] == ["q_proj", "v_proj"]
