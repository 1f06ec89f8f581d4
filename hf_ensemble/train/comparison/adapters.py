"""Adapters beside those of a run: of a higher rank, or saved ones on the run's model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ..._compat import preserve_active_adapter
from ...ensemble.saving.files import load_adapter
from ...runs import TrainedAdapter
from ..flows.adapter_training import AdapterTraining
from ..flows.ensemble_flow import EnsembleFlow
from ..inputs.used_models import mark_as_of_a_run
from ..model_state import ModelState

_WIDER = "compared_wider"


def widened(config: LoraConfig, factor: int) -> LoraConfig:
    """LoRA of `factor` times the rank in every layer, scaled as it was: by alpha / r, or alpha / sqrt(r) (rsLoRA)."""
    scaling = math.sqrt(factor) if config.use_rslora else factor
    return replace(
        config,
        r=config.r * factor,
        lora_alpha=config.lora_alpha * scaling,
        rank_pattern={key: rank * factor for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={key: alpha * scaling for key, alpha in (config.alpha_pattern or {}).items()},
    )


def train_widened(
    flow: EnsembleFlow,
    factor: int,
    name: str,
    mixture: Mapping[str, float] | Sequence[str],
    folder: Path,
    **options: Any,
) -> TrainedAdapter:
    """Train an adapter of `factor` times the rank; the other arguments are those of [`AdapterTraining.run`]."""
    context, model = flow.context, flow.context.model
    context.model_state.restore()
    with torch.random.fork_rng():
        torch.manual_seed(context.args.seed)
        model.add_adapter(_WIDER, widened(model.peft_config[context.adapter_name], factor))
    mark_as_of_a_run(model.peft_config[_WIDER])
    try:
        model.set_adapter(_WIDER)
        own = replace(context, adapter_name=_WIDER, model_state=ModelState(model, origin=context.model_state))
        return AdapterTraining(own).run(name, mixture, folder, **options)
    finally:
        model.set_adapter(context.adapter_name)
        model.delete_adapter(_WIDER)
        context.model_state.restore()


@contextmanager
def loaded_adapters(flow: EnsembleFlow, folders: Mapping[str, Path]) -> Iterator[list[str]]:
    """While open, saved adapters are on the run's model, under these names."""
    model = flow.context.model
    with preserve_active_adapter(model):
        try:
            for name, folder in folders.items():
                load_adapter(model, folder, name)
                mark_as_of_a_run(model.peft_config[name])
            yield list(folders)
        finally:
            for name in folders:
                if name in model.peft_config:
                    model.delete_adapter(name)
