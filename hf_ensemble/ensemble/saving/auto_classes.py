"""Which of transformers' auto classes loads a base model."""

from peft import PeftConfig
from torch import nn

from ...models.inputs import is_encoder_decoder

CAUSAL, SEQ_TO_SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
CLASSIFIER = "AutoModelForSequenceClassification"
AUTO_CLASSES = {
    "ForSequenceClassification": CLASSIFIER,
    "ForConditionalGeneration": SEQ_TO_SEQ,
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
}
AUTO_CLASS_OF_TASK = {"CAUSAL_LM": CAUSAL, "SEQ_CLS": CLASSIFIER, "SEQ_2_SEQ_LM": SEQ_TO_SEQ}


def auto_class_of(base: nn.Module) -> str | None:
    """The auto class that loads a model; `None` for one of another kind."""
    auto_class = _of_name(type(base).__name__)
    # Vision-language models have the same suffix.
    return None if auto_class == SEQ_TO_SEQ and not is_encoder_decoder(base) else auto_class


def adapter_auto_class(config: PeftConfig) -> str | None:
    """The auto class that loads an adapter's base, by the task type, or else the class of the base that it names."""
    named = (config.auto_mapping or {}).get("base_model_class", "")
    return AUTO_CLASS_OF_TASK.get(config.task_type or "") or _of_name(named)


def _of_name(name: str) -> str | None:
    return next((auto for suffix, auto in AUTO_CLASSES.items() if name.endswith(suffix)), None)
