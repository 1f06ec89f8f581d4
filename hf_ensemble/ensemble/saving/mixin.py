"""Saving and loading: the part of [`PeftEnsembleModel`] that handles files."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn

from ..._cards import CARD
from ..._hub import Repository
from ..._settings import check_options, checked_mapping, checked_path
from ...errors import EnsembleError, EnsembleLoadError
from ...tasks import LabelSpace
from ..forward.combination import check_combination
from ..forward.router import check_router
from ..forward.routing import check_routing, check_temperature
from ..members import (
    BaseModelReference,
    check_adapter_name,
    check_scales,
    check_weights,
    plain_numbers,
    plain_weights,
    standing_alone,
)
from .auto_classes import AUTO_CLASS_OF_TASK
from .ensemble_config import ADAPTER_CONFIG, SavedEnsembleConfig
from .files import load_adapter, load_ensemble, loaded_base, save_ensemble
from .loading import check_loading, download_options, load_base, local_folder
from .pushing import push_ensemble
from .untrusted import checked_file, read_object
from .vocabulary import fit_vocabulary


@dataclass(frozen=True)
class AdapterSource:
    """Location of one adapter.

    Args:
        name_or_path (`str`): folder or Hub id.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        subfolder (`str`, *optional*): subfolder of the adapter.
    """

    name_or_path: str
    revision: str | None = None
    subfolder: str = ""


Adapters = Mapping[str, "str | Path | AdapterSource"]


class SavingMixin:
    """Saving and loading of [`PeftEnsembleModel`]."""

    def ensemble_config(self) -> SavedEnsembleConfig:
        """The content of `ensemble_config.json`.

        Raises:
            `EnsembleError`: for weights, scales, a combination, routing or router that were set to something unknown.
        """
        for weights in (self.weights, {"default": self.default_weights}):
            check_weights(weights, self.adapter_names)
        check_scales(self.scales)
        check_combination(self.combination)
        check_routing(self.routing)
        check_temperature(self.routing_temperature)
        check_router(self.router, len(standing_alone(self.members)))
        return SavedEnsembleConfig(
            self.base_model_reference,
            self.members,
            plain_weights(self.weights),
            plain_numbers(self.default_weights),
            None if self.label_space is None else self.label_space.to_dict(),
            combination=self.combination,
            routing=self.routing,
            tags=list(self.model_tags or []),
            scales=plain_numbers(self.scales),
            router=self.router,
            routing_temperature=float(self.routing_temperature),
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write `ensemble_config.json`, one plain PEFT adapter per member, safetensors only, and a model card.

        A card that is there already keeps what is not between its two marks. Adapters of an ensemble that was saved
        there before, and that this one lacks, are deleted.

        Args:
            save_directory (`str` or `Path`): the folder.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Whether to upload it too, with what an author has written into the folder's card.
            repo_id (`str`, *optional*): repository to upload to; called after the folder by default.
            safe_serialization (`bool`, *optional*, defaults to `True`): has to be `True`, see above.
            is_main_process (`bool`, *optional*, defaults to `True`):
                Whether this process writes and uploads; the others of a distributed run pass `False`.
            kwargs: further arguments of [`push_to_hub`].

        Raises:
            `EnsembleError`: for adapters that were deleted, replaced or merged, and for `safe_serialization=False`.
            `WriteError`: where the folder cannot be written.
            `PushError`: as [`push_to_hub`]; the folder is saved then.
            `ConfigurationError`: for arguments that [`push_to_hub`] does not take.
        """
        folder = checked_path("the folder to save into", save_directory, EnsembleError)
        if not safe_serialization:
            raise EnsembleError(
                "Adapters are written as safetensors, since reading a pickle may run code; found "
                "safe_serialization=False. Leave it out."
            )
        check_options(self.push_to_hub, kwargs, "push_to_hub")
        if not push_to_hub and (repo_id is not None or kwargs):
            raise EnsembleError(
                f"{sorted(['repo_id', *kwargs] if repo_id is not None else kwargs)} are for an upload. Set "
                "push_to_hub=True, or leave them out."
            )
        self.check_adapters()
        if not is_main_process:
            return
        save_ensemble(folder, self.model, self.ensemble_config())
        if push_to_hub:
            self._push(folder / CARD, repo_id or folder.resolve().name, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | str | None = None,
    ) -> CommitInfo:
        """Upload the ensemble with its model card, in one commit.

        Members that the repository has and this ensemble lacks are deleted in the same commit; the card keeps what is
        not between its two marks.

        Args:
            repo_id (`str`): repository; created where it does not exist.
            commit_message (`str`, *optional*): of the commit.
            commit_description (`str`, *optional*): of the commit.
            private (`bool`, *optional*): of a new repository.
            token (`str`, *optional*): Hub token.
            revision (`str`, *optional*):
                Branch to commit to, created where it does not exist; or `refs/pr/N`, a pull request that is open.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request instead, against the branch `revision` where one is given.
            tags (`list[str]`, *optional*): further tags of the card.

        Raises:
            `EnsembleError`: for adapters that were deleted, replaced or merged.
            `PushError`: where the Hub refuses or cannot be reached, and for a pull request against a pull request.
        """
        options = {"token": token, "private": private, "revision": revision, "create_pr": create_pr, "tags": tags}
        return self._push(None, repo_id, commit_message, commit_description, **options)

    def _push(
        self,
        card: Path | None,
        repo_id: str,
        commit_message: str | None = None,
        commit_description: str | None = None,
        tags: Sequence[str] | str | None = None,
        **options: Any,
    ) -> CommitInfo:
        """[`push_to_hub`], with what an author has written into a local card."""
        message = commit_message or "Upload ensemble"
        repository = Repository(repo_id, commit_message=message, commit_description=commit_description, **options)
        self.check_adapters()
        config = self.ensemble_config()
        given = [tags] if isinstance(tags, str) else list(tags or ())
        config = replace(config, tags=list(dict.fromkeys([*config.tags, *given])))
        with tempfile.TemporaryDirectory() as work:
            if card is not None and card.is_file():
                shutil.copy(card, work)
            save_ensemble(Path(work), self.model, config)
            return push_ensemble(Path(work), config, repository, again=f"model.push_to_hub({repo_id!r})")

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
        """Make an ensemble of adapters from different folders or Hub repositories.

        Args:
            base_model (`str` or `PreTrainedModel`, *optional*): the base model, or its folder or Hub id; by default the
                one that all adapters name.
            adapters (`dict[str, str]`): folder, Hub id or [`AdapterSource`] of each adapter, by name.
            weights (`dict[str, dict[str, float]]`, *optional*): weight of each adapter, by task.
            token (`str`, *optional*): Hub token.
            model_kwargs (`dict`, *optional*): as for [`from_pretrained`].
            kwargs: further arguments of [`PeftEnsembleModel`].

        Raises:
            `EnsembleLoadError`: for an adapter that is missing, of another base, or not in safetensors.
        """
        loading = dict(model_kwargs or {})
        check_loading(base_model, loading)
        folders = {}
        for name, source in checked_mapping("adapters", adapters, EnsembleLoadError).items():
            check_adapter_name(name)
            if not isinstance(source, AdapterSource):
                source = AdapterSource(str(source))
            folders[name] = local_folder(
                source.name_or_path, source.revision, token, source.subfolder, **download_options(loading)
            )
        if not folders:
            raise EnsembleLoadError("Expected at least one adapter, found none.")
        model: Any = base_model
        if not isinstance(base_model, nn.Module):
            model = load_base(_named_base(folders, base_model), None, token, loading)
            fit_vocabulary(model, folders)
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
        subfolder: str = "",
        **model_kwargs: Any,
    ):
        """Load an ensemble from a folder or the Hub, or make one of separate adapters.

        Args:
            name_or_path (`str`, `Path` or `dict[str, str]`): folder or Hub id; or adapters as for
                [`from_adapters`], with equal weights.
            revision (`str`, *optional*): branch, tag or commit of a Hub id; separate adapters have their own, see
                [`AdapterSource`].
            base_model (`str` or `PreTrainedModel`, *optional*):
                In place of the base that the ensemble names. What is saved, merged or exported later names this one.
            token (`str`, *optional*): Hub token.
            subfolder (`str`, *optional*): folder of the ensemble inside of `name_or_path`.
            model_kwargs: passed to the base model's `from_pretrained` (`dtype`, `device_map`, `quantization_config`,
                ...). Code of the base's repository runs only with `trust_remote_code=True` here. `cache_dir`,
                `force_download` and `local_files_only` are for the ensemble too, and the only ones beside a base model
                that is loaded.

        Raises:
            `EnsembleLoadError`: for a folder that is not an ensemble, for an adapter that is missing, foreign, damaged
                or not in safetensors, and for a name that leads out of the folder; the message names the file. For a
                base without weights in safetensors, and for arguments of one that is loaded.
        """
        if isinstance(name_or_path, Mapping):
            for what, given in (("revision", revision), ("subfolder", subfolder)):
                if given:
                    raise EnsembleLoadError(
                        f"Expected no {what} of separate adapters, found {given!r}. Give each its own: "
                        f"AdapterSource(name_or_path, {what}=...)."
                    )
            return cls.from_adapters(base_model, name_or_path, token=token, model_kwargs=model_kwargs)
        folder = checked_path("name_or_path", name_or_path, EnsembleLoadError)
        model, config = load_ensemble(str(folder), revision, base_model, token, model_kwargs, subfolder)
        base = config.base_model if base_model is None else loaded_base(config.base_model, model)
        if base != config.base_model:
            for member in config.members:
                own = model.peft_config[member.name]
                own.base_model_name_or_path, own.revision = base.name_or_path, base.revision
        ensemble = cls(
            model,
            config.members,
            config.weights,
            config.default_weights,
            None if config.label_space is None else LabelSpace.from_dict(config.label_space),
            base,
            config.combination,
            config.routing,
            config.scales,
            config.router,
            config.routing_temperature,
        ).eval()
        if config.tags:
            ensemble.add_model_tags(config.tags)
        return ensemble


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
            f"Expected adapters of one base model and task type, found {named}, {sorted(map(str, kinds))}. Pass the "
            "base model itself."
        )
    auto_class = AUTO_CLASS_OF_TASK.get(kinds.pop() or "")
    if auto_class is None:
        raise EnsembleLoadError(
            f"Expected one of the task types {sorted(AUTO_CLASS_OF_TASK)} in {ADAPTER_CONFIG}, which gives the base "
            "model's class. Pass the model itself."
        )
    base, revision = next(iter(named.values()))
    return BaseModelReference(override or base, None if override else revision, auto_class)
