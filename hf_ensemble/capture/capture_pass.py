"""One pass of a model over the rows of all tasks, which fills one or more gradient stores."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from .._compat import package_versions
from .._processes import even_share, run_in_step, run_on_all, run_on_main, run_on_main_first
from ..errors import CaptureError
from ..logging import get_logger
from ..models.batches import HalvingOnFullMemory, length_sorted_batches
from ..models.sharding import is_sharded
from ..models.usage import FlopSamples, UsageCounter
from ..store import (
    CapturedRows,
    GradientStore,
    GradientStoreWriter,
    GradientStoreWriters,
    TrainingRecipe,
    exclusive_writers,
    shared_records,
)
from ..tasks import EXAMPLE_ID, TASK, TaskCollator, TaskSet
from ..tasks.rows import token_fingerprint
from .config import ROW_LIMITS, CaptureConfig
from .gradients import BatchGradients, GradientExtractor
from .identity import model_identity
from .preconditioner import Preconditioner
from .row_sample import sample_rows
from .training_arguments import fresh_lora_gain

logger = get_logger(__name__)

# Number of training rows, evenly spaced over all tasks, whose second moments make the preconditioner.
MOMENT_ROWS = 128


class CapturePass:
    """A pass over encoded rows with resolved settings; see [`capture_gradients`] for the arguments.

    Args:
        model (`nn.Module`): model without distributed wrappers.
        tasks (`TaskSet`): tasks to capture.
        configs (`dict[str, CaptureConfig]`): resolved settings by store name, which a single pass can serve.
        encoded (`dict[str, Dataset]`): tokenized rows by split, with `task` and `example_id`.
        data_collator (`TaskCollator`): collates encoded rows.
        optimizer (`torch.optim.Optimizer`, *optional*): optimizer for `preconditioner="optimizer"`.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: TaskSet,
        configs: Mapping[str, CaptureConfig],
        encoded: Mapping[str, Dataset],
        data_collator: TaskCollator,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.model = model
        self.tasks = tasks
        self.configs = configs
        self.encoded = encoded
        self.data_collator = data_collator
        self.optimizer = optimizer
        # Settings that all configs share are read from the first one.
        self.config = next(iter(configs.values()))
        self.config.check_limited_tasks(tasks.names)
        self.samples = {
            split: sample_rows(table, self.config.row_limit(split), self.config.capture_seed)
            for split, table in encoded.items()
        }
        self.extractor = GradientExtractor(
            model,
            [each.projection_dim for each in configs.values()],
            [each.projection_seed for each in configs.values()],
            self.config.margin,
            tasks.label_space,
            mixed_precision=self.config.mixed_precision,
        )
        self.state = PartialState()
        # Then processes share the rows of every batch; otherwise, the files.
        self._in_step = is_sharded(model)
        # Rows whose moments are taken and rows that are captured go through the model alike.
        self._samples = FlopSamples()
        self._has_begun = False

    def run(
        self,
        folders: Mapping[str, Path],
        shard_size: int,
        overwrite: bool,
        disable_tqdm: bool,
        recipe: TrainingRecipe | None,
        shard: tuple[int, int] | None = None,
    ) -> dict[str, GradientStore] | None:
        """Fill the stores in `folders`, resume them, or find them complete; with `shard`, fill this part of them.

        Returns `None` where parts that others fill are missing.
        """
        state, places = self.state, list(folders.values())
        shares = shard is not None and state.is_main_process
        with ExitStack() as held:
            # Errors of the main process, which locks and writes, are raised on all: none waits for it in vain.
            run_on_main(lambda: held.enter_context(exclusive_writers(places, shard)))
            identity = model_identity(self.model)
            with shared_records(places) if shares else nullcontext():
                writers = run_on_main_first(
                    lambda: self._writers(folders, identity, shard_size, overwrite, is_shared=shard is not None)
                )
                index, count = shard or (0, 1)
                missing = [number for number in writers.missing_shards() if number % count == index]
                # Nobody writes before all have looked.
                state.wait_for_everyone()
                run_on_main(writers.check_space)
                if self.config.preconditioner != "none":
                    self._set_preconditioner(writers)
            mine = missing if self._in_step else missing[state.process_index :: state.num_processes]
            # Over a sharded base the processes communicate while they capture.
            together = run_in_step if self._in_step else run_on_all
            together(lambda: self._capture_shards(writers, mine, disable_tqdm))
            if mine and self.extractor.unused:
                named = ", ".join(self.extractor.unused[:5])
                logger.warning("No example depends on %s. Their features are zero.", named)
            with shared_records(places) if shares else nullcontext():
                if run_on_main(lambda: shard is not None and bool(writers.missing_shards())):
                    return None
                coverage = {"hooked": self.extractor.hooked, "fallback": self.extractor.fallback}
                finished = {"coverage": coverage, "versions": package_versions()}
                run_on_main(lambda: writers.finish(self._completed(recipe), **finished))
        stores = {name: GradientStore(folder) for name, folder in folders.items()}
        excluded = next(iter(stores.values())).excluded
        if excluded and state.is_main_process:
            named = ", ".join(f"{task}/{example_id}" for _, task, example_id in excluded[:5])
            logger.warning("%d examples with gradients that are not finite are excluded: %s.", len(excluded), named)
        return stores

    def _writers(
        self, folders: Mapping[str, Path], model: Mapping[str, Any], shard_size: int, overwrite: bool, is_shared: bool
    ) -> GradientStoreWriters:
        tables = {split: sample.rows for split, sample in self.samples.items()}
        plan = [
            (split, task, example_id)
            for split, table in tables.items()
            for task, example_id in zip(table[TASK], table[EXAMPLE_ID])
        ]
        data = {
            "row_format": self.tasks.row_format.value,
            "fingerprint": self.tasks.fingerprint,
            "tokens": token_fingerprint(tables),
        }
        sampled = {split: sample for split, sample in self.samples.items() if sample.num_rows}
        settings: dict[str, Any] = {}
        if sampled:
            data["num_rows"] = {split: dict(sample.num_rows) for split, sample in sampled.items()}
            settings = {ROW_LIMITS[split]: dict(sample.num_captured) for split, sample in sampled.items()}
            settings["capture_seed"] = self.config.capture_seed
        identity = {"model": model, "data": data}
        writers = [
            GradientStoreWriter(
                folders[name],
                {**identity, "config": config.identity() | settings},
                plan,
                projection.dim,
                config.feature_dtype,
                shard_size,
                overwrite,
                self.state.is_main_process,
                is_shared,
            )
            for (name, config), projection in zip(self.configs.items(), self.extractor.projections)
        ]
        return GradientStoreWriters(writers)

    def _set_preconditioner(self, writers: GradientStoreWriters) -> None:
        """Load the stores' preconditioner, which the main process computes first if there is none."""
        is_main, scales = self.state.is_main_process, None
        if is_main or self._in_step:
            scales = writers.preconditioner()
            # Before the main process writes what the others look for.
            if self._in_step:
                self.state.wait_for_everyone()
            if scales is None:
                computed = self._computed_preconditioner()
                scales = {name: scale.cpu().numpy() for name, scale in computed.scales.items()}
        if is_main:
            writers.write_preconditioner(scales)
        self.state.wait_for_everyone()
        self.extractor.preconditioner = Preconditioner(writers.preconditioner())

    def _computed_preconditioner(self) -> Preconditioner:
        if self.config.preconditioner == "optimizer":
            if self.optimizer is None:
                raise CaptureError(
                    "preconditioner='optimizer' needs the optimizer of a training. Pass it as optimizer=..., or set "
                    "preconditioner='adam' to estimate the second moments from some rows."
                )
            return Preconditioner.from_optimizer(self.optimizer, self.extractor.parameters)
        table = self.encoded["train"]
        positions = np.unique(np.linspace(0, len(table) - 1, min(MOMENT_ROWS, len(table))).round().astype(int))
        rows = [_without_none(table[int(position)]) for position in positions]
        moments: dict[str, torch.Tensor] = {}

        def add_rows(batch: list[dict]) -> None:
            inputs = self.data_collator(batch)
            with self._counted(usage, inputs):
                self.extractor.add_second_moments(inputs, moments)

        add = HalvingOnFullMemory(add_rows, self.model)
        with UsageCounter(self._samples) as usage, torch.random.fork_rng():
            for batch in self._batches(rows):
                add([rows[position] for position in batch])
        return Preconditioner.from_second_moments(moments)

    def _capture_shards(self, writers: GradientStoreWriters, shards: list[int], disable_tqdm: bool) -> None:
        starts = np.cumsum([0, *(len(sample.rows) for sample in self.samples.values())]).tolist()
        bounds = list(zip(self.samples, starts))

        def row_at(position: int) -> dict:
            split, start = next(bound for bound in reversed(bounds) if position >= bound[1])
            return _without_none(self.samples[split].rows[position - start])

        total = sum(len(writers.rows_of(shard)) for shard in shards)
        hidden = disable_tqdm or not self.state.is_local_main_process

        def gradients(batch: list[dict]) -> BatchGradients:
            inputs = self.data_collator(batch)
            with self._counted(usage, inputs):
                return self.extractor(inputs)

        extract = HalvingOnFullMemory(gradients, self.model)
        with (
            UsageCounter(self._samples) as usage,
            tqdm(total=total, desc="Capturing gradients", unit="example", disable=hidden) as progress,
            torch.random.fork_rng(),
        ):
            for shard in shards:
                rows = [row_at(position) for position in writers.rows_of(shard)]
                captured = self._capture_rows(extract, rows, progress)
                if self.state.is_main_process or not self._in_step:
                    writers.write_shard(shard, captured, exclude_non_finite=self.config.non_finite == "exclude")

    def _capture_rows(self, extract: HalvingOnFullMemory, rows: list[dict], progress: tqdm) -> CapturedRows:
        """Capture rows in batches of similar length, to save padding; results are in the order of the rows."""
        processes = self.state.num_processes if self._in_step else 1
        positions: list[int] = []
        parts: list[BatchGradients] = []
        for batch in self._batches(rows, processes):
            own = [batch[index] for index in even_share(len(batch))] if self._in_step else batch
            parts += extract([rows[position] for position in own])
            positions += own
            progress.update(len(batch))
        names = ("features", "margin", "loss", "num_tokens", "other_entropy")
        columns = [np.array(positions), *(torch.cat([getattr(part, name) for part in parts]).numpy() for name in names)]
        if self._in_step:
            columns = [np.concatenate(column) for column in zip(*run_in_step(lambda: columns))]
        # A row that two processes have captured counts once.
        _, first = np.unique(columns[0], return_index=True)
        return CapturedRows(*(column[first] for column in columns[1:]))

    @contextmanager
    def _counted(self, usage: UsageCounter, inputs: Mapping[str, Any]) -> Iterator[None]:
        """While open, a batch is run; with the first one hooks are checked, which takes further passes."""
        with usage.batch(inputs, is_typical=self._has_begun):
            yield
        self._has_begun = True

    def _batches(self, rows: list[dict], processes: int = 1) -> list[list[int]]:
        """Positions of the rows of each batch, which so many processes share."""
        lengths = [len(row["input_ids"]) for row in rows]
        return length_sorted_batches(lengths, self.config.batch_size, self.config.max_batch_tokens, processes)

    def _completed(self, recipe: TrainingRecipe | None) -> TrainingRecipe | None:
        """The recipe with the effective number of parameters and the input gain, which a preconditioner determines."""
        if recipe is None or self.extractor.preconditioner is None:
            return recipe
        return replace(
            recipe,
            num_parameters=self.extractor.preconditioner.num_effective_parameters(),
            input_gain=fresh_lora_gain(self.model),
        )


def _without_none(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}
