"""The local Hub of `hub_server.py` answers the real `huggingface_hub` and PEFT clients end to end."""

from pathlib import Path

import pytest

from helpers.hub_server import local_hub, run_against_hub

TINY_BASE_MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
base_model = LlamaForCausalLM(
    LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
)
"""

PUSH_TWO_ADAPTERS = """
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

config = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False}  # random, as zeros would equal zeros
model = get_peft_model(base_model, LoraConfig(**config), adapter_name="group_0")
model.add_adapter("group_1", LoraConfig(**config))
model.push_to_hub("tester/adapters")
for name in ("group_0", "group_1"):
    torch.save(get_peft_model_state_dict(model, adapter_name=name), f"{name}.pt")
"""

LOAD_TWO_ADAPTERS = """
from pathlib import Path
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model_state_dict

loaded = PeftModel.from_pretrained(base_model, "tester/adapters", adapter_name="group_0", subfolder="group_0")
loaded.load_adapter("tester/adapters", adapter_name="group_1", subfolder="group_1")
for name in ("group_0", "group_1"):
    expected = torch.load(Path("../pusher", f"{name}.pt"))
    found = get_peft_model_state_dict(loaded, adapter_name=name)
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)

files = {file.path: file for file in HfApi().list_repo_tree("tester/adapters", "group_1")}
assert files["group_1/adapter_model.safetensors"].lfs is not None
assert files["group_1/adapter_config.json"].lfs is None
"""


@pytest.fixture
def hub(tmp_path: Path):
    """Endpoint of a Hub without repositories."""
    with local_hub(tmp_path / "hub") as endpoint:
        yield endpoint


def test_adapters_pushed_and_read_back_are_bit_equal(hub: str, tmp_path: Path) -> None:
    run_against_hub(TINY_BASE_MODEL + PUSH_TWO_ADAPTERS, hub, tmp_path / "pusher")
    run_against_hub(TINY_BASE_MODEL + LOAD_TWO_ADAPTERS, hub, tmp_path / "reader")


def test_model_card_pushed_and_loaded(hub: str, tmp_path: Path) -> None:
    code = """
    import pytest
    from huggingface_hub import ModelCard, create_repo, upload_file

    repo_id = create_repo("card").repo_id
    assert repo_id == "hub-user/card"
    card = ModelCard("---\\nlicense: apache-2.0\\ntags:\\n- ensemble\\n---\\n\\n# A card\\n")
    card.push_to_hub(repo_id)
    loaded = ModelCard.load(repo_id)
    assert loaded.data.license == "apache-2.0" and loaded.data.tags == ["ensemble"]
    assert loaded.content == card.content

    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=b"---\\nlicense: [unclosed\\n---\\n")
    """
    run_against_hub(code, hub, tmp_path / "home")


def test_commits_stay_readable_and_unchanged_files_make_none(hub: str, tmp_path: Path) -> None:
    code = """
    from pathlib import Path
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    api = HfApi()
    api.create_repo("tester/revisions", private=True)
    assert api.create_repo("tester/revisions", exist_ok=True).repo_id == "tester/revisions"
    folder = Path("upload")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "notes.txt").write_text("first")
    (folder / "weights.bin").write_bytes(bytes(1000))
    (folder / "empty.txt").touch()

    first = api.upload_folder(repo_id="tester/revisions", folder_path=folder).oid
    assert api.upload_folder(repo_id="tester/revisions", folder_path=folder).oid == first
    (folder / "deep" / "notes.txt").write_text("second")
    second = api.upload_folder(repo_id="tester/revisions", folder_path=folder).oid
    info = api.model_info("tester/revisions")
    assert info.sha == second != first and info.private

    old = Path(snapshot_download("tester/revisions", revision=first))
    new = Path(snapshot_download("tester/revisions"))
    assert (old / "deep" / "notes.txt").read_text() == "first"
    assert Path(hf_hub_download("tester/revisions", "deep/notes.txt")).read_text() == "second"
    assert (old / "weights.bin").read_bytes() == bytes(1000)
    names = {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}
    assert names == {".gitattributes", "deep/notes.txt", "empty.txt", "weights.bin"}

    api.delete_folder("deep", "tester/revisions")
    api.delete_file("empty.txt", "tester/revisions")
    assert set(api.list_repo_files("tester/revisions")) == {".gitattributes", "weights.bin"}
    """
    run_against_hub(code, hub, tmp_path / "home")


def test_what_is_missing_raises_the_errors_of_the_real_hub(hub: str, tmp_path: Path) -> None:
    code = """
    import pytest
    from huggingface_hub import HfApi, create_repo, file_exists, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    )

    create_repo("tester/almost-empty")
    assert file_exists("tester/almost-empty", ".gitattributes")
    assert not file_exists("tester/almost-empty", "missing.json")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("tester/almost-empty", "missing.json")
    for revision in ("no-such-branch", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download("tester/almost-empty", ".gitattributes", revision=revision)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("tester/missing", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="tester/missing")
    with pytest.raises(HfHubHTTPError, match="does not answer DELETE /api/repos/delete"):
        HfApi().delete_repo("tester/almost-empty")
    """
    run_against_hub(code, hub, tmp_path / "home")


def test_code_that_fails_shows_its_output(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="(?s)exit status 1.*printed.*reason"):
        run_against_hub("print('printed'); raise SystemExit('reason')", "http://127.0.0.1:1", tmp_path)
