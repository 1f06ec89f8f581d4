"""Credentials among arguments: they are used, and never written."""

import copy
import os
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..errors import ConfigurationError

# Words of names under which loaders, file systems and trackers take credentials.
_SECRET_WORDS = {
    "auth",
    "authorization",
    "bearer",
    "cookie",
    "cookies",
    "credential",
    "credentials",
    "header",
    "headers",
}
_SECRET_WORDS |= {"apikey", "passphrase", "passwd", "password", "proxies", "proxy", "pwd", "sas", "secret", "secrets"}
_SECRET_WORDS |= {"signature", "token"}
_SECRET_PHRASES = ("access_key", "account_key", "api_key", "connection_string", "private_key", "storage_options")
# Tokens of a vocabulary.
_TEXT_TOKEN = re.compile(r"(^|_)(audio|bos|cls|eos|extra|image|mask|pad|sep|special|unk|video)_token$")
_LOGIN_TOKEN = re.compile(r"(^|_)(access|api|auth|bearer|hf|hub|login|secret|session|user)_token$")
_REPLACEMENTS = [
    # User and password, query and fragment of a URL.
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s?#]*@", re.IGNORECASE), r"\1"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s?#]*)[?#]\S*", re.IGNORECASE), r"\1"),
    (re.compile(r"(Bearer|Basic) \S+"), r"\1 <secret>"),
    (
        re.compile(r"\b(hf|ghp|gho|github_pat|glpat|sk|xoxb|xoxp)[-_][A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b"),
        "<secret>",
    ),
]
# Shorter values of environment variables are words that may stand anywhere.
_MIN_LENGTH = 8


def is_secret_name(name: str) -> bool:
    """Whether a value of this name may be a credential."""
    words = "_".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()
    if _TEXT_TOKEN.search(words):
        return False
    return bool(_SECRET_WORDS & set(words.split("_"))) or any(phrase in words for phrase in _SECRET_PHRASES)


def without_secrets(value: Any) -> Any:
    """A value without the credentials in it: entries of dicts by their names, texts by their form.

    Users, passwords and queries are taken out of URLs; well-known forms of access tokens, and what an environment
    variable with the name of a credential holds, are replaced.
    """
    if type(value) is str:
        for pattern, replacement in _REPLACEMENTS:
            value = pattern.sub(replacement, value)
        for secret in _environment_secrets():
            value = value.replace(secret, "<secret>")
        return value
    if isinstance(value, Mapping):
        return {key: without_secrets(entry) for key, entry in value.items() if not is_secret_name(str(key))}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(without_secrets(entry) for entry in value)
    return value


def _environment_secrets() -> list[str]:
    values = [value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _MIN_LENGTH]
    # The longest first: one may be a part of another.
    return sorted(values, key=len, reverse=True)


def arguments_without_secrets(args: TrainingArguments) -> TrainingArguments:
    """A copy of a trainer's arguments that may be written to files and trackers."""
    args = copy.copy(args)
    for name, value in list(vars(args).items()):
        if is_secret_name(name):
            setattr(args, name, None)
        elif type(value) in (str, dict, list, tuple):
            setattr(args, name, without_secrets(value))
    return args


def check_hub_model_id(name: str | None) -> None:
    """Raise `ConfigurationError` for a URL, which may hold credentials, in place of a repository's name."""
    if name is not None and "://" in name:
        raise ConfigurationError(
            f"hub_model_id has to be a repository's name such as 'user/name', found the URL {without_secrets(name)!r}."
        )


def forget_secrets_of(tokenizer: PreTrainedTokenizerBase) -> None:
    """Drop what a tokenizer was loaded with and would be saved with, where it may be a credential.

    Raises:
        `ConfigurationError`: for a credential that the tokenizer has taken for one of its special tokens.
    """
    arguments = getattr(tokenizer, "init_kwargs", {})
    taken = [name for name in getattr(tokenizer, "special_tokens_map", {}) if _LOGIN_TOKEN.search(name)]
    if taken:
        raise ConfigurationError(
            f"The tokenizer has taken {taken} for special tokens, and would be saved with them. Load it with token=."
        )
    for name in [name for name in arguments if is_secret_name(name) and not name.endswith("_token")]:
        del arguments[name]
