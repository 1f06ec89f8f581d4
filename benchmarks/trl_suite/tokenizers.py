"""Tokenizers of the stand-in models: one small vocabulary, and each family's special tokens and chat template."""

from dataclasses import dataclass
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .rows import TEST_SENTENCES, TRAIN_SENTENCES

# A byte-level vocabulary in which every word of the stand-in rows is one token.
VOCABULARY = 1024
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Vocabulary:
    """Special tokens of a model family.

    Args:
        template (`str`, *optional*): name of its file among trl's chat templates, without the ending.
        eos (`str`): end token.
        pad (`str`, *optional*): padding token.
        bos (`str`, *optional*): begin token.
        more (`tuple[str, ...]`, *optional*): other tokens that the template writes.
    """

    template: str | None = None
    eos: str = "<|endoftext|>"
    pad: str | None = "<|pad|>"
    bos: str | None = None
    more: tuple[str, ...] = ()

    @property
    def special(self) -> list[str]:
        return list(dict.fromkeys(token for token in (self.pad, self.bos, self.eos, *self.more) if token))


CHATML = Vocabulary(eos="<|im_end|>", pad="<|endoftext|>", more=("<|im_start|>",))


def make_tokenizer(vocabulary: Vocabulary, **named: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a family on the stand-in rows.

    Args:
        vocabulary (`Vocabulary`): the family's special tokens and template.
        named (`str`): special tokens that a processor asks the tokenizer for by a name of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=vocabulary.special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TRAIN_SENTENCES, *TEST_SENTENCES], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=vocabulary.eos,
        pad_token=vocabulary.pad,
        bos_token=vocabulary.bos,
        extra_special_tokens=named,
    )
    if vocabulary.template is not None:
        fast.chat_template = (TEMPLATES / f"{vocabulary.template}.jinja").read_text(encoding="utf-8")
    return fast
