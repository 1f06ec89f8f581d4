"""Training one adapter after another from one starting point, each by an ordinary trainer."""

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from .._files import read_json, write_json
from ..ensemble.files import save_adapter
from ..tasks import TASK
from .multi_task_trainer import MultiTaskMixin


@dataclass(frozen=True)
class TrainedAdapter:
    """What is known of one training.

    Args:
        name (`str`): of the adapter.
        mixture (`dict[str, float]`): weight of each task's rows; tasks left out were not trained on.
        num_examples (`int`): training rows.
        seconds (`float`): wall time of the training.
        training_loss (`float`): mean over its steps.
        global_step (`int`): optimizer steps.
    """

    name: str
    mixture: dict[str, float]
    num_examples: int
    seconds: float
    training_loss: float
    global_step: int


class AdapterTraining:
    """Trains the active adapter of a multi-task trainer's model on subsets of its tasks.

    Every training begins at the same parameters theta0 and the same seed, whatever was trained before it, and leaves
    the model at theta0. What was trained lies in its folder.

    Args:
        trainer (`MultiTaskMixin`): brings model, tables, arguments and what an inner trainer takes.
    """

    def __init__(self, trainer: MultiTaskMixin):
        self.trainer = trainer
        self.adapter_name = trainer.model.active_adapter
        self.theta0 = {
            name: parameter.detach().clone().cpu()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }

    def reset(self) -> None:
        """Put theta0 back into the model, trainable, and make its adapter the active one."""
        self.trainer.model.set_adapter(self.adapter_name)
        with torch.no_grad():
            for name, parameter in self.trainer.model.named_parameters():
                if name in self.theta0:
                    parameter.copy_(self.theta0[name])

    def start_from(self, folder: Path) -> None:
        """Make a saved adapter the starting point in place of theta0."""
        weights = load_file(str(folder / "adapter_model.safetensors"))
        set_peft_model_state_dict(self.trainer.model, weights, adapter_name=self.adapter_name)
        self.theta0 = {
            name: parameter.detach().clone().cpu()
            for name, parameter in self.trainer.model.named_parameters()
            if name in self.theta0
        }

    def run(self, name: str, mixture: Mapping[str, float] | Sequence[str], folder: Path) -> TrainedAdapter:
        """Train on a subset or mixture of the tasks and save the adapter; a finished training is read instead.

        A training that was interrupted goes on from its last checkpoint, where the arguments make checkpoints.

        Args:
            name (`str`): for logs and checkpoints; what is known of the training goes to `training/NAME.json`.
            mixture (`dict[str, float]` or `Sequence[str]`): weight of each task's rows, or the tasks.
            folder (`Path`): where the adapter goes.
        """
        weights = dict(mixture) if isinstance(mixture, Mapping) else dict.fromkeys(mixture, 1.0)
        work = Path(self.trainer.args.output_dir) / "training" / name
        record = work.with_name(f"{name}.json")
        if record.exists() and folder.exists():
            return TrainedAdapter(**read_json(record))
        record.unlink(missing_ok=True)
        self.reset()
        rows = _rows_of(self.trainer.train_dataset, weights)
        inner = self._inner_trainer(name, work, weights, rows)
        start = time.perf_counter()
        result = inner.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
        seconds = time.perf_counter() - start
        # Mixed precision wraps the model's forward for this trainer's accelerator; the next one wraps it anew.
        inner.accelerator.unwrap_model(inner.model_wrapped, keep_fp32_wrapper=False)
        trained = TrainedAdapter(
            name, weights, len(rows), round(seconds, 3), float(result.training_loss), int(result.global_step)
        )
        if self.trainer.is_world_process_zero():
            save_adapter(self.trainer.model, self.adapter_name, folder)
            write_json(record, asdict(trained))
            shutil.rmtree(work, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.state.log_history += [{**entry, "adapter": name} for entry in inner.state.log_history]
        self.reset()
        return trained

    def _inner_trainer(self, name: str, work: Path, weights: dict[str, float], rows: Dataset):
        args = copy.copy(self.trainer.args)
        args.output_dir = str(work)
        args.push_to_hub = False
        args.run_name = f"{args.run_name or Path(self.trainer.args.output_dir).name}-{name}"
        args.load_best_model_at_end = False
        if isinstance(args, SFTConfig):
            # The model is loaded and the rows are tokens already.
            args.model_init_kwargs = None
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        kwargs = dict(self.trainer.inner_kwargs)
        sampling = {task: weight * self.trainer.tasks.sampling_weights[task] for task, weight in weights.items()}
        return self.trainer.inner_trainer_class(
            model=self.trainer.model,
            args=args,
            train_dataset=rows,
            eval_dataset={task: self.trainer.eval_dataset[task] for task in weights if weights[task] > 0},
            processing_class=self.trainer.processing_class,
            sampling_weights=sampling,
            **kwargs,
        )


def _rows_of(table: Dataset, weights: Mapping[str, float]) -> Dataset:
    """The rows of the tasks with a weight."""
    return table.select([i for i, task in enumerate(table[TASK]) if weights.get(task, 0.0) > 0])
