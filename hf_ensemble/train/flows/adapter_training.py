"""Training adapters from one starting point, one after another or several at once, each by an ordinary trainer."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer

from ..._cards import CARD
from ..._compat import tokens_of_their_own_adapters
from ..._files import checksums, writing
from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ...capture.identity import parameter_fingerprint
from ...ensemble.saving.files import save_adapter
from ...errors import RunDivergedError, RunMismatchError
from ...models.usage import FlopSamples
from ...runs import TrainedAdapter
from ...tasks import TASK
from ...tasks.sampling import rows_per_epoch
from ..concurrent.copies import sharing_frozen
from ..concurrent.turns import Turn, Turns
from ..credentials import arguments_without_secrets
from ..inputs.best_metric import metric_of_training
from ..losses.step_loss import StepLoss
from ..model_state import ModelState
from ..tracking import closed_after_error, report_as_part_of_run
from ..training_usage import usage_fields
from .bars import label_bars
from .checkpoints import SealCheckpoints, last_whole_checkpoint, remove_checkpoints
from .context import FlowContext
from .kept_adapter import kept_adapter
from .learning import LearningCheck
from .run_log import plain_log

T = TypeVar("T")

# Options of schedules that are numbers of steps.
_STEPS_OF_SCHEDULES = ("num_decay_steps", "num_stable_steps", "timescale")


class AdapterTraining:
    """Trains the adapter of a run on subsets or mixtures of its tasks.

    Every training begins at the same parameters theta0, at the same seed unless another is asked for, and on the model
    as it was before any trainer has prepared it. It leaves the model at theta0; what was trained lies in its folder.

    Args:
        context (`FlowContext`): what the run works on; the model is at theta0.

    Attributes:
        ignore_keys_for_eval (`list[str]`, *optional*): outputs that evaluations during a training leave out.
    """

    def __init__(self, context: FlowContext):
        self.context = context
        self.ignore_keys_for_eval: list[str] | None = None
        # An adapter that has learnt from all tasks may have little left to learn.
        self._is_trained_already = False
        # Trainings differ in their rows and their length alone.
        self._samples = FlopSamples()
        self.theta0 = {
            name: parameter.detach().clone().cpu()
            for name, parameter in context.model.named_parameters()
            if parameter.requires_grad
        }

    def beside(self, context: FlowContext) -> "AdapterTraining":
        """The same for a copy of the model, which is at theta0 too."""
        other = type(self)(context)
        other.ignore_keys_for_eval = self.ignore_keys_for_eval
        other._is_trained_already, other._samples = self._is_trained_already, self._samples
        return other

    def fingerprint(self, start: Path | None = None) -> str:
        """What records and gradient stores know theta0 by, or the parameters of a saved adapter."""
        if start is None:
            return parameter_fingerprint(self.theta0)
        self.load(start)
        parameters = {name: own for name, own in self.context.model.named_parameters() if name in self.theta0}
        fingerprint = parameter_fingerprint({name: own.detach().cpu() for name, own in parameters.items()})
        self.reset()
        return fingerprint

    def num_parameters(self) -> int:
        """Number of parameters that a training moves."""
        return sum(parameter.numel() for parameter in self.theta0.values())

    def reset(self) -> None:
        """Put theta0 back into the model, trainable, and activate its adapter."""
        model = self.context.model
        model.set_adapter(self.context.adapter_name)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.theta0:
                    parameter.copy_(self.theta0[name])

    def distance(self) -> float:
        """Euclidean norm of the trained parameters' move away from theta0."""
        squares = 0.0
        for name, parameter in self.context.model.named_parameters():
            if name in self.theta0:
                squares += float((parameter.detach().cpu().float() - self.theta0[name].float()).square().sum())
        return squares**0.5

    def load(self, folder: Path) -> None:
        """Put a saved adapter's weights into the model; trainings still begin at theta0."""
        weights = load_file(str(folder / "adapter_model.safetensors"))
        with tokens_of_their_own_adapters():
            set_peft_model_state_dict(self.context.model, weights, adapter_name=self.context.adapter_name)

    def start_from(self, folder: Path) -> None:
        """Make a saved adapter the starting point in place of theta0."""
        self.load(folder)
        self._is_trained_already = True
        self.theta0 = {
            name: parameter.detach().clone().cpu()
            for name, parameter in self.context.model.named_parameters()
            if name in self.theta0
        }

    def num_steps(self, subset: Sequence[str], length: float = 1.0) -> int:
        """Optimizer steps of a training on these tasks, of a length in multiples of that of the arguments."""
        args, tasks = self.context.args, self.context.tasks
        if args.max_steps > 0:
            return math.ceil(args.max_steps * length)
        rows = rows_per_epoch({task: tasks.sampling_weights[task] for task in subset}, self.context.num_drawn_rows())
        whole = math.floor if args.dataloader_drop_last else math.ceil
        batches = max(whole(rows / (args.train_batch_size * args.world_size)), 1)
        return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs * length)

    def num_rows(self, subset: Sequence[str]) -> float:
        """Rows that a training on these tasks draws, about: its steps are as full as they can be."""
        args = self.context.args
        return self.num_steps(subset) * args.train_batch_size * args.world_size * args.gradient_accumulation_steps

    def run(
        self,
        name: str,
        mixture: Mapping[str, float] | Sequence[str],
        folder: Path,
        seed: int | None = None,
        start: Path | None = None,
        length: float = 1.0,
        loss: StepLoss | None = None,
        first_step: int | None = None,
    ) -> TrainedAdapter:
        """Train on a subset or mixture of the tasks and save the adapter; a finished training is read instead.

        A training that was interrupted goes on from its last checkpoint, where the arguments make checkpoints.

        Args:
            name (`str`): for logs, checkpoints and the record of the training.
            mixture (`dict[str, float]` or `Sequence[str]`): weight of each task's rows, or the tasks.
            folder (`Path`): where the adapter goes.
            seed (`int`, *optional*): of the order of the rows and of dropout; that of the arguments by default.
            start (`Path`, *optional*): a saved adapter to begin at; theta0 by default.
            length (`float`, *optional*, defaults to 1.0): epochs or steps, in multiples of those of the arguments.
            loss (`StepLoss`, *optional*): what a boosting step is trained on; the trainer's own loss by default.
            first_step (`int`, *optional*): steps that the run's log counts before it; those of all begun by default.
        """
        run, args = self.context.run, self.context.args
        weights = dict(mixture) if isinstance(mixture, Mapping) else dict.fromkeys(mixture, 1.0)
        origin = self.fingerprint(start)
        seed = args.seed if seed is None else seed
        identity, batch_size = loss.identity if loss else "own", args.train_batch_size * args.world_size
        wanted = TrainedAdapter(name, weights, seed, origin, length=length, loss=identity, batch_size=batch_size)
        begun, checkpoint = run_on_main(lambda: self._begun(wanted, folder, first_step))
        if begun.status == "done":
            return begun
        self.reset()
        if start is not None:
            self.load(start)
        rows = rows_of(self.context.train_rows, weights)
        try:
            with self.context.model_state.restored():
                is_new = start is None and loss is None and not self._is_trained_already
                learning = LearningCheck(self.context, rows) if is_new else None
                trainer = self.make_trainer(begun, rows)
                # What runs beside a boosting step takes operations, too.
                trainer.usage_samples = self._samples if loss is None else FlopSamples()
                attached = loss.attached(trainer) if loss else nullcontext()
                with writing(run.training(name)), attached, closed_after_error(trainer):
                    result = trainer.train(
                        resume_from_checkpoint=checkpoint, ignore_keys_for_eval=self.ignore_keys_for_eval
                    )
                trainer.accelerator.free_memory()
            distance, loss_of_steps = self.distance(), float(result.training_loss)
            if not math.isfinite(distance) or not math.isfinite(loss_of_steps):
                raise RunDivergedError(
                    f"The training {name!r} diverged: its loss is {loss_of_steps:g}, and its parameters have moved by "
                    f"{distance:g}. Lower learning_rate or set max_grad_norm, with overwrite_run=True or another "
                    "output_dir."
                )
            trained = replace(
                begun,
                status="done",
                num_examples=len(rows),
                global_step=int(result.global_step),
                training_loss=loss_of_steps,
                distance=distance,
                total_flos=float(trainer.state.total_flos),
                **usage_fields(trainer.training_usage),
                num_parameters=self.num_parameters(),
                log_history=plain_log(trainer.state.log_history),
                **kept_adapter(trainer, name),
            )
            if learning is not None:
                learning.report(trained)
            if is_main_process():
                save_adapter(self.context.model, self.context.adapter_name, folder)
                # The card may be changed at any time.
                files = {file: checksum for file, checksum in checksums(folder).items() if file != CARD}
                run.write_trained_adapter(replace(trained, files=files))
                remove_checkpoints(run.training(name))
            wait_for_everyone()
            trained = run_on_main(lambda: run.trained_adapter(name))
        finally:
            self.reset()
        return trained

    def _begun(self, wanted: TrainedAdapter, folder: Path, first_step: int | None) -> tuple[TrainedAdapter, str | None]:
        """The training, finished or begun, and the checkpoint that it goes on from; decided by the main process."""
        run = self.context.run
        known, work = run.trained_adapter(wanted.name), run.training(wanted.name)
        same = wanted.continues(known)
        self._check_batch_size(wanted.batch_size, known if same else None)
        if same and known.status == "done" and folder.exists():
            known.check_files(folder)
            # A process that was killed may have left some.
            remove_checkpoints(work)
            return known, None
        if not same:
            # Those of another mixture or starting point.
            remove_checkpoints(work)
        first_step = run.num_steps() if first_step is None else first_step
        begun = replace(wanted, first_step=known.first_step if same else first_step)
        run.write_trained_adapter(begun)
        return begun, last_whole_checkpoint(work)

    def _check_batch_size(self, size: int, known: TrainedAdapter | None) -> None:
        """Refuse a training whose steps are of another number of rows than those that it goes on from or beside."""
        others = [*self.context.run.trainings(), *([known] if known else [])]
        other = next((own for own in others if own.batch_size != size), None)
        if other is not None:
            raise RunMismatchError(
                f"The training {other.name!r} of this run drew {other.batch_size} rows at a time, by all processes "
                f"together, and this one would draw {size}: it has another number of processes or GPUs. Start it with "
                "as many, so that all adapters of the run are trained alike, or use another output_dir."
            )

    def make_trainer(self, begun: TrainedAdapter, rows: Dataset, **changes: Any) -> Trainer:
        """An ordinary trainer for a training.

        Args:
            begun (`TrainedAdapter`): the training.
            rows (`Dataset`): of its tasks, see [`rows_of`].
            changes (`dict`): arguments that differ from those of the run.
        """
        # A training reports its arguments to trackers and needs no login.
        args = arguments_without_secrets(self.context.args)
        if begun.seed != args.seed:
            args.seed = args.data_seed = begun.seed
        args.output_dir = str(self.context.run.training(begun.name))
        args.push_to_hub = False
        args.num_train_epochs *= begun.length
        if args.max_steps > 0:
            args.max_steps = math.ceil(args.max_steps * begun.length)
        if args.warmup_steps >= 1:
            # A number of steps, not a share of them.
            args.warmup_steps = math.ceil(args.warmup_steps * begun.length)
        args.lr_scheduler_kwargs = _of_length(args.lr_scheduler_kwargs, begun.length)
        # A training that goes on is the same training, early stopping included.
        args.restore_callback_states_from_checkpoint = True
        own = [task for task, weight in begun.mixture.items() if weight > 0]
        args.metric_for_best_model = metric_of_training(args.metric_for_best_model, self.context.tasks, own)
        sampling = self.context.tasks.sampling_weights
        for argument, value in changes.items():
            setattr(args, argument, value)
        trainer = self.context.make_trainer(
            args,
            rows,
            {task: self.context.eval_rows[task] for task in own},
            {task: weight * sampling[task] for task, weight in begun.mixture.items()},
        )
        report_as_part_of_run(trainer.callback_handler, begun.name, begun.first_step)
        label_bars(trainer.callback_handler, begun.name)
        trainer.add_callback(SealCheckpoints)
        return trainer


def _of_length(options: Any, length: float) -> Any:
    """Options of a schedule with their numbers of steps for a training of another length."""
    if length == 1 or not isinstance(options, dict):
        return options
    return {
        name: math.ceil(value * length) if name in _STEPS_OF_SCHEDULES and isinstance(value, int) else value
        for name, value in options.items()
    }


def rows_of(table: Dataset, weights: Mapping[str, float]) -> Dataset:
    """The rows of the tasks with a weight."""
    return table.select([i for i, task in enumerate(table[TASK]) if weights.get(task, 0.0) > 0])


def run_concurrently(
    training: AdapterTraining, jobs: Sequence[Callable[[AdapterTraining], T]], num_at_once: int
) -> list[T]:
    """Train several adapters at once, in passes through the base model that they share.

    Each training is what it would be alone: a trainer with its own rows, optimizer, schedule, clipping, callbacks and
    checkpoints. Where one fails the others end where they are; made again, they go on from their checkpoints.

    Args:
        training (`AdapterTraining`): of the model, which stays at theta0.
        jobs (`Sequence[Callable]`): each trains with what it is passed, which trains a copy of the model.
        num_at_once (`int`): trainings that have begun and not ended, at most.
    """
    # A copy is made of the model as no trainer has prepared it.
    with training.context.model_state.restored():
        return Turns(num_at_once, training.context.args.seed).run([partial(_in_turn, training, job) for job in jobs])


def _in_turn(training: AdapterTraining, job: Callable[[AdapterTraining], T], turn: Turn) -> T:
    context = training.context
    model = sharing_frozen(context.model)
    turn.share_backbone(model)

    def make_trainer(*args: Any, **kwargs: Any) -> Trainer:
        trainer = context.make_trainer(*args, model=model, **kwargs)
        turn.share_backward(trainer)
        return trainer

    state = ModelState(model, origin=context.model_state)
    own = replace(context, model=model, model_state=state, make_trainer=make_trainer)
    return job(training.beside(own))
