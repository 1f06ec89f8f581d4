"""What a run of several trainings cannot finish, found before anything is trained."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin, Trainer
from trl import SFTTrainer

from ..._settings import check_bitsandbytes
from ...callbacks import GradientCaptureCallback, ModelCardCallback, PushToHubCallback, TaskMetricsCallback
from ...callbacks.host_rows import copied, same_random_numbers
from ...ensemble import PeftEnsembleModel
from ...ensemble.adapter_kinds import adapter_obstacle
from ...ensemble.saving.adapter_tensors import embedding_layers
from ...ensemble.saving.files import base_reference
from ...errors import ConfigurationError, EnsembleLoadError
from ...models.inputs import is_encoder_decoder
from ...models.kinds import check_answers_of, check_kind
from ...tasks import RowFormat, TaskSet

# Arguments of the constructors that have to be of some kind, or None.
_KINDS: dict[str, tuple[type, ...]] = {
    "peft_config": (PeftConfig,),
    "callbacks": (list, tuple),
    "processing_class": (PreTrainedTokenizerBase, ProcessorMixin),
    "data_collator": (Callable,),
}

# Callbacks of this package for plain trainers, and what of a run does the same; subclasses before their parents.
# Keywords of the trainers that a run is made of, and what to do instead.
_OF_THE_PARTS = {
    "sampling_weights": "Set it in the trainer's config, as sampling_weights={TASK: weight}.",
    "label_space": "It is that of the tasks: name labels alike in the column label_text where they are the same.",
    "has_tasks": "Leave it out: a single dataset makes the trainer its parent.",
}
_OF_PLAIN_TRAINERS: dict[type, str] = {
    GradientCaptureCallback: "trainer.capture() returns the store of the run's own gradients.",
    TaskMetricsCallback: (
        "Set eval_strategy to have every training log eval_TASK_loss, and pass answer_metrics=AnswerMetric(...) or "
        "compute_metrics for further metrics of each task."
    ),
    PushToHubCallback: "Set push_to_hub=True and hub_model_id to have the run upload what it ends with.",
    ModelCardCallback: "The run writes the card of what it ends with; trainer.create_model_card(...) adds to it.",
}


def check_is_model(model: Any, is_made_later: bool) -> None:
    """Raise `ConfigurationError` for what no adapter can be trained on.

    Args:
        model: what a trainer is given as a model.
        is_made_later (`bool`): whether it may be `None`, since a function makes the model.
    """
    if not isinstance(model, (str, nn.Module)) and not (model is None and is_made_later):
        raise ConfigurationError(
            f"Expected model to be a model, or its name or folder, found a {type(model).__name__}."
        )
    if isinstance(model, PeftEnsembleModel):
        raise ConfigurationError(
            "Expected a model without adapters or with one of yours, found a PeftEnsembleModel. Pass its PeftModel, "
            "ensemble.model: a new run takes the adapters of an earlier one off."
        )


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raise `ConfigurationError` for callbacks, or their classes, that are for a single training only."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        own = next((own for own in _OF_PLAIN_TRAINERS if issubclass(kind, own)), None)
        if own is not None:
            raise ConfigurationError(
                f"Expected callbacks for every training of a run, found a {kind.__name__}, which is for one plain "
                f"training and would act on each of the run's. Leave it out. {_OF_PLAIN_TRAINERS[own]}"
            )


def check_kinds(given: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for arguments of a trainer, by name, that are of another kind than it takes."""
    for name, kinds in _KINDS.items():
        value = given[name]
        if value is not None and not isinstance(value, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigurationError(f"Expected {name} to be a {expected}, found {value!r:.60}.")


def check_before_loading(model: Any, peft_config: PeftConfig | None, trainer_class: type[Trainer]) -> None:
    """Check what is known before a model is loaded and rows are tokenized.

    Args:
        model (`str` or `nn.Module`): the model that a trainer is given.
        peft_config (`PeftConfig`, *optional*): the adapter that it is asked for.
        trainer_class (`type[Trainer]`): its class.

    Raises:
        `ConfigurationError`: for adapters that cannot be saved and loaded beside others, and for models that the
            trainer cannot train.
    """
    if isinstance(model, str):
        check_model_folder(model)
        if issubclass(trainer_class, SFTTrainer):
            # It loads the class that wrote the checkpoint.
            check_kind(next(iter(_config_of(model).get("architectures") or []), ""))
    else:
        _check_has_config(model)
        check_kind(model)
    check_has_no_adapter(model, peft_config)
    if peft_config is None and isinstance(model, PeftModel):
        name = model.active_adapter
        peft_config = model.peft_config[name if isinstance(name, str) else name[0]]
    obstacle = None if peft_config is None else adapter_obstacle(peft_config.to_dict())
    if obstacle is not None:
        raise ConfigurationError(f"A run puts several adapters on one base model, but this adapter {obstacle}.")
    if issubclass(trainer_class, SFTTrainer) and _is_encoder_decoder(model):
        raise ConfigurationError(
            "Expected a model of decoder layers alone, as SFTTrainer trains; found an encoder-decoder. Use "
            f"{trainer_class.__name__.replace('SFT', '')}, which takes the same prompts and completions."
        )


def check_has_no_adapter(model: Any, peft_config: PeftConfig | None) -> None:
    """Raise `ConfigurationError` for a model with an adapter that is to get another one: no file holds both."""
    if peft_config is not None and isinstance(model, PeftModel):
        raise ConfigurationError(
            "Expected a PeftModel or a peft_config, found both: the new adapter would lie on the other one, which is "
            "not saved. Leave peft_config out to train the model's adapter, or pass model.merge_and_unload()."
        )


def checked_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a trainer's constructor, without those that are its parts' own.

    Raises:
        `ConfigurationError`: for one of these.
    """
    for name, advice in _OF_THE_PARTS.items():
        if name in keywords:
            raise ConfigurationError(f"{name} is no argument of the trainer. {advice}")
    return keywords


def _check_has_config(model: nn.Module) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(getattr(base, "config", None), PreTrainedConfig):
        raise ConfigurationError(
            "Expected a transformers model, whose config says how an adapter's base is run and loaded again; found a "
            f"{type(base).__name__} without one. Derive it from PreTrainedModel, or train it without an adapter."
        )


def check_quantization(quantization_config: Any, args: Any) -> None:
    """Raise `ConfigurationError` where a base is to be quantized by bitsandbytes, and that is not installed."""
    kwargs = getattr(args, "model_init_kwargs", None)
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    asked = quantization_config or kwargs.get("quantization_config")
    given = asked if isinstance(asked, dict) else getattr(asked, "__dict__", {})
    method = given.get("quant_method")
    bits = given.get("load_in_4bit") or given.get("load_in_8bit") or getattr(method, "value", method) == "bitsandbytes"
    if bits:
        check_bitsandbytes()


def check_model_folder(name: str) -> None:
    """Raise `ConfigurationError` for a name that is meant as a folder, and is none with a model."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if path.is_dir() and not (path / "config.json").is_file():
        there = sorted(own.name for own in path.iterdir())
        raise ConfigurationError(
            f"Expected a model in {name!r}, found no config.json among {there!s:.200}. Name the folder that "
            "save_pretrained wrote, or a Hub id."
        )
    if path.exists() or not looks_local:
        return
    there = [str(own) for own in path.parent.iterdir() if own.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), there, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(f"There is no folder {name!r} with a model.{meant} Correct the path, or name a Hub id.")


def check_loaded(trainer: Trainer, tasks: TaskSet) -> None:
    """Check the model and the tokenizer of a trainer over several tasks.

    Raises:
        `ConfigurationError`: for chats with an encoder-decoder, for adapters that the trainer would not train, and
            without a padding token; for a model that has no answers of the rows' kind, and a collator that makes no
            batch of the rows.
    """
    model = trainer.model
    check_before_loading(model, None, type(trainer))
    check_answers_of(model, tasks)
    if is_encoder_decoder(model) and tasks.row_format is RowFormat.CHAT:
        raise ConfigurationError(
            "Expected prompts and completions, or token ids with labels, for an encoder-decoder model; found chats. "
            "Make a prompt of the turns before the last one, and a completion of the last."
        )
    wrapped = [isinstance(layer, TrainableTokensWrapper) for layer in embedding_layers(model.get_base_model())]
    if isinstance(trainer, SFTTrainer) and any(wrapped[1:]):
        raise ConfigurationError(
            "SFTTrainer reads the output layer's weight directly, so trainable_token_indices cannot train tokens of "
            "an output layer that is tied to the embeddings. Use modules_to_save=['embed_tokens'] with "
            "ensure_weight_tying=True, or load the model with tie_word_embeddings=False."
        )
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    tokenizer = getattr(collator, "tokenizer", None)
    if tokenizer is not None and tokenizer.pad_token_id is None:
        raise ConfigurationError(
            "Expected a tokenizer with a padding token, found none. Set tokenizer.pad_token, for example to "
            "tokenizer.eos_token, and pass the tokenizer as processing_class."
        )
    check_collator(trainer)


def check_collator(trainer: Trainer) -> None:
    """Raise `ConfigurationError` for a collator that makes no batch of the rows as a trainer over tasks has them."""
    if not isinstance(trainer.train_dataset, Dataset) or not len(trainer.train_dataset):
        return
    row = trainer._remove_unused_columns(trainer.train_dataset, "training")[0]
    # A collator may hold the model.
    shared = [trainer.model, trainer.processing_class]
    shared += [trainer.model.get_base_model()] if isinstance(trainer.model, PeftModel) else []
    collate = copied(trainer.data_collator, {id(own): own for own in shared})
    try:
        with same_random_numbers():
            collate([row])
    except Exception as error:  # whatever a collator raises
        collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
        raise ConfigurationError(
            "Expected a data_collator for rows of tokens, which rows of several datasets are made into; of rows "
            f"with the columns {sorted(row)}, {getattr(collator, '__name__', type(collator).__name__)} made no batch "
            f"({type(error).__name__}: {error!s:.200}). Pass one that pads tokens, such as "
            "DataCollatorWithPadding(tokenizer), or leave it out."
        ) from error


def refuse_padding_collator(collator: Callable) -> None:
    """Raise `ConfigurationError` for a collator set on a trainer of batches without padding, as trl's constructor."""
    raise ConfigurationError(
        "Expected trl's data collator, as it makes batches without padding (padding_free, or packing); found that "
        f"trainer.data_collator was set to a {type(collator).__name__}. Leave it as it is, or set padding_free=False "
        "and packing=False."
    )


def check_base_model(model: PeftModel) -> None:
    """Raise `ConfigurationError` for a base model that a saved ensemble could not load again."""
    try:
        base_reference(model)
    except EnsembleLoadError as error:
        raise ConfigurationError(f"An ensemble has to load its base model again. {error}") from error


def set_padding(trainer: Trainer) -> None:
    """Tell a classifier the tokenizer's padding token where its configuration has none.

    A classifier over decoder layers reads the last token before the padding, and takes one row at a time otherwise.
    """
    config = trainer.model.config.get_text_config()
    tokenizer = trainer.processing_class
    lacks_padding = hasattr(config, "pad_token_id") and config.pad_token_id is None
    if trainer.label_space is not None and lacks_padding and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id


def _is_encoder_decoder(model: Any) -> bool:
    return names_encoder_decoder(model) if isinstance(model, str) else is_encoder_decoder(model)


def names_encoder_decoder(name: str) -> bool:
    """Whether a folder or Hub id is an encoder-decoder's; False for what cannot be read."""
    return bool(_config_of(name).get("is_encoder_decoder"))


def _config_of(name: str) -> dict[str, Any]:
    """The configuration of a folder or Hub id; empty where it cannot be read, as loading the model says why."""
    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError):
        return {}
