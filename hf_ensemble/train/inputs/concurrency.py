"""Trainings of several groups at once, and what they do not go with: refused before anything is trained."""

from typing import NoReturn

from peft import PeftModel
from transformers import TrainingArguments

from ...errors import ConfigurationError
from ..concurrent.turns import backbone_of

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
        `ConfigurationError`: which names the argument.
    """
    if args.concurrent_groups == 1:
        return
    if args.world_size > 1:
        _refuse(f"{args.world_size} processes, on each of which other trainings would wait", args)
    if args.grouping_method == "mixtures" and args.sequential_groups:
        _refuse("sequential_groups=True, which chooses each group anew after the one before is trained", args)
    for name, reason in _REFUSED.items():
        value = getattr(args, name, None)
        # Whole rows that were cut to one length.
        has_rows = name == "packing" and value and args.packing_strategy == "wrapped"
        if value and not has_rows:
            _refuse(f"{name}={value!r}, {reason}", args)
    optimizer = getattr(args.optim, "value", str(args.optim))
    if any(part in optimizer for part in _IN_BACKWARD):
        _refuse(f"optim={optimizer!r}, which steps in the backward pass", args)
    for name in args.report_to:
        if name in _OF_A_THREAD:
            _refuse(f"report_to={name!r}, which has a run of its own in each thread", args)


def check_concurrent_model(model: PeftModel, args: TrainingArguments) -> None:
    """Refuse models that several trainings cannot share, and several GPUs.

    Args:
        model (`PeftModel`): the model with its adapter.
        args (`TrainingArguments`): the trainer's arguments, once it has settled its devices.

    Raises:
        `ConfigurationError`: which names what was found.
    """
    if args.concurrent_groups == 1:
        return
    if args.n_gpu > 1:
        _refuse(f"{args.n_gpu} GPUs in one process, on each of which a copy of the model would run", args)
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        _refuse("a model that is spread over several devices", args)
    if backbone_of(model) is None:
        kind = type(model.get_base_model()).__name__
        _refuse(f"a {kind}, which has no part below its head that trainings could share", args)


def _refuse(what: str, args: TrainingArguments) -> NoReturn:
    raise ConfigurationError(
        f"concurrent_groups={args.concurrent_groups} does not go with {what}. Set concurrent_groups=1 to train "
        "one group after the other."
    )
