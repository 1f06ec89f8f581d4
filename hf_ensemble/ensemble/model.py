"""`PeftEnsembleModel`: one base model, several adapters, one weighted answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput, SequenceClassifierOutput

from .._compat import keep_quantized_weights_in_place
from ..errors import EnsembleError
from ..tasks import IGNORE_INDEX, LabelSpace, restrict_to_labels
from ..tasks.answers import answer_positions
from .forward.cache import EnsembleCache, cache_maker
from .forward.combination import check_combination
from .forward.generation import check_generation, generate_by_outputs
from .forward.inference import MemberForward, keep_beside, stacks_beside, summed_weights
from .forward.routing import check_routing, prompt_weights
from .forward.rows import batch_size_of
from .forward.task_weights import Tasks, label_mask, tasks_of_rows, warn_of_unknown, weight_rows
from .members import BaseModelReference, EnsembleMember, check_members, check_weights
from .merging.merge import MergedAdapter, merge_adapters
from .saving.files import base_reference
from .saving.mixin import SavingMixin
from .saving.vllm import vllm_obstacles
from .weighting.fitting import Collator, Rows, WeightFit, fit_ensemble


class PeftEnsembleModel(SavingMixin, nn.Module):
    """A weighted ensemble of adapters over one base model: logits(x) = sum_k A[task(x), k] logits_k(x).

    Each adapter runs on the rows that give it a weight, and on no others; all of a batch run in one forward of the
    base. Nothing of the base model is copied.

    Args:
        model (`PeftModel`): holds every adapter by name.
        members (`Sequence[str]` or `Sequence[EnsembleMember]`): the adapters that take part.
        weights (`dict[str, dict[str, float]]`, *optional*): weight of each adapter, by task.
        default_weights (`dict[str, float]`, *optional*): for rows of no known task; all adapters alike by default.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        base_model (`BaseModelReference`, *optional*): where the base comes from; read off the model by default.
        combination (`str`, *optional*, defaults to `"logits"`):
            What is summed: `logits`, `log_probs` (the same distribution, normalised), `probs` (a mixture of the
            adapters' distributions) or `weights` (one forward with the base's weights plus the weighted sum of the
            adapters' deltas).
        routing (`str`, *optional*, defaults to `"default"`):
            Weights of rows of no known task: `default` takes `default_weights`, `prompt` weighs each adapter by how
            well it predicts the prompt.

    Attributes:
        fused (`bool`): run all adapters of a batch at once. Set to `False` to run one after the other, which needs
            less memory; layers that cannot be served at once run so by themselves.
        routing_temperature (`float`): see [`prompt_weights`].

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
        combination: str = "logits",
        routing: str = "default",
    ):
        super().__init__()
        self.members = [m if isinstance(m, EnsembleMember) else EnsembleMember(m) for m in members]
        check_members(model, self.adapter_names)
        check_combination(combination)
        check_routing(routing)
        self.model = model
        self.weights = {task: dict(row) for task, row in (weights or {}).items()}
        self.default_weights = dict(default_weights or dict.fromkeys(self.adapter_names, 1.0 / len(self.members)))
        check_weights(self.weights, self.adapter_names)
        check_weights({"default": self.default_weights}, self.adapter_names)
        self.label_space = label_space
        self.base_model_reference = base_model or base_reference(model)
        self.combination = combination
        self.routing = routing
        self.routing_temperature = 0.1
        self.fused = True
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

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_base_model().dtype

    def can_generate(self) -> bool:
        """Whether the base model generates."""
        base = self.model.get_base_model()
        return bool(hasattr(base, "can_generate") and base.can_generate())

    def row_weights(self, task: Tasks, batch_size: int) -> torch.Tensor:
        """Weight of each adapter for each row, `(batch_size, members)`.

        Args:
            task (`str` or `Sequence[str]`, *optional*): one task for all rows, or one per row; `None` and a task
                without weights take the default weights.

        Raises:
            `EnsembleError`: for a list of another length than the batch.
        """
        tasks = tasks_of_rows(task, batch_size)
        warn_of_unknown(tasks, self.weights, self.routing)
        return weight_rows(tasks, self.weights, self.default_weights, self.adapter_names, self.device)

    def _routed_weights(self, task, routing: str | None, inputs: Mapping[str, Any], labels=None) -> torch.Tensor:
        """[`row_weights`], with rows of no known task weighed by the prompt where the routing says so."""
        batch_size = batch_size_of(inputs)
        weights = self.row_weights(task, batch_size)
        routing = routing or self.routing
        check_routing(routing)
        rows = [row for row, name in enumerate(tasks_of_rows(task, batch_size)) if name not in self.weights]
        if routing == "default" or not rows:
            return weights
        if not self.can_generate() or self.config.is_encoder_decoder or inputs.get("input_ids") is None:
            raise EnsembleError(
                "routing='prompt' needs a causal language model and prompts in input_ids. Pass task=, or "
                "routing='default'."
            )
        index = torch.tensor(rows, device=self.device)
        own = [None if v is None else v[index] for v in (inputs["input_ids"], inputs.get("attention_mask"), labels)]
        weights[index] = prompt_weights(self.member_forward("logits"), *own, temperature=self.routing_temperature)
        return weights

    def member_forward(self, combination: str | None = None) -> MemberForward:
        """What computes the adapters' logits on a batch; to be used in a `with` statement."""
        return MemberForward(
            self.model,
            self.model.get_base_model().forward,
            self.adapter_names,
            combination or self.combination,
            # Dropout and checkpointing are the layers' own.
            fused=self.fused and not self.model.training,
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: Tasks = None,
        routing: str | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput | SequenceClassifierOutput:
        """The ensemble's logits, and the loss where labels are given.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
            labels (`torch.Tensor` of shape `(B, T)` or `(B,)`, *optional*):
                As the base model takes them. The loss is the mean over the labels of the batch; of a classification
                task only the task's own labels count.
            task (`str` or `Sequence[str]`, *optional*): see [`row_weights`].
            routing (`str`, *optional*): in place of the ensemble's own.
            kwargs: further inputs of the base model. With `use_cache=True` the output holds `past_key_values` for the
                next call.

        Returns:
            The base model's kind of output, logits of shape `(B, T, V)` or `(B, num_labels)`; a classifier's labels
            that the row's task does not have are at minus infinity.
        """
        base = self.model.get_base_model()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        inputs = {key: value for key, value in inputs.items() if value is not None}
        encoder_decoder = getattr(self.config, "is_encoder_decoder", False)
        if encoder_decoder and labels is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        weights = self._routed_weights(task, routing, inputs, labels)
        cache = inputs.pop("past_key_values", None)
        if self.can_generate():
            inputs.setdefault("use_cache", cache is not None)
        mask = label_mask(task, len(weights), self.label_space)
        if self.combination == "weights":
            stacks = stacks_beside(cache)
            with summed_weights(self.model, self.adapter_names, weights, stacks):
                output = base.forward(**inputs, **({} if cache is None else {"past_key_values": cache}))
            logits, cache = output.logits.float(), getattr(output, "past_key_values", None)
            keep_beside(cache, stacks)
        else:
            if cache is None and inputs.get("use_cache"):
                cache = EnsembleCache(cache_maker(base.config))
            with self.member_forward() as run:
                logits = run(weights, inputs, cache, mask)
        if mask is not None and logits.dim() == 2:
            logits = restrict_to_labels(logits, mask)
        loss = None if labels is None else self._loss(logits, labels)
        if logits.dim() == 2:
            return SequenceClassifierOutput(loss=loss, logits=logits)
        kind = Seq2SeqLMOutput if encoder_decoder else CausalLMOutputWithPast
        return kind(loss=loss, logits=logits, past_key_values=cache)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shift = not getattr(self.config, "is_encoder_decoder", False)
        answers, targets, _ = answer_positions(logits, labels, shift)
        return nn.functional.cross_entropy(answers, targets, ignore_index=IGNORE_INDEX)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        task: Tasks = None,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        routing: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts with the ensemble; takes what the base model's `generate` takes.

        Each step's logits are combined over the adapters, each with key-value states of its own.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): prompts, padded on the left; `inputs` is another name.
            task (`str` or `Sequence[str]`, *optional*): see [`row_weights`].
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
            routing (`str`, *optional*): in place of the ensemble's own.
            kwargs: as of `GenerationMixin.generate`: greedy, sampling and beams, streamers, stopping criteria, dynamic
                and static caches.

        Raises:
            `EnsembleError`: for a classifier, or a cache of the caller's own.
        """
        base = self.model.get_base_model()
        check_generation(base, kwargs)
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise EnsembleError("Expected prompts in input_ids, found none.")
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask}
        weights = self._routed_weights(task, routing, prompts)
        if self.combination == "weights":
            masks = {} if attention_mask is None else {"attention_mask": attention_mask}
            with summed_weights(self.model, self.adapter_names, weights):
                return base.generate(input_ids=input_ids, **masks, **kwargs)
        return generate_by_outputs(self.member_forward(), base, weights, input_ids, attention_mask, **kwargs)

    def merge(
        self, task: str | None = None, rank: int | None = None, method: str = "sum", **options: Any
    ) -> MergedAdapter:
        """The adapters of a task as one plain PEFT adapter.

        Args:
            task (`str`, *optional*): whose weights; the default weights without one.
            rank (`int`, *optional*): cap of the rank, and the error that it makes is stated. Without it the rank is
                the sum of the adapters' ranks, and `sum` and `lines` are exact.
            method (`str`, *optional*, defaults to `"sum"`):
                `sum` is what the combination `weights` computes; `lines` (LiNeS) scales it by depth with `alpha` and
                `beta`; `ties`, `dare_linear`, `dare_ties` (with `density`, and `seed` for DARE), `breadcrumbs` (with
                `drop_smallest` and `drop_largest`) and `pcb` (PCB-Merging, with `density`) merge entry by entry.
            options: of the method.

        Returns:
            [`MergedAdapter`]: to be saved as plain PEFT files, or put on a model.

        Raises:
            `EnsembleError`: for an unknown task or method, and adapters that have no merged form.
        """
        if task is not None and task not in self.weights:
            raise EnsembleError(f"No weights for the task {task!r}; known: {sorted(self.weights)}.")
        weights = self.default_weights if task is None else self.weights[task]
        return merge_adapters(self.model, weights, rank, method, **options)

    def fit_weights(
        self,
        dataset: "Mapping[str, Rows] | Rows",
        constraint: str = "simplex",
        data_collator: Collator | None = None,
        batch_size: int = 8,
        min_weight: float = 0.0,
        max_values: int = 2**27,
    ) -> WeightFit:
        """Learn the weights of each task, and default weights for all of them, on the adapters' outputs.

        Every adapter runs once over the rows; the mean loss of the combined outputs is convex in the weights and is
        minimised on the cached logits. The ensemble has the new weights afterwards.

        Args:
            dataset (`dict[str, Dataset]` or rows with a column `task`):
                Rows of token ids and labels, of each task. Rows that the adapters were not trained on.
            constraint (`str`, *optional*, defaults to `"simplex"`):
                `simplex` (none below 0, sum 1), `convex` (none below 0, any sum) or `free`.
            data_collator (`Callable`, *optional*): from rows to a batch; pads on the right by default.
            batch_size (`int`, *optional*, defaults to 8): rows per forward of each adapter.
            min_weight (`float`, *optional*, defaults to 0.0): on the simplex, lighter adapters are left out.
            max_values (`int`, *optional*): most logits to keep, 4 bytes each.

        Returns:
            [`WeightFit`]: with the losses of equal weights and of single adapters beside.

        Raises:
            `EnsembleError`: see `fitting.fit_ensemble`.
        """
        fit = fit_ensemble(self, dataset, constraint, data_collator, batch_size, min_weight, max_values)
        self.weights = {**self.weights, **{task: fit.weights_of(fitted) for task, fitted in fit.tasks.items()}}
        self.default_weights = fit.weights_of(fit.overall)
        check_weights(self.weights, self.adapter_names)
        check_weights({"default": self.default_weights}, self.adapter_names)
        return fit

    def vllm_obstacles(self) -> dict[str, list[str]]:
        """For each adapter, why vLLM would refuse it or compute it wrongly; empty lists where it serves them."""
        return {name: vllm_obstacles(self.model.peft_config[name]) for name in self.adapter_names}
