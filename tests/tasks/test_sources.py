"""Datasets as people have them, as tasks."""

import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, IterableDataset

from helpers.hub_server import local_hub, run_against_hub
from hf_ensemble import DatasetSource, TaskSet, load_task_folder, load_tasks
from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.tasks.stream_rows import first_rows

ROWS = [{"question": f"{n} + 1 =", "answer": str(n + 1), "hint": n} for n in range(20)]
COLUMNS = {"question": "prompt", "answer": "completion"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """One dataset in every kind of file, and as a folder of splits."""
    path = tmp_path / "data"
    path.mkdir()
    rows = Dataset.from_list(ROWS)
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "a.json").write_text(json.dumps(ROWS))
    rows.to_csv(path / "a.csv")
    (path / "a.tsv").write_text("question\tanswer\n" + "".join(f"{row['question']}\t{row['answer']}\n" for row in ROWS))
    rows.to_parquet(path / "a.parquet")
    (path / "splits").mkdir()
    for split, count in {"train": 12, "dev": 5, "test": 3}.items():
        rows.select(range(count)).to_csv(path / "splits" / f"{split}.csv")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(folder, ending):
    tasks = load_tasks({"sums": {"path": str(folder / f"a.{ending}"), "columns": COLUMNS}})
    rows = tasks["sums"].splits["train"]
    # Answers stay texts in a CSV file, though they look like numbers.
    assert rows["prompt"][:] == [row["question"] for row in ROWS]
    assert rows["completion"][:] == [row["answer"] for row in ROWS]


def test_splits_of_a_folder_and_parts_of_them(folder):
    source = {"path": str(folder / "splits"), "columns": COLUMNS}
    tasks = load_tasks({"sums": source, "few": {**source, "split": "train[25%:50%]", "validation": "test"}})
    assert {split: len(rows) for split, rows in tasks["sums"].splits.items()} == {
        "train": 12,
        "validation": 5,
        "test": 3,
    }
    assert tasks["few"].splits["train"]["completion"][:] == ["4", "5", "6"]
    # Rows that are chosen by are not reported on.
    assert {split: len(rows) for split, rows in tasks["few"].splits.items()} == {"train": 3, "validation": 3}


def test_rows_that_are_trained_on_are_for_nothing_else(folder):
    source = {"path": str(folder / "splits"), "columns": COLUMNS}
    tasks = load_tasks(
        {
            "on_dev": {**source, "split": "dev"},
            "on_test": {**source, "split": "test"},
            "halves": {**source, "split": "train[:50%]", "validation": "train[50%:]"},
            "held_out": {**source, "split": "eval", "validation": 2},
            "other_file": {**source, "path": str(folder / "a.csv"), "validation": str(folder / "splits" / "dev.csv")},
        }
    )
    assert {name: {split: len(own) for split, own in task.splits.items()} for name, task in tasks.items()} == {
        "on_dev": {"train": 5, "test": 3},
        "on_test": {"train": 3, "validation": 5},
        "halves": {"train": 6, "validation": 6, "test": 3},
        "held_out": {"train": 3, "validation": 2, "test": 3},
        "other_file": {"train": 20, "validation": 5},
    }


def test_rows_are_cut_weighed_and_held_out(folder):
    source = {"path": str(folder / "a.jsonl"), "columns": COLUMNS}
    tasks = load_tasks(
        {
            "a": {**source, "max_rows": 10, "validation": 4, "weight": 2.5},
            "b": {**source, "validation": 0.25},
            "c": {**source, "validation": str(folder / "splits" / "dev.csv")},
            "d": DatasetSource(str(folder / "a.csv"), columns=COLUMNS),
        },
        max_rows={"validation": 3},
    )
    assert {name: len(task.splits["train"]) for name, task in tasks.items()} == {"a": 7, "b": 17, "c": 20, "d": 20}
    assert {name: len(task.splits.get("validation", ())) for name, task in tasks.items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
        "d": 0,
    }
    assert tasks.sampling_weights == {"a": 2.5, "b": 1.0, "c": 1.0, "d": 1.0}


def test_templates_name_labels_and_keep_ids(tmp_path):
    rows = Dataset.from_dict({"q": ["is it?", "is it {not}?"], "label": [1, 0], "example_id": ["x", "y"]})
    rows = rows.cast_column("label", ClassLabel(names=["no", "yes"]))
    rows.to_parquet(tmp_path / "q.parquet")
    source = {"path": str(tmp_path / "q.parquet"), "template": {"prompt": "{q} {{a}}", "completion": " {label}"}}
    made = load_tasks({"q": source})["q"].splits["train"]
    assert made["prompt"][:] == ["is it? {a}", "is it {not}? {a}"] and made["completion"][:] == [" yes", " no"]
    assert made["example_id"][:] == ["x", "y"]
    text = load_tasks({"q": {**source, "template": "{q}: {label}"}})["q"].splits["train"]
    assert text["text"][:] == ["is it?: yes", "is it {not}?: no"]


def test_templates_show_texts_as_they_stand_in_a_file(tmp_path):
    (tmp_path / "a.csv").write_text("q,a,score\nfirst,007,2\nsecond,1.50,3\n")
    source = {"path": str(tmp_path / "a.csv"), "template": {"prompt": "{q} ({score:.1f})", "completion": " {a}"}}
    rows = load_tasks({"a": source})["a"].splits["train"]
    assert rows["prompt"][:] == ["first (2.0)", "second (3.0)"] and rows["completion"][:] == [" 007", " 1.50"]
    renamed = {**source, "columns": {"a": "answer"}, "template": {"prompt": "?", "completion": "{answer}"}}
    assert load_tasks({"a": renamed})["a"].splits["train"]["completion"][:] == ["007", "1.50"]


def test_templates_show_nothing_for_missing_values(tmp_path):
    rows = [{"q": "a", "context": None, "score": 1.5}, {"q": "b", "context": "c", "score": None}]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    template = {"prompt": "{context}\n{q}", "completion": "{q} {score:.2f}{context.real[0]!s:>2}"}
    with pytest.raises(TaskError, match="row 1 .* does not fit .*AttributeError"):
        load_tasks({"a": {"path": str(tmp_path / "a.parquet"), "template": template}})
    template["completion"] = "{q} {score:.2f}{score.real!r}"
    made = load_tasks({"a": {"path": str(tmp_path / "a.parquet"), "template": template}})["a"].splits["train"]
    assert made["prompt"][:] == ["\na", "c\nb"] and made["completion"][:] == ["a 1.501.5", "b "]


def test_a_mixture_of_trl_is_read(folder):
    mixture = [
        {"path": str(folder / "a.jsonl"), "columns": list(COLUMNS), "fraction": 0.5},
        {"path": str(folder / "splits"), "split": "train", "columns": list(COLUMNS), "fraction": 1.0},
    ]
    with pytest.raises(TaskError, match="Task 'a': expected the columns"):
        load_tasks(mixture)
    tasks = load_tasks([{**own, "columns": COLUMNS} for own in mixture])
    assert {name: len(task.splits["train"]) for name, task in tasks.items()} == {"a": 6, "splits": 12}


def test_folders_of_tasks_hold_any_kind_of_file(folder):
    for name in ("a.jsonl", "a.json", "a.parquet", "a.tsv"):
        (folder / name).unlink()
    for path in (folder / "a.csv", *(folder / "splits").iterdir()):
        path.write_text(path.read_text().replace("question,answer", "prompt,completion"))
    tasks = load_task_folder(folder)
    assert {name: set(task.splits) for name, task in tasks.items()} == {
        "a": {"train"},
        "splits": {"train", "validation", "test"},
    }
    with pytest.raises(TaskError, match="holds the splits of one dataset"):
        load_task_folder(folder / "splits")


BAD = {
    "typo": ({"path": "{f}/aa.jsonl"}, "no file or folder .*Did you mean .*a.jsonl'"),
    "typo in a folder": ({"path": "{f}/split/train.csv"}, "no file or folder .*Did you mean .*splits'"),
    "kind of file": ({"path": "{f}/notes.txt"}, "expected a file that ends in .jsonl, .json, .csv"),
    "no path": ({"split": "train"}, "expected a path, or a mapping with one"),
    "unknown key": ({"path": "{f}/a.jsonl", "colums": {}}, r"unknown keys \['colums'\]; known are path, name"),
    "split": (
        {"path": "{f}/splits", "split": "training"},
        "one of the splits .* in split, found 'training'",
    ),
    "validation": ({"path": "{f}/splits", "validation": "val"}, "in validation, found 'val'. Set validation to one of"),
    "part": ({"path": "{f}/splits", "split": "train[5]"}, r"a part of a split like 'train\[:1000\]'"),
    "share": ({"path": "{f}/a.jsonl", "validation": 1.5}, "validation, a share of the rows, has to be a finite number"),
    "all held out": (
        {"path": "{f}/a.jsonl", "columns": COLUMNS, "validation": 20},
        "fewer validation rows than the 20",
    ),
    "columns": (
        {"path": "{f}/a.jsonl"},
        r"found \['answer', 'hint', 'question'\]. Rename them: .*'question': 'prompt'",
    ),
    "columns that are not there": (
        {"path": "{f}/a.jsonl", "columns": {"q": "prompt"}},
        r"columns names \['q'\], found \['question', 'answer', 'hint'\]",
    ),
    "columns turned": (
        {"path": "{f}/a.jsonl", "columns": {"prompt": "question"}},
        "Names of the dataset stand first, new ones second",
    ),
    "template": ({"path": "{f}/a.jsonl", "template": {"prompt": "{q}"}}, r"the template of 'prompt' names the columns"),
    "braces": ({"path": "{f}/a.jsonl", "template": {"prompt": "{question"}}, "cannot be read .*Write braces that are"),
    "missing value": (
        {"path": "{f}/gaps.jsonl", "template": {"prompt": "{q}", "completion": " {a}"}},
        "row 1 .counted from 0.: the template of 'completion' has nothing to show: expected a value in 'a', found none",
    ),
    "format of a number": (
        {"path": "{f}/a.jsonl", "template": {"prompt": "{question:.1f}", "completion": "{answer}"}},
        "row 0 .counted from 0.: the template of 'prompt', .* does not fit {'question': '0 . 1 ='} .ValueError: .*Corr",
    ),
    "no template": ({"path": "{f}/a.jsonl", "template": {}}, "template has to map names to texts, found {}"),
    "template of numbers": ({"path": "{f}/a.jsonl", "template": {"prompt": 3}}, "template has to map names to texts"),
    "two columns of one name": (
        {"path": "{f}/a.jsonl", "columns": {"question": "prompt", "hint": "prompt"}},
        "several columns the name 'prompt', found .*Name one of them so, or join them with a template",
    ),
    "evaluation rows that are trained on": (
        {"path": "{f}/splits", "validation": "train[:10%]"},
        r"different rows in split 'train' and validation 'train\[:10%\]', found 1 in both. Name other rows",
    ),
    "the same file twice": ({"path": "{f}/a.jsonl", "validation": "{f}/a.jsonl"}, "found 20 in both"),
    "tested on what is chosen by": (
        {"path": "{f}/splits", "validation": "test", "test": "test"},
        "different rows in validation 'test' and test 'test', found 3 in both",
    ),
    "files of data": ({"path": "json", "data_files": 3}, "data_files has to be a text, a list of texts"),
    "typo of a folder": ({"path": "split"}, "'split' cannot be loaded: .*Did you mean 'splits'"),
    "weight": ({"path": "{f}/a.jsonl", "weight": 0}, "'sums': weight has to be a finite number above 0"),
    "rows": ({"path": "{f}/a.jsonl", "max_rows": "many"}, "'sums': max_rows has to be a positive integer"),
    "name is a number": ({"path": "{f}/a.jsonl", "name": 3}, "'sums': name has to be a text, found 3"),
    "broken CSV": ({"path": "{f}/broken.csv"}, "broken.csv' cannot be read"),
    "empty": ({"path": "{f}/empty.csv"}, "empty.csv' has no rows"),
    "not on the Hub": (
        {"path": "nobody/nothing"},
        "'nobody/nothing' cannot be loaded: .*Check path, name and revision",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_sources_are_named(folder, bad, monkeypatch):
    given, message = BAD[bad]
    monkeypatch.chdir(folder)
    (folder / "gaps.jsonl").write_text('{"q": "1", "a": "2"}\n{"q": "3", "a": null}\n')
    (folder / "notes.txt").write_text("a")
    (folder / "empty.csv").write_text("")
    (folder / "broken.csv").write_bytes(b'a,b\n"1,2\n\xff\xfe\n')
    given = {
        key: value.replace("{f}", str(folder)) if isinstance(value, str) else value for key, value in given.items()
    }
    with pytest.raises(TaskError, match=message) as raised:
        load_tasks({"sums": given})
    assert "sums" in str(raised.value) and "\n" not in str(raised.value)


def test_sources_are_checked_where_they_are_made(folder):
    for given, message in (
        ({"weight": -1}, "^weight has to be a finite number above 0, found -1"),
        ({"validation": True}, "^validation, a number of rows, has to be a positive integer"),
        ({"template": {"prompt": "{q"}}, "^the template of 'prompt', '{q', cannot be read"),
    ):
        with pytest.raises(TaskError, match=message):
            DatasetSource("a.jsonl", **given)
    assert DatasetSource(folder / "a.jsonl").path == str(folder / "a.jsonl")
    for limits, message in (
        ({"train": 0}, "train rows has to be a positive"),
        ({"dev": 3}, "has to be one of .*'dev'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            load_tasks({"a": str(folder / "a.jsonl")}, max_rows=limits)


def test_folders_of_tasks_say_what_they_hold(folder):
    with pytest.raises(TaskError, match="at .*/dat', found none. Did you mean .*/data'"):
        load_task_folder(folder.parent / "dat")
    with pytest.raises(TaskError, match=r"at .*a\.jsonl', found a file\. Pass .*load_tasks\(\{'a': '.*a\.jsonl'\}\)"):
        load_task_folder(folder / "a.jsonl")
    (folder / "splits" / "train.csv").rename(folder / "splits" / "trian.csv")
    (folder / "splits" / "dev.csv").unlink()
    (folder / "splits" / "test.csv").unlink()
    with pytest.raises(TaskError, match=r"'splits': expected train.jsonl.* found \['trian.csv'\]. Rename the files"):
        load_task_folder(folder)
    for file in folder.glob("a.*"):
        file.rename(file.with_suffix(".txt"))
    (folder / "splits" / "trian.csv").unlink()
    with pytest.raises(TaskError, match=r"No task in .*expected NAME/train.jsonl.*, found \['a.txt', 'splits'\]"):
        load_task_folder(folder)


def test_remedies_are_in_the_words_of_the_surface(folder):
    with pytest.raises(TaskError) as raised:
        load_tasks({"sums": str(folder / "a.jsonl")})
    assert "Dataset.rename_columns" in str(raised.value)
    assert "columns: {question: prompt, answer: completion}" in raised.value.in_terminal
    assert "rename_columns" not in raised.value.in_terminal


def test_datasets_come_from_the_hub(tmp_path):
    parts = {"train": ROWS[:12], "validation": ROWS[12:16], "test": ROWS[16:]}
    for split, rows in parts.items():
        (tmp_path / "repo" / "main").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "repo" / "main" / f"{split}-00000-of-00001.parquet")
    configs = "configs:\n- config_name: main\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: main/{split}-*\n" for split in parts
    )
    (tmp_path / "repo" / "README.md").write_text(f"---\n{configs}- config_name: other\n  data_files: none-*\n---\n")
    with local_hub(tmp_path / "hub") as endpoint:
        done = run_against_hub(
            f"""
            from huggingface_hub import HfApi
            from hf_ensemble import load_tasks
            from hf_ensemble.errors import TaskError
            api = HfApi()
            repo = {{"repo_id": "hub-user/sums", "repo_type": "dataset"}}
            api.create_repo(**repo)
            commit = api.upload_folder(folder_path={str(tmp_path / "repo")!r}, **repo)
            source = {{"path": "hub-user/sums", "name": "main", "revision": commit.oid, "columns": {COLUMNS!r}}}
            task = load_tasks({{"sums": source | {{"test": "test", "split": "train[:50%]"}}}})["sums"]
            counts = {{split: len(task.splits[split]) for split in ("train", "validation", "test")}}
            print(counts, task.splits["train"]["prompt"][0])
            for wrong in ({{"name": "mian"}}, {{"name": None}}, {{"split": "training"}}, {{"path": "hub-user/sms"}}):
                try:
                    load_tasks({{"sums": source | wrong}})
                except TaskError as error:
                    print(error)
            """,
            endpoint,
            tmp_path / "home",
        )
    found, config, none, split, path = done.stdout.strip().splitlines()
    assert found == "{'train': 6, 'validation': 4, 'test': 4} 0 + 1 ="
    assert "'mian' not found. Available: ['main', 'other']" in config
    assert "Config name is missing" in none and "'main'" in none
    assert "expected one of the splits [" in split and "in split, found 'training'" in split
    assert "'hub-user/sms' cannot be loaded" in path


def test_columns_that_the_first_row_lacks_are_kept(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]},
    ]
    rows[1]["tools"] = [{"name": "search"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "table.json").write_text(json.dumps(rows))
    tasks = load_tasks([tmp_path / "lines.jsonl", tmp_path / "table.json"])
    transformed = Dataset.from_dict({"number": [0, 1]})
    transformed.set_transform(lambda batch: {key: [rows[n].get(key) for n in batch["number"]] for key in rows[1]})
    own = TaskSet.from_datasets({"list": rows, "transform": transformed}, None)
    streamed = first_rows("stream", IterableDataset.from_generator(lambda: iter(rows)), 2)
    found = [*(task.splits["train"] for task in (*tasks.values(), *own.values())), streamed]
    for table in found:
        assert [row["tools"] and row["tools"][0]["name"] for row in table] == [None, "search"]


def test_a_row_without_any_column_is_no_row(tmp_path):
    with pytest.raises(TaskError, match="expected the columns|no columns|is empty"):
        TaskSet.from_datasets({"a": [{}], "b": [{}]}, None)
