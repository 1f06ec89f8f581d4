"""What a model card can say of saved adapters: their metadata, and code that loads them and runs as it stands."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftConfig
from safetensors import safe_open

from ..._cards import CARD, CardParts, render, update_card_file
from ..._files import read_json
from ...logging import get_logger
from ..members import BaseModelReference
from .auto_classes import CAUSAL, CLASSIFIER, SEQ_TO_SEQ, adapter_auto_class
from .ensemble_config import ADAPTER_WEIGHTS, ADAPTERS_FOLDER, SavedEnsembleConfig
from .vllm import vllm_obstacles, vllm_rank
from .vocabulary import saved_vocabulary

logger = get_logger(__name__)

# A prompt, or the messages of a chat.
Example = str | list[dict[str, Any]]
# What of a LoRA adapter has no place in a plain one whose rank is known.
_NOT_MERGED = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
_TOKENIZER_FILE = "tokenizer_config.json"
_MAX_NEW_TOKENS = 64


def public_name(name: str | None) -> str | None:
    """A Hub id as it is, and the last part of a folder's path: a card does not tell the paths of a machine."""
    return Path(name).name if name and (Path(name).is_absolute() or name.startswith(("./", "../"))) else name


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one that the Hub can link to."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


_PIPELINES = {
    CLASSIFIER: "text-classification",
    CAUSAL: "text-generation",
    SEQ_TO_SEQ: "text-generation",
}


@dataclass(frozen=True)
class Loading:
    """Values of the code that loads saved adapters.

    Args:
        load_from (`str`): folder or repository.
        is_on_hub (`bool`): whether it is a repository.
        base (`BaseModelReference`): the base model, its name being empty where the Hub does not have it.
        base_folder (`str`): what the base's folder was called, where the Hub does not have it.
        has_tokenizer (`bool`): whether the tokenizer lies beside the adapters.
        examples (`dict[str, Example]`): a prompt, text or chat of each task, by `""` where there are no tasks.
        members (`list[str]`): names of the ensemble's adapters.
        merged_rank (`dict[str, int]`): rank of each task's merged adapter; empty where adapters cannot be merged.
        has_labels (`bool`): whether the ensemble names the classifier's outputs.
        is_served_by_vllm (`bool`): whether vLLM serves the merged or only adapter.
        vocabulary (`int`, *optional*): tokens of the base, where its vocabulary was resized.
        needs_padding_token (`bool`): whether the tokenizer has none, or is unknown.
        has_own_end (`bool`): whether the tokenizer beside the adapters has an end-of-sequence token.
        combination (`str`): of the ensemble, see [`PeftEnsembleModel`].
    """

    load_from: str
    is_on_hub: bool
    base: BaseModelReference
    base_folder: str = ""
    has_tokenizer: bool = True
    examples: Mapping[str, Example] = field(default_factory=dict)
    members: Sequence[str] = ()
    merged_rank: Mapping[str, int] = field(default_factory=dict)
    has_labels: bool = False
    is_served_by_vllm: bool = False
    vocabulary: int | None = None
    needs_padding_token: bool = False
    has_own_end: bool = False
    combination: str = "logits"
    max_new_tokens: int = _MAX_NEW_TOKENS

    @property
    def is_classifier(self) -> bool:
        return self.base.auto_class == CLASSIFIER

    @property
    def continues_prompts(self) -> bool:
        """Whether what is generated begins with the prompt."""
        return self.base.auto_class == CAUSAL

    @property
    def shown(self) -> dict[str, Example]:
        """At most two tasks with their examples."""
        return dict(list(self.examples.items())[:2])

    @property
    def first_task(self) -> str:
        return next(iter(self.examples))

    @property
    def name(self) -> str:
        """What a server may call the adapter."""
        return self.load_from.rstrip("/").rpartition("/")[2]

    @property
    def merged_folder(self) -> str:
        return f"merged-{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.first_task)}" if self.first_task else "merged"

    @property
    def are_chats(self) -> bool:
        return any(not isinstance(example, str) for example in self.shown.values())

    @property
    def chats(self) -> list[list[dict[str, Any]]]:
        """The shown examples, each as messages."""
        return [own if not isinstance(own, str) else [{"role": "user", "content": own}] for own in self.shown.values()]

    @property
    def base_arguments(self) -> dict[str, Any]:
        """What the base is loaded with beside its name."""
        given = {key: getattr(self.base, key) for key in ("revision", "num_labels", "pad_token_id")}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def served_rank(self) -> int | None:
        """`max_lora_rank` that vLLM needs for every task's merged adapter."""
        return vllm_rank(LoraConfig(r=max(self.merged_rank.values()))) if self.merged_rank else None


def ensemble_loading(
    config: SavedEnsembleConfig, folder: Path, repo_id: str | None = None, examples: Mapping[str, Example] | None = None
) -> Loading:
    """How an ensemble in a folder is loaded from there, or from the repository that it is pushed to."""
    configs = {member.name: _adapter_config(folder / ADAPTERS_FOLDER / member.name) for member in config.members}
    base = config.base_model
    tasks = list(config.weights) or [""]
    ranks = {task: _merged_rank(config.weights.get(task, config.default_weights), configs) for task in tasks}
    can_merge = all(rank is not None for rank in ranks.values())
    vocabularies = {name: _vocabulary(folder / ADAPTERS_FOLDER / name, config) for name, config in configs.items()}
    obstacles = [vllm_obstacles(config, vocabularies[name] is not None) for name, config in configs.items()]
    is_served = can_merge and base.auto_class == CAUSAL and not any(obstacles)
    return Loading(
        load_from=repo_id or card_path(folder),
        is_on_hub=repo_id is not None,
        base=_public_reference(base),
        base_folder=public_name(base.name_or_path) or "",
        has_tokenizer=(folder / _TOKENIZER_FILE).is_file(),
        needs_padding_token=not _own_token(folder, "pad_token"),
        has_own_end=_own_token(folder, "eos_token"),
        examples={task: (examples or {}).get(task) or f"A prompt {task and f'of {task}'}".strip() for task in tasks},
        members=[member.name for member in config.members],
        merged_rank=ranks if can_merge else {},
        has_labels=config.label_space is not None,
        combination=config.combination,
        is_served_by_vllm=is_served and max(ranks.values()) <= 512,
        vocabulary=next((own for own in vocabularies.values() if own is not None), None),
    )


def adapter_loading(
    folder: Path,
    base: BaseModelReference,
    examples: Mapping[str, Example],
    repo_id: str | None = None,
    config: PeftConfig | None = None,
) -> Loading:
    """How one plain adapter in a folder is loaded; its configuration is read from there unless it is given."""
    config = config or _adapter_config(folder)
    vocabulary = _vocabulary(folder, config)
    is_served = base.auto_class == CAUSAL and not vllm_obstacles(config, vocabulary is not None)
    return Loading(
        load_from=repo_id or card_path(folder),
        is_on_hub=repo_id is not None,
        base=_public_reference(base),
        base_folder=public_name(base.name_or_path) or "",
        has_tokenizer=(folder / _TOKENIZER_FILE).is_file(),
        needs_padding_token=not _own_token(folder, "pad_token"),
        has_own_end=_own_token(folder, "eos_token"),
        examples=examples,
        merged_rank={"": config.r} if is_served else {},
        is_served_by_vllm=is_served,
        vocabulary=vocabulary,
    )


def model_loading(
    folder: Path, base: BaseModelReference, examples: Mapping[str, Example], repo_id: str | None = None
) -> Loading:
    """How a whole model in a folder is loaded."""
    return Loading(
        load_from=repo_id or card_path(folder),
        is_on_hub=repo_id is not None,
        base=_public_reference(base),
        base_folder=public_name(base.name_or_path) or "",
        needs_padding_token=not _own_token(folder, "pad_token"),
        examples=examples,
    )


def _own_token(folder: Path, name: str) -> bool:
    """Whether a tokenizer lies in a folder and has a special token; one of the base model is not looked at."""
    file = folder / _TOKENIZER_FILE
    return file.is_file() and bool(read_json(file).get(name))


def _public_reference(base: BaseModelReference) -> BaseModelReference:
    if is_hub_id(base.name_or_path):
        return base
    return replace(base, name_or_path="", revision=None)


def _adapter_config(folder: Path) -> PeftConfig:
    return PeftConfig.from_pretrained(str(folder))


def _vocabulary(folder: Path, config: PeftConfig) -> int | None:
    """Tokens of the base that a saved adapter was trained on, where its vocabulary was resized."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        return None
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dict
    return saved_vocabulary(shapes, config)


def saved_auto_class(folder: Path) -> str:
    """The auto class of a saved adapter's base; that of causal models where the adapter does not tell."""
    return adapter_auto_class(_adapter_config(folder)) or CAUSAL


def _merged_rank(weights: Mapping[str, float], configs: Mapping[str, PeftConfig]) -> int | None:
    """Rank of the weighted sum of adapters; `None` where there is none."""
    own = [configs[name] for name, weight in weights.items() if weight]
    if not all(isinstance(config, LoraConfig) for config in own):
        return None
    if any(getattr(config, name, None) for config in own for name in _NOT_MERGED):
        return None
    return sum(max([config.r, *config.rank_pattern.values()]) for config in own)


def adapter_metadata(
    base: BaseModelReference, tags: Sequence[str], library: str = "peft", relation: str = "adapter"
) -> dict[str, Any]:
    """Metadata of adapters, or of a model: what they are, and of which base."""
    name = base.name_or_path
    return {
        "library_name": library,
        **({"pipeline_tag": _PIPELINES[base.auto_class]} if base.auto_class in _PIPELINES else {}),
        # A local folder is no model id that the Hub could link to.
        **({"base_model": name, "base_model_relation": relation} if is_hub_id(name) else {}),
        "tags": list(dict.fromkeys(tags)),
    }


def ensemble_metadata(config: SavedEnsembleConfig, folder: Path) -> dict[str, Any]:
    """Metadata of an ensemble. Its library is this one: PEFT finds no adapter at the repository's root."""
    kinds = {
        _adapter_config(folder / ADAPTERS_FOLDER / member.name).peft_type.value.lower() for member in config.members
    }
    tags = ["hf-ensemble", "ensemble", "peft", *sorted(kinds), *config.tags]
    return adapter_metadata(config.base_model, tags, "hf-ensemble")


def saved_card(folder: Path, config: SavedEnsembleConfig, repo_id: str | None = None) -> CardParts:
    """What the card of a saved ensemble is made of."""
    loading = ensemble_loading(config, folder, repo_id)
    body = render("saved_ensemble_card.md.jinja", ensemble=config, loading=loading)
    return CardParts(ensemble_metadata(config, folder), body)


def write_saved_card(folder: Path, config: SavedEnsembleConfig) -> None:
    """Write or update the card of a saved ensemble. A card that cannot be written is reported, and stops nothing."""
    with reporting_failed_card(folder):
        update_card_file(folder / CARD, *saved_card(folder, config))


@contextmanager
def reporting_failed_card(folder: Path) -> Iterator[None]:
    """While open, whatever fails is reported in one line: what was trained and saved is worth more than its card."""
    try:
        yield
    except Exception as error:
        logger.warning("The model card in %r was not written: %s: %s", str(folder), type(error).__name__, error)


def card_path(folder: Path) -> str:
    """A folder as a card names it: as it was given, but no path of a machine."""
    return folder.as_posix() if not folder.is_absolute() else f"path/to/{folder.name}"
