"""Saving and loading ensembles: the part of [`PeftEnsembleModel`] that knows files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import EnsembleLoadError
from ...tasks import LabelSpace
from ..members import BaseModelReference, check_adapter_name
from .adapter_check import ADAPTER_CONFIG
from .ensemble_config import SavedEnsembleConfig
from .files import load_adapter, load_base, load_ensemble, local_folder, save_ensemble
from .untrusted import checked_file, read_object

_AUTO_CLASS_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class AdapterSource:
    """Where one adapter lies.

    Args:
        name_or_path (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        subfolder (`str`, *optional*): within it.
    """

    name_or_path: str
    revision: str | None = None
    subfolder: str = ""


Adapters = Mapping[str, "str | Path | AdapterSource"]


class SavingMixin:
    """Saving and loading of [`PeftEnsembleModel`]."""

    def ensemble_config(self) -> SavedEnsembleConfig:
        """What `ensemble_config.json` will hold."""
        return SavedEnsembleConfig(
            self.base_model_reference,
            self.members,
            self.weights,
            self.default_weights,
            None if self.label_space is None else self.label_space.to_dict(),
            combination=self.combination,
            routing=self.routing,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `ensemble_config.json` and one plain PEFT adapter per member, safetensors only."""
        self.check_adapters()
        save_ensemble(Path(folder), self.model, self.ensemble_config())

    @classmethod
    def from_adapters(
        cls,
        base_model: "str | nn.Module | None",
        adapters: Adapters,
        weights: Mapping[str, Mapping[str, float]] | None = None,
        token: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """An ensemble of adapters that lie in different folders or Hub repositories.

        Args:
            base_model (`str` or `PreTrainedModel`, *optional*): the base model, or where it lies; the one that all the
                adapters name by default.
            adapters (`dict[str, str]`): folder, Hub id or [`AdapterSource`] of each adapter, by the name it gets.
            weights (`dict[str, dict[str, float]]`, *optional*): weight of each adapter, by task.
            token (`str`, *optional*): Hub token.
            model_kwargs (`dict`, *optional*): passed to the base model's `from_pretrained`.
            kwargs: further arguments of the class.

        Raises:
            `EnsembleLoadError`: for an adapter that is missing, foreign or not safetensors.
        """
        folders = {}
        for name, source in adapters.items():
            check_adapter_name(name)
            if not isinstance(source, AdapterSource):
                source = AdapterSource(str(source))
            folders[name] = local_folder(source.name_or_path, source.revision, token, source.subfolder)
        if not folders:
            raise EnsembleLoadError("Expected at least one adapter, found none.")
        model: Any = base_model
        if not isinstance(base_model, nn.Module):
            model = load_base(_named_base(folders, base_model), None, token, dict(model_kwargs or {}))
        for name, folder in folders.items():
            model = load_adapter(model, folder, name)
        return cls(model, list(adapters), weights, **kwargs).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: "str | Path | Adapters",
        revision: str | None = None,
        base_model: "str | nn.Module | None" = None,
        token: str | None = None,
        **model_kwargs: Any,
    ):
        """Load an ensemble from a folder or the Hub, or make one of adapters that lie apart.

        Args:
            name_or_path (`str`, `Path` or `dict[str, str]`): folder, or Hub id; or adapters as of [`from_adapters`],
                which get equal weights.
            revision (`str`, *optional*): branch, tag or commit of a Hub id.
            base_model (`str` or `PreTrainedModel`, *optional*): in place of the base that the ensemble names.
            token (`str`, *optional*): Hub token.
            model_kwargs: passed to the base model's `from_pretrained` (`dtype`, `device_map`, `quantization_config`,
                ...). Code of the base's repository runs only with `trust_remote_code=True` here.

        Raises:
            `EnsembleLoadError`: for a folder that is no ensemble, an adapter that is missing, foreign, damaged or not
                safetensors, a name that leads out of the folder; the message names file and fault.
        """
        if isinstance(name_or_path, Mapping):
            return cls.from_adapters(base_model, name_or_path, token=token, model_kwargs=model_kwargs)
        model, config = load_ensemble(str(name_or_path), revision, base_model, token, model_kwargs)
        return cls(
            model,
            config.members,
            config.weights,
            config.default_weights,
            None if config.label_space is None else LabelSpace.from_dict(config.label_space),
            config.base_model,
            config.combination,
            config.routing,
        ).eval()


def _named_base(folders: Mapping[str, Path], override: str | None) -> BaseModelReference:
    """The base model that all adapters name."""
    named, kinds = {}, set()
    for name, folder in folders.items():
        what = f"Adapter {name!r}"
        data = read_object(checked_file(folder / ADAPTER_CONFIG, folder, what), what)
        named[name] = (data.get("base_model_name_or_path") or "", data.get("revision"))
        kinds.add(data.get("task_type"))
    if len(kinds) != 1 or (override is None and len(set(named.values())) != 1):
        raise EnsembleLoadError(
            f"The adapters are of different base models or tasks: {named}, {sorted(map(str, kinds))}. Pass the base "
            "model itself."
        )
    auto_class = _AUTO_CLASS_OF_TASK.get(kinds.pop() or "")
    if auto_class is None:
        raise EnsembleLoadError(
            f"{ADAPTER_CONFIG} names no task_type that tells the base model's class. Pass the model."
        )
    base, revision = next(iter(named.values()))
    return BaseModelReference(override or base, None if override else revision, auto_class)
