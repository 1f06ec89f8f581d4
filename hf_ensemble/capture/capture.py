"""The capture pass: one forward and backward pass over all examples of all tasks into a gradient store."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .._compat import package_versions
from ..errors import CaptureError
from ..logging import get_logger
from ..models.batches import HalvingOnFullMemory, length_sorted_batches
from ..models.wrappers import unwrapped
from ..store import (
    CapturedRows,
    GradientStore,
    GradientStoreWriter,
    GradientStoreWriters,
    TrainingRecipe,
    exclusive_writers,
)
from ..tasks import EXAMPLE_ID, TASK, RowFormat, TaskCollator, TaskSet, data_collator_for, encode, length_limit
from .config import CaptureConfig, check_single_pass
from .gradients import BatchGradients, GradientExtractor
from .identity import model_identity
from .preconditioner import Preconditioner
from .training_arguments import fresh_lora_gain

logger = get_logger(__name__)

SHARD_SIZE = 512
# Number of training rows, evenly spaced over all tasks, whose second moments make the preconditioner.
MOMENT_ROWS = 128


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
) -> GradientStore | dict[str, GradientStore]:
    """Capture the gradient features of all training and validation examples.

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

    Returns:
        `GradientStore`: the finished store, or the stores by name with multiple configs.

    Raises:
        `StoreMismatchError`: when the directory has a store of another model, other data or other settings.
        `StoreError`:
            For gradients that are not finite, unless the settings exclude them; when another pass is writing into the
            directory; and when the disk is too small for the store.
        `CaptureError`: when the model has no trainable parameter, or a row no answer token.
        `ConfigurationError`: for multiple configs that one pass cannot serve.

    Example:

    ```python
    >>> store = capture_gradients(model, tasks, processing_class=tokenizer, output_dir="gradients")  # doctest: +SKIP
    ```
    """
    configs = config if isinstance(config, Mapping) else {"": config or CaptureConfig()}
    configs = {name: each.resolved() for name, each in configs.items()}
    if isinstance(config, Mapping):
        check_single_pass(configs)
    folders = {name: Path(output_dir) / name for name in configs}
    first = next(iter(configs.values()))
    model = unwrapped(model)
    if encoded is None:
        if processing_class is None:
            raise CaptureError(
                "Expected processing_class or encoded, found neither. Pass the tokenizer as processing_class."
            )
        max_length = first.max_length if first.max_length is not None else length_limit(processing_class)
        encoded = {
            split: encode(tasks.table(split), processing_class, tasks.row_format, tasks.label_space, max_length)
            for split in ("train", "validation")
        }
    if data_collator is None:
        data_collator = data_collator_for(
            tasks.row_format, processing_class, labels_are_tokens=tasks.row_format is not RowFormat.CLASSIFICATION
        )
    state = PartialState()
    extractor = GradientExtractor(
        model,
        [each.projection_dim for each in configs.values()],
        [each.projection_seed for each in configs.values()],
        first.margin,
        tasks.label_space,
        mixed_precision=first.mixed_precision,
    )
    plan = [
        (split, task, example_id)
        for split, table in encoded.items()
        for task, example_id in zip(table[TASK], table[EXAMPLE_ID])
    ]
    identity = {
        "model": model_identity(model),
        "data": {
            "row_format": tasks.row_format.value,
            "fingerprint": tasks.fingerprint,
            "tokens": _fingerprint(encoded),
        },
    }
    with exclusive_writers(list(folders.values())) if state.is_main_process else nullcontext():
        with state.main_process_first():
            writers = GradientStoreWriters(
                [
                    GradientStoreWriter(
                        folders[name],
                        {**identity, "config": own.identity()},
                        plan,
                        projection.dim,
                        own.feature_dtype,
                        SHARD_SIZE,
                        overwrite,
                        state.is_main_process,
                    )
                    for (name, own), projection in zip(configs.items(), extractor.projections)
                ]
            )
        missing = writers.missing_shards()
        state.wait_for_everyone()
        if state.is_main_process:
            writers.check_space()
        if first.preconditioner != "none":
            if state.is_main_process:
                kept = writers.preconditioner()
                if kept is None:
                    made = _preconditioner(extractor, encoded["train"], data_collator, first, optimizer)
                    kept = {name: scale.cpu().numpy() for name, scale in made.scales.items()}
                writers.write_preconditioner(kept)
            state.wait_for_everyone()
            extractor.preconditioner = Preconditioner(writers.preconditioner())
        mine = missing[state.process_index :: state.num_processes]
        _capture_shards(extractor, writers, mine, encoded, data_collator, first, disable_tqdm)
        if mine and extractor.unused:
            logger.warning("No example depends on %s. Their features are zero.", ", ".join(extractor.unused[:5]))
        state.wait_for_everyone()
        if recipe is not None and extractor.preconditioner is not None:
            recipe = replace(
                recipe,
                num_parameters=extractor.preconditioner.num_effective_parameters(),
                input_gain=fresh_lora_gain(model),
            )
        if state.is_main_process:
            coverage = {"hooked": extractor.hooked, "fallback": extractor.fallback}
            writers.finish(recipe, coverage=coverage, versions=package_versions())
        state.wait_for_everyone()
    stores = {name: GradientStore(folder) for name, folder in folders.items()}
    excluded = next(iter(stores.values())).excluded
    if excluded and state.is_main_process:
        named = ", ".join(f"{task}/{example_id}" for _, task, example_id in excluded[:5])
        logger.warning("%d examples with gradients that are not finite are excluded: %s.", len(excluded), named)
    return stores if isinstance(config, Mapping) else stores[""]


def _preconditioner(extractor, rows: Dataset, data_collator, config, optimizer) -> Preconditioner:
    if config.preconditioner == "optimizer":
        if optimizer is None:
            raise CaptureError(
                "preconditioner='optimizer' needs the optimizer of a training. Pass it as optimizer=..., or set "
                "preconditioner='adam' to estimate the second moments from some rows."
            )
        return Preconditioner.from_optimizer(optimizer, extractor.parameters)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(MOMENT_ROWS, len(rows))).round().astype(int))
    chosen_rows = [_without_none(rows[int(i)]) for i in chosen]
    moments: dict[str, torch.Tensor] = {}
    add = HalvingOnFullMemory(lambda batch: extractor.add_second_moments(data_collator(batch), moments))
    lengths = [len(row["input_ids"]) for row in chosen_rows]
    with torch.random.fork_rng():
        for batch in length_sorted_batches(lengths, config.batch_size, config.max_batch_tokens):
            add([chosen_rows[position] for position in batch])
    return Preconditioner.from_second_moments(moments)


def _capture_shards(extractor, writer, shards, encoded, data_collator, config, disable_tqdm) -> None:
    starts = dict(zip(encoded, np.cumsum([0, *(len(table) for table in encoded.values())])))
    bounds = list(starts.items())

    def row_at(position: int):
        split, start = next(item for item in reversed(bounds) if position >= item[1])
        return encoded[split][int(position - start)]

    total = sum(len(writer.rows_of(shard)) for shard in shards)
    hidden = disable_tqdm or not PartialState().is_local_main_process
    extract = HalvingOnFullMemory(lambda batch: extractor(data_collator(batch)))
    with tqdm(total=total, desc="Capturing gradients", unit="example", disable=hidden) as bar, torch.random.fork_rng():
        for shard in shards:
            rows = [_without_none(row_at(position)) for position in writer.rows_of(shard)]
            captured = _capture_rows(extract, rows, config, bar)
            writer.write_shard(shard, captured, exclude_non_finite=config.non_finite == "exclude")


def _capture_rows(extract: HalvingOnFullMemory, rows: list[dict], config: CaptureConfig, bar: tqdm) -> CapturedRows:
    """Capture rows in batches of similar length, to save padding; results are in the order of the rows."""
    batches = length_sorted_batches([len(row["input_ids"]) for row in rows], config.batch_size, config.max_batch_tokens)
    parts: list[BatchGradients] = []
    for batch in batches:
        parts += extract([rows[position] for position in batch])
        bar.update(len(batch))
    back = np.argsort([position for batch in batches for position in batch])

    def joined(name: str) -> np.ndarray:
        return torch.cat([getattr(part, name) for part in parts]).numpy()[back]

    return CapturedRows(joined("features"), joined("margin"), joined("loss"), joined("num_tokens"))


def _without_none(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


def _fingerprint(encoded: Mapping[str, Dataset]) -> str:
    """Fingerprint of the tokens, which depend on the tokenizer and the truncation as well as on the tasks."""
    digest = hashlib.blake2b(digest_size=16)
    for split, table in encoded.items():
        digest.update(split.encode())
        for column in ("input_ids", "labels"):
            for value in table[column]:
                digest.update(np.asarray(value, dtype=np.int64).tobytes())
    return digest.hexdigest()
