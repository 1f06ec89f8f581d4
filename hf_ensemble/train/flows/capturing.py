"""The gradients that a run's predictions are made from."""

from pathlib import Path

from datasets import concatenate_datasets

from ..._processes import run_on_main
from ...capture import capture_gradients, optimizer_preconditioner, training_recipe
from ...errors import RunMismatchError
from ...runs.progress import AT_BASELINE, GRADIENTS
from ...store import GradientStore, TrainingRecipe, has_every_file
from .adapter_training import AdapterTraining
from .context import FlowContext


def captured_gradients(
    context: FlowContext, training: AdapterTraining, shard: tuple[int, int] | None = None
) -> GradientStore | None:
    """The run's gradient store, captured at theta0 where the run does not hold it yet.

    Args:
        context (`FlowContext`): what the run works on.
        training (`AdapterTraining`): knows theta0.
        shard (`tuple[int, int]`, *optional*):
            Which part of how many is captured, beside other processes with the others; `None` is returned where some
            are missing still.

    Raises:
        `RunMismatchError`: when it was captured elsewhere than where trainings begin.
    """
    return _captured(context, training, GRADIENTS, context.run.gradients, None, shard)


def gradients_at_baseline(
    context: FlowContext, training: AdapterTraining, shard: tuple[int, int] | None = None
) -> GradientStore | None:
    """The same at the adapter for all tasks, where trainings go on from it.

    Raises:
        `RunMismatchError`: when it was captured at another adapter.
    """
    run = context.run
    return _captured(context, training, AT_BASELINE, run.baseline_gradients, run.baseline, shard)


def _captured(
    context: FlowContext,
    training: AdapterTraining,
    stage: str,
    folder: Path,
    start: Path | None,
    shard: tuple[int, int] | None,
) -> GradientStore | None:
    run, args = context.run, context.args
    whole = run.stage(stage) if shard is None else run.part_of_stage(stage, shard, lambda: has_every_file(folder))
    with whole as todo:
        # What was deleted from a finished store, because it was damaged, is captured again.
        if not todo and run_on_main(lambda: has_every_file(folder)):
            store = GradientStore(folder)
            found, expected = store.identity["model"]["theta0"], training.fingerprint(start)
            if found != expected:
                raise RunMismatchError(
                    f"The gradients in {str(folder)!r} were captured at other parameters (theta0 {found}) than "
                    f"those that trainings begin at ({expected}). Choose another output_dir, or delete the run."
                )
            return store
        training.reset()
        if start is not None:
            training.load(start)
        try:
            with context.model_state.restored():
                return capture_gradients(
                    context.model,
                    context.tasks,
                    context.capture_config(),
                    folder,
                    data_collator=context.data_collator,
                    encoded={
                        "train": context.train_table,
                        "validation": concatenate_datasets([context.eval_tables[name] for name in context.tasks]),
                    },
                    overwrite=args.overwrite_run,
                    disable_tqdm=bool(args.disable_tqdm),
                    recipe=_recipe(context, training),
                    shard=shard,
                )
        finally:
            training.reset()


def _recipe(context: FlowContext, training: AdapterTraining) -> TrainingRecipe | None:
    """The training on all tasks; `None` where the features are not in the optimizer's metric."""
    args, optimizer = context.args, context.optimizer
    if context.capture_config().preconditioner != optimizer_preconditioner(args, optimizer):
        return None
    return training_recipe(args, training.num_steps(context.tasks.names), optimizer)
