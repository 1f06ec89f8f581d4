"""Columns of rows for an `SFTTrainer`: those that it reads are checked in every split, and no others."""

import pytest
from datasets import Dataset, DatasetDict
from trl import SFTTrainer

from helpers import toy
from helpers.sft_rows import chat_tokenizer
from helpers.trainers import SMALL, sft_config
from hf_ensemble import EnsembleSFTTrainer
from hf_ensemble.errors import TaskError
from hf_ensemble.tasks.sft_rows import SFTRows

ROWS = toy.sum_rows(8, 1)
USER, ASSISTANT = {"role": "user", "content": "sum"}, {"role": "assistant", "content": "3"}
SAID = [{"from": "user", "value": "sum"}, {"from": "assistant", "value": "3"}]


def trainer(folder, train, evaluation=None, peft=True, formatting_func=None, **changes):
    return EnsembleSFTTrainer(
        toy.llama(),
        sft_config(folder, **changes),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=chat_tokenizer(),
        peft_config=toy.lora() if peft else None,
        formatting_func=formatting_func,
    )


def with_columns(**columns):
    """Questions and replies, and columns that hold anything."""
    return Dataset.from_list([{"q": row["prompt"], "a": row["completion"], **columns} for row in ROWS])


def text_of(row):
    return row["q"] + row["a"]


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize(
    "columns",
    [{"messages": '[{"role": "user"}]'}, {"text": None}, {"text": ["a"]}, {"completion": None}, {"label": 0.5}],
    ids=str,
)
def test_columns_that_nothing_reads_may_hold_anything(tmp_path, columns, peft):
    rows = with_columns(**columns)
    own = trainer(tmp_path, {"a": rows, "b": rows}, peft=peft, formatting_func=text_of)
    expected = [chat_tokenizer()(text_of(row) + "<eos>")["input_ids"] for row in rows]
    assert all(ids in expected for ids in own.train_dataset["input_ids"])
    if "messages" not in columns and "completion" not in columns:
        named = rows.map(lambda row: {"content": text_of(row)})
        own = trainer(tmp_path, {"a": named, "b": named}, peft=peft, dataset_text_field="content")
        assert all(ids in expected for ids in own.train_dataset["input_ids"])


def test_tokens_with_a_class_beside_them_are_the_labels_themselves(tmp_path):
    tokens = Dataset.from_list([{**toy.tokenizer()(row["prompt"]), "label": 1} for row in ROWS])
    own = trainer(tmp_path, {"a": tokens, "b": tokens})
    assert own.train_dataset["labels"][:] == own.train_dataset["input_ids"][:]


REFUSED = {
    "text of another name": ([{"content": "1"}, {"content": None}], "row 1 .*expected a string in 'content', found No"),
    "no text of that name": ([{"text": "1"}], r"or content or input_ids; found \['text'\]"),
    "no answers": ([{"prompt": "1", "content": "1"}], "which lack 'completion'"),
    "chats with a prompt": ([{"prompt": "1", "messages": [USER, ASSISTANT]}], "which lack 'completion'.*remove 'prom"),
    "a text that trl ends": ([{"prompt": "1", "completion": "2", "content": None}], "a string in 'content', found No"),
    "conversations of texts": ([{"conversations": ["a"]}], "expected messages with a from and a value in 'conversa"),
    "no conversation": ([{"conversations": SAID}, {"conversations": None}], "row 1 .*a list of messages in 'conversa"),
    "a class of tokens": ([{"input_ids": [3, 4], "labels": 1}], "expected token ids in 'labels', found 1"),
}


# Without an adapter no split but the training rows is read of a dataset.
@pytest.mark.parametrize(
    ("split", "peft"), [("train", True), ("validation", True), ("test", True), ("train", False), ("validation", False)]
)
@pytest.mark.parametrize("bad", REFUSED)
def test_columns_that_are_read_are_checked_in_every_split(tmp_path, bad, split, peft):
    rows, message = REFUSED[bad]
    own = {"train": ROWS, "validation": ROWS, split: rows}
    splits = DatasetDict({name: Dataset.from_list(table) for name, table in own.items()})
    evaluation = None if peft else {"a": splits["validation"]}
    with pytest.raises(TaskError, match=message) as caught:
        trainer(tmp_path, {"a": splits, "b": ROWS}, evaluation, peft, dataset_text_field="content")
    assert f"Task 'a', split {split!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "1"}, "expected no column 'prompt' beside a formatting_func"),
        ({"messages": [USER, ASSISTANT]}, "expected no messages beside a formatting_func.*in 'messages'"),
        ({"conversations": SAID}, "expected no messages beside a formatting_func.*in 'conversations'"),
    ],
)
def test_columns_that_trl_reads_in_place_of_the_formatted_text_are_refused(tmp_path, columns, message):
    rows = with_columns(**columns)
    with pytest.raises(TaskError, match=message):
        trainer(tmp_path, {"a": rows, "b": rows}, formatting_func=text_of)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "1 2", "messages": "3"},
        {"prompt": "1", "completion": " 2", "text": "3", "messages": None},
        {"messages": [USER, ASSISTANT], "text": None},
        {"conversations": SAID, "text": None},
        {"input_ids": [3, 4, 5], "prompt": None, "messages": 3},
    ],
    ids=str,
)
def test_rows_that_pass_are_rows_that_trl_takes(tmp_path, columns):
    rows = Dataset.from_list([columns] * 4)
    SFTRows().check("a", "train", rows)
    args = sft_config(tmp_path, **SMALL, bf16=False)
    SFTTrainer(toy.llama(), args, train_dataset=rows, processing_class=chat_tokenizer())


def test_a_stream_is_checked_by_what_is_read(tmp_path):
    rows = [*({"content": f"{number}", "text": None} for number in range(8)), {"content": None, "text": None}]
    table = Dataset.from_list(rows)
    given = {"a": table.to_iterable_dataset(), "b": table.select(range(8))}
    own = trainer(tmp_path, given, peft=False, dataset_text_field="content", max_steps=2, streaming_rows=4)
    with pytest.raises(TaskError, match="'a', split 'train', row 8 .*a string in 'content', found None"):
        list(own.train_dataset.take(40))
