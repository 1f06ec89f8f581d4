"""Training one adapter after another from one starting point, each by an ordinary trainer."""

import copy
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from trl import SFTConfig

from .._files import read_json, write_json
from ..ensemble.saving.files import save_adapter
from ..estimate.mixtures import epoch_length
from ..logging import get_logger
from ..tasks import TASK
from .multi_task_trainer import MultiTaskMixin

logger = get_logger(__name__)


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
        distance (`float`): Euclidean norm of the trained parameters' move away from theta0.
    """

    name: str
    mixture: dict[str, float]
    num_examples: int
    seconds: float
    training_loss: float
    global_step: int
    distance: float


class AdapterTraining:
    """Trains the active adapter of a multi-task trainer's model on subsets of its tasks.

    Every training begins at the same parameters theta0, and at the same seed if no other is asked for, whatever was
    trained before it, and leaves the model at theta0. What was trained lies in its folder.

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

    def distance(self) -> float:
        """Euclidean norm of the parameters' move away from theta0."""
        squares = 0.0
        for name, parameter in self.trainer.model.named_parameters():
            if name in self.theta0:
                squares += float((parameter.detach().cpu().float() - self.theta0[name].float()).square().sum())
        return squares**0.5

    def load(self, folder: Path) -> None:
        """Put a saved adapter's weights into the model; trainings still begin at theta0."""
        weights = load_file(str(folder / "adapter_model.safetensors"))
        set_peft_model_state_dict(self.trainer.model, weights, adapter_name=self.adapter_name)

    def start_from(self, folder: Path) -> None:
        """Make a saved adapter the starting point in place of theta0."""
        self.load(folder)
        self.theta0 = {
            name: parameter.detach().clone().cpu()
            for name, parameter in self.trainer.model.named_parameters()
            if name in self.theta0
        }

    def num_steps(self, subset: Sequence[str]) -> int:
        """Optimizer steps of a training on these tasks."""
        args, tasks = self.trainer.args, self.trainer.tasks
        if args.max_steps > 0:
            return args.max_steps
        counts = Counter(self.trainer.train_dataset[TASK])
        weights = np.array([tasks.sampling_weights[task] for task in subset])
        rows = epoch_length(weights, np.array([counts[task] for task in subset]))
        batches = math.ceil(rows / (args.train_batch_size * args.world_size))
        return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)

    def run(
        self, name: str, mixture: Mapping[str, float] | Sequence[str], folder: Path, seed: int | None = None
    ) -> TrainedAdapter:
        """Train on a subset or mixture of the tasks and save the adapter; a finished training is read instead.

        A training that was interrupted goes on from its last checkpoint, where the arguments make checkpoints.

        Args:
            name (`str`): for logs and checkpoints; what is known of the training goes to `training/NAME.json`.
            mixture (`dict[str, float]` or `Sequence[str]`): weight of each task's rows, or the tasks.
            folder (`Path`): where the adapter goes.
            seed (`int`, *optional*): of the training's order and dropout, in place of the arguments' own.
        """
        weights = dict(mixture) if isinstance(mixture, Mapping) else dict.fromkeys(mixture, 1.0)
        work = Path(self.trainer.args.output_dir) / "training" / name
        record = work.with_name(f"{name}.json")
        known = read_json(record) if record.exists() else {}
        if known.get("status") == "done" and known["mixture"] == weights and folder.exists():
            return TrainedAdapter(**{key: value for key, value in known.items() if key != "status"})
        if known.get("mixture") != weights:
            # Checkpoints of another mixture.
            shutil.rmtree(work, ignore_errors=True)
        if self.trainer.is_world_process_zero():
            write_json(record, {"status": "training", "mixture": weights})
        self.trainer.accelerator.wait_for_everyone()
        self.reset()
        rows = _rows_of(self.trainer.train_dataset, weights)
        base = self.trainer.model.get_base_model()
        forward = base.__dict__.get("forward")
        inner = self._inner_trainer(name, work, weights, rows, seed)
        start = time.perf_counter()
        result = inner.train(resume_from_checkpoint=_last_whole_checkpoint(work))
        seconds = time.perf_counter() - start
        # Mixed precision wraps the model's forward for this trainer's accelerator; the next one wraps it anew.
        inner.accelerator.unwrap_model(inner.model_wrapped, keep_fp32_wrapper=False)
        if forward is not None:
            # SFTTrainer wraps the forward that it finds: without this each training would wrap the last one's.
            base.forward = forward
        trained = TrainedAdapter(
            name,
            weights,
            len(rows),
            round(seconds, 3),
            float(result.training_loss),
            int(result.global_step),
            self.distance(),
        )
        if self.trainer.is_world_process_zero():
            save_adapter(self.trainer.model, self.adapter_name, folder)
            write_json(record, {"status": "done", **asdict(trained)})
            shutil.rmtree(work, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        self.trainer.state.log_history += [{**entry, "adapter": name} for entry in inner.state.log_history]
        self.reset()
        return trained

    def _inner_trainer(self, name: str, work: Path, weights: dict[str, float], rows: Dataset, seed: int | None = None):
        args = copy.copy(self.trainer.args)
        if seed is not None:
            args.seed = args.data_seed = seed
        args.output_dir = str(work)
        args.push_to_hub = False
        args.run_name = f"{args.run_name or Path(self.trainer.args.output_dir).name}-{name}"
        if args.load_best_model_at_end:
            logger.warning(
                "load_best_model_at_end is not used: an adapter's losses are those of the end of its training."
            )
            args.load_best_model_at_end = False
        if isinstance(args, SFTConfig):
            # The model is loaded and the rows are tokens already.
            args.model_init_kwargs = args.chat_template_path = None
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


def _last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end; the state is what `Trainer` writes last."""
    steps = {int(path.name.split("-")[-1]): path for path in work.glob("checkpoint-*") if path.is_dir()}
    whole = [step for step, path in steps.items() if (path / "trainer_state.json").is_file()]
    for step in set(steps) - set(whole):
        logger.warning("The checkpoint %s was not written to its end and is deleted.", steps[step])
        shutil.rmtree(steps[step])
    return str(steps[max(whole)]) if whole else None


def _rows_of(table: Dataset, weights: Mapping[str, float]) -> Dataset:
    """The rows of the tasks with a weight."""
    return table.select([i for i, task in enumerate(table[TASK]) if weights.get(task, 0.0) > 0])
