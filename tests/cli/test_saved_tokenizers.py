"""Which tokenizer reads the prompts of a saved ensemble."""

import json
import shutil
import textwrap

import pytest
from transformers import AutoModelForCausalLM

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub
from helpers.member_kinds import KINDS, NAMES, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.cli.main import main

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture
def saved(tmp_path):
    """A saved ensemble without a tokenizer, and its base."""
    toy.save_model(toy.llama(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    weights = {"sums": {"first": 0.5, "second": 0.5}}
    PeftEnsembleModel(make(base, KINDS["ranks and scalings"]), NAMES, weights).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def answers(capsys, *flags):
    assert main(["generate", *map(str, flags), "--task", "sums", "--prompts", "1 + 1", "--max_new_tokens", "3"]) == 0
    return capsys.readouterr().out


def test_that_of_the_base_model_that_is_loaded(saved, tmp_path, capsys):
    expected = answers(capsys, "--ensemble", saved)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    assert answers(capsys, "--ensemble", saved, "--base_model", tmp_path / "elsewhere") == expected


def test_a_repositorys_with_its_chat_template(saved, tmp_path):
    """Which lies in a file of its own."""
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(saved)
    assert (saved / "chat_template.jinja").is_file()
    line = ["generate", "--ensemble", "tester/one", "--base_model", str(tmp_path / "base"), "--chat"]
    line += ["--task", "sums", "--prompts", "1 + 1", "--max_new_tokens", "3", "--json"]
    with local_hub(tmp_path / "hub") as endpoint:
        code = f"""
            from huggingface_hub import HfApi
            from hf_ensemble.cli.main import main

            HfApi().create_repo("tester/one")
            HfApi().upload_folder(repo_id="tester/one", folder_path={str(saved)!r})
            raise SystemExit(main({line!r}))
        """
        done = run_against_hub(textwrap.dedent(code), endpoint, tmp_path / "client")
    assert json.loads(done.stdout.splitlines()[-1])["answers"][0]["task"] == "sums"
