"""`ensemble_config.json`: the parts of a saved ensemble."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..._compat import package_versions
from ..._files import sha256_of, write_atomically, write_json
from ..._records import check_checksum, with_checksum
from ...errors import EnsembleError, EnsembleLoadError, RecordError
from ...models import LabelHead
from ..forward.combination import COMBINATIONS
from ..forward.router import PromptRouter
from ..forward.routing import DEFAULT_TEMPERATURE, ROUTINGS, check_temperature
from ..members import (
    BaseModelReference,
    EnsembleMember,
    check_adapter_name,
    check_scales,
    check_weights,
    standing_alone,
)
from .untrusted import REMEDY, checked_file, read_object

CONFIG_NAME = "ensemble_config.json"
ADAPTERS_FOLDER = "adapters"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ROUTER_WEIGHTS = "router.safetensors"
FORMAT = "hf_ensemble.ensemble"
FORMAT_VERSION = 4


@dataclass(frozen=True)
class SavedEnsembleConfig:
    """Content of `ensemble_config.json`.

    Args:
        base_model (`BaseModelReference`): the base model.
        members (`list[EnsembleMember]`): the adapters, in the order of the weights' columns.
        weights (`dict[str, dict[str, float]]`): weight of each adapter, by task; adapters left out weigh 0.
        default_weights (`dict[str, float]`): weights for rows of no known task.
        label_space (`dict`, *optional*): label sets of classification tasks.
        versions (`dict[str, str]`): versions of the packages that wrote it.
        combination (`str`): see [`PeftEnsembleModel`].
        routing (`str`, *optional*): see [`PeftEnsembleModel`].
        files (`dict[str, dict[str, str]]`): checksums of each adapter's files; taken anew when the ensemble is saved.
        tags (`list[str]`): the model's tags, for the card.
        scales (`dict[str, float]`): see [`PeftEnsembleModel`].
        router ([`PromptRouter`], *optional*): see [`PeftEnsembleModel`]; it has a file of its own.
        routing_temperature (`float`): see [`PeftEnsembleModel`].
    """

    base_model: BaseModelReference
    members: list[EnsembleMember]
    weights: dict[str, dict[str, float]]
    default_weights: dict[str, float]
    label_space: dict | None = None
    versions: dict[str, str] = field(default_factory=package_versions)
    combination: str = "logits"
    routing: str | None = None
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)
    router: PromptRouter | None = None
    routing_temperature: float = DEFAULT_TEMPERATURE

    def save(self, folder: Path) -> None:
        """Write the router and, beside the adapters, the configuration with all their checksums."""
        files = {
            member.name: {
                name: sha256_of(path)
                for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
                if (path := folder / ADAPTERS_FOLDER / member.name / name).is_file()
            }
            for member in self.members
        }
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(replace(self, router=None)),
            "files": files,
            "router": _write_router(folder / ROUTER_WEIGHTS, self.router),
        }
        write_json(folder / CONFIG_NAME, with_checksum(data))

    def check_adapter_files(self, name: str, folder: Path) -> None:
        """Make sure that an adapter's files are those that were saved with the configuration.

        Raises:
            `EnsembleLoadError`: for missing and other ones.
        """
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            path = checked_file(folder / ADAPTERS_FOLDER / name / file, folder, f"Adapter {name!r}")
            if self.files.get(name, {}).get(file) != sha256_of(path):
                raise EnsembleLoadError(
                    f"Adapter {name!r}: {str(path)!r} is not the file that the ensemble was saved with: it is damaged "
                    f"or was replaced. {REMEDY}"
                )

    @classmethod
    def load(cls, folder: Path) -> "SavedEnsembleConfig":
        """Read and check a configuration.

        Raises:
            `EnsembleLoadError`: for a missing or foreign file, a newer format, or an adapter name that is not a folder
            name.
        """
        path = folder / CONFIG_NAME
        if not path.is_file():
            inside = folder / "ensemble"
            meant = f"Did you mean {str(inside)!r}?" if (inside / CONFIG_NAME).is_file() else "Check the path."
            raise EnsembleLoadError(f"{str(folder)!r} holds no {CONFIG_NAME}: it is not a saved ensemble. {meant}")
        where = f"The ensemble in {str(folder)!r}"
        data = read_object(checked_file(path, folder, where), where)
        version = data.get("format_version")
        if data.get("format") != FORMAT or not isinstance(version, int):
            raise EnsembleLoadError(
                f"{CONFIG_NAME} in {str(folder)!r} is damaged: expected the format {FORMAT!r} with a format_version, "
                f"found {data.get('format')!r} and {version!r}. {REMEDY}"
            )
        if version > FORMAT_VERSION:
            raise EnsembleLoadError(
                f"{CONFIG_NAME} has format version {version}, this release reads {FORMAT_VERSION}. Install a newer "
                "hf_ensemble."
            )
        for key, known in (("combination", COMBINATIONS), ("routing", (*ROUTINGS, None))):
            if data.get(key, known[-1]) not in known:
                raise EnsembleLoadError(f"{CONFIG_NAME}: unknown {key} {data[key]!r}, known: {known}.")
        try:
            config = cls(
                _base_model(data["base_model"]),
                [EnsembleMember(**member) for member in data["members"]],
                {task: dict(row) for task, row in data["weights"].items()},
                dict(data["default_weights"]),
                data.get("label_space"),
                data.get("versions", {}),
                data.get("combination", COMBINATIONS[0]),
                data.get("routing"),
                data.get("files", {}),
                list(data.get("tags", [])),
                dict(data.get("scales", {})),
                routing_temperature=data.get("routing_temperature", DEFAULT_TEMPERATURE),
            )
            config.check()
            check_checksum(data, str(path), REMEDY)
            if data.get("router") is not None:
                config = replace(config, router=_read_router(folder, data["router"], config.members))
        except RecordError as error:
            raise EnsembleLoadError(str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, EnsembleError):
                raise
            raise EnsembleLoadError(f"{CONFIG_NAME} in {str(folder)!r} is damaged: {error!r}. {REMEDY}") from error
        return config

    def check(self) -> None:
        """Raise [`EnsembleLoadError`] for names that lead out of the folder and for values of the wrong type."""
        base = self.base_model
        if not all(isinstance(v, str) for v in (base.name_or_path, base.auto_class, base.revision or "")):
            raise EnsembleLoadError(f"{CONFIG_NAME}: expected strings in base_model, found {base}.")
        if not Path(base.name_or_path).is_absolute() and ".." in re.split(r"[/\\]", base.name_or_path):
            raise EnsembleLoadError(f"{CONFIG_NAME}: the base model {base.name_or_path!r} leads out of its folder.")
        if not all(isinstance(tag, str) for tag in self.tags):
            raise EnsembleLoadError(f"{CONFIG_NAME}: expected strings in tags, found {self.tags!s:.80}.")
        names = [member.name for member in self.members]
        for name in names:
            check_adapter_name(name)
        if not names:
            raise EnsembleLoadError(f"{CONFIG_NAME}: expected at least one member, found none.")
        if not all(isinstance(member.is_step, bool) for member in self.members):
            raise EnsembleLoadError(f"{CONFIG_NAME}: expected true or false as is_step of each member.")
        if len(set(names)) < len(names):
            raise EnsembleLoadError(f"{CONFIG_NAME}: two members have the same name, found {names}.")
        check_weights(self.weights, names, CONFIG_NAME)
        check_weights({"default": self.default_weights}, names, CONFIG_NAME)
        check_scales(self.scales, CONFIG_NAME)
        check_temperature(self.routing_temperature)
        if self.label_space is not None:
            outputs = len(self.label_space["names"])
            for task, labels in self.label_space["task_labels"].items():
                if not all(isinstance(label, int) and 0 <= label < outputs for label in labels):
                    raise EnsembleLoadError(
                        f"{CONFIG_NAME}: the labels of {task!r} are {labels!r}, expected numbers below {outputs}."
                    )


def _write_router(path: Path, router: PromptRouter | None) -> str | None:
    """The checksum of the file; where there is no router, none is left."""
    if router is None:
        path.unlink(missing_ok=True)
        return None
    data = save(router.tensors())
    write_atomically(path, lambda file: file.write(data), len(data))
    return sha256_of(path)


def _read_router(folder: Path, checksum: str, members: list[EnsembleMember]) -> PromptRouter:
    path = checked_file(folder / ROUTER_WEIGHTS, folder, "The ensemble's router")
    if sha256_of(path) != checksum:
        raise EnsembleLoadError(
            f"{str(path)!r} is not the router that the ensemble was saved with: it is damaged or was replaced. {REMEDY}"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise EnsembleLoadError(f"{str(path)!r} is damaged: {error}. {REMEDY}") from error
    return PromptRouter.from_tensors(tensors, len(standing_alone(members)))


def _base_model(data: Mapping[str, Any]) -> BaseModelReference:
    """The reference with its head, whose values are checked: they come from a file."""
    head = data.get("label_head")
    if head is None:
        return BaseModelReference(**data)
    head = LabelHead(**head)
    ids = [own for tokens in head.token_ids for own in tokens]
    if len(head.texts) != len(head.token_ids) or not all(head.token_ids) or not all(isinstance(i, int) for i in ids):
        raise EnsembleLoadError(
            f"{CONFIG_NAME}: expected the tokens of each of {len(head.texts)} label texts, found "
            f"{head.token_ids!s:.80}. {REMEDY}"
        )
    if head.dtype is not None and not isinstance(getattr(torch, str(head.dtype), None), torch.dtype):
        raise EnsembleLoadError(
            f"{CONFIG_NAME}: expected a type of torch in label_head, found {head.dtype!r}. {REMEDY}"
        )
    return BaseModelReference(**{**data, "label_head": head})
