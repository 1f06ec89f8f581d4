"""`PeftEnsembleModel`: one base model, several adapters, one weighted answer."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from .._compat import adapters_untouched, keep_quantized_weights_in_place
from ..errors import EnsembleError
from ..tasks import IGNORE_INDEX, LabelSpace, restrict_to_labels
from ..tasks.answers import answer_positions
from .cache import MemberCaches
from .config import BaseModelReference, EnsembleMember, SavedEnsembleConfig, check_adapter_name, check_weights
from .files import base_reference, load_adapter, load_ensemble, local_folder, save_ensemble


class PeftEnsembleModel(nn.Module):
    """A weighted ensemble of adapters over one base model: logits(x) = sum_k A[task(x), k] logits_k(x).

    Each adapter runs on the rows that give it a weight, and on no others. Nothing of the base model is copied.

    Args:
        model (`PeftModel`): holds every adapter by name.
        members (`Sequence[str]` or `Sequence[EnsembleMember]`): the adapters that take part.
        weights (`dict[str, dict[str, float]]`, *optional*): weight of each adapter, by task.
        default_weights (`dict[str, float]`, *optional*): for rows of no known task; all adapters alike by default.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        base_model (`BaseModelReference`, *optional*): where the base comes from; read off the model by default.

    Raises:
        `EnsembleError`: for members that the model lacks, and weights of unknown adapters.

    Example:

    ```python
    >>> model = PeftEnsembleModel.from_pretrained("user/my-ensemble")  # doctest: +SKIP
    >>> model(**batch, task="boolq").logits  # doctest: +SKIP
    >>> model.generate(**inputs, task=["boolq", "gsm8k"], max_new_tokens=20)  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: PeftModel,
        members: Sequence[str | EnsembleMember],
        weights: Mapping[str, Mapping[str, float]] | None = None,
        default_weights: Mapping[str, float] | None = None,
        label_space: LabelSpace | None = None,
        base_model: BaseModelReference | None = None,
    ):
        super().__init__()
        self.members = [m if isinstance(m, EnsembleMember) else EnsembleMember(m) for m in members]
        names = [member.name for member in self.members]
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
        self.model = model
        self.weights = {task: dict(row) for task, row in (weights or {}).items()}
        self.default_weights = dict(default_weights or {name: 1.0 / len(names) for name in names})
        check_weights({**self.weights, "default": self.default_weights}, names)
        self.label_space = label_space
        self.base_model_reference = base_model or base_reference(model)
        keep_quantized_weights_in_place(model)

    @property
    def adapter_names(self) -> list[str]:
        return [member.name for member in self.members]

    @property
    def config(self):
        return self.model.config

    @property
    def generation_config(self):
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def row_weights(self, task: str | Sequence[str | None] | None, batch_size: int) -> torch.Tensor:
        """Weight of each adapter for each row, `(batch_size, members)`.

        Args:
            task (`str` or `Sequence[str]`, *optional*): one task for all rows, or one per row; `None` takes the
                default.

        Raises:
            `EnsembleError`: for a task without weights, or a list of another length than the batch.
        """
        tasks = list(task) if isinstance(task, (list, tuple)) else [task] * batch_size
        if len(tasks) != batch_size:
            raise EnsembleError(f"Expected one task for each of {batch_size} rows, found {len(tasks)}.")
        unknown = sorted({str(t) for t in tasks if t is not None and t not in self.weights})
        if unknown:
            raise EnsembleError(
                f"No weights for the tasks {unknown}; known: {sorted(self.weights)}. Pass task=None for the "
                "default weights."
            )
        rows = [self.default_weights if t is None else self.weights[t] for t in tasks]
        return torch.tensor([[row.get(name, 0.0) for name in self.adapter_names] for row in rows], device=self.device)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: str | Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | SequenceClassifierOutput:
        """The ensemble's logits, and the loss where labels are given.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
            labels (`torch.Tensor` of shape `(B, T)` or `(B,)`, *optional*):
                As the base model takes them. The loss is the mean over the labels of the batch; of a classification
                task only the task's own labels count.
            task (`str` or `Sequence[str]`, *optional*): see [`row_weights`].
            kwargs: further inputs of the base model.

        Returns:
            The base model's kind of output, logits of shape `(B, T, V)` or `(B, num_labels)`; a classifier's labels
            that the row's task does not have are at minus infinity.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs = {key: value for key, value in inputs.items() if value is not None}
        batch_size = next(value for value in inputs.values() if torch.is_tensor(value)).shape[0]
        weights = self.row_weights(task, batch_size)
        with adapters_untouched(self.model):
            logits = self._combined(self._base_forward(), weights, inputs)
        if logits.dim() == 2:
            logits = self._within_label_sets(logits, task)
        loss = None if labels is None else self._loss(logits, labels)
        if logits.dim() == 2:
            return SequenceClassifierOutput(loss=loss, logits=logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _within_label_sets(self, logits: torch.Tensor, task: str | Sequence[str | None] | None) -> torch.Tensor:
        """Classification logits with the labels that a row's task does not have at minus infinity."""
        if self.label_space is None or task is None:
            return logits
        tasks = [task] * len(logits) if isinstance(task, str) else list(task)
        known = [row for row, name in enumerate(tasks) if name is not None]
        mask = torch.ones(logits.shape, dtype=torch.bool)
        mask[known] = self.label_space.mask([tasks[row] for row in known])
        return restrict_to_labels(logits, mask)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shift = not getattr(self.config, "is_encoder_decoder", False)
        answers, targets, _ = answer_positions(logits, labels, shift)
        return nn.functional.cross_entropy(answers, targets, ignore_index=IGNORE_INDEX)

    def _base_forward(self):
        return self.model.get_base_model().forward

    def _combined(self, forward, weights, inputs, caches: MemberCaches | None = None) -> torch.Tensor:
        """Weighted sum of the adapters' logits, each computed on the rows that give it a weight."""
        batch_size = len(weights)
        combined: torch.Tensor | None = None
        for column, name in enumerate(self.adapter_names):
            rows = weights[:, column].nonzero().squeeze(1)
            if not len(rows):
                continue
            own = inputs if len(rows) == batch_size else {key: _take(v, rows, batch_size) for key, v in inputs.items()}
            if caches is not None:
                own = {**own, "past_key_values": caches.members[name][0]}
            self.model.set_adapter(name, inference_mode=True)
            logits = forward(**own).logits.float()
            part = weights[rows, column].view(-1, *[1] * (logits.dim() - 1)) * logits
            if combined is None:
                combined = torch.zeros(batch_size, *logits.shape[1:], dtype=torch.float32, device=logits.device)
            combined = combined.index_add(0, rows, part)
        return combined

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        task: str | Sequence[str | None] | None = None,
        inputs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Continue prompts with the ensemble; takes what the base model's `generate` takes.

        Each step's logits are the weighted sum over the adapters, each with its own key-value cache.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): prompts, padded on the left; `inputs` is another name.
            task (`str` or `Sequence[str]`, *optional*): see [`row_weights`].
            kwargs: as of `GenerationMixin.generate`, greedy, sampling and beams alike.

        Raises:
            `EnsembleError`: for a classifier, or a cache of the caller's own.
        """
        base = self.model.get_base_model()
        if not (hasattr(base, "can_generate") and base.can_generate()):
            raise EnsembleError(f"{type(base).__name__} does not generate. Call the ensemble for its logits.")
        for option in ("past_key_values", "cache_implementation"):
            if kwargs.get(option) is not None:
                raise EnsembleError(f"{option} cannot be set: every adapter of an ensemble keeps a cache of its own.")
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise EnsembleError("Expected prompts in input_ids, found none.")
        weights = self.row_weights(task, len(input_ids))
        use_cache = kwargs.get("use_cache", True)
        caches = MemberCaches() if use_cache else None
        with adapters_untouched(self.model), self._generating(base, weights, caches):
            extra = {"past_key_values": caches} if use_cache else {}
            return base.generate(input_ids=input_ids, **kwargs, **extra)

    @contextmanager
    def _generating(self, base, weights: torch.Tensor, caches: "MemberCaches | None") -> Iterator[None]:
        """While open, the base model's forward is the ensemble's."""
        patched = base.__dict__.get("forward")
        forward = base.forward

        @functools.wraps(forward)
        def ensemble_forward(*args, past_key_values=None, **inputs):
            batch_size = next(v for v in inputs.values() if torch.is_tensor(v)).shape[0]
            # Beams and returned sequences lie beside each other: row r of the prompt is expanded to a run of rows.
            rows = weights.repeat_interleave(batch_size // len(weights), dim=0)
            if caches is not None and not caches.members:
                caches.build(rows, self.adapter_names, base.config.get_text_config(decoder=True))
            logits = self._combined(forward, rows, inputs, caches)
            return CausalLMOutputWithPast(logits=logits, past_key_values=caches)

        base.forward = ensemble_forward
        try:
            yield
        finally:
            if patched is None:
                del base.forward
            else:
                base.forward = patched

    def ensemble_config(self) -> SavedEnsembleConfig:
        """What `ensemble_config.json` will hold."""
        return SavedEnsembleConfig(
            self.base_model_reference,
            self.members,
            self.weights,
            self.default_weights,
            None if self.label_space is None else self.label_space.to_dict(),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `ensemble_config.json` and one plain PEFT adapter per member, safetensors only."""
        save_ensemble(Path(folder), self.model, self.ensemble_config())

    @classmethod
    def from_adapters(
        cls,
        base_model: nn.Module,
        adapters: Mapping[str, str | Path],
        weights: Mapping[str, Mapping[str, float]] | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> "PeftEnsembleModel":
        """An ensemble of adapters that lie in different folders or Hub repositories.

        Args:
            base_model (`PreTrainedModel`): the base model.
            adapters (`dict[str, str]`): folder or Hub id of each adapter, by the name it gets.
            weights (`dict[str, dict[str, float]]`, *optional*): weight of each adapter, by task.
            token (`str`, *optional*): Hub token.
            kwargs: further arguments of the class.

        Raises:
            `EnsembleLoadError`: for an adapter that is missing, foreign or not safetensors.
        """
        model: Any = base_model
        for name, source in adapters.items():
            check_adapter_name(name)
            model = load_adapter(model, local_folder(str(source), None, token), name)
        return cls(model, list(adapters), weights, **kwargs).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        base_model: "str | nn.Module | None" = None,
        token: str | None = None,
        **model_kwargs: Any,
    ) -> "PeftEnsembleModel":
        """Load an ensemble from a folder or the Hub.

        Args:
            name_or_path (`str` or `Path`): folder, or Hub id.
            revision (`str`, *optional*): branch, tag or commit of a Hub id.
            base_model (`str` or `PreTrainedModel`, *optional*): in place of the base that the ensemble names.
            token (`str`, *optional*): Hub token.
            model_kwargs: passed to the base model's `from_pretrained` (`dtype`, `device_map`, `quantization_config`,
            ...).

        Raises:
            `EnsembleLoadError`: for a folder that is no ensemble, an adapter that is missing, foreign or not
            safetensors,
                a name that leads out of the folder; the message names file and fault.
        """
        model, config = load_ensemble(str(name_or_path), revision, base_model, token, model_kwargs)
        return cls(
            model,
            config.members,
            config.weights,
            config.default_weights,
            None if config.label_space is None else LabelSpace.from_dict(config.label_space),
            config.base_model,
        ).eval()


def _take(value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    return value[rows] if torch.is_tensor(value) and value.dim() and value.shape[0] == batch_size else value
