"""How an ensemble is boosted, and what cannot be: refused before anything is trained."""

from dataclasses import dataclass, field
from typing import NoReturn

from peft import PeftModel
from transformers import TrainingArguments

from ..._settings import Settings, check_at_least, check_one_of
from ...errors import ConfigurationError
from ...estimate import LINEAR_METHODS
from ...models.inputs import is_encoder_decoder

# Methods that train an adapter; the others solve for one in the captured gradients.
TRAINED_METHODS = ("finetuning", "residuals", "adaboost")
METHODS = (*LINEAR_METHODS, *TRAINED_METHODS)
TARGETS = ("group", "task")
# Methods whose training runs the ensemble beside the step.
_BESIDE_ENSEMBLE = ("finetuning", "residuals")
_PACKING = ("packing", "padding_free", "use_liger_kernel")


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


def check_boosting_arguments(args: TrainingArguments, has_loss_function: bool, has_streams: bool) -> None:
    """Refuse arguments beside which boosting steps cannot be made.

    Args:
        args (`TrainingArguments`): the trainer's arguments, with those of boosting.
        has_loss_function (`bool`): whether there is a `compute_loss_func`.
        has_streams (`bool`): whether a dataset is streamed.

    Raises:
        `ConfigurationError`: names the argument, and what to use instead.
    """
    if not args.boosting_steps:
        return
    method = args.boosting_method
    if args.world_size > 1:
        _refuse("several processes", "Start the script with one process, or boosting_steps=0")
    if method in LINEAR_METHODS:
        if not isinstance(args.margin, str):
            _refuse("margin as a function, which no ensemble's answers can be scored by", "Leave margin out")
        return
    for name in _PACKING:
        if getattr(args, name, False):
            _refuse(
                f"{name}=True with boosting_method={method!r}, which needs the logits of each row",
                f"Leave {name} out, or set boosting_method='surrogate'",
            )
    if getattr(args, "loss_type", None) == "dft":
        _refuse(
            f"loss_type='dft' with boosting_method={method!r}: it counts what is answered badly least, and a step is "
            "for what the ensemble answers badly",
            "Leave loss_type out, or set boosting_method='surrogate'",
        )
    if method == "finetuning":
        return
    if has_loss_function or args.label_smoothing_factor > 0 or args.task_loss_weighting != "tokens":
        _refuse(
            f"compute_loss_func, label_smoothing_factor or task_loss_weighting with boosting_method={method!r}, which "
            "has a loss of its own",
            "Leave them out, or set boosting_method='finetuning'",
        )
    if method == "adaboost" and has_streams:
        _refuse(
            "streamed datasets with boosting_method='adaboost', whose rows are weighed before the training",
            "Pass tables, or set boosting_method='finetuning'",
        )


def check_boosted_model(model: PeftModel, args: TrainingArguments) -> None:
    """Refuse models whose logits cannot be added to others', and devices that a step cannot be trained on.

    Args:
        model (`PeftModel`): the model with its adapter.
        args (`TrainingArguments`): the trainer's arguments, once it has settled its devices.

    Raises:
        `ConfigurationError`: for prompt learning, which changes the inputs, and encoder-decoders beside an ensemble;
            and for several GPUs in one process.
    """
    config = model.peft_config[model.active_adapters[0]]
    if config.is_prompt_learning:
        _refuse(
            f"a {type(config).__name__}: boosting steps are added to logits of one input", "Use LoraConfig or IA3Config"
        )
    method = args.boosting_method
    if method not in _BESIDE_ENSEMBLE:
        return
    if args.n_gpu > 1:
        _refuse(
            f"boosting_method={method!r} on {args.n_gpu} GPUs in one process, which would run copies of the model",
            "Set CUDA_VISIBLE_DEVICES=0, or boosting_method='surrogate'",
        )
    if is_encoder_decoder(model):
        _refuse(
            f"boosting_method={method!r} for an encoder-decoder, which is not run beside an ensemble in training",
            "Set boosting_method='surrogate' or 'adaboost'",
        )


def _refuse(what: str, remedy: str) -> NoReturn:
    raise ConfigurationError(f"boosting_steps does not go with {what}. {remedy}.")
