import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import DataCollatorWithPadding

from helpers import toy
from hf_ensemble.errors import TaskError
from hf_ensemble.tasks import (
    LabelSpace,
    RowFormat,
    TaskCollator,
    TaskSet,
    data_collator_for,
    encode,
    load_task_folder,
    pop_meta,
    restrict_to_labels,
    score_answers,
)
from hf_ensemble.tasks.rows import content_hash, token_fingerprint

ROWS = toy.sum_rows(5)


def task_set(**changes):
    return TaskSet.from_datasets(
        **{"train": {"a": ROWS, "b": ROWS[:2]}, "validation": {"a": ROWS, "b": ROWS}, **changes}
    )


def test_table_carries_task_and_id():
    table = task_set().table("train")
    assert table["task"][:] == ["a"] * 5 + ["b"] * 2
    assert len(set(zip(table["task"], table["example_id"]))) == 7
    assert set(table.column_names) == {"prompt", "completion", "task", "example_id"}


def test_example_ids_follow_content_not_position():
    forward = task_set().table("train")
    backward = task_set(train={"a": ROWS[::-1], "b": ROWS[:2]}).table("train")
    by_prompt = {(r["prompt"], r["completion"]): r["example_id"] for r in forward if r["task"] == "a"}
    assert all(by_prompt[r["prompt"], r["completion"]] == r["example_id"] for r in backward if r["task"] == "a")


def test_repeated_rows_get_different_ids():
    table = task_set(train={"a": [ROWS[0]] * 3, "b": ROWS}).table("train")
    assert len(set(table["example_id"][:3])) == 3


def test_own_example_ids_are_kept_and_checked():
    rows = [{**row, "example_id": i} for i, row in enumerate(ROWS)]
    assert task_set(train={"a": rows, "b": ROWS}).table("train")["example_id"][:5] == ["0", "1", "2", "3", "4"]
    with pytest.raises(TaskError, match="repeat"):
        task_set(train={"a": [{**row, "example_id": 1} for row in ROWS], "b": ROWS})


def token_rows(changed=None, length=1500):
    """Token rows that are longer than what numpy and torch print."""
    ids = [3 + i % 20 for i in range(length)]
    if changed is not None:
        ids[changed] = 30
    return [{"input_ids": ids, "labels": ids}, {"input_ids": ids[::-1], "labels": ids}]


def in_format(rows, kind):
    if kind == "list":
        return rows
    if kind == "transform":
        table = Dataset.from_list([{"key": i} for i in range(len(rows))])
        return table.with_transform(lambda batch: {key: [rows[i][key] for i in batch["key"]] for key in rows[0]})
    return Dataset.from_list(rows).with_format(kind)


@pytest.mark.parametrize("kind", ["list", None, "numpy", "torch", "pandas", "transform"])
def test_identity_follows_values_whatever_format_they_are_read_in(kind):
    def of(rows):
        return TaskSet.from_datasets({"a": in_format(rows, kind)}, {"a": rows[:1]})

    plain = TaskSet.from_datasets({"a": token_rows()}, {"a": token_rows()[:1]})
    found = of(token_rows())
    assert found.fingerprint == plain.fingerprint
    assert found.table("train")["example_id"][:] == plain.table("train")["example_id"][:]
    for position in (0, 750, 1499):
        changed = of(token_rows(position))
        assert changed.fingerprint != plain.fingerprint
        assert not set(changed.table("train")["example_id"]) & set(plain.table("train")["example_id"])


def test_a_row_hashes_as_its_values():
    plain = {"a": [[1, 2], [3]], "b": {"c": [0.5, 1.5]}, "d": True, "e": 4}
    same = [
        {"a": [np.array([1, 2]), np.array([3])], "b": {"c": torch.tensor([0.5, 1.5])}, "d": np.True_, "e": np.int8(4)},
        {"a": np.array([np.array([1, 2]), np.array([3])], dtype=object), "b": {"c": (0.5, 1.5)}, "d": True, "e": 4},
        dict(reversed(plain.items())),
    ]
    assert {content_hash(row) for row in same} == {content_hash(plain)}
    tensor = torch.arange(5000)
    changed = tensor.clone()
    changed[2500] = 0
    for kind in (lambda x: x, torch.Tensor.numpy, lambda x: {"nested": [x]}):
        assert content_hash({"x": kind(tensor)}) != content_hash({"x": kind(changed)})
    with pytest.raises(TaskError, match="found a object. Convert it"):
        content_hash({"x": object()})


def test_fingerprints_keep_names_and_rows_apart():
    def labels(*names):
        rows = [{"text": "x", "label": i, "label_text": name} for i, name in enumerate(names)]
        return TaskSet.from_datasets({"a": rows}, {"a": rows[:1]})._tasks["a"]

    first, second = (replace(labels("x", "y"), label_names=names) for names in (("a|b", "c"), ("a", "b|c")))
    assert TaskSet([first]).fingerprint != TaskSet([second]).fingerprint
    split, joined = (
        Dataset.from_list([{"input_ids": ids, "labels": [1]} for ids in rows])
        for rows in ([[1], [2, 3]], [[1, 2], [3]])
    )
    assert token_fingerprint({"train": split}) != token_fingerprint({"train": joined})


def test_fingerprint_changes_with_any_row():
    assert task_set().fingerprint == task_set().fingerprint
    changed = [*ROWS[:-1], {**ROWS[-1], "completion": " 19"}]
    assert task_set(validation={"a": changed, "b": ROWS}).fingerprint != task_set().fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"a": [{"question": "1", "answer": "2"}], "b": ROWS}}, "expected the columns .* found .*answer"),
        ({"train": {"a": Dataset.from_list(ROWS).select([]), "b": ROWS}}, "'a' is empty"),
        ({"train": [("a", ROWS), ("a", ROWS)]}, "Two tasks with the same name"),
        ({"train": {"a": ROWS, "A": ROWS}, "validation": {"a": ROWS, "A": ROWS}}, "Two tasks with the same name"),
        ({"validation": {"a": ROWS, "b": ROWS, "c": ROWS}}, r"without training rows: \['c'\]"),
        ({"train": {"a/b": ROWS}, "validation": {"a/b": ROWS}}, "folder name"),
        ({"train": {}, "validation": {}}, "at least one task"),
        (
            {"train": {"a": ROWS, "b": toy.text_rows(4)}, "validation": {"a": ROWS, "b": toy.text_rows(4)}},
            "same row format",
        ),
        ({"train": {"a": "rows", "b": ROWS}}, "found str"),
        ({"train": {"a": [{**ROWS[0], "task": "z"}], "b": ROWS}}, "reserved"),
        ({"sampling_weights": {"z": 1.0}}, "Unknown tasks in sampling_weights"),
        ({"sampling_weights": {"a": 0.0}}, "finite number above 0, found 0.0"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(TaskError, match=message):
        task_set(**changes)


def classification(train, validation):
    return TaskSet.from_datasets({"t": train}, {"t": validation})


def test_label_outside_of_the_set_is_named():
    with pytest.raises(TaskError, match="label 2 is outside the task's set of 2"):
        classification(toy.text_rows(4), [{"text": "a", "label": 2, "label_text": "x"}])
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    with pytest.raises(TaskError, match="label -1 is outside"):
        classification(rows, rows)
    with pytest.raises(TaskError, match="integers from 0"):
        classification([{"text": "a", "label": 0.5}], [{"text": "a", "label": 0.5}])


def test_tasks_of_different_label_features_make_one_table():
    def rows(names):
        features = Features({"text": Value("large_string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    plain = toy.text_rows(2)
    train = {"sst2": rows(["negative", "positive"]), "cola": rows(["bad", "good"]), "plain": plain}
    tasks = TaskSet.from_datasets(train, train)
    assert len(tasks.table("train")) == 6
    assert tasks.label_space.names == ("negative", "positive", "bad", "good")
    other = {**train, "cola": rows(["no", "yes"])}
    renamed = TaskSet.from_datasets(other, other)
    assert renamed.fingerprint != tasks.fingerprint


def test_label_names():
    assert classification(toy.text_rows(4), toy.text_rows(2))["t"].label_names == ("negative", "positive")
    unnamed = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert classification(unnamed, unnamed)["t"].label_names == ("t:0", "t:1")
    varying = [{"text": "a", "label": 0, "label_text": "x"}, {"text": "b", "label": 0, "label_text": "y"}]
    assert classification(varying, varying)["t"].label_names == ("t:0",)


def test_label_space_shares_outputs_of_one_name():
    space = LabelSpace.from_label_names({"a": ("neg", "pos"), "b": ("pos", "none")})
    assert space.names == ("neg", "pos", "none")
    assert space.mask(["b", "a"]).tolist() == [[False, True, True], [True, True, False]]
    assert space.output_of("b", 0) == 1
    assert LabelSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    with pytest.raises(TaskError, match="no label set"):
        space.mask(["c"])


def test_encoding_masks_the_prompt_and_ends_the_answer(tokenizer):
    rows = encode(task_set().table("train"), tokenizer, RowFormat.PROMPT_COMPLETION)
    row, raw = rows[0], ROWS[0]
    answer = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(answer).split() == [*raw["completion"].split(), "<eos>"]
    assert row["input_ids"][-len(answer) :] == answer
    with pytest.raises(TaskError, match="no answer token is left"):
        encode(task_set().table("train"), tokenizer, RowFormat.PROMPT_COMPLETION, max_length=4)


def test_encoding_a_chat_masks_all_but_the_last_turn(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] == 'user' and '+' or '-' }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}- {% endif %}"
    )
    chat = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
    tasks = TaskSet.from_datasets({"c": [{"messages": chat}]}, {"c": [{"messages": chat}]})
    row = encode(tasks.table("train"), tokenizer, tasks.row_format)[0]
    assert [tokenizer.decode([t]) for t in row["labels"] if t != -100] == ["3"]
    rows = {"c": [{"messages": [*chat, chat[0]]}]}
    unfinished = TaskSet.from_datasets(rows, rows)
    with pytest.raises(TaskError, match="assistant's turn"):
        encode(unfinished.table("train"), tokenizer, unfinished.row_format)


def test_collator_carries_names_and_pop_takes_them_out(tokenizer):
    tasks = TaskSet.from_datasets(toy.text_tasks())
    rows = encode(tasks.table("train"), tokenizer, tasks.row_format, tasks.label_space)
    batch = TaskCollator(DataCollatorWithPadding(tokenizer))([rows[0], rows[-1]])
    assert batch["task"] == ["films", "songs"]
    meta = pop_meta(batch)
    assert set(meta) == {"task", "example_id"}
    assert {"input_ids", "attention_mask", "labels"} <= set(batch)
    assert not {"task", "example_id"} & set(batch)


def test_scores_of_answers():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7)
    labels = torch.full((3, 5), -100)
    labels[0, 2:] = torch.tensor([1, 2, 3])
    labels[1, 4] = 6
    labels[2, 1:3] = logits[2, 0:2].argmax(-1)
    scores = score_answers(logits, labels)
    for row in range(3):
        kept = labels[row, 1:] != -100
        expected = torch.nn.functional.cross_entropy(logits[row, :-1][kept], labels[row, 1:][kept])
        assert torch.allclose(scores.loss[row], expected)
    assert scores.num_tokens.tolist() == [3, 1, 2]
    assert scores.exact_match.tolist()[2]
    unshifted = score_answers(logits[:, :-1], labels[:, 1:], shift=False)
    assert torch.equal(unshifted.loss, scores.loss)


def test_labels_outside_of_the_set_do_not_count():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    restricted = restrict_to_labels(logits, torch.tensor([[True, False, True]]))
    scores = score_answers(restricted, torch.tensor([2]))
    assert torch.allclose(scores.loss, torch.nn.functional.cross_entropy(logits[:, [0, 2]], torch.tensor([1])))
    assert scores.exact_match.item()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_folder_of_folders_and_files(tmp_path):
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "a" / f"{split}.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", toy.sum_rows(40, 5))
    tasks = load_task_folder(tmp_path, max_rows={"train": 4})
    assert tasks.names == ("a", "b")
    assert len(tasks["a"].splits["train"]) == 4
    assert not tasks.has_split("test") and "test" in tasks["a"].splits
    with pytest.raises(TaskError, match=r"found none of \['b'\]. Pass them, or hold some out"):
        tasks.table("validation")
    assert load_task_folder(tmp_path, names=["b"]).names == ("b",)


def test_files_that_look_like_rows_are_not_left_out_in_silence(tmp_path, caplog):
    for name in ("a.jsonl", "b.JSONL", "c.ndjson", "d.jsonl.gz", "README.md"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert load_task_folder(tmp_path).names == ("a",)
    assert "['b.JSONL', 'c.ndjson', 'd.jsonl.gz']. Expected names that end in .jsonl" in caplog.text


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(TaskError, match="Expected a folder"):
        load_task_folder(tmp_path / "none")
    with pytest.raises(TaskError, match="No task"):
        load_task_folder(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(TaskError, match=r"line 1 of .*x.jsonl' is not JSON"):
        load_task_folder(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    write_jsonl(tmp_path / "x" / "train.jsonl", ROWS)
    with pytest.raises(TaskError, match="Two tasks with the same name"):
        load_task_folder(tmp_path)


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"), [(2, 0.1, 1), (17, 0.1, 8), (60, 0.1, 20), (400, 0.1, 40), (9000, 0.2, 500)]
)
def test_held_out_rows(rows, fraction, held_out):
    """Which rows are held out depends on the seed and their content alone, not on their order."""
    source = [{"prompt": f"{number} =", "completion": " 1"} for number in range(rows)]
    splits = {}
    for order, seed in ((source, 0), (source[::-1], 0), (source, 1)):
        (task,) = TaskSet.from_datasets({"a": order}).with_validation(fraction, seed).values()
        ids = {split: set(own["example_id"]) for split, own in task.splits.items()}
        assert len(ids["validation"]) == held_out and not ids["validation"] & ids["train"]
        assert len(ids["train"]) == rows - held_out and set(task.fingerprints) == set(ids)
        splits.setdefault(seed, ids)
        assert splits[seed] == ids
    assert rows < 10 or splits[0] != splits[1]


def test_rows_are_held_out_only_where_there_are_none():
    tasks = TaskSet.from_datasets({"a": ROWS, "b": toy.sum_rows(40)}, {"a": ROWS})
    whole = tasks.with_validation()
    assert whole["a"] is tasks["a"] and len(whole["b"].splits["validation"]) == 20
    assert whole.with_validation() == whole
    with pytest.raises(TaskError, match="Task 'a': expected at least 2 rows"):
        TaskSet.from_datasets({"a": ROWS[:1]}).with_validation()


@pytest.mark.parametrize("side", ["left", "right"])
def test_further_inputs_of_tokens_are_kept_and_padded(side):
    rows = [
        {"input_ids": [3, 4, 5], "labels": 1, "position_ids": [7, 8, 9], "bbox": [[1, 2, 3, 4]] * 3},
        {"input_ids": [3], "labels": 0, "position_ids": [7], "bbox": [[1, 2, 3, 4]]},
    ]
    table = TaskSet.from_datasets({"a": rows, "b": rows}, None)["a"].splits["train"]
    batch = data_collator_for(RowFormat.TOKENIZED, toy.tokenizer(side), labels_are_tokens=False)(list(table))
    pad = batch["input_ids"][1] == 0
    assert pad.sum() == 2 and batch["position_ids"][0].tolist() == [7, 8, 9]
    assert batch["position_ids"][1][~pad].tolist() == [7] and not batch["position_ids"][1][pad].any()
    assert batch["bbox"].shape == (2, 3, 4) and not batch["bbox"][1][pad].any()
    decoder = [{**row, "labels": row["input_ids"], "decoder_input_ids": row["input_ids"][:2]} for row in rows]
    batch = data_collator_for(RowFormat.TOKENIZED, toy.tokenizer(side), labels_are_tokens=True)(decoder)
    assert batch["decoder_input_ids"].tolist() == [[3, 4], [3, 0]] and batch["position_ids"][1].tolist() == [7, 0, 0]
