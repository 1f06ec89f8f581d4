"""The gradients that a run's predictions are made from."""

from datasets import concatenate_datasets

from ..._processes import run_on_main
from ...capture import capture_gradients, optimizer_preconditioner, training_recipe
from ...errors import RunMismatchError
from ...store import GradientStore, TrainingRecipe, has_every_file
from .adapter_training import AdapterTraining
from .context import FlowContext


def captured_gradients(context: FlowContext, training: AdapterTraining) -> GradientStore:
    """The run's gradient store, captured at theta0 where the run does not hold it yet.

    Raises:
        `RunMismatchError`: when it was captured elsewhere than where trainings begin.
    """
    run, args = context.run, context.args
    with run.stage("gradients") as todo:
        # What was deleted from a finished store, because it was damaged, is captured again.
        if not todo and run_on_main(lambda: has_every_file(run.gradients)):
            store = GradientStore(run.gradients)
            found, expected = store.identity["model"]["theta0"], training.theta0_fingerprint()
            if found != expected:
                raise RunMismatchError(
                    f"The gradients in {str(run.gradients)!r} were captured at other parameters (theta0 {found}) than "
                    f"those that trainings begin at ({expected}). Choose another output_dir, or delete the run."
                )
            return store
        training.reset()
        with context.model_state.restored():
            return capture_gradients(
                context.model,
                context.tasks,
                args.capture_config(),
                run.gradients,
                data_collator=context.data_collator,
                encoded={
                    "train": context.train_table,
                    "validation": concatenate_datasets([context.eval_tables[name] for name in context.tasks]),
                },
                overwrite=args.overwrite_run,
                disable_tqdm=bool(args.disable_tqdm),
                recipe=_recipe(context, training),
            )


def _recipe(context: FlowContext, training: AdapterTraining) -> TrainingRecipe | None:
    """The training on all tasks; `None` where the features are not in the optimizer's metric."""
    args = context.args
    if args.capture_config().preconditioner != optimizer_preconditioner(args):
        return None
    return training_recipe(args, training.num_steps(context.tasks.names))
