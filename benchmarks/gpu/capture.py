"""The capture of a 4-bit model, next to a training step on the same rows."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from hf_ensemble.capture import GradientExtractor

from ..capture.methods import Capture
from ..capture.models import Setting, make_batches, make_model, make_rows
from .clocks import kernels, peak_bytes, seconds

TURNS, BATCHES = 3, 2
# Rows of 512 tokens in a batch, and batches of a store.
SIZES = {"llama-8b": (8, 12), "llama-34b": (4, 4)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PLAIN, STEP, CAPTURE = "forward and backward", "with activation checkpointing", "capture"


class _MixedCapture(Capture):
    """`capture_gradients` as for a trainer with bf16."""

    config = {"mixed_precision": "bf16"}
    clock = staticmethod(time.perf_counter)


def measure(name: str, device: torch.device, tiny: bool, layers: int | None) -> dict:
    """Seconds of a batch, memory and kernels, by way to take the rows through the model."""
    setting, store_batches = _setting(name, device, tiny, layers)
    start = time.perf_counter()
    model = make_model(setting)
    made = time.perf_counter() - start
    batches = make_batches(setting, make_rows(setting, setting.batch * BATCHES))
    ways = _ways(model, setting, device)
    result = {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "parameters": sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows": setting.batch,
        "length": setting.length,
        "answer": setting.answer,
        "features": setting.dim,
        "seconds_to_make": made,
        "weights_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
        "ways": _measured(ways, batches, device),
    }
    if CAPTURE in result["ways"]:
        result["store"] = _store(model, setting, store_batches, device)
    return result


def _setting(name: str, device: torch.device, tiny: bool, layers: int | None) -> tuple[Setting, int]:
    changes = {} if layers is None else {"num_hidden_layers": layers}
    if tiny:
        small = {"batch": 2, "length": 32, "answer": 8, "dim": 256}
        return _nf4("llama-tiny", device, changes, **small), 2
    batch, store_batches = SIZES[name]
    return _nf4(name, device, changes, batch=batch, length=512, answer=128, dim=4096), store_batches


def _nf4(model: str, device: torch.device, changes: dict, **shape: int) -> Setting:
    return Setting(
        model, rank=16, target_modules=ATTENTION, device=str(device), quantization="nf4", changes=changes, **shape
    )


def _ways(model: Any, setting: Setting, device: torch.device) -> dict[str, Callable[[dict], Any]]:
    # It keeps quantized weights as they are, also for the other ways.
    extractor = GradientExtractor(model, setting.dim, mixed_precision="bf16")
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})

    def step(batch: dict, training: bool) -> None:
        # Activations are checkpointed in training mode alone.
        model.train(training)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()

    return {
        PLAIN: lambda batch: step(batch, training=False),
        STEP: lambda batch: step(batch, training=True),
        CAPTURE: extractor,
    }


def _measured(ways: dict[str, Callable], batches: list[dict], device: torch.device) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name, run in ways.items():
        try:
            # The first batch of a capture takes further passes that check its hooks.
            first = seconds(lambda run=run: run(batches[0]), device)
            run(batches[0])
            peak = peak_bytes(lambda run=run: run(batches[0]), device)
        except torch.OutOfMemoryError:
            continue
        finally:
            _settle(device)
        count = kernels(lambda run=run: run(batches[0]), device)
        found[name] = {"first_seconds": first, "peak_bytes": peak, "kernels": count, "seconds": []}
    for _ in range(TURNS):
        for name, own in found.items():
            own["seconds"] += [seconds(lambda run=ways[name], batch=batch: run(batch), device) for batch in batches]
    tokens = batches[0]["input_ids"].numel()
    for own in found.values():
        own["tokens_per_second"] = tokens / statistics.median(own["seconds"])
    return found


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _store(model: Any, setting: Setting, batches: int, device: torch.device) -> dict:
    """A whole `capture_gradients`, with its preconditioner and the store on disk."""
    rows = make_rows(setting, setting.batch * batches)
    capture = _MixedCapture(model, setting, rows)
    capture.prepare()
    took = seconds(capture.run, device)
    return {"rows": len(rows), "seconds": took, "moments": capture.once.get("moment rows")}
