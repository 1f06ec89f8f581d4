"""Exact gradients of a trainer's tasks, and the features that each variant of the estimator derives from them."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets

from hf_ensemble.capture import CaptureConfig, Preconditioner, SeededProjection, capture_gradients, training_recipe
from hf_ensemble.capture.capture_pass import MOMENT_ROWS
from hf_ensemble.capture.training_arguments import fresh_lora_gain
from hf_ensemble.store import FeatureTable, GradientStore, TrainingRecipe
from hf_ensemble.train.flows.adapter_training import AdapterTraining


class Captures:
    """Exact gradients, captured on first use, and the features derived from them."""

    def __init__(self, trainer, folder: Path):
        self.trainer = trainer
        self.folder = folder
        self._tables: dict[tuple[str, str], dict[str, FeatureTable]] = {}

    def tables(self, choice: Mapping[str, Any]) -> dict[str, FeatureTable]:
        """Training and validation features of a variant."""
        exact = self._exact(choice["linearised at"], choice["margin"])
        train = exact["train"]
        scales = torch.ones(train.features.shape[1])
        if choice["preconditioner"] == "adam":
            scales = self._adam_scales(train)
        kept = self._kept_rows(train, choice["training rows"])
        parts = {"train": train.of_rows(kept), "validation": exact["validation"]}
        return {
            split: dataclasses.replace(table, features=_projected(table.features[:], scales, choice["projection"]))
            for split, table in parts.items()
        }

    def recipe(self, choice: Mapping[str, Any]) -> TrainingRecipe | None:
        """The training recipe, as far as the variant uses it."""
        if choice["evidence"] == "validation loss":
            return None
        train = self._exact(choice["linearised at"], choice["margin"])["train"]
        self.trainer.open_run()
        steps = self.trainer.flow.training.num_steps(self.trainer.tasks.names)
        num_moving = Preconditioner({"all": self._adam_scales(train)}).num_effective_parameters()
        recipe = training_recipe(self.trainer.args, steps)
        if choice["steps"] == "equal, no growth":
            return recipe
        growth = {"none": 0.0, "x 1/2": 0.5, "x 2": 2.0, "x 4": 4.0}.get(choice["growth"], 1.0)
        self.trainer.flow.training.reset()
        return dataclasses.replace(
            recipe, num_parameters=num_moving, input_gain=growth * fresh_lora_gain(self.trainer.model)
        )

    def _exact(self, point: str, margin: str) -> dict[str, FeatureTable]:
        if (point, margin) not in self._tables:
            self._tables = {}
            training = self.trainer.flow.training
            training.reset()
            if point == "warm-up":
                training.load(self._warm_up())
            store = self._capture(self.folder / f"{point}-{margin}", margin)
            training.reset()
            names = self.trainer.tasks.names
            self._tables[point, margin] = {split: store.table(split, names) for split in ("train", "validation")}
        return self._tables[point, margin]

    def _capture(self, folder: Path, margin: str) -> GradientStore:
        config = CaptureConfig(None, margin=margin, preconditioner="none")
        trainer, context = self.trainer, self.trainer.flow.context
        encoded = {
            "train": context.train_table,
            "validation": concatenate_datasets([context.eval_tables[name] for name in context.tasks]),
        }
        return capture_gradients(
            trainer.model, trainer.tasks, config, folder, data_collator=trainer.data_collator, encoded=encoded
        )

    def _warm_up(self) -> Path:
        context, folder = self.trainer.flow.context, self.folder / "warm-up-adapter"
        args = copy.copy(context.args)
        args.num_train_epochs, args.learning_rate = 1, args.learning_rate / 4
        AdapterTraining(dataclasses.replace(context, args=args)).run("warm-up", context.tasks.names, folder)
        return folder

    @staticmethod
    def _adam_scales(train: FeatureTable) -> torch.Tensor:
        rows = np.unique(np.linspace(0, len(train) - 1, min(MOMENT_ROWS, len(train))).round().astype(int))
        loss_gradients = train.features[rows] / (1 + np.exp(train.margin[rows]))[:, None]
        moments = {"all": torch.from_numpy((loss_gradients**2).sum(0))}
        return Preconditioner.from_second_moments(moments).scales["all"]

    @staticmethod
    def _kept_rows(train: FeatureTable, share: str) -> np.ndarray:
        step = 1 if share == "all" else int(share.split("/")[1])
        return np.concatenate([np.flatnonzero(train.task == task)[::step] for task in range(len(train.task_names))])


def _projected(features: np.ndarray, scales: torch.Tensor, projection: str) -> np.ndarray:
    scaled = torch.from_numpy(features) * scales
    if projection == "exact":
        return scaled.numpy()
    dim, seed = (int(word) for word in projection.split(", seed "))
    own = SeededProjection({"all": scaled.shape[1:]}, dim, seed)
    projected = torch.zeros(len(scaled), own.dim)
    own.add(projected, "all", scaled)
    return projected.numpy()
