"""Fine-tune on many datasets: group them, train one adapter per group, serve the weighted ensemble."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import TrainOutput

from .._compat import preserve_active_adapter
from .._files import read_json, write_folder_atomically, write_json
from ..ensemble import EnsembleMember, PeftEnsembleModel, fit_weights
from ..ensemble.saving.ensemble_config import ADAPTERS_FOLDER
from ..ensemble.saving.files import load_adapter
from ..errors import ConfigurationError
from ..publish import push_ensemble_to_hub, write_model_card
from ..select import Grouping
from ..store import GradientStore
from .arguments import EnsembleConfig, EnsembleSFTConfig
from .evaluation import Scores, answer_logits, score_tasks
from .multi_task_trainer import MultiTaskSFTTrainer, MultiTaskTrainer
from .scored_runs import keep_scored_run
from .stages import StagesMixin

BASELINE = "baseline"
# Validation rows per task that the ensemble's weights are fitted to: enough for a few weights, small in memory.
_WEIGHT_EXAMPLES = 200
# Logits of all adapters together that are held at once, about a gigabyte: long answers over a large vocabulary.
_WEIGHT_VALUES = 2**28


class EnsembleMixin(StagesMixin):
    """The stages of an ensemble run: capture, baseline, group, one adapter per group, weights, card."""

    ensemble: PeftEnsembleModel | None = None
    grouping: Grouping | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("num_groups", "max_groups"):
            value = getattr(self.args, name)
            if value is not None and value > len(self.tasks):
                raise ConfigurationError(f"{name}={value} is more than the {len(self.tasks)} tasks.")

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        """Run every stage that `output_dir` does not hold yet.

        A run that was killed and is started again with the same configuration goes on where it stopped.

        Returns:
            `TrainOutput`: steps and mean training loss over all adapters, and the metrics of [`evaluate`].

        Raises:
            `RunMismatchError`: when `output_dir` holds a run of another configuration.
        """
        if kwargs:
            raise ConfigurationError(f"train() of an ensemble takes no {sorted(kwargs)}.")
        run = self.open_run()
        store = self.capture()
        trained = []
        if self.args.train_baseline:
            with run.stage("baseline"):
                baseline = self.adapter_training.run(BASELINE, self.tasks.names, run.path / BASELINE)
                keep_scored_run(self, baseline, run.path / BASELINE, description="Evaluating baseline")
                trained.append(baseline)
        self.grouping = self._group(store)
        for name in self.grouping.groups:
            tasks = self.grouping.trained_on(name)
            with run.stage(f"adapter:{name}"):
                folder = run.path / "ensemble" / ADAPTERS_FOLDER / name
                if self.args.train_baseline and len(tasks) == len(self.tasks):
                    # One group of everything is what the baseline was trained on.
                    self._copy_baseline(folder)
                else:
                    trained.append(self.adapter_training.run(name, tasks, folder))
        self.ensemble = self._assemble()
        metrics = self.evaluate()
        steps = sum(adapter.global_step for adapter in trained)
        loss = sum(a.training_loss * a.global_step for a in trained) / max(steps, 1)
        return TrainOutput(steps, loss, metrics)

    def num_calibration_runs(self) -> int:
        """The one adapter for all is a run that exists anyway."""
        return max(self.args.calibration_runs, int(self.args.train_baseline))

    def _group(self, store: GradientStore) -> Grouping:
        file = self.run_directory.path / "groups.json"
        with self.run_directory.stage("group") as todo:
            if not todo:
                return Grouping.load(file)
            selector = self.selector(store)
            self.estimator = selector.estimator
            grouping = selector.group(
                self.args.num_groups or "auto",
                self.args.grouping_method,
                max_groups=self.args.max_groups,
                overlap=self.args.overlapping_groups,
                num_subsets=self.args.num_subsets,
                seed=self.args.seed,
            )
            prediction = self.estimator.predict_subsets([grouping.trained_on(name) for name in grouping.groups])
            if self.is_world_process_zero():
                regularization, calibration = self.estimator.regularization, self.estimator.calibration
                estimate = {
                    "l2_scale": regularization.l2_scale,
                    "l2_evidence": regularization.evidence,
                    "l2_criterion": regularization.criterion,
                    "calibration": None if calibration is None else calibration.by_task(self.estimator.task_names),
                    "num_components": int(self.estimator.reduction.components.shape[1]),
                    "base_loss": dict(zip(self.estimator.task_names, self.estimator.base_loss().tolist())),
                    "predicted_loss": {
                        group: dict(zip(self.estimator.task_names, row))
                        for group, row in zip(grouping.groups, prediction.loss.tolist())
                    },
                }
                write_json(self.run_directory.path / "estimate" / "estimate.json", estimate)
                grouping.save(file)
            self.accelerator.wait_for_everyone()
        return grouping

    def _copy_baseline(self, folder: Path) -> None:
        if self.is_world_process_zero():
            write_folder_atomically(
                folder, lambda new: shutil.copytree(self.run_directory.path / BASELINE, new, dirs_exist_ok=True)
            )
        self.accelerator.wait_for_everyone()

    def _assemble(self) -> PeftEnsembleModel:
        """The ensemble over this trainer's own model, with its weights.

        With fitted weights the baseline's adapter stands beside the groups' as one more column: it is trained anyway,
        and a task that does better with it gets it. It stays out when no task gives it a weight.
        """
        run = self.run_directory.path
        folder = run / "ensemble"
        members = [EnsembleMember(name, self.grouping.trained_on(name)) for name in self.grouping.groups]
        own = {task: {self.grouping.group_of(task): 1.0} for task in self.tasks}
        file = run / "estimate" / "weights.json"
        shared = EnsembleMember(BASELINE, list(self.tasks))
        with self.run_directory.stage("weights") as todo:
            if todo:
                if self.args.ensemble_weights == "fitted" and len(members) > 1:
                    candidates = [*members, shared] if self.args.train_baseline else members
                    candidate = PeftEnsembleModel(self._with_adapters(candidates), candidates)
                    own = {task: self._fitted_weights(candidate, task) for task in self.tasks}
                if any(BASELINE in row for row in own.values()):
                    self._copy_baseline(folder / ADAPTERS_FOLDER / BASELINE)
                if self.is_world_process_zero():
                    write_json(file, own)
                self.accelerator.wait_for_everyone()
        weights = read_json(file)
        if any(BASELINE in row for row in weights.values()):
            members.append(shared)
        ensemble = PeftEnsembleModel(self._with_adapters(members), members, weights, label_space=self.label_space)
        if self.is_world_process_zero():
            ensemble.ensemble_config().save(folder)
            self.processing_class.save_pretrained(folder)
        return ensemble

    def _with_adapters(self, members: list[EnsembleMember]):
        """This trainer's model with the members' adapters beside its own."""
        run = self.run_directory.path
        with preserve_active_adapter(self.model):
            for member in members:
                if member.name not in self.model.peft_config:
                    folder = (
                        run / BASELINE if member.name == BASELINE else run / "ensemble" / ADAPTERS_FOLDER / member.name
                    )
                    load_adapter(self.model, folder, member.name)
        return self.model

    def _fitted_weights(self, ensemble: PeftEnsembleModel, task: str) -> dict[str, float]:
        rows = self.eval_dataset[task]
        max_values = _WEIGHT_VALUES // len(ensemble.adapter_names)
        logits = []
        for name in ensemble.adapter_names:
            own, targets, owners = answer_logits(
                self, self.adapter_logits(name), rows, self.label_space, _WEIGHT_EXAMPLES, max_values
            )
            logits.append(own)
        # An adapter below a twentieth changes little but costs its forward pass.
        fitted = fit_weights(torch.stack(logits), targets, owners, min_weight=0.05)
        return {name: float(w) for name, w in zip(ensemble.adapter_names, fitted.weights) if w > 0}

    def evaluate(
        self,
        eval_dataset: Mapping[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and accuracy of every task, for the ensemble and for the one-adapter-for-all baseline.

        Before [`train`] it is the plain trainer's evaluation.

        Args:
            eval_dataset (`dict[str, Dataset]`, *optional*): rows of each task, for example test rows.
            ignore_keys (`list[str]`, *optional*): not used after training.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): first word of the metrics' names.

        Returns:
            `dict[str, float]`: `PREFIX_TASK_loss` and `PREFIX_TASK_accuracy` (the whole answer right) of the ensemble,
            `PREFIX_baseline_TASK_...` of the baseline, and `PREFIX_mean_...` of both.
        """
        if self.ensemble is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        datasets = self.eval_dataset if eval_dataset is None else self.prepare_rows(eval_dataset)

        def ensemble_logits(inputs: dict[str, Any], tasks: list[str]):
            return self.ensemble(**inputs, task=tasks).logits

        results: dict[str, Scores] = {
            "ensemble": score_tasks(self, ensemble_logits, datasets, self.label_space, "Evaluating ensemble")
        }
        if self.args.train_baseline:
            folder = self.run_directory.path / BASELINE
            results["baseline"] = self.score_adapter(folder, datasets, "Evaluating baseline")
        metrics = flat_metrics(results, metric_key_prefix)
        self.keep_scores(metric_key_prefix, results)
        if self.is_world_process_zero():
            write_model_card(self.run_directory.path)
        self.log(dict(metrics))
        return metrics

    def predict(self, *args: Any, **kwargs: Any):
        """Not after training: the model in hand is one untrained adapter. Raises `ConfigurationError`."""
        if self.ensemble is not None:
            raise ConfigurationError("predict() knows one model. Call trainer.ensemble(**batch, task=...) instead.")
        return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the ensemble; before [`train`], what the plain trainer saves."""
        if self.ensemble is None or _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.is_world_process_zero():
            self.ensemble.save_pretrained(output_dir or str(self.run_directory.path / "ensemble"))

    def _upload(self, repo_id: str, **kwargs: Any):
        if self.ensemble is None:
            raise ConfigurationError("There is no ensemble yet: call train() first.")
        return push_ensemble_to_hub(self.run_directory.path, repo_id, **kwargs)


def flat_metrics(results: Mapping[str, Scores], prefix: str) -> dict[str, float]:
    """Nested scores as one dict of metrics; the ensemble's own carry no further name."""
    metrics: dict[str, float] = {}
    for system, scores in results.items():
        start = prefix if system == "ensemble" else f"{prefix}_{system}"
        for task, score in scores.items():
            metrics[f"{start}_{task}_loss"] = score["loss"]
            metrics[f"{start}_{task}_accuracy"] = score["accuracy"]
        for measure in ("loss", "accuracy"):
            metrics[f"{start}_mean_{measure}"] = float(np.mean([score[measure] for score in scores.values()]))
    return metrics


class EnsembleTrainer(EnsembleMixin, MultiTaskTrainer):
    """`transformers.Trainer` that fine-tunes on many datasets and ends with an ensemble of adapters.

    Changes: `train_dataset` and `eval_dataset` are dicts of named datasets; [`train`] captures gradients, groups the
    tasks, trains one adapter per group and one for all, and combines them; [`evaluate`] reports every task.

    Example:

    ```python
    >>> trainer = EnsembleTrainer(  # doctest: +SKIP
    ...     model="bert-base-uncased",
    ...     args=EnsembleConfig(output_dir="out"),
    ...     train_dataset={"sst2": sst2["train"], "cola": cola["train"]},
    ...     eval_dataset={"sst2": sst2["validation"], "cola": cola["validation"]},
    ...     peft_config=LoraConfig(task_type="SEQ_CLS"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    config_class = EnsembleConfig


class EnsembleSFTTrainer(EnsembleMixin, MultiTaskSFTTrainer):
    """`trl.SFTTrainer` that fine-tunes on many datasets and ends with an ensemble of adapters.

    Changes: as of [`EnsembleTrainer`].

    Example:

    ```python
    >>> trainer = EnsembleSFTTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=EnsembleSFTConfig(output_dir="out"),
    ...     train_dataset={"gsm8k": gsm8k, "boolq": boolq},
    ...     eval_dataset={"gsm8k": gsm8k_eval, "boolq": boolq_eval},
    ...     peft_config=LoraConfig(),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    config_class = EnsembleSFTConfig
