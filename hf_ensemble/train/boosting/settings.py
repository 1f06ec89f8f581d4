"""How an ensemble is boosted."""

from dataclasses import dataclass, field

from ..._settings import Settings, check_at_least, check_one_of
from ...estimate import LINEAR_METHODS

# Methods that train an adapter; the others solve for one in the captured gradients.
TRAINED_METHODS = ("finetuning", "residuals", "adaboost")
METHODS = (*LINEAR_METHODS, *TRAINED_METHODS)
TARGETS = ("group", "task")


@dataclass
class BoostingSettings(Settings):
    """How an ensemble is boosted.

    Raises:
        `ConfigurationError`: for values out of range.
    """

    boosting_steps: int = field(
        default=0,
        metadata={
            "help": "Number of boosting steps: each adds an adapter for the group, or the task, with the highest "
            "training loss, and is kept if it lowers the validation loss by more than the noise."
        },
    )
    boosting_method: str = field(
        default="surrogate",
        metadata={
            "help": "How a step's adapter is made. Without training, from the captured gradients: 'surrogate' "
            "(LogitBoost's weights) or 'ridge' (regression to the residuals, as in EnsembleLoRA). By training: "
            "'finetuning' (beside the ensemble's logits), 'residuals' (regression of its logits to the residuals), or "
            "'adaboost' (rows reweighted by how badly they are answered)."
        },
    )
    boosting_target: str = field(
        default="group", metadata={"help": "What a step is for: the 'group' or the 'task' with the highest loss."}
    )

    def __post_init__(self):
        check_at_least("boosting_steps", self.boosting_steps, 0)
        check_one_of("boosting_method", self.boosting_method, METHODS)
        check_one_of("boosting_target", self.boosting_target, TARGETS)
        super().__post_init__()
