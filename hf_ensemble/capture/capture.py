"""`capture_gradients`: captures the gradient features of tasks into a store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._settings import checked_path, checked_shard
from ..errors import CaptureError, ConfigurationError
from ..models.inputs import is_encoder_decoder
from ..models.kinds import check_answers_of, check_kind
from ..models.token_checks import check_token_rows
from ..models.wrappers import unwrapped
from ..store import GradientStore, TrainingRecipe
from ..tasks import TaskCollator, TaskSet, data_collator_for, encode, length_limit
from ..tasks.encoding import joined
from .capture_pass import CapturePass
from .config import CaptureConfig, check_single_pass
from .margin import check_single_answers

SHARD_SIZE = 512


@overload
def capture_gradients(
    model: nn.Module, tasks: TaskSet, config: CaptureConfig | None = None, *args: Any, **kwargs: Any
) -> GradientStore: ...


@overload
def capture_gradients(
    model: nn.Module, tasks: TaskSet, config: Mapping[str, CaptureConfig], *args: Any, **kwargs: Any
) -> dict[str, GradientStore]: ...


def capture_gradients(
    model: nn.Module,
    tasks: TaskSet,
    config: CaptureConfig | Mapping[str, CaptureConfig] | None = None,
    output_dir: str | Path = "gradients",
    processing_class: PreTrainedTokenizerBase | None = None,
    data_collator: TaskCollator | None = None,
    encoded: Mapping[str, Dataset] | None = None,
    overwrite: bool = False,
    disable_tqdm: bool = False,
    recipe: TrainingRecipe | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    shard: tuple[int, int] | None = None,
) -> GradientStore | dict[str, GradientStore] | None:
    """Capture the gradient features of training and validation examples: of all, or of a sample of each task's.

    `capture_rows` of [`CaptureConfig`] says how many; the store records how many rows a sample is of, and estimates are
    of trainings on all of them.

    Modes, gradients and random state of the model are left unchanged. An interrupted pass resumes at the first
    unfinished shard when it is started again with the same arguments, and ends with the same store. Under a distributed
    launcher the processes share the shards.

    Args:
        model (`nn.Module`):
            Causal language model, encoder-decoder or sequence classifier with trainable adapter parameters. Gradients
            are taken at their present values, theta0.
        tasks (`TaskSet`): tasks to capture.
        config (`CaptureConfig` or `dict[str, CaptureConfig]`, *optional*):
            Settings of the pass, or multiple settings by name that differ in projection and stored data type: one pass
            then fills a store for each.
        output_dir (`str` or `Path`, *optional*, defaults to `"gradients"`):
            Directory of the store, or of one sub-folder per name with multiple configs.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; required unless `encoded` is given.
        data_collator (`TaskCollator`, *optional*): collates encoded rows. A padding collator by default.
        encoded (`dict[str, Dataset]`, *optional*): tokenized rows by split, with `task` and `example_id`.
        overwrite (`bool`, *optional*, defaults to `False`): replace a store with another identity.
        disable_tqdm (`bool`, *optional*, defaults to `False`): hide the progress bar.
        recipe (`TrainingRecipe`, *optional*):
            The training on all tasks that continues from theta0, recorded in the store for estimates. Its number of
            parameters is filled in from the preconditioner.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Adam or a related optimizer, whose second moments `preconditioner="optimizer"` uses.
        shard (`tuple[int, int]`, *optional*):
            Index and number of parts, of which this call captures one. Other processes may capture the other parts at
            the same time, on other machines that share the folder; the store is then that of a single pass.

    Returns:
        `GradientStore`: the finished store, or the stores by name with multiple configs; `None` where other parts are
        missing.

    Raises:
        `StoreMismatchError`: when the directory has a store of another model, other data or other settings.
        `StoreError`:
            For gradients that are not finite, unless the settings exclude them; and when the disk is too small for the
            store.
        `StoreLockedError`: when another process is writing into the directory, or the same part of it.
        `CaptureError`: when the model has no trainable parameter, or a row no answer token.
        `ConfigurationError`:
            For models of another kind, and models that have no answers of the rows' kind; for multiple configs that one
            pass cannot serve, numbers of rows of unknown tasks, and a shard that is none.

    Example:

    ```python
    >>> store = capture_gradients(model, tasks, processing_class=tokenizer, output_dir="gradients")  # doctest: +SKIP
    ```
    """
    _check_arguments(model, tasks, config, processing_class)
    configs = config if isinstance(config, Mapping) else {"": config or CaptureConfig()}
    configs = {name: each.resolved() for name, each in configs.items()}
    if isinstance(config, Mapping):
        check_single_pass(configs)
    if encoded is None:
        encoded = encoded_splits(model, tasks, processing_class, next(iter(configs.values())).max_length)
    for rows in encoded.values():
        check_token_rows(model, rows)
    if data_collator is None:
        data_collator = data_collator_for(
            tasks.row_format, processing_class, labels_are_tokens=not tasks.labels_are_classes
        )
    capture = CapturePass(unwrapped(model), tasks, configs, encoded, data_collator, optimizer)
    folders = {name: checked_path("output_dir", output_dir) / name for name in configs}
    shard = checked_shard("shard", shard)
    stores = capture.run(folders, SHARD_SIZE, overwrite, disable_tqdm, recipe, shard)
    return stores if stores is None or isinstance(config, Mapping) else stores[""]


def _check_arguments(model: Any, tasks: Any, config: Any, processing_class: Any) -> None:
    """Raise `ConfigurationError` for arguments and models of another kind, and rows with several answers."""
    configs = config.values() if isinstance(config, Mapping) else [] if config is None else [config]
    for name, value, kind in (
        ("model", model, nn.Module),
        ("tasks", tasks, TaskSet),
        *(("config", each, CaptureConfig) for each in configs),
        *([] if processing_class is None else [("processing_class", processing_class, PreTrainedTokenizerBase)]),
    ):
        if not isinstance(value, kind):
            raise ConfigurationError(f"Expected {name} to be a {kind.__name__}, found {value!r:.60}.")
    check_kind(model)
    check_answers_of(model, tasks)
    check_single_answers(tasks)


def encoded_splits(
    model: nn.Module,
    tasks: TaskSet,
    processing_class: PreTrainedTokenizerBase | None,
    max_length: int | None,
    splits: Sequence[str] = ("train", "validation"),
) -> dict[str, Dataset]:
    """The tasks' rows of these splits as tokens, cut at `max_length` or else where the tokenizer cuts.

    Raises:
        `CaptureError`: without a tokenizer.
        `ConfigurationError`: for models that have no answers of the rows' kind.
        `TaskError`: for rows that have no answer left, or cannot be encoded.
    """
    if processing_class is None:
        raise CaptureError(
            "Expected processing_class or encoded, found neither. Pass the tokenizer as processing_class."
        )
    check_answers_of(model, tasks)
    if max_length is None:
        max_length = length_limit(processing_class)
    arguments = (
        processing_class,
        tasks.row_format,
        tasks.label_space,
        max_length,
        is_encoder_decoder(unwrapped(model)),
    )
    # Each task on its own: messages may have other keys in another task.
    return {split: joined(encode(rows, *arguments) for rows in tasks.split(split).values()) for split in splits}
