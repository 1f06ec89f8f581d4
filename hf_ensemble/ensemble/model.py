"""`PeftEnsembleModel`: one base model, several adapters, one weighted answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput, SequenceClassifierOutput

from .._compat import keep_quantized_weights_in_place
from ..errors import EnsembleError
from ..models.answer_head import head_width
from ..tasks import LabelSpace
from .adapter_identity import AdapterIdentity
from .forward.cache import cache_argument, check_cache, holds_states, keep_weights, kept_weights
from .forward.combination import check_combination
from .forward.generation import check_generation, generate_by_outputs, prompt_mask
from .forward.router import PromptRouter, check_router
from .forward.routing import DEFAULT_TEMPERATURE, check_routing, check_temperature
from .forward.routing_mixin import RoutingMixin
from .forward.rows import model_inputs
from .forward.scoring import answer_loss, check_values, values_loss, values_problem
from .forward.scoring_mixin import ScoringMixin
from .forward.summed import summed_weights
from .forward.task_model import TaskModel
from .forward.task_weights import Tasks, check_known, tasks_of_rows
from .members import (
    BaseModelReference,
    EnsembleMember,
    check_members,
    check_scales,
    check_weights,
    plain_numbers,
    plain_weights,
    standing_alone,
)
from .merging.mixin import MergingMixin
from .saving.files import base_reference
from .saving.mixin import SavingMixin
from .weighting.mixin import FittingMixin


class PeftEnsembleModel(RoutingMixin, ScoringMixin, FittingMixin, MergingMixin, SavingMixin, nn.Module):
    """A weighted ensemble of adapters over one base model: logits(x) = sum_k A[task(x), k] logits_k(x).

    Each adapter runs on the rows that give it a weight, and on no others; all adapters of a batch run in one forward of
    the base. Nothing of the base model is copied.

    Args:
        model (`PeftModel`): holds every adapter by name.
        members (`Sequence[str]` or `Sequence[EnsembleMember]`): the adapters to use.
        weights (`dict[str, dict[str, float]]`, *optional*): weight of each adapter, by task.
        default_weights (`dict[str, float]`, *optional*): weights for rows of no known task; equal by default.
        label_space (`LabelSpace`, *optional*): label sets of classification tasks.
        base_model (`BaseModelReference`, *optional*): where the base comes from; taken from the model by default.
        combination (`str`, *optional*, defaults to `"logits"`):
            What is summed: `logits`, `log_probs` (the same distribution, normalised), `probs` (a mixture of the
            adapters' distributions) or `weights` (one forward with the base's weights plus the weighted sum of the
            adapters' deltas).
        routing (`str`, *optional*):
            Weights for rows of no known task: `default` uses `default_weights`, `prompt` weighs each adapter by how
            well it predicts the prompt, `hidden_states` uses the `router`; these two leave boosting steps out. Without
            `routing` such rows are refused.
        scales (`dict[str, float]`, *optional*):
            By task, what its combined logits are multiplied by (the inverse of a temperature), 1 for tasks left out.
            For the combinations `logits` and `log_probs`; others, and merged adapters, are as they are without.
        router ([`PromptRouter`], *optional*): weights from a prompt's hidden states, see [`fit_router`].
        routing_temperature (`float`, *optional*, defaults to 0.1): of the routing `prompt`, see [`prompt_weights`].

    Attributes:
        fused (`bool`): whether to run all adapters of a batch at once. Set to `False` to run one after the other, which
            needs less memory. A model with layers that cannot be fused runs this way by itself.

    Raises:
        `EnsembleError`:
            For members that the model lacks, for weights of unknown adapters and, in any later call, for adapters that
            were deleted, replaced or merged in the meantime.

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
        routing: str | None = None,
        scales: Mapping[str, float] | None = None,
        router: PromptRouter | None = None,
        routing_temperature: float = DEFAULT_TEMPERATURE,
    ):
        super().__init__()
        if isinstance(members, str) or not isinstance(members, Sequence):
            raise EnsembleError(f"Expected members as a list of adapter names, found {members!r:.60}.")
        self.members = [m if isinstance(m, EnsembleMember) else EnsembleMember(m) for m in members]
        check_members(model, self.adapter_names)
        check_combination(combination)
        check_routing(routing)
        if label_space is not None and not isinstance(label_space, LabelSpace):
            raise EnsembleError(f"Expected label_space to be a LabelSpace, found {label_space!r:.60}.")
        alone = [self.adapter_names[k] for k in standing_alone(self.members)]
        if not alone:
            raise EnsembleError(f"Expected a member that is no boosting step, found {self.adapter_names} only.")
        if combination == "probs" and len(alone) < len(self.members):
            raise EnsembleError(
                "The combination 'probs' is a mean of distributions, and boosting steps are added to logits. Use "
                "'logits', 'log_probs' or 'weights'."
            )
        default_weights = default_weights or dict.fromkeys(alone, 1.0 / len(alone))
        check_weights(weights or {}, self.adapter_names)
        check_weights({"default": default_weights}, self.adapter_names)
        self.model = model
        self.weights = plain_weights(weights or {})
        self.default_weights = plain_numbers(default_weights)
        check_scales(scales or {})
        self.scales = plain_numbers(scales or {})
        check_router(router, len(alone))
        self.router = router
        self.label_space = label_space
        self.base_model_reference = base_model or base_reference(model)
        self.combination = combination
        self.routing = routing
        check_temperature(routing_temperature)
        self.routing_temperature = float(routing_temperature)
        self.fused = True
        keep_quantized_weights_in_place(model)
        self._adapters = AdapterIdentity(model, self.adapter_names)

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

    @property
    def model_tags(self) -> list[str] | None:
        return getattr(self.model.get_base_model(), "model_tags", None)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags for model cards, see `PreTrainedModel.add_model_tags`; they are saved with the ensemble."""
        self.model.get_base_model().add_model_tags(tags)

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its name in the ensemble, or in the `PeftModel` that the ensemble was made of.

        `get_parameter` and `get_buffer` take the names of both, too.
        """
        try:
            return super().get_submodule(target)
        except AttributeError:
            return self.model.get_submodule(target)

    def can_generate(self) -> bool:
        """Whether the base model generates."""
        base = self.model.get_base_model()
        return bool(hasattr(base, "can_generate") and base.can_generate())

    def for_task(self, task: str) -> TaskModel:
        """The ensemble for the rows of one task: what a pipeline takes.

        ```python
        >>> news = model.for_task("ag_news")  # doctest: +SKIP
        >>> pipeline("text-classification", model=news, tokenizer=tokenizer)("Oil prices rose.")  # doctest: +SKIP
        ```

        Returns:
            [`TaskModel`]: takes the base model's inputs, and answers with the task's own labels.

        Raises:
            `EnsembleError`: for an unknown task.
        """
        check_known([task], self.weights)
        return TaskModel(self, task)

    @property
    def num_outputs(self) -> int:
        """Number of logits at a position: the vocabulary of a language model, or the labels of a classifier."""
        width = head_width(self.model.get_base_model())
        return width or (self.config.get_text_config().vocab_size if self.can_generate() else self.config.num_labels)

    def check_adapters(self) -> None:
        """Raise [`EnsembleError`] where the model no longer holds the adapters that the ensemble was made of."""
        self._adapters.check(self.model)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        task: Tasks = None,
        routing: str | None = None,
        return_logits: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Seq2SeqLMOutput | SequenceClassifierOutput | tuple:
        """The ensemble's logits, and the loss if labels are given.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 on padding.
            labels (`torch.Tensor` of shape `(B, T)`, `(B,)` or `(B, num_labels)`, *optional*):
                As the base model takes them. The loss is the mean over the labels of the batch; for a classification
                task only the task's own labels count. With the `problem_type` `regression` or
                `multi_label_classification` it is the base model's, of the combined logits.
            task (`str` or `Sequence[str]`, *optional*):
                One task for all rows, or one per row. Rows of no known task are refused unless there is a `routing`; an
                ensemble without tasks takes none.
            routing (`str`, *optional*): overrides the ensemble's own.
            return_logits (`bool`, *optional*, defaults to `True`):
                Set to `False` for the loss alone. Without gradients, logits are then made at the answers only, a few
                tokens at a time.
            return_dict (`bool`, *optional*): set to `False` for a tuple of what the output holds, the loss first.
            kwargs: further inputs of the base model. With `use_cache=True` the output holds `past_key_values` for the
                next call, whatever the base model calls its states, and with them the weights that the routing gave
                the prompts.

        Returns:
            The base model's kind of output, logits of shape `(B, T, V)` or `(B, num_labels)`; a classifier's labels
            that are not in the row's label set are at minus infinity.

        Raises:
            `EnsembleError`: where hidden states or attentions are asked for, which an ensemble has none of, and for
                labels of a `problem_type` that the combination has no loss for.
        """
        base = self.model.get_base_model()
        inputs = model_inputs({"input_ids": input_ids, "attention_mask": attention_mask, **kwargs})
        if not return_logits and labels is None:
            raise EnsembleError("return_logits=False leaves only the loss: expected labels, found none.")
        problem = None
        if labels is not None:
            problem = values_problem(base, labels, self.label_space is not None)
        if problem is not None:
            check_values(problem, base, labels, self.combination, self.label_space is not None)
        if self._is_encoder_decoder and labels is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        given = [inputs.pop(name, None) for name in ("past_key_values", cache_argument(base.forward))]
        cache = next((own for own in given if own is not None), None)
        weights = self._weights_of_call(task, routing, inputs, None if problem else labels, cache)
        if self.can_generate():
            inputs.setdefault("use_cache", cache is not None)
            check_cache(base, inputs["use_cache"])
        mask = self._label_mask(task, len(weights))
        run, classifies = self._combined_forward(), labels is not None and labels.dim() == 1
        if not return_logits and problem is None and cache is None and not torch.is_grad_enabled():
            logits, loss = None, -run.scores(weights, inputs, labels, mask).log_probs.mean()
        else:
            logits, cache = run.logits(weights, inputs, cache, mask)
            keep_weights(cache, weights)
            if problem is not None:
                loss = values_loss(problem, logits, labels)
            else:
                loss = None if labels is None else answer_loss(logits, labels, run.shift)
            classifies, logits = logits.dim() == 2, logits if return_logits else None
        if classifies:
            output = SequenceClassifierOutput(loss=loss, logits=logits)
        else:
            kind = CausalLMOutputWithPast if run.shift else Seq2SeqLMOutput
            output = kind(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _weights_of_call(self, task: Tasks, routing: str | None, inputs, labels, cache: Any) -> torch.Tensor:
        """Weights of the rows; those that a prompt decided stay for the tokens that follow it."""
        routing = routing or self.routing
        check_routing(routing)
        if routing in (None, "default") or not holds_states(cache):
            return self._routed_weights(task, routing, inputs, labels)
        weights = self._routed_weights(task, "default", inputs)
        tasks = tasks_of_rows(task, len(weights))
        rows = [row for row, name in enumerate(tasks) if name not in self.weights]
        if rows:
            weights[rows] = kept_weights(cache, len(weights))[rows].to(weights)
        return weights

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
        """Continue prompts with the ensemble; takes the arguments of the base model's `generate`.

        Each step combines the logits of the adapters, each of which has key-value states of its own.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`): prompts, padded on the left; `inputs` is an alias.
            task (`str` or `Sequence[str]`, *optional*):
                One task for all rows, or one per row. Rows of no known task are refused unless there is a `routing`; an
                ensemble without tasks takes none.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                0 on padding; told by the padding token by default, unless that ends texts, too.
            routing (`str`, *optional*): overrides the ensemble's own.
            kwargs: see `GenerationMixin.generate`: greedy, sampling and beams, guidance by a negative prompt, assisted
                decoding, streamers, stopping criteria, dynamic and static caches.

        Raises:
            `EnsembleError`: for a classifier, a cache of the caller's own, and options that need more than logits.
        """
        base = self.model.get_base_model()
        check_generation(base, kwargs)
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise EnsembleError("Expected prompts in input_ids, found none.")
        if attention_mask is None:
            attention_mask = prompt_mask(base, input_ids, kwargs)
        prompts = {"input_ids": input_ids, "attention_mask": attention_mask}
        weights = self._routed_weights(task, routing, prompts)
        if self.combination == "weights":
            masks = {} if attention_mask is None else {"attention_mask": attention_mask}
            with summed_weights(self.model, self.adapter_names, weights):
                return base.generate(input_ids=input_ids, **masks, **kwargs)
        return generate_by_outputs(self.member_forward(), base, weights, input_ids, attention_mask, **kwargs)
