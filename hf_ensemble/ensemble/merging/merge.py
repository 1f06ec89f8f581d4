"""Merging a weighted set of adapters into one plain PEFT adapter."""

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save
from torch import nn

from ..._cards import CARD, CardParts, render, update_card_file
from ..._compat import tokens_of_their_own_adapters
from ..._files import write_together
from ..._hub import Repository
from ..._settings import check_at_least, check_one_of, check_options, checked_path
from ...errors import EnsembleError, EnsembleLoadError
from ...logging import get_logger
from ..members import BaseModelReference
from ..saving.card import adapter_loading, adapter_metadata, reporting_failed_card
from ..saving.ensemble_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..saving.files import base_reference
from ..saving.pushing import push_adapter
from ..saving.vllm import vllm_obstacles, vllm_rank
from ..saving.vocabulary import resized_embeddings, saved_vocabulary
from . import task_vectors
from .deltas import AdapterDelta, adapter_delta, lora_modules, saved_modules
from .low_rank import padded, truncated, truncated_matrix
from .quantization import warn_of_requantization

logger = get_logger(__name__)

DENSE_METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "ties": task_vectors.ties,
    "dare_linear": task_vectors.dare_linear,
    "dare_ties": task_vectors.dare_ties,
    "breadcrumbs": task_vectors.breadcrumbs,
    "pcb": task_vectors.pcb,
    "tsv": task_vectors.tsv,
    "knots": task_vectors.knots,
}
METHODS = ("sum", "lines", *DENSE_METHODS)
# Methods that draw entries at random, by the module's name.
_RANDOM_METHODS = ("dare_linear", "dare_ties")
Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MergedAdapter:
    """A plain LoRA adapter merged from several; its scaling is 1.

    Args:
        config (`LoraConfig`): `adapter_config.json`.
        state_dict (`dict[str, torch.Tensor]`): `adapter_model.safetensors`, in float32; with it the embeddings of a
            base whose vocabulary was resized, in the base's precision.
        weights (`dict[str, float]`): weight of each merged adapter.
        method (`str`): merging method.
        relative_error (`float`): |merged - exact| / |exact| over all modules together, in the Frobenius norm, where
            `exact` is the method's result before it is truncated to the rank; 0.0 if nothing was truncated.
        module_errors (`dict[str, float]`): the same for each truncated module.
        base_model (`BaseModelReference`, *optional*): the base model, for the card; `None` for one of another kind.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor] = field(repr=False)
    weights: dict[str, float]
    method: str
    relative_error: float
    module_errors: dict[str, float] = field(repr=False)
    base_model: BaseModelReference | None = None

    @property
    def rank(self) -> int:
        return self.config.r

    @property
    def vllm_rank(self) -> int | None:
        """The smallest `max_lora_rank` with which vLLM serves the adapter; `None` above its largest."""
        return vllm_rank(self.config)

    def vllm_obstacles(self) -> list[str]:
        """Why vLLM would refuse the adapter or compute it wrongly; empty if it serves it."""
        return vllm_obstacles(self.config, self._vocabulary is not None)

    @property
    def _vocabulary(self) -> int | None:
        """Tokens of a base whose vocabulary was resized."""
        return saved_vocabulary({key: value.shape for key, value in self.state_dict.items()}, self.config)

    def padded(self, rank: int) -> "MergedAdapter":
        """The same change of the weights with matrices of a larger rank, the new entries zero and the scaling 1.

        Raises:
            `EnsembleError`: for a rank below the adapter's.
        """
        check_at_least("rank", rank, self.rank, error=EnsembleError)
        state = dict(self.state_dict)
        for key in self.state_dict:
            if ".lora_A." in key or key.endswith(".lora_embedding_A"):
                other = key.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
                state[key], state[other] = padded(state[key], state[other], rank)
        return replace(self, config=replace(self.config, r=rank, lora_alpha=rank), state_dict=state)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the two files of a plain PEFT adapter, for `PeftModel.from_pretrained`, and its model card.

        An adapter that is there is replaced; where that is interrupted, the folder holds it or the new one whole, or no
        `adapter_config.json`, without which it is none. Other files of the folder stay.

        Raises:
            `WriteError`: where the folder cannot be written.
        """
        folder = checked_path("the folder to save into", folder, EnsembleError)
        tensors = {key: value.contiguous() for key, value in self.state_dict.items()}
        weights = save(tensors, metadata={"format": "pt"})
        with tempfile.TemporaryDirectory() as work:
            self.config.save_pretrained(work)
            text = (Path(work) / ADAPTER_CONFIG).read_bytes()
        # The configuration comes last, as it makes the folder an adapter.
        write_together(folder, {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: text})
        with reporting_failed_card(folder):
            update_card_file(folder / CARD, *self._card(folder))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Upload the adapter with its model card, in one commit.

        Args:
            repo_id (`str`): repository; created where it does not exist.
            kwargs: `token`, `private`, `commit_message`, `commit_description`, `revision` and `create_pr`, as for
                [`PeftEnsembleModel.push_to_hub`].

        Raises:
            `PushError`: where the Hub refuses or cannot be reached.
        """
        check_options(Repository, kwargs, "push_to_hub")
        repository = Repository(repo_id, **{"commit_message": "Upload merged adapter", **kwargs})
        base = self.config.base_model_name_or_path or ""
        with tempfile.TemporaryDirectory() as work:
            self.save_pretrained(work)
            card = self._card(Path(work), repo_id)
            return push_adapter(Path(work), repository, base, card, f"merged.push_to_hub({repo_id!r})")

    def _card(self, folder: Path, repo_id: str | None = None) -> CardParts:
        """What the card is made of."""
        base = self.base_model or BaseModelReference(self.config.base_model_name_or_path or "", None, "AutoModel")
        loading = adapter_loading(folder, base, {"": "A prompt"}, repo_id)
        metadata = adapter_metadata(base, ["hf-ensemble", "lora", "merge"])
        return CardParts(metadata, render("merged_card.md.jinja", merged=self, loading=loading))

    def add_to(self, model: nn.Module, name: str = "default") -> PeftModel:
        """Add the adapter to a base model or a `PeftModel`, frozen and active.

        Raises:
            `EnsembleError`: if the model already has an adapter of this name, and where it lacks tokens of the resized
                vocabulary that the adapter was made with.
        """
        if self._vocabulary is not None and self._vocabulary != (own := model.get_input_embeddings().weight.shape[0]):
            raise EnsembleError(
                f"Expected a model with the adapter's vocabulary of {self._vocabulary} tokens, found one of {own}. "
                f"Call model.resize_token_embeddings({self._vocabulary}, mean_resizing=False) first."
            )
        if isinstance(model, PeftModel):
            if name in model.peft_config:
                raise EnsembleError(f"The model already has an adapter {name!r}: pass another name.")
            model.add_adapter(name, self.config)
        else:
            model = get_peft_model(model, self.config, adapter_name=name)
        with tokens_of_their_own_adapters():
            set_peft_model_state_dict(model, self.state_dict, adapter_name=name)
        model.set_adapter(name, inference_mode=True)
        return model.eval()


@torch.no_grad()
def merge_adapters(
    model: PeftModel,
    weights: Mapping[str, float],
    rank: int | None = None,
    method: str = "sum",
    base_model: BaseModelReference | None = None,
    **options: Any,
) -> MergedAdapter:
    """Merge a model's adapters, see [`PeftEnsembleModel.merge`].

    Args:
        model (`PeftModel`): holds the adapters.
        weights (`dict[str, float]`): weight of each adapter.
        rank (`int`, *optional*): largest rank. By default the sum of the adapters' ranks, which is exact for `sum` and
            `lines`; the results of the other methods have a higher rank.
        method (`str`): one of [`METHODS`].
        base_model (`BaseModelReference`, *optional*): what the result names as its base; what the model's base was
            loaded from by default.
        options: the method's own, see `task_vectors`; for `lines`, `alpha` and `beta`.

    Raises:
        `EnsembleError`: for an unknown method or option, and for adapters that cannot be merged.
    """
    _check(rank, method)
    used = {name: float(weight) for name, weight in weights.items() if weight}
    wanted: dict[str, Factors | torch.Tensor] = {}
    ranks: dict[str, int] = {}
    embeddings = set()
    layers = {path: _layer_number(path) for path, _ in lora_modules(model, used)}
    num_layers = 1 + max((number for number in layers.values() if number is not None), default=0)
    for path, layer in lora_modules(model, used):
        deltas = {name: adapter_delta(path, layer, name) for name in used}
        held = {name: delta for name, delta in deltas.items() if delta is not None}
        if not held:
            continue
        if any(name in layer.lora_embedding_A for name in held):
            embeddings.add(path)
        own = {name: used[name] for name in held}
        if method == "lines":
            factor = _with_options(task_vectors.lines_factor, layers[path], num_layers, **{**_LINES, **options})
            own = {name: weight * factor for name, weight in own.items()}
        wanted[path] = _merged_module(path, held, own, len(used), rank, method, options)
        ranks[path] = sum(len(delta.down) for delta in held.values())
        if isinstance(wanted[path], torch.Tensor) and rank is not None:
            ranks[path] = min(wanted[path].shape)
    saved = saved_modules(model, used)
    if not wanted and not saved:
        raise EnsembleError(f"The adapters {list(used)} change no module of the model.")
    cap = max(ranks.values(), default=1) if rank is None else min(rank, max(ranks.values(), default=1))
    state, errors, relative_error = _factors(wanted, cap, embeddings)
    for path, parameters in saved.items():
        state.update({f"base_model.model.{path}.{key}": value for key, value in parameters.items()})
    state.update(resized_embeddings(model, list(used)))
    warn_of_requantization(model, used)
    try:
        base = base_model or base_reference(model)
    except EnsembleLoadError:
        base = None  # of a kind that its card cannot show code for
    config = _config(model, next(iter(used)), list(wanted), sorted(saved), cap)
    if base is not None and base.name_or_path:
        # The adapters may name it by a path that is relative to another working directory.
        config.base_model_name_or_path, config.revision = base.name_or_path, base.revision
    return MergedAdapter(config, state, used, method, relative_error, errors, base)


_LINES = {"alpha": 1.0, "beta": 0.5}


def _check(rank: int | None, method: str) -> None:
    check_one_of("method", method, METHODS, EnsembleError)
    check_at_least("rank", rank, 1, optional=True, error=EnsembleError)


def _with_options(function: Callable, *args: Any, **options: Any) -> Any:
    try:
        return function(*args, **options)
    except TypeError as error:
        raise EnsembleError(f"{function.__name__} does not take the options {sorted(options)}: {error}.") from error


def _merged_module(
    path: str,
    deltas: dict[str, AdapterDelta],
    weights: dict[str, float],
    num_adapters: int,
    rank: int | None,
    method: str,
    options: dict[str, Any],
) -> Factors | torch.Tensor:
    """The method's result for one module: factors where the rank allows it, else a matrix `(out, in)`."""
    dense = [name for name, delta in deltas.items() if delta.dense is not None]
    if method in DENSE_METHODS:
        # An adapter without this module counts as zero in an average.
        matrices = [delta.matrix() for delta in deltas.values()]
        absent = [torch.zeros_like(matrices[0])] * (num_adapters - len(matrices))
        values = torch.tensor([*weights.values(), *[0.0] * len(absent)], device=matrices[0].device)
        drawn_from = [path] if method in _RANDOM_METHODS else []
        return _with_options(DENSE_METHODS[method], [*matrices, *absent], values, *drawn_from, **options)
    if options and method == "sum":
        raise EnsembleError(f"The method 'sum' takes no options, found {sorted(options)}.")
    if not dense:
        down = torch.cat([delta.down for delta in deltas.values()])
        return down, torch.cat([weights[name] * delta.up for name, delta in deltas.items()], 1)
    if rank is None:
        raise EnsembleError(
            f"The adapters {dense} are DoRA and change {path!r} by a full-rank matrix: no merge is exact. Pass rank=."
        )
    return sum(weights[name] * delta.matrix() for name, delta in deltas.items())


def _factors(wanted: dict[str, Factors | torch.Tensor], rank: int, embeddings: set[str]):
    """PEFT's tensors of every module, all of one rank, with the errors of the truncated ones."""
    state, errors, lost, total = {}, {}, 0.0, 0.0
    for path, change in wanted.items():
        if isinstance(change, torch.Tensor):
            down, up, error, size = truncated_matrix(change, rank)
        elif len(change[0]) > rank:
            down, up, error, size = truncated(*change, rank)
        else:
            (down, up), error = change, 0.0
            size = float(((up.T @ up) * (down @ down.T)).sum())
        if error > 0.0:
            errors[path] = (error / size) ** 0.5
        lost, total = lost + error, total + size
        down, up = padded(down, up, rank)
        keys = ("lora_embedding_A", "lora_embedding_B") if path in embeddings else ("lora_A.weight", "lora_B.weight")
        state.update({f"base_model.model.{path}.{key}": value for key, value in zip(keys, (down, up))})
    return state, errors, (lost / total) ** 0.5 if total else 0.0


def _config(model: PeftModel, like: str, targets: list[str], saved: list[str], rank: int) -> LoraConfig:
    """The same rank and scaling 1 everywhere, which every server of adapters reads."""
    source = model.peft_config[like]
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_shortest_names(model, targets),
        modules_to_save=saved or None,
        task_type=source.task_type,
        fan_in_fan_out=source.fan_in_fan_out,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
    )


def _shortest_names(model: PeftModel, targets: list[str]) -> list[str]:
    """The last parts of the targets' paths if they match the same modules, else whole paths."""
    short = {path.rpartition(".")[2] for path in targets}
    base = model.get_base_model()
    inner = ("base_layer", "lora_", "modules_to_save", "original_module")
    meant = {
        path
        for path, _ in base.named_modules()
        if path.rpartition(".")[2] in short and not any(part.startswith(inner) for part in path.split("."))
    }
    return sorted(short) if meant == set(targets) else sorted(targets)


def _layer_number(path: str) -> int | None:
    found = re.search(r"\.(\d+)\.", f".{path}.")
    return None if found is None else int(found.group(1))
