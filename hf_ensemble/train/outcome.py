"""What a run's trainer answers once the run has made something, and as its parent does before."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from .._processes import is_main_process, run_on_main
from ..errors import ConfigurationError, PushError, TaskError
from ..evaluate import TaskScores
from ..logging import get_logger
from ..publish import card_metadata, push_run_to_hub, write_model_card
from ..runs import Results
from ..tasks.task import as_dataset
from .concurrent.process_state import ProcessState
from .inputs.evaluation_rows import positions_by_task, token_tables

logger = get_logger(__name__)

# Arguments of `SFTConfig` that put several rows into one.
_PACKING = ("packing", "eval_packing", "padding_free")


class OutcomeMixin:
    """Evaluation, predictions, card and upload of a run. Before it is trained, they are the parent's of one adapter."""

    _is_working: bool = False

    def _is_trained(self) -> bool:
        raise NotImplementedError

    def _made_folder(self) -> Path:
        """Where what the run has made lies."""
        raise NotImplementedError

    def _serve(self) -> None:
        """Make what the run has trained the trainer's model."""

    def _report(self, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation, and tell callbacks."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def evaluate(
        self,
        eval_dataset: Mapping[str, Dataset] | Dataset | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and accuracy of every task; before [`train`], the parent trainer's evaluation of the untrained adapter.

        Called by a callback during a training, it is the parent's of the adapter that is being trained, and the
        training goes on as if it had not been.

        The run keeps the scores by their prefix. Its report and its card are made from those of `test`, of all tasks,
        and else from those of `eval`, which are of its own evaluation rows. Other rows with the prefix `eval`, and
        fewer tasks than are kept, leave the records as they are.

        Args:
            eval_dataset (`dict[str, Dataset]` or `Dataset`, *optional*):
                Rows of each task, for example test rows; or one dataset that has the task of each row in a column
                `task`; or a task's name, for its evaluation rows. The evaluation rows of all tasks by default. Without
                an adapter, rows as the constructor takes them, or tokens as the parent does.
            ignore_keys (`list[str]`, *optional*): used before training only.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): first word of the metrics' names.

        Returns:
            `dict[str, float]`: `PREFIX_TASK_loss` and `PREFIX_TASK_accuracy` (share of rows whose whole answer is
            right), the metrics of generated answers where there are `answer_metrics` (`PREFIX_TASK_exact_match`), and
            those of `compute_metrics`; the same of their means over the tasks as `PREFIX_mean_...`, and as
            `PREFIX_loss` and so on, which in a selection are the target's; and the evaluation's speed.

        Raises:
            `TaskError`: for rows without a task and unknown tasks, and for a task whose every answer is cut off.
        """
        if self.trains_directly:
            return super().evaluate(self._direct_rows(eval_dataset), ignore_keys, metric_key_prefix)
        if self._has_one_adapter():
            eval_dataset = None if eval_dataset is None else self._tables(eval_dataset)
            with self._single_trainer() as trainer:
                return trainer.evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._record_model()
        self._memory_tracker.start()
        with self.working():
            metrics = self.flow.evaluate(self._scored_tables(eval_dataset), metric_key_prefix, eval_dataset is None)
        self._report(metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self,
        test_dataset: Mapping[str, Dataset] | Dataset | str,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Predictions of the ensemble, or of a selection's final adapter; before [`train`], of the untrained adapter.

        Called by a callback during a training, they are of the adapter that is being trained.

        Args:
            test_dataset (`dict[str, Dataset]` or `Dataset`):
                As for [`evaluate`]. A classifier's rows may lack the label, or have -1 for each.
            ignore_keys (`list[str]`, *optional*): outputs of the model that are left out.
            metric_key_prefix (`str`, *optional*, defaults to `"test"`): first word of the metrics' names.

        Returns:
            `PredictionOutput`: logits and labels of all rows, padded with -100, in the order of one dataset's rows, and
            else one task's after the other's; and the parent's metrics of each task (`PREFIX_TASK_loss`, and those of
            `compute_metrics`) and their means. Beside the logits of an encoder-decoder stand its encoder's states, NaN
            for an ensemble, which has none.

        Raises:
            `TaskError`: for rows without a task and unknown tasks.
        """
        if self.trains_directly:
            rows = self._direct_rows(test_dataset, needs_labels=False)
            return super().predict(rows, ignore_keys, metric_key_prefix)
        if isinstance(test_dataset, list):
            test_dataset = as_dataset("all", test_dataset)
        tables, positions = self._tables(test_dataset, needs_labels=False), positions_by_task(test_dataset)
        if self._has_one_adapter():
            with self._single_trainer() as trainer:
                return _in_order(trainer.predict(tables, ignore_keys, metric_key_prefix), positions)
        self._record_model()
        self._memory_tracker.start()
        with self.working(), self.flow.predictor(tables) as predictor:
            output = predictor.predict_tasks(tables, ignore_keys, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        self._memory_tracker.stop_and_update_metrics(output.metrics)
        return _in_order(output, positions)

    def scores(
        self, eval_dataset: Mapping[str, Dataset] | Dataset | str | None = None
    ) -> dict[str, dict[str, TaskScores]]:
        """Scores of the base model and of every system of the run, by system and task.

        Args:
            eval_dataset (`dict[str, Dataset]` or `Dataset`, *optional*): as for [`evaluate`].

        Raises:
            `ConfigurationError`: before training, and during one.
        """
        if not self._is_trained():
            raise ConfigurationError("There is nothing to score yet: call train() first.")
        self._check_between_trainings()
        tables = self._scored_tables(eval_dataset)
        self._record_model()
        return self.flow.scores(tables)

    def report(self) -> Results:
        """A verdict, and every system's scores with their intervals, on test rows or else on evaluation rows.

        It is also in `results.json`. Printed, it is the verdict and tables.

        Raises:
            `ConfigurationError`: before training.
        """
        if self.trains_directly or not self._is_trained():
            raise ConfigurationError("There is nothing to report yet: call train() first.")
        return run_on_main(lambda: self.run_directory.read(Results))

    def _scored_tables(self, eval_dataset: Mapping[str, Dataset] | Dataset | str | None) -> Mapping[str, Dataset]:
        if eval_dataset is None:
            return self.flow.context.eval_tables
        return {name: self._remove_unused_columns(rows) for name, rows in self._tables(eval_dataset).items()}

    def _tables(self, given: Mapping[str, Dataset] | Dataset | str, needs_labels: bool = True) -> dict[str, Dataset]:
        if isinstance(given, str):
            if given not in self.eval_dataset:
                raise TaskError(f"Unknown task {given!r}; the tasks are {list(self.eval_dataset)}.")
            given = {given: self.eval_dataset[given]}
        return token_tables(given, self.tasks, self.prepare_rows, needs_labels)

    def _record_model(self) -> None:
        """Between trainings the model is as no trainer has touched it, but for what the user has changed."""
        if not self._is_working and self._model_state.at_work() is None:
            self._model_state.record()

    def _has_one_adapter(self) -> bool:
        """Whether the run has made nothing yet, or is called from within a training."""
        return not self._is_trained() or self._model_state.at_work() is not None

    def _check_between_trainings(self) -> None:
        """Refuse what a callback asks of the run during one of its trainings.

        Raises:
            `ConfigurationError`: during a training.
        """
        if not self.trains_directly and self._model_state.at_work() is not None:
            raise ConfigurationError(
                "Expected a call between the trainings of the run, found one from within a training, by a callback. "
                "Call evaluate() or predict() there, which are about the adapter that is being trained, and all else "
                "before or after train()."
            )

    @contextmanager
    def _single_trainer(self) -> Iterator[Trainer]:
        """While open, the parent trainer over all tasks, for what it can do while there is one adapter.

        A training that is interrupted by it finds its model, and its random numbers, as they were.
        """
        args = copy.copy(self.args)
        args.push_to_hub = False
        interrupted, process = self._model_state.at_work(), ProcessState()
        self._record_model()
        state = interrupted or self._model_state
        with state.restored():
            try:
                yield self.adapter_trainer(
                    args, self.train_dataset, self.eval_dataset, self.tasks.sampling_weights, state.model
                )
            finally:
                if interrupted is not None:
                    process.restore()

    def _prediction_trainer(self, tables: Mapping[str, Dataset]) -> Trainer:
        """A trainer of this one's class with these evaluation sets, one row each: a row has one task."""
        args = copy.copy(self.args)
        args.push_to_hub = False
        # One device, since threads would not share the tasks of a batch.
        args._n_gpu = min(args.n_gpu, 1)
        for name in _PACKING:
            if hasattr(args, name):
                setattr(args, name, False)
        return self.adapter_trainer(args, self.train_dataset, tables, self.tasks.sampling_weights)

    def _push_finished(self) -> None:
        """Upload what `train` has made. A failure is reported: the run is complete without it."""
        try:
            self.push_to_hub()
        except PushError as error:
            logger.error("The run in %r is complete. %s", self.args.output_dir, error)
        except Exception as error:  # whatever the connection, the Hub or a file raises
            logger.error(
                "The run in %r is complete, but was not uploaded: %s: %s. Call trainer.push_to_hub(), or start the "
                "same script again.",
                self.args.output_dir,
                type(error).__name__,
                error,
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

        Takes the arguments of `Trainer.push_to_hub`; `hub_model_id`, `hub_token`, `hub_private_repo` and
        `hub_revision` are read from `args`, and `kwargs` are those of [`create_model_card`]. It always waits for the
        upload.

        Raises:
            `ConfigurationError`: before training.
            `PushError`: where the Hub refuses or cannot be reached; the message says how to go on.
        """
        if self.trains_directly:
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        if not is_main_process():
            return None
        if not self._is_trained():
            raise ConfigurationError("There is nothing to upload yet: call train() first.")
        return push_run_to_hub(
            self.run_directory.path,
            self.args.hub_model_id or Path(self.args.output_dir).resolve().name,
            metadata=card_metadata(kwargs),
            folder=self._made_folder(),
            again="trainer.push_to_hub()",
            commit_message=commit_message,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the ensemble, or of the final adapter; before [`train`], what the parent trainer writes.

        Takes the parent's arguments, of which `language`, `license`, `tags` and the datasets go into the card's
        metadata. A card that is there keeps what is not between its two marks.
        """
        if self.trains_directly or not self._is_trained():
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            given = dict(zip(inspect.signature(super().create_model_card).parameters, args)) | kwargs
            write_model_card(self.run_directory.path, folder=self._made_folder(), metadata=card_metadata(given))


def _arrays(values: Any) -> Iterator[np.ndarray]:
    """Arrays within predictions or labels."""
    if isinstance(values, np.ndarray):
        yield values
    for own in values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else ():
        yield from _arrays(own)


def _in_order(output: PredictionOutput, positions: list[int] | None) -> PredictionOutput:
    """Predictions in the order of the rows that they were asked for."""

    def sort(values: Any) -> Any:
        if isinstance(values, tuple):
            return tuple(map(sort, values))
        if isinstance(values, dict):
            return {name: sort(own) for name, own in values.items()}
        # Batches that are not joined have no place of their own.
        is_whole = isinstance(values, np.ndarray) and len(values) == len(positions)
        return values[positions] if is_whole else values

    if positions is None:
        return output
    first = next(_arrays(output.label_ids), None)
    if first is not None and len(first) < len(positions):
        logger.warning(
            "%d of %d rows have no answer within max_length and are left out: predictions are one task's after the "
            "other's, not in the order of the rows.",
            len(positions) - len(first),
            len(positions),
        )
    return output._replace(predictions=sort(output.predictions), label_ids=sort(output.label_ids))
