"""Progress bars that say what they are of."""

from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler


def label_bars(handler: CallbackHandler, name: str) -> None:
    """Let the progress bars of a training carry its name.

    Args:
        handler (`CallbackHandler`): of the training.
        name (`str`): of the training.
    """
    for callback in handler.callbacks:
        if isinstance(callback, ProgressCallback):
            handler.add_callback(_LabelledBars(callback, name))
            return


class _LabelledBars(TrainerCallback):
    """Labels the bars of a callback that has made them just before."""

    def __init__(self, bars: ProgressCallback, name: str):
        self._bars = bars
        self._name = name

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._bars.training_bar is not None:
            self._bars.training_bar.set_description(f"Training {self._name}")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self._bars.prediction_bar is not None and not self._bars.prediction_bar.desc:
            self._bars.prediction_bar.set_description(f"Evaluating {self._name}")
