"""The stages that the ensemble and the selection trainers share: configuration, capture, scoring."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from .._compat import preserve_active_adapter
from .._files import read_json, write_json
from ..capture import capture_gradients, model_identity, optimizer_metric, training_recipe
from ..ensemble.saving.files import load_adapter
from ..estimate import ObservedRun
from ..logging import get_logger
from ..select import DataSelector, calibration_subsets
from ..store import GradientStore, TrainingRecipe
from .adapter_training import AdapterTraining
from .evaluation import LogitsFunction, Scores, score_tasks
from .run_directory import RunDirectory
from .scored_runs import scored_run

logger = get_logger(__name__)

# Arguments that say where and how to report or how fast to go, not what to train.
_UNCOMPARED = ("output_dir", "run_name", "project", "disable_tqdm", "overwrite_run", "local_rank", "report_to")
_UNCOMPARED += ("per_device_eval_batch_size", "capture_batch_size", "capture_batch_tokens")
_UNCOMPARED += (
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
)
_UNCOMPARED_PREFIXES = ("hub_", "push_to_hub", "log_", "logging_", "save_", "ddp_", "trackio")
# Arguments that only the choice of groups or auxiliary tasks depends on.
_CHOICES = ("num_components", "num_groups", "max_groups", "grouping_method", "overlapping_groups")
_CHOICES += ("num_subsets", "ensemble_weights", "selection_method", "max_auxiliary", "calibration_runs")


class StagesMixin:
    """Runs stages in a [`RunDirectory`]; a trainer over several tasks mixes it in."""

    run_directory: RunDirectory | None = None

    def open_run(self) -> RunDirectory:
        """The run in `output_dir`.

        Raises:
            `RunMismatchError`: when it holds a run of another configuration.
        """
        if self.run_directory is None:
            self.adapter_training = AdapterTraining(self)
            # The others open what the main process has begun.
            with self.args.main_process_first(local=False, desc="opening the run directory"):
                self.run_directory = RunDirectory.open(
                    self.args.output_dir,
                    self._configuration(),
                    self._choices(),
                    self.args.overwrite_run,
                    self.is_world_process_zero(),
                )
            if self.is_world_process_zero():
                write_json(self.run_directory.path / "tasks.json", self.tasks.to_dict())
        return self.run_directory

    def _configuration(self) -> dict[str, Any]:
        arguments = {
            key: value
            for key, value in self.args.to_dict().items()
            if key not in (*_UNCOMPARED, *_CHOICES) and not key.startswith(_UNCOMPARED_PREFIXES)
        }
        return {
            "trainer": type(self).__name__,
            "model": model_identity(self.model),
            "tasks": self.tasks.fingerprint,
            "sampling_weights": self.tasks.sampling_weights,
            "arguments": _json_values(arguments),
        }

    def _choices(self) -> dict[str, Any]:
        return {key: getattr(self.args, key) for key in _CHOICES if hasattr(self.args, key)}

    def capture(self, name: str = "gradients") -> GradientStore:
        """Capture gradients at the current parameters into the run's store."""
        folder = self.open_run().path / name
        with self.run_directory.stage(name) as todo:
            if not todo:
                return GradientStore(folder)
            return capture_gradients(
                self.model,
                self.tasks,
                self.args.capture_config(),
                folder,
                data_collator=self.data_collator,
                encoded={
                    "train": self.train_dataset,
                    "validation": concatenate_datasets([self.eval_dataset[name] for name in self.tasks]),
                },
                overwrite=self.args.overwrite_run,
                disable_tqdm=bool(self.args.disable_tqdm),
                recipe=self._recipe(),
            )

    def _recipe(self) -> TrainingRecipe | None:
        """The training on all tasks; `None` where the features are not in the optimizer's metric."""
        args = self.args
        if args.capture_config().preconditioner != optimizer_metric(args):
            return None
        return training_recipe(args, self.adapter_training.num_steps(self.tasks.names))

    def num_calibration_runs(self) -> int:
        """How many true fine-tunings calibrate the estimates."""
        return self.args.calibration_runs

    def observed_runs(self) -> list[ObservedRun]:
        """The true fine-tunings that calibrate the estimates; those that the run does not hold yet are made."""
        self.open_run()
        subsets = calibration_subsets(self.tasks.names, self.num_calibration_runs(), self.args.seed)
        return [
            scored_run(self, subset, description=f"Calibration run {number}/{len(subsets)}").as_observed()
            for number, subset in enumerate(subsets, start=1)
        ]

    def selector(self, store: GradientStore) -> DataSelector:
        """Predictions from the run's store, with all evidence that the run has."""
        return DataSelector.from_store(
            store,
            self.tasks.names,
            self.args.num_components,
            self.observed_runs(),
            self.tasks.sampling_weights,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ):
        """Upload what the run has made: the ensemble with its model card, or the final adapter.

        Takes what `Trainer.push_to_hub` takes; `hub_model_id`, `hub_token`, `hub_private_repo` and `hub_revision` are
        read from `args`. It always waits for the upload, and makes the card from the run, not from `kwargs`.

        Raises:
            `ConfigurationError`: before training.
        """
        if kwargs:
            logger.info("The card is made from the run; %s are not used.", sorted(kwargs))
        if not self.is_world_process_zero():
            return None
        return self._upload(
            self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )

    def adapter_logits(self, name: str | None) -> LogitsFunction:
        """Logits of one adapter, or of the base model alone."""

        def logits_of(inputs: dict[str, Any], tasks: list[str]):
            with preserve_active_adapter(self.model):
                if name is None:
                    with self.model.disable_adapter():
                        return self.model(**inputs).logits
                self.model.set_adapter(name, inference_mode=True)
                return self.model(**inputs).logits

        return logits_of

    def score_adapter(self, folder: Path | None, datasets: Mapping[str, Dataset], description: str) -> Scores:
        """Scores of a saved adapter, or of the base model, on token tables by task."""
        if folder is None:
            return score_tasks(self, self.adapter_logits(None), datasets, self.label_space, description)
        with self.loaded(folder) as name:
            return score_tasks(self, self.adapter_logits(name), datasets, self.label_space, description)

    def keep_scores(self, prefix: str, scores: Mapping[str, Scores]) -> None:
        """Add the scores of each system to `evaluation.json`, beside those of other prefixes."""
        if self.is_world_process_zero():
            file = self.run_directory.path / "evaluation.json"
            kept = read_json(file) if file.exists() else {}
            write_json(file, {**kept, prefix: scores})

    @contextmanager
    def loaded(self, folder: Path) -> Iterator[str]:
        """While open, a saved adapter lies in the model under the name that is yielded."""
        name = "loaded_for_scoring"
        with preserve_active_adapter(self.model):
            load_adapter(self.model, folder, name)
        try:
            yield name
        finally:
            active = self.model.active_adapter
            self.model.delete_adapter(name)
            self.model.set_adapter(active)


def _json_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration JSON can hold, sets sorted."""
    plain = {}
    for key, value in data.items():
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        elif isinstance(value, Mapping):
            value = _json_values(value)
        elif isinstance(value, (list, tuple)):
            value = [v if isinstance(v, (str, int, float, bool)) else str(v) for v in value]
        elif not (value is None or isinstance(value, (str, int, float, bool))):
            value = str(getattr(value, "value", value))
        plain[key] = value
    return plain
