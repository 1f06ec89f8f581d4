"""Peak memory of one method, and the largest tensor of a capture; to be measured in a separate process."""

import ctypes
import gc
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..common import peak_memory, process_memory
from .methods import Capture, Method, Plain
from .models import Setting, largest_layer_gradients, make_model, make_rows

_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def method_memory(setting: Setting, method: type[Method]) -> dict:
    """Peak above the model at rest. A tiny model runs first, so that imports and library buffers are not counted."""
    tiny = replace(setting, path=None, quantization=None, changes=_TINY, dim=16)
    _run(make_model(tiny), tiny, method, 2)
    model = make_model(setting)
    # Second moments are taken from the training rows, which are one of the two batches.
    batches = 2 if issubclass(method, Capture) else 1
    _run(model, setting, Plain, 1)
    _settle()
    if setting.device == "cuda":
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _run(model, setting, method, batches)
        return {"rest_bytes": rest, "peak_extra_bytes": torch.cuda.max_memory_allocated() - rest}
    rest, how = process_memory("VmRSS"), "VmHWM after clear_refs"
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        how, rest = "ru_maxrss", peak_memory()
    missing = _run(model, setting, method, batches)
    return {"how": how, "rest_bytes": rest, "peak_extra_bytes": process_memory("VmHWM") - rest + missing}


def _run(model, setting: Setting, method: type[Method], batches: int) -> int:
    """Run a method once; returns the bytes of a matrix that it would need but did not allocate."""
    made = method(model, setting, make_rows(setting, setting.batch * batches))
    made.prepare()
    made.run()
    return made.facts.get("matrix_bytes_not_made", 0)


class _Largest(TorchDispatchMode):
    """Records the largest new storage of each operation."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, tuple[int, list[int], str]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                size = tensor.untyped_storage().nbytes()
                if size > self.found.get(str(function), (0,))[0]:
                    self.found[str(function)] = (size, list(tensor.shape), str(tensor.dtype))
        return out


def largest_tensor(setting: Setting, method: type[Method], rank: int | None, batches: int) -> dict:
    """The largest tensors that PyTorch allocates during a capture; NumPy's allocations are not seen."""
    setting = replace(setting, rank=rank)
    model = make_model(setting)
    with _Largest() as mode:
        _run(model, setting, method, batches)
    order = sorted(mode.found.items(), key=lambda item: -item[1][0])
    return {
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "largest_layer_gradients_bytes": largest_layer_gradients(model, setting.batch),
        "bytes": order[0][1][0],
        "largest": [{"operation": name, "bytes": b, "shape": s, "dtype": d} for name, (b, s, d) in order[:6]],
    }
