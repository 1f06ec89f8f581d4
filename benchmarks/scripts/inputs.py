"""Small local models and datasets that the scripts are run on."""

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from ..common import write_rows
from ..models import write_tiny_llama
from ..skills import rows

SKILLS = ("two_step_addition", "reversal", "sorting")
SFT_SPLITS = {"train": 16, "test": 8}
# Labels of each task of texts: one set for all, and a set for each.
LABELS = {
    "one": dict.fromkeys(("films", "books", "songs"), ("bad", "good")),
    "several": {"films": ("bad", "good"), "books": ("bad", "good"), "songs": ("no", "yes")},
}
GLUE_SPLITS = {"train": 16, "validation": 8, "test": 8}
_WORDS = {0: ("awful", "poor", "dull"), 1: ("great", "fine", "lovely")}
# What `evaluate.load` finds in the working folder before it asks the Hub.
_METRIC = '''"""Share of right labels."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    def _info(self):
        labels = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=labels)

    def _compute(self, predictions, references):
        return {"accuracy": sum(map(int.__eq__, map(int, predictions), map(int, references))) / len(references)}
'''


def write_sft(folder: Path) -> None:
    """A language model in `base`, a folder of rows for each dataset, and the YAML that names them."""
    write_tiny_llama(folder / "base")
    for name in SKILLS:
        for split, count in SFT_SPLITS.items():
            write_rows(folder / "data" / name / f"{split}.jsonl", rows(name, count, split))
    paths = "".join(f"  - path: data/{name}\n" for name in SKILLS)
    (folder / "datasets.yaml").write_text(f"test_split_size: 0.2\ndatasets:\n{paths}")


def write_glue(folder: Path, labels: dict[str, tuple[str, str]]) -> None:
    """An encoder in `base`, one file for each split with the rows of all tasks, and the metric."""
    for split, count in GLUE_SPLITS.items():
        write_rows(
            folder / f"{split}.json", [row for name in labels for row in _texts(name, labels[name], count, split)]
        )
    words = [
        "<pad>",
        "<unk>",
        "<sep>",
        "the",
        "was",
        "very",
        *labels,
        *(word for own in _WORDS.values() for word in own),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", sep_token="<sep>", model_max_length=32
    )
    set_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder / "base")
    tokens.save_pretrained(folder / "base")
    (folder / "accuracy").mkdir()
    (folder / "accuracy" / "accuracy.py").write_text(_METRIC)


def _texts(name: str, labels: tuple[str, str], count: int, split: str) -> list[dict[str, str]]:
    generator = random.Random(f"{name}{split}")
    made = []
    for number in range(count):
        word = generator.choice(_WORDS[number % 2])
        pair = {"sentence1": f"the {name} was {'very ' * generator.randrange(3)}{word}", "sentence2": f"the {name}"}
        made.append({**pair, "label": labels[number % 2], "task": name})
    return made
