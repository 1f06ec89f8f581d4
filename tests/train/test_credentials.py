"""Credentials among arguments are never written, whatever the argument."""

import io
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer
from trl import ModelConfig

from helpers.trainers import sft_trainer
from hf_ensemble import EnsembleConfig, EnsembleSFTConfig, SelectionConfig, SelectionSFTConfig
from hf_ensemble.cli.parsing import parse
from hf_ensemble.cli.words import Words
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.train.configuration import choices_of, json_values
from hf_ensemble.train.credentials import arguments_without_secrets, is_secret_name, without_secrets

NAMES = ("token", "use_auth_token", "hf_token", "apiKey", "API-KEY", "password", "aws_secret_access_key", "headers")
NAMES += ("Authorization", "proxies", "storage_options", "connection_string", "client_secret", "cookies", "sas_token")


def secret(place):
    return f"planted-{place}"


def planted(place, hint):
    """Values with secrets for an argument of a type."""
    url = f"https://user:{secret(place)}@host/path?signature={secret(place)}#{secret(place)}"
    if "dict" in hint:
        inner = {name: {"x": secret(place)} if name[0] in "hps" else secret(place) for name in NAMES}
        return {**inner, "nested": [{"token": secret(place)}], "url": url, "use_cache": True}
    if "list" in hint:
        return [url, url]
    return url


@pytest.mark.parametrize("config", [EnsembleSFTConfig, EnsembleConfig, SelectionSFTConfig, SelectionConfig])
def test_no_argument_that_takes_text_lets_a_secret_through(config, tmp_path):
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    places = [own.name for own in fields(config) if "str" in str(own.type) or "dict" in str(own.type)]
    hints = {own.name: str(own.type) for own in fields(config)}
    assert len(places) > 30
    for place in places:
        setattr(args, place, planted(place, hints[place]))
    text = str({**json_values(args.to_dict()), **choices_of(args)})
    assert "planted" not in text
    assert "use_cache" in text and "https://host/path" in text
    file = io.BytesIO()
    public = arguments_without_secrets(args)
    torch.save(public, file)
    assert b"planted" not in file.getvalue() and "planted" not in public.to_json_string()
    # The user's own arguments are as they were.
    assert args.hub_token == planted("hub_token", "str")


def test_names_of_credentials_and_of_other_things():
    assert all(map(is_secret_name, (*NAMES, "hub_token", "WANDB_API_KEY", "x-amz-security-token", "sshPassword")))
    others = ("eos_token", "pad_token", "tokenizer", "max_tokens", "include_num_input_tokens_seen", "key", "author")
    assert not any(map(is_secret_name, (*others, "token_type_ids"[6:], "num_keys", "passes", "secretary")))


def test_tokens_in_texts_and_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    texts = ["hf_" + "a" * 34, "see 0123456789abcdef here", "Authorization: Bearer abc.def", "s3://u:p@bucket/x?y=z"]
    assert [without_secrets(text) for text in texts] == [
        "<secret>",
        "see <secret> here",
        "Authorization: Bearer <secret>",
        "s3://bucket/x",
    ]
    for text in ("org/model", "the name", "a@b", "https://host/path", "hf_internal-testing/tiny"):
        assert without_secrets(text) == text


def test_tokens_of_the_vocabulary_are_compared(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder, eos_token="<eos>")
    arguments = trainer._run_configuration()["arguments"]
    assert arguments["eos_token"] == "<eos>" and "hub_token" not in arguments


def test_a_repository_given_as_an_address_is_refused_without_its_password(tmp_path, base_folder):
    with pytest.raises(ConfigurationError, match="hub_model_id has to be a repository's name") as caught:
        sft_trainer(tmp_path / "run", base_folder, hub_model_id="https://user:planted@huggingface.co/user/name")
    assert "planted" not in str(caught.value)


def test_a_tokenizer_forgets_what_it_was_loaded_with(tmp_path, base_folder):
    trainer = sft_trainer(tmp_path / "run", base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder, headers={"a": "planted"}, storage_options={"k": "planted"})
    trainer.args.hub_token = "planted"
    trainer.processing_class.init_kwargs.update(tokenizer.init_kwargs)
    from hf_ensemble.train.credentials import forget_secrets_of

    forget_secrets_of(trainer.processing_class)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "training_args.bin").is_file() and trainer.args.hub_token == "planted"
    for path in (tmp_path / "saved").rglob("*"):
        assert b"planted" not in path.read_bytes(), path
    with pytest.raises(ConfigurationError, match=r"taken \['use_auth_token'\] for special tokens.*Load it with token="):
        forget_secrets_of(SimpleNamespace(init_kwargs={}, special_tokens_map={"use_auth_token": "planted"}))


def test_messages_about_flags_do_not_repeat_their_values(tmp_path):
    with pytest.raises(ConfigurationError, match="Unknown arguments: --hub_tokn --api_key. See") as caught:
        parse([ModelConfig], ["--hub_tokn", "planted", "--api_key=planted"])
    assert "planted" not in str(caught.value)
    (tmp_path / "run.yaml").write_text("seed: 1\nhub_token: 'planted\nmodel: [x\n")
    with pytest.raises(ConfigurationError, match="is not YAML in line") as caught:
        Words.of(["--config", str(tmp_path / "run.yaml")])
    assert "planted" not in str(caught.value)
