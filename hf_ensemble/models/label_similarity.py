"""A classifier without a trained head: similarities between a text and the labels' texts."""

from collections.abc import Sequence

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

    @property
    def encoder_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(**self.encoder)


class LabelSimilarityForSequenceClassification(PreTrainedModel):
    """Logits are scaled cosine similarities of the mean-pooled text to each label's text, embedded by the same encoder.

    It classifies before any training, unlike a new random head, so that the model can be linearised there.

    Example:

    ```python
    >>> model = LabelSimilarityForSequenceClassification.from_encoder(  # doctest: +SKIP
    ...     "sentence-transformers/all-MiniLM-L6-v2", tokenizer, ["negative", "positive"]
    ... )
    ```
    """

    config_class = LabelSimilarityConfig
    base_model_prefix = "encoder"

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
        pretrained = AutoModel.from_pretrained(encoder, **encoder_kwargs)
        config = LabelSimilarityConfig(
            encoder=pretrained.config.to_dict(), logit_scale=logit_scale, id2label=dict(enumerate(label_texts))
        )
        model = cls(config).to(pretrained.dtype)
        own = model.encoder.state_dict()
        model.encoder.load_state_dict({key: value for key, value in pretrained.state_dict().items() if key in own})
        texts = [text.replace("_", " ") for text in label_texts]
        with torch.no_grad():
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            model.eval()
            model.label_embeddings.copy_(model.embed(**batch))
        model.config._name_or_path = str(encoder)
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
