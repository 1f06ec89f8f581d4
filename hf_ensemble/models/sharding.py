"""A frozen base whose parameters are sharded over the processes, with adapters that every process holds whole."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .zero_sharding import cut_base, gathered, is_cut


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are sharded over processes, which then have to run it together."""
    if not torch.distributed.is_initialized():
        return False
    # Those of a unit that is gathered at the moment look whole.
    gathers = any(isinstance(module, FSDPModule) for module in model.modules())
    return gathers or any(isinstance(own, DTensor) or is_cut(own) for own in model.parameters())


def modules_sharded_together(model: nn.Module) -> list[str]:
    """Names of modules that `fully_shard` was given in one list, but for those of [`shard_base`].

    A head that is run by itself, as scores of answers do, finds its weights freed in its backward: the process dies.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            together = module._get_fsdp_state()._modules
            own = any(_shard_until_backward in other._forward_hooks.values() for other in together)
            found += [name] if len(together) > 1 and not own else []
    return found


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the whole of a sharded one, for which every process has to call this.

    Of one that ZeRO-3 has cut, this has to be the parameter itself.
    """
    tensor = gathered(tensor) if is_cut(tensor) else tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_base(model: PeftModel, mesh: DeviceMesh, is_unit: Callable[[nn.Module], bool]) -> None:
    """Shard the frozen parameters of a `PeftModel`'s base by FSDP2; adapters stay whole on every process.

    So do those that are put on the model later, and modules of which adapters hold copies. Units are gathered while
    they run: those that `is_unit` names, and what is left of the base's own parts (its body, its head). The base itself
    is none, since PEFT calls its `forward`, which hooks do not see. Between passes all units are sharded: one that is
    gathered on some processes alone would keep the others waiting.

    Args:
        model (`PeftModel`): equal on all processes. Parameters are moved to the mesh's device unit by unit.
        mesh (`DeviceMesh`): the processes, in one dimension.
        is_unit (`Callable`): whether a module is gathered by itself, such as a decoder layer.
    """
    base, whole = model.get_base_model(), whole_parameters(model)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole, "reshard_after_forward": True}
    for module in reversed(list(base.modules())):
        if module is not base and is_unit(module):
            fully_shard(module, **options)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight and head.weight not in whole:
        # A parameter belongs to one unit, whose hooks see the body alone.
        fully_shard([embeddings, head], **options)
        head.register_forward_hook(_shard_until_backward)
    for part in base.children():
        if any(parameter not in whole and not isinstance(parameter.data, DTensor) for parameter in part.parameters()):
            fully_shard(part, **options)
    if mesh.device_type != "cpu":
        device = torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
        _move_whole(model, device)


def shard_base_by_zero(model: PeftModel, device: torch.device, is_unit: Callable[[nn.Module], bool]) -> None:
    """Shard the frozen parameters of a `PeftModel`'s base by ZeRO-3 of DeepSpeed, as [`shard_base`] does by FSDP2.

    Args:
        model (`PeftModel`): equal on all processes.
        device (`torch.device`): of this process.
        is_unit (`Callable`): whether a module is gathered by itself, such as a decoder layer.
    """
    cut_base(model, whole_parameters(model), is_unit)
    _move_whole(model, device)


def whole_parameters(model: PeftModel) -> set[nn.Parameter]:
    """Parameters of a base that stay whole: adapters, modules of which they hold copies, what is trained, scalars."""
    base, prefix = model.get_base_model(), model.base_model.prefix
    named = base.named_parameters()
    whole = {own for name, own in named if own.requires_grad or prefix in name or own.dim() == 0}
    for module in base.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            whole.update(module.parameters())
    return whole


def _move_whole(model: PeftModel, device: torch.device) -> None:
    """Put what belongs to no unit on a device."""
    for tensor in (*whole_parameters(model), *model.get_base_model().buffers()):
        tensor.data = tensor.data.to(device)


def _shard_until_backward(head: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Forward hook of a head that is tied to the embeddings."""

    def gather(gradient: torch.Tensor) -> torch.Tensor:
        head.unshard()
        return gradient

    head.reshard()
    if output.requires_grad:
        output.register_hook(gather)
