"""`ensemble_config.json`: what a saved ensemble consists of."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft import PeftModel

from .._compat import package_versions
from .._files import write_json
from ..errors import EnsembleError, EnsembleLoadError
from .combination import COMBINATIONS
from .untrusted import checked_file, read_object

CONFIG_NAME = "ensemble_config.json"
ADAPTERS_FOLDER = "adapters"
FORMAT = "hf_ensemble.ensemble"
FORMAT_VERSION = 1
ROUTINGS = ("default", "prompt")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class BaseModelReference:
    """Where an ensemble's base model comes from.

    Args:
        name_or_path (`str`): Hub id or folder.
        revision (`str`, *optional*): commit of a Hub id.
        auto_class (`str`): the transformers auto class that loads it.
        num_labels (`int`, *optional*): outputs of a classification head that the base checkpoint lacks.
    """

    name_or_path: str
    revision: str | None
    auto_class: str
    num_labels: int | None = None


@dataclass(frozen=True)
class EnsembleMember:
    """One adapter: its name (also its folder under `adapters/`) and the tasks it was trained on."""

    name: str
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SavedEnsembleConfig:
    """What `ensemble_config.json` holds.

    Args:
        base_model (`BaseModelReference`): the base model.
        members (`list[EnsembleMember]`): the adapters, in the order of the weights' columns.
        weights (`dict[str, dict[str, float]]`): weight of each adapter, by task; adapters left out weigh 0.
        default_weights (`dict[str, float]`): for rows of no known task.
        label_space (`dict`, *optional*): label sets of classification tasks.
        versions (`dict[str, str]`): packages that wrote it.
        combination (`str`): what is summed, see [`PeftEnsembleModel`].
        routing (`str`): weights of rows of no known task, see [`PeftEnsembleModel`].
    """

    base_model: BaseModelReference
    members: list[EnsembleMember]
    weights: dict[str, dict[str, float]]
    default_weights: dict[str, float]
    label_space: dict | None = None
    versions: dict[str, str] = field(default_factory=package_versions)
    combination: str = "logits"
    routing: str = "default"

    def save(self, folder: Path) -> None:
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **asdict(self),
        }
        write_json(folder / CONFIG_NAME, data)

    @classmethod
    def load(cls, folder: Path) -> "SavedEnsembleConfig":
        """Read and check a configuration.

        Raises:
            `EnsembleLoadError`: for a missing or foreign file, a newer format, or an adapter name that is no folder
            name.
        """
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise EnsembleLoadError(f"{str(folder)!r} holds no {CONFIG_NAME}: it is not a saved ensemble.")
        where = f"The ensemble in {str(folder)!r}"
        data = read_object(checked_file(path, folder, where), where)
        version = data.get("format_version")
        if data.get("format") != FORMAT or not isinstance(version, int):
            raise EnsembleLoadError(
                f"{CONFIG_NAME} in {str(folder)!r} is damaged: expected the format {FORMAT!r} with a format_version, "
                f"found {data.get('format')!r} and {version!r}."
            )
        if version > FORMAT_VERSION:
            raise EnsembleLoadError(
                f"{CONFIG_NAME} has format version {version}, this release reads {FORMAT_VERSION}. Install a newer "
                "hf_ensemble."
            )
        for key, known in (("combination", COMBINATIONS), ("routing", ROUTINGS)):
            if data.get(key, known[0]) not in known:
                raise EnsembleLoadError(f"{CONFIG_NAME}: unknown {key} {data[key]!r}, known: {', '.join(known)}.")
        try:
            config = cls(
                BaseModelReference(**data["base_model"]),
                [EnsembleMember(**member) for member in data["members"]],
                data["weights"],
                data["default_weights"],
                data.get("label_space"),
                data.get("versions", {}),
                data.get("combination", COMBINATIONS[0]),
                data.get("routing", ROUTINGS[0]),
            )
            config.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, EnsembleError):
                raise
            raise EnsembleLoadError(f"{CONFIG_NAME} in {str(folder)!r} is damaged: {error!r}.") from error
        return config

    def check(self) -> None:
        """Raise [`EnsembleLoadError`] for names that lead elsewhere and for values of other types."""
        base = self.base_model
        if not all(isinstance(v, str) for v in (base.name_or_path, base.auto_class, base.revision or "")):
            raise EnsembleLoadError(f"{CONFIG_NAME}: base_model has to hold texts, found {base}.")
        if not Path(base.name_or_path).is_absolute() and ".." in re.split(r"[/\\]", base.name_or_path):
            raise EnsembleLoadError(f"{CONFIG_NAME}: the base model {base.name_or_path!r} leads out of its folder.")
        names = [member.name for member in self.members]
        for name in names:
            check_adapter_name(name)
        if not names:
            raise EnsembleLoadError(f"{CONFIG_NAME}: the ensemble has no member.")
        if len(set(names)) < len(names):
            raise EnsembleLoadError(f"{CONFIG_NAME}: two members have the same name, found {names}.")
        check_weights(self.weights, names, CONFIG_NAME)
        check_weights({"default": self.default_weights}, names, CONFIG_NAME)
        if self.label_space is not None:
            outputs = len(self.label_space["names"])
            for task, labels in self.label_space["task_labels"].items():
                if not all(isinstance(label, int) and 0 <= label < outputs for label in labels):
                    raise EnsembleLoadError(
                        f"{CONFIG_NAME}: the labels of {task!r} are {labels!r}, expected numbers below {outputs}."
                    )


def check_adapter_name(name: str) -> None:
    """Raise [`EnsembleLoadError`] for a name that is no plain folder name, so that none leads out of the folder."""
    if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
        raise EnsembleLoadError(
            f"Adapter name {name!r} is not usable as a folder's name: use letters, digits, '_' and '-'."
        )


def check_members(model: PeftModel, names: list[str]) -> None:
    """Raise [`EnsembleError`] unless these are different LoRA adapters of the model."""
    for name in names:
        check_adapter_name(name)
    lacking = sorted(set(names) - set(model.peft_config))
    if lacking or not names or len(set(names)) < len(names):
        raise EnsembleError(
            f"Expected different adapters of the model as members, found {names}; the model has "
            f"{list(model.peft_config)}."
        )
    foreign = [name for name in names if model.peft_config[name].peft_type != "LORA"]
    if foreign:
        raise EnsembleError(f"Members of an ensemble are LoRA adapters; {foreign} are not.")
    invoked = [name for name in names if getattr(model.peft_config[name], "alora_invocation_tokens", None)]
    if invoked:
        raise EnsembleError(
            f"The adapters {invoked} wait for invocation tokens (aLoRA), which an ensemble does not do."
        )


def check_weights(weights: Mapping[str, Mapping[str, float]], members: list[str], where: str = "") -> None:
    """Raise [`EnsembleError`] for a weight of an unknown adapter, one that is not finite, or a task without any."""
    prefix = f"{where}: the" if where else "The"
    for task, row in weights.items():
        unknown = sorted(set(row) - set(members))
        if unknown:
            raise EnsembleError(
                f"{prefix} weights of {task!r} name unknown adapters {unknown}; the adapters are {members}."
            )
        numbers = all(isinstance(w, (int, float)) and abs(w) < float("inf") for w in row.values())
        if not numbers or not any(row.values()):
            raise EnsembleError(
                f"{prefix} weights of {task!r} have to be finite numbers and not all zero, found {dict(row)}."
            )
