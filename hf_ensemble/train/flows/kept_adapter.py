"""Which adapter a training has ended with: that of its last step, or that of its best evaluation."""

from typing import Any

from transformers import Trainer

from ...logging import get_logger
from .checkpoints import checkpoint_step

logger = get_logger(__name__)


def kept_adapter(trainer: Trainer, name: str) -> dict[str, Any]:
    """The fields of a training's record that say which adapter it has kept.

    Args:
        trainer (`Trainer`): whose training is over.
        name (`str`): of the training, for the log.
    """
    state, args = trainer.state, trainer.args
    if not args.load_best_model_at_end:
        return {"epoch": float(state.epoch or 0.0)}
    metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if state.best_model_checkpoint is None:
        logger.warning(
            "%s: no checkpoint was made at an evaluation with a %s, so the adapter of the last step is kept.",
            name,
            metric,
        )
        return {"epoch": float(state.epoch or 0.0), "metric_for_best_model": metric}
    step = checkpoint_step(state.best_model_checkpoint)
    # The best metric of the state may be of a later step, at which no checkpoint was made.
    entries = [entry for entry in state.log_history if entry.get("step") == step]
    best = next((entry[metric] for entry in entries if metric in entry), None)
    if best is None and state.best_global_step == step:
        best = state.best_metric
    logger.info("%s: of %d steps, the adapter of step %d is kept (%s %s).", name, state.global_step, step, metric, best)
    return {
        "epoch": next((float(entry["epoch"]) for entry in entries if "epoch" in entry), 0.0),
        "best_step": step,
        "best_metric": None if best is None else float(best),
        "metric_for_best_model": metric,
    }
