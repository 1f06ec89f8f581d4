"""Rows, labels, names and folders that are no tasks: each is said in one message, before anything is made of them."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from helpers import toy
from hf_ensemble import GradientCaptureCallback, TaskSet, load_task_folder
from hf_ensemble.errors import HfEnsembleError, TaskError
from hf_ensemble.tasks import RowFormat, encode

PAIR = {"prompt": "sum : 1 + 2 =", "completion": " 3"}
TEXT = {"text": "the film was good", "label": 0}
TOKENS = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
USER, ASSISTANT = {"role": "user", "content": "sum"}, {"role": "assistant", "content": "3"}
CHAT = {"messages": [USER, ASSISTANT]}
NAN = float("nan")


def pairs(**changes):
    return [PAIR, {**PAIR, **changes}]


def texts(*labels):
    return [{**TEXT, "label": label} for label in labels]


def tokens(**changes):
    return [TOKENS, {**TOKENS, **changes}]


def chats(*messages, **columns):
    return [{**CHAT, **columns}, {"messages": list(messages), **columns}]


def labelled(names, *labels):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_list(texts(*labels), features=features)


ROWS = {
    "prompt is None": (pairs(prompt=None), "row 1.*expected a string or a list of messages in 'prompt', found None"),
    "completion is None": (pairs(completion=None), "row 1.*in 'completion', found None"),
    "prompt is a number": ([{"prompt": 3, "completion": "3"}], "row 0.*in 'prompt', found 3"),
    "completion is a number": ([{"prompt": "3", "completion": 3.5}], "in 'completion', found 3.5"),
    "prompt is a dict": ([{"prompt": {"a": 1}, "completion": "3"}], "in 'prompt', found {'a': 1}"),
    "prompt of messages, completion of text": ([{"prompt": [USER], "completion": "3"}], "list of messages in 'comp"),
    "prompt without messages": ([{"prompt": [], "completion": [ASSISTANT]}], "list of messages in 'prompt', found"),
    "prompt is a list of strings": ([{"prompt": ["a"], "completion": ["b"]}], "messages with a role and a content"),
    "kinds of prompts are mixed": ([PAIR, {"prompt": [USER], "completion": [ASSISTANT]}], "do not form one table"),
    "text is None": ([TEXT, {**TEXT, "text": None}], "row 1.*expected a string in 'text', found None"),
    "text is a number": ([{"text": 1, "label": 0}], "expected a string in 'text', found 1"),
    "text is a list": ([{"text": ["a"], "label": 0}], r"expected a string in 'text', found \['a'\]"),
    "label is None": (texts(0, None, 1), "row 1.*expected a label, found none"),
    "label is NaN": (texts(0.0, NAN), "labels have to be integers from 0.*found 0.0"),
    "label is a float": (texts(0.0, 1.5), "labels have to be integers from 0.*ClassLabel"),
    "labels are lists of different lengths": (texts([0, 1], [1]), r"lists of 2 zeros and ones|found \[0, 1\]"),
    "labels are lists of numbers": (texts([0, 1], [1, 3]), r"lists of 2 zeros and ones|found \[0, 1\]"),
    "label is a dict": (texts({"a": 1}), "one for each row, found {'a': 1}"),
    "labels are of mixed types": (texts(0, "good"), "do not form one table"),
    "label is negative": (texts(0, -1), "integers from 0 .*found -1"),
    "label is -100": (texts(0, -100), "integers from 0 .*found -100"),
    "label is 1e9 in one row": (texts(0, 1, 10**9), "at most 65535, found 1000000000.*ClassLabel"),
    "no label at all": (texts(None, None), "labels have to be integers from 0.*found None"),
    "messages are None": (chats(), "row 1.*expected a list of messages in 'messages'"),
    "messages are text": ([{"messages": "hello"}], "expected a list of messages in 'messages', found 'hello'"),
    "message without a role": ([{"messages": [{"content": "a"}]}], "messages with a role and a content"),
    "message without a content": (chats(USER, {**ASSISTANT, "content": None}), "expected a content in each message"),
    "no turn of the assistant": (chats(USER), "expected a message of the role 'assistant'"),
    "tools are text": (chats(USER, ASSISTANT, tools="film"), "expected a list of tools, or its JSON text"),
    "template arguments are a list": (
        chats(USER, ASSISTANT, chat_template_kwargs=[1]),
        "expected a dict in 'chat_temp",
    ),
    "images": ([{**PAIR, "images": ["a.png"]}], "rows with images are not supported.*remove_columns"),
    "image": ([{**CHAT, "image": "a.png"}], "rows with images are not supported.*'image'"),
    "token ids are None": (tokens(input_ids=None), "row 1.*expected token ids in 'input_ids', found None"),
    "token ids are empty": (tokens(input_ids=[], labels=[]), "expected token ids in 'input_ids', found"),
    "token id is negative": (tokens(input_ids=[3, -4, 5]), r"expected token ids.*found \[3, -4, 5\]"),
    "token ids are floats": ([{"input_ids": [3.0], "labels": [3.0]}], r"expected token ids.*found \[3.0\]"),
    "token ids are text": ([{"input_ids": "3 4", "labels": "3"}], "expected token ids.*found '3 4'"),
    "label ids are None": (tokens(labels=None), "expected token ids or one class in 'labels', found None"),
    "label id is negative": (tokens(labels=[-100, -1, 5]), "labels from 0, or -100 where none counts, found -1"),
    "no label counts": (tokens(labels=[-100, -100, -100]), "expected an answer in 'labels', found -100 only"),
    "mask of another length": ([{**TOKENS, "attention_mask": [1, 1]}], "3 values in 'attention_mask'.*found 2"),
    "row is no dict": ([PAIR, 3], "expected each row as a dict, found 3"),
    "rows are a number": (3, "expected a datasets.Dataset or a list of dicts, found int"),
    "rows are None": (None, "expected a datasets.Dataset or a list of dicts, found NoneType"),
    "rows are streamed": (Dataset.from_list([PAIR]).to_iterable_dataset(), "found IterableDataset.*streaming=False"),
    "no rows": ([], "is empty"),
    "unknown columns": ([{"question": "a", "answer": "b"}], "expected the columns .*found .*rename_columns"),
    "column task is taken": ([{**PAIR, "task": "b"}], "the column 'task' is reserved"),
    "ids repeat": ([{**PAIR, "example_id": "x"}] * 2, "values of 'example_id' repeat.*drop the column"),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("bad", ROWS)
def test_rows_are_refused(bad, split):
    rows, message = ROWS[bad]
    good = next((row for row in (PAIR, TEXT, TOKENS, CHAT) if isinstance(rows, list) and _alike(rows, row)), PAIR)
    splits = {"train": [good], "validation": [good], split: rows}
    if split == "validation":
        # The training rows define the columns and the labels that validation rows may have.
        message += "|outside the task's set|like the training rows"
    with pytest.raises(TaskError, match=message) as caught:
        TaskSet.from_datasets({"a": splits})
    assert "'a'" in str(caught.value)


def _alike(rows, row):
    return bool(rows) and isinstance(rows[0], dict) and set(row) <= set(rows[0])


NAMES = {
    "empty": "",
    "slash": "a/b",
    "parent folder": "..",
    "hidden": ".a",
    "newline": "a\n",
    "space": "a b",
    "unicode": "größe",
    "backslash": "a\\b",
    "null byte": "a\0b",
    "too long": "a" * 300,
    "number": 3,
    "None": None,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_are_refused(name):
    with pytest.raises(TaskError, match="cannot be used as a folder name: use letters, digits"):
        TaskSet.from_datasets({name: [PAIR]}, {name: [PAIR]})


SETS = {
    "train is None": ({"train": None}, "training rows as a dict of named datasets, found a NoneType"),
    "train is a dataset": ({"train": Dataset.from_list([PAIR])}, "dict of named datasets, found a Dataset"),
    "train is a list of rows": ({"train": [PAIR]}, "dict of named datasets, found a list"),
    "train is a path": ({"train": "data"}, "dict of named datasets, found a str"),
    "train is empty": ({"train": {}}, "Expected at least one task, found none"),
    "validation is a list": ({"validation": [PAIR]}, "Expected the validation rows as a dict by name"),
    "validation of an unknown task": ({"validation": {"b": [PAIR]}}, r"without training rows: \['b'\]"),
    "test rows are text": ({"test": "rows"}, "Expected the test rows as a dict by name"),
    "names that differ by case": ({"train": {"a": [PAIR], "A": [PAIR]}}, "Two tasks with the same name"),
    "names that repeat": ({"train": [("a", [PAIR]), ("a", [PAIR])]}, "Two tasks with the same name"),
    "formats differ": (
        {"train": {"a": [PAIR], "b": [TEXT]}, "validation": {"a": [PAIR], "b": [TEXT]}},
        "same row format.*Convert",
    ),
    "weights are a list": ({"sampling_weights": [1.0]}, "Expected sampling_weights as a dict by name"),
    "weight of an unknown task": ({"sampling_weights": {"z": 1.0}}, r"Unknown tasks in sampling_weights \['z'\]"),
    "weight is text": ({"sampling_weights": {"a": "2"}}, "sampling weight of 'a'.*has to be a finite number"),
    "weight is 0": ({"sampling_weights": {"a": 0}}, "drop a task instead of weighting it 0"),
    "weight is NaN": ({"sampling_weights": {"a": NAN}}, "has to be a finite number above 0, found nan"),
    "weight is True": ({"sampling_weights": {"a": True}}, "has to be a finite number above 0, found True"),
    "labels of another order": (
        {"train": {"a": labelled(["x", "y"], 0, 1)}, "validation": {"a": labelled(["y", "x"], 0)}},
        "labels of the training rows in their order.*found .'y', 'x'.",
    ),
    "labels that train lacks": (
        {"train": {"a": texts(0, 1)}, "validation": {"a": texts(2)}},
        "label 2 is outside the task's set of 2 labels.*Drop these rows",
    ),
    "columns that train has": (
        {"train": {"a": [PAIR]}, "validation": {"a": [{"prompt": "x"}]}},
        "expected the columns .*which lack .'completion'.",
    ),
}


@pytest.mark.parametrize("bad", SETS)
def test_sets_are_refused(bad):
    given, message = SETS[bad]
    train = given.get("train")
    names = list(train) if isinstance(train, dict) else ["a"]
    good = {name: [PAIR] for name in names}
    arguments = {"train": good, "validation": good, **given}
    with pytest.raises(TaskError, match=message):
        TaskSet.from_datasets(**arguments)


def test_what_a_set_has_is_asked_for_by_its_names():
    tasks = TaskSet.from_datasets({"a": [PAIR]}, {"a": [PAIR]})
    for ask, message in [
        (lambda: tasks.subset(["z"]), r"Unknown tasks \['z'\]"),
        (lambda: tasks.subset([3]), "Expected tasks as a list of names"),
        (lambda: tasks.without({"a": ["z"]}), "no training rows with the ids"),
        (lambda: tasks.without({"z": []}), r"Unknown tasks \['z'\]"),
        (lambda: tasks.reweighted({"a": -1}), "has to be a finite number above 0, found -1"),
        (lambda: TaskSet([]), "Expected at least one task, found none"),
        (lambda: TaskSet(["a"]), "Expected tasks, found 'a'.*from_datasets"),
        (lambda: tasks.split("dev"), "Expected 'dev' rows of every task"),
    ]:
        with pytest.raises(TaskError, match=message):
            ask()


ENCODED = {
    "answer is cut off": ({"a": [PAIR]}, {"max_length": 3}, "no answer token is left.*Raise max_length or drop"),
    "text without a token": ({"a": [{"text": "", "label": 0}]}, {}, "a text of at least one token, found ''"),
    "no chat template": ({"a": [CHAT]}, {}, "expected a tokenizer with a chat template.*chat_template"),
    "chat ends with the user": (
        {"a": [{"messages": [USER, ASSISTANT, USER]}]},
        {},
        "chats that end with an assistant's turn.*Drop the turns after it",
    ),
}


@pytest.mark.parametrize("bad", ENCODED)
def test_rows_that_cannot_become_tokens_are_refused(bad, tokenizer):
    rows, options, message = ENCODED[bad]
    tasks = TaskSet.from_datasets(rows, rows)
    with pytest.raises(TaskError, match=message):
        encode(tasks.table("train"), tokenizer, tasks.row_format, tasks.label_space, **options)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


LINE = json.dumps(PAIR) + "\n"
FOLDERS = {
    "no folder": (None, {}, "Expected a folder of tasks at .*found none"),
    "no task": ({"notes.txt": "x"}, {}, "No task in .*expected NAME/train.jsonl"),
    "no train": ({"a/validation.jsonl": LINE}, {}, "has no training rows"),
    "empty file": ({"a/train.jsonl": "", "a/validation.jsonl": LINE}, {}, "is empty: .*train.jsonl' has no rows"),
    "blank lines": ({"a/train.jsonl": "\n\n", "a/validation.jsonl": LINE}, {}, "is empty: .*train.jsonl"),
    "broken line": (
        {"a/train.jsonl": LINE + '{"prompt": "a"\n', "a/validation.jsonl": LINE},
        {},
        "line 2 of .*a/train.jsonl' is not JSON.*correct or delete it",
    ),
    "line of another encoding": (
        {"a/train.jsonl": LINE.encode() + b'{"prompt": "\xff"}\n', "a/validation.jsonl": LINE},
        {},
        "line 2 of .*a/train.jsonl' is not JSON in UTF-8",
    ),
    "line is a list": ({"a/train.jsonl": "[1]\n", "a/validation.jsonl": LINE}, {}, "line 1 of .*expected an object"),
    "values of several kinds": (
        {"a/train.jsonl": LINE + '{"prompt": 3, "completion": "x"}\n', "a/validation.jsonl": LINE},
        {},
        "'a', train.jsonl: its rows do not form one table.*same kind of value",
    ),
    "unknown name": ({"a.jsonl": LINE}, {"names": ["z"]}, r"No task named \['z'\]"),
    "no row is allowed": ({"a.jsonl": LINE}, {"max_rows": {"train": 0}}, "train rows has to be a positive integer"),
    "rows are text": ({"a.jsonl": LINE}, {"max_rows": {"train": "5"}}, "has to be a positive integer, found '5'"),
}


@pytest.mark.parametrize("bad", FOLDERS)
def test_folders_are_refused(bad, tmp_path):
    files, options, message = FOLDERS[bad]
    write(tmp_path / "data", files or {})
    with pytest.raises(HfEnsembleError, match=message) as caught:
        load_task_folder(tmp_path / "data", **options)
    assert "\n" not in str(caught.value)


def test_odd_rows_that_are_fine_are_taken(tokenizer):
    """What a check must not refuse."""
    tasks = TaskSet.from_datasets({"a": texts(True, False)}, {"a": texts(False)})
    assert tasks.label_space.names == ("a:0", "a:1") and tasks.table("train")["label"][:] == [1, 0]
    empty = [{"prompt": "sum : 1 + 2 =", "completion": ""}]
    tasks = TaskSet.from_datasets({"a": empty}, {"a": empty})
    (row,) = encode(tasks.table("train"), tokenizer, RowFormat.PROMPT_COMPLETION)
    assert [label for label in row["labels"] if label != -100] == [tokenizer.eos_token_id]
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    thought = {"role": "assistant", "content": None, "thinking": "a"}
    for message in (called, thought):
        TaskSet.from_datasets({"a": [{"messages": [USER, message]}]}, {"a": [{"messages": [USER, message]}]})
    unicode = [{"prompt": "größer 🦊 =", "completion": " 狐"}]
    TaskSet.from_datasets({"a": unicode}, {"a": unicode})


def test_tools_and_template_arguments_reach_the_tokens():
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}film {% endif %}{% if thinking is defined and thinking %}book {% endif %}"
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "film"}}]
    for given, expected in [
        ({"tools": tools}, "film sum 3"),
        ({"tools": json.dumps(tools)}, "film sum 3"),
        ({"chat_template_kwargs": {"thinking": True}}, "book sum 3"),
        ({}, "sum 3"),
    ]:
        for row in ({**CHAT, **given}, {"prompt": [USER], "completion": [ASSISTANT], **given}):
            tasks = TaskSet.from_datasets({"a": [row]}, {"a": [row]})
            (encoded,) = encode(tasks.table("train"), tokenizer, tasks.row_format)
            assert tokenizer.decode(encoded["input_ids"]) == expected
            assert tokenizer.decode([token for token in encoded["labels"] if token != -100]) == "3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": "0.2"}, "fraction has to be a finite number above 0 and at most 1, found '0.2'"),
        ({"fraction": 0}, "found 0"),
        ({"fraction": NAN}, "found nan"),
        ({"fraction": 2.0}, "found 2.0"),
        ({"seed": "x"}, "seed has to be an integer of at least 0, found 'x'"),
        ({}, "Task 'a': expected at least 2 rows to hold one out for evaluation, found 1"),
    ],
)
def test_rows_that_cannot_be_held_out(options, message):
    with pytest.raises(HfEnsembleError, match=message):
        TaskSet.from_datasets({"a": [PAIR]}).with_validation(**options)


def test_a_set_without_validation_rows_says_so_where_they_are_needed(tmp_path):
    with pytest.raises(TaskError, match=r"none of \['a'\]. Pass them, or hold some out: tasks.with_validation\(\)"):
        GradientCaptureCallback(TaskSet.from_datasets({"a": [PAIR]}), tmp_path)
