"""Trainings of several groups at once, and what they do not go with: refused before anything is trained."""

from peft import PeftModel
from transformers import TrainingArguments

from ...errors import ConfigurationError
from ..concurrent.copies import sharing_frozen
from ..concurrent.turns import backbone_of
from ..configs import AUTO

# Arguments that turn on what a shared pass cannot be made with.
_REFUSED = {
    "packing": "whose rows are parts of one sequence, so that adapters cannot be told apart by rows",
    "padding_free": "whose rows are parts of one sequence, so that adapters cannot be told apart by rows",
    "torch_compile": "whose graphs hold the adapter of one training",
    "use_liger_kernel": "which replaces layers of the model that all trainings share",
    "neftune_noise_alpha": "whose noise depends on the length of the longest row beside",
    "activation_offloading": "which follows the activations of one training",
}
# Trackers with a run for each thread.
_OF_A_THREAD = ("mlflow", "dagshub")
# Optimizers that step in the backward pass.
_IN_BACKWARD = ("lomo", "layerwise")


def check_concurrency(args: TrainingArguments) -> None:
    """Refuse arguments, and numbers of processes, that groups cannot be trained at once with.

    Raises:
        `ConfigurationError`: which names the argument; not with `concurrent_groups="auto"`, which is 1 then.
    """
    if args.concurrent_groups not in (1, AUTO):
        _refuse(obstacle_of_arguments(args), args)


def check_concurrent_model(model: PeftModel, args: TrainingArguments) -> None:
    """Refuse models that several trainings cannot share, and several GPUs.

    Args:
        model (`PeftModel`): the model with its adapter.
        args (`TrainingArguments`): the trainer's arguments, once it has settled its devices.

    Raises:
        `ConfigurationError`: which names what was found; not with `concurrent_groups="auto"`, which is 1 then.
    """
    if args.concurrent_groups not in (1, AUTO):
        _refuse(obstacle_of_model(model, args), args)


def obstacle_of_arguments(args: TrainingArguments) -> str | None:
    """What among the arguments groups cannot be trained at once with, and why."""
    if args.world_size > 1:
        return f"{args.world_size} processes, on each of which other trainings would wait"
    if args.grouping_method == "mixtures" and args.sequential_groups:
        return "sequential_groups=True, which chooses each group anew after the one before is trained"
    for name, reason in _REFUSED.items():
        value = getattr(args, name, None)
        # Whole rows that were cut to one length.
        has_rows = name == "packing" and value and args.packing_strategy == "wrapped"
        if value and not has_rows:
            return f"{name}={value!r}, {reason}"
    optimizer = getattr(args.optim, "value", str(args.optim))
    if any(part in optimizer for part in _IN_BACKWARD):
        return f"optim={optimizer!r}, which steps in the backward pass"
    for name in args.report_to:
        if name in _OF_A_THREAD:
            return f"report_to={name!r}, which has a run of its own in each thread"
    return None


def obstacle_of_model(model: PeftModel, args: TrainingArguments) -> str | None:
    """What of the model and its devices groups cannot be trained at once with, and why."""
    if args.n_gpu > 1:
        return f"{args.n_gpu} GPUs in one process, on each of which a copy of the model would run"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "a model that is spread over several devices"
    if backbone_of(model) is None:
        kind = type(model.get_base_model()).__name__
        return f"a {kind}, which has no part below its head that trainings could share"
    try:
        # What each training gets; an attribute of the model may refuse it in any way.
        sharing_frozen(model)
    except Exception as error:
        return f"a model that cannot be copied: {str(error).rstrip('.')}"
    return None


def _refuse(obstacle: str | None, args: TrainingArguments) -> None:
    if obstacle is not None:
        raise ConfigurationError(
            f"concurrent_groups={args.concurrent_groups} does not go with {obstacle}. Set concurrent_groups=1 to "
            "train one group after the other."
        )
