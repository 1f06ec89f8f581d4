"""Whether a training has learnt anything."""

from datasets import Dataset

from ...capture.training_arguments import learning_rate
from ...ensemble.weighting.sampling import spread_sample
from ...evaluate import Evaluator
from ...logging import get_logger
from ...runs import TrainedAdapter
from .context import FlowContext

logger = get_logger(__name__)

# Training rows whose loss is compared: the same ones before and after, so that few are enough.
_NUM_ROWS = 32
# A training that works lowers the loss of its own rows by far more. Of smaller losses little is left to learn.
_LEAST_MOVE = 0.005
_LEAST_LOSS = 0.1
# What LoRA usually takes.
_USUAL_RATES = (1e-4, 1e-3)


class LearningCheck:
    """Compares the loss of some training rows before and after a training, and warns where it has hardly moved.

    Args:
        context (`FlowContext`): what the run works on; the model is where the training begins.
        rows (`Dataset`): the training's rows.
    """

    def __init__(self, context: FlowContext, rows: Dataset):
        self.context = context
        sample = rows.select(spread_sample(len(rows), min(_NUM_ROWS, len(rows)), context.args.seed))
        self._rows = context.model_columns(sample)
        self._evaluator = Evaluator(
            context.model,
            context.data_collator,
            context.args.per_device_eval_batch_size,
            context.mixed_precision,
            disable_tqdm=True,
        )
        self._before = self._loss()

    def _loss(self) -> float:
        return self._evaluator.score_rows(self.context.answer_scorer(), self._rows).summary().loss

    def report(self, trained: TrainedAdapter) -> None:
        """Warn if the loss has hardly moved, with the model as it was trained.

        Not where validation chose an earlier step: then it is not for want of steps.
        """
        if self._before < _LEAST_LOSS or trained.best_step not in (None, trained.global_step):
            return
        after = self._loss()
        moved = abs(after - self._before) / self._before
        if moved < _LEAST_MOVE:
            logger.warning("%s", self._message(trained, moved, after))

    def _message(self, trained: TrainedAdapter, moved: float, after: float) -> str:
        optimizer, (low, high) = self.context.optimizer, _USUAL_RATES
        rate = learning_rate(self.context.args, optimizer)
        name = "learning_rate" if optimizer is None else "lr of optimizer_cls_and_kwargs"
        if rate is not None and rate < low:
            remedy = f"Raise {name}, found {rate:g}: adapters usually take {low:g} to {high:g}."
        else:
            is_usual = rate is not None and rate < high
            remedy = "Train for more steps" + (f", or raise {name}, found {rate:g}." if is_usual else ".")
        return (
            f"{trained.name}: the loss of its own training rows moved by {moved:.1%} in {trained.global_step} steps, "
            f"from {self._before:.4f} to {after:.4f}. {remedy}"
        )
