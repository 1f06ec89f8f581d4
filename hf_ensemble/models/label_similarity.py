"""A classifier without a trained head: similarities between a text and the labels' texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput


@dataclass(frozen=True)
class LabelHead:
    """What makes a [`LabelSimilarityForSequenceClassification`] of an encoder.

    Args:
        texts (`list[str]`): text of each label.
        token_ids (`list[list[int]]`): the tokens of each text, as the encoder takes them.
        logit_scale (`float`): scale of the cosine similarities.
        dtype (`str`, *optional*): the type that the encoder was loaded in; its checkpoint's own by default.
    """

    texts: list[str]
    token_ids: list[list[int]]
    logit_scale: float = 20.0
    dtype: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], logit_scale: float = 20.0) -> "LabelHead":
        """The head for these labels; "_" reads as a space."""
        texts = [text.replace("_", " ") for text in labels]
        return cls(list(labels), [list(tokenizer(text)["input_ids"]) for text in texts], logit_scale)


class LabelSimilarityConfig(PreTrainedConfig):
    """Configuration of [`LabelSimilarityForSequenceClassification`].

    Args:
        encoder (`dict`): the encoder's configuration.
        logit_scale (`float`): scale of the cosine similarities.
    """

    model_type = "label_similarity"

    def __init__(self, encoder: dict | None = None, logit_scale: float = 20.0, **kwargs):
        self.encoder = encoder
        self.logit_scale = logit_scale
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """The configuration in a folder or repository; that of an encoder alone is one without labels."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") != cls.model_type:
            config = {"model_type": cls.model_type, "encoder": config}
        return config, kwargs

    @property
    def vocab_size(self) -> int | None:
        """The encoder's, which PEFT compares with the checkpoint's."""
        return (self.encoder or {}).get("vocab_size")

    @property
    def encoder_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(**self.encoder)


class LabelSimilarityForSequenceClassification(PreTrainedModel):
    """Logits are scaled cosine similarities of the mean-pooled text to each label's text, embedded by the same encoder.

    It classifies before any training, unlike a new random head, so that the model can be linearised there.

    Attributes:
        made_of (`LabelHead`, *optional*): the head, where the encoder is as its checkpoint has it.

    Example:

    ```python
    >>> model = LabelSimilarityForSequenceClassification.from_encoder(  # doctest: +SKIP
    ...     "sentence-transformers/all-MiniLM-L6-v2", tokenizer, ["negative", "positive"]
    ... )
    ```
    """

    config_class = LabelSimilarityConfig
    base_model_prefix = "encoder"
    made_of: LabelHead | None = None

    def __init__(self, config: LabelSimilarityConfig):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config, **_no_pooler(config.encoder_config))
        shape = (config.num_labels, config.encoder_config.hidden_size)
        self.register_buffer("label_embeddings", torch.zeros(shape))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All weights are loaded; none is initialised at random."""

    @classmethod
    def from_encoder(
        cls,
        encoder: str,
        tokenizer: PreTrainedTokenizerBase,
        label_texts: Sequence[str],
        logit_scale: float = 20.0,
        **encoder_kwargs,
    ) -> "LabelSimilarityForSequenceClassification":
        """Wrap a pretrained encoder.

        Args:
            encoder (`str`): Hub id or folder.
            tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
            label_texts (`Sequence[str]`): text of each label; "_" reads as a space.
            logit_scale (`float`, *optional*, defaults to 20): scale of the similarities.
            encoder_kwargs: passed to `AutoModel.from_pretrained`.
        """
        return cls.from_head(encoder, LabelHead.of(tokenizer, label_texts, logit_scale), **encoder_kwargs)

    @classmethod
    def from_head(cls, encoder: str, head: LabelHead, **encoder_kwargs) -> "LabelSimilarityForSequenceClassification":
        """The same model again, of an encoder and the head that [`made_of`] holds."""
        if head.dtype is not None:
            encoder_kwargs.setdefault("dtype", getattr(torch, head.dtype))
        pretrained = AutoModel.from_pretrained(encoder, **encoder_kwargs)
        config = LabelSimilarityConfig(
            encoder=pretrained.config.to_dict(), logit_scale=head.logit_scale, id2label=dict(enumerate(head.texts))
        )
        model = cls(config).to(pretrained.dtype)
        own = model.encoder.state_dict()
        model.encoder.load_state_dict({key: value for key, value in pretrained.state_dict().items() if key in own})
        model.to(pretrained.device).eval()
        with torch.no_grad():
            # One by one: padding would change the last digits.
            rows = [torch.tensor([ids], device=pretrained.device) for ids in head.token_ids]
            model.label_embeddings.copy_(torch.cat([model.embed(row) for row in rows]))
        model.config._name_or_path = str(encoder)
        model.config._commit_hash = getattr(pretrained.config, "_commit_hash", None)
        model.made_of = replace(head, dtype=str(pretrained.dtype).removeprefix("torch."))
        return model

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Mean-pooled, normalised embeddings `(B, hidden)` of token ids `(B, T)`."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return nn.functional.normalize(pooled, dim=-1)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits `(B, num_labels)`, and the cross-entropy of `labels` `(B,)` where given."""
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        embedded = self.embed(input_ids, attention_mask, **extra)
        logits = self.config.logit_scale * embedded @ self.label_embeddings.T
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()


def _no_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """The mean over tokens replaces the pooler that BERT-like encoders add."""
    return {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet") else {}


AutoConfig.register(LabelSimilarityConfig.model_type, LabelSimilarityConfig)
AutoModelForSequenceClassification.register(LabelSimilarityConfig, LabelSimilarityForSequenceClassification)
