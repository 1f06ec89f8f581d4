"""How the prompts of a saved ensemble are read."""

import io
import json
import shutil
import sys
import textwrap

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from helpers import toy
from helpers.hub_server import local_hub, run_against_hub
from helpers.markdown import code_blocks
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


def test_a_tokenizer_without_a_token_for_padding(saved, tmp_path, capsys):
    """As those of GPT-2 and Llama; the card's code pads too."""
    expected = answers(capsys, "--ensemble", saved)
    tokenizer = toy.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    assert answers(capsys, "--ensemble", saved) == expected
    block = code_blocks((saved / "README.md").read_text(), "python")[0]
    exec(block.replace("path/to/saved", str(saved)), {})


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_prompt_is_refused_before_anything_is_loaded(capsys, monkeypatch, blank):
    assert main(["generate", "--ensemble", "nowhere", "--task", "sums", "--prompts", "1 + 1", blank]) == 1
    assert "found none in prompt 1 (counted from 0)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"1 + 1\n{blank}\n2 + 2\n"))
    assert main(["generate", "--ensemble", "nowhere", "--task", "sums"]) == 1
    assert "found none in prompt 1 (counted from 0)" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [64, None])
def test_a_classifiers_texts_are_cut_off_where_its_positions_end(tmp_path, capsys, caplog, limit):
    toy.save_model(toy.bert(num_labels=3), tmp_path / "base")
    tokenizer = toy.tokenizer()
    tokenizer.model_max_length = limit or VERY_LARGE_INTEGER
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, toy.lora("SEQ_CLS"), "one")
    PeftEnsembleModel(model, ["one"], {"films": {"one": 1.0}}).save_pretrained(tmp_path / "saved")
    text = "the film was good " * 40
    line = ["generate", "--ensemble", str(tmp_path / "saved"), "--task", "films", "--prompts", text, text, "the film"]
    assert main(line) == 0
    assert "2 of 3 texts are cut off after 64 tokens" in caplog.text
