"""Mistakes of a first hour, each through the surface that a newcomer uses: one line with expected and found."""

import re

import datasets
import pytest
import transformers
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from helpers import toy
from helpers.task_files import write_rows
from hf_ensemble import (
    DataSelector,
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    PeftEnsembleModel,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    load_tasks,
)
from hf_ensemble.cli.main import main

PAIRS = {name: Dataset.from_list(toy.sum_rows(6, seed)) for seed, name in enumerate(("gsm8k", "boolq", "sciq"))}
QUESTIONS = {name: rows.rename_columns({"prompt": "question", "completion": "answer"}) for name, rows in PAIRS.items()}
TEXTS = {name: Dataset.from_list(toy.text_rows(6, seed)) for seed, name in enumerate(("mr", "sst2"))}
CHATS = {
    name: [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 6 for name in "ab"
}


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers.Trainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy.save_model(toy.llama(), tmp_path_factory.mktemp("base"))


def sft(base, folder, rows=PAIRS, settings=None, trainer=EnsembleSFTTrainer, config=EnsembleSFTConfig, **given):
    own = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, **(settings or {})}
    adapter = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(**{"model": base, "train_dataset": rows, "peft_config": adapter, **given, "args": config(**own)})


def selection(base, folder, **given):
    return sft(base, folder, trainer=SelectionSFTTrainer, config=SelectionSFTConfig, **given)


def classifier(base, folder, rows=TEXTS, **given):
    args = EnsembleConfig(output_dir=str(folder / "out"), use_cpu=True)
    given = {"peft_config": LoraConfig(target_modules="all-linear"), **given}
    return EnsembleTrainer(model=base, args=args, train_dataset=rows, **given)


def with_row(rows, **row):
    return {**rows, "bad": [*rows[next(iter(rows))].to_list(), row]}


IN_PYTHON = {
    "columns of one's own": (
        lambda b, f: sft(b, f, QUESTIONS),
        r"expected the columns prompt \+ completion.*found \['a",
    ),
    "columns of one's own, for a target": (
        lambda b, f: selection(b, f, rows=QUESTIONS, target="gsm8k"),
        r"Rename them: Dataset.rename_columns\({'question': 'prompt', 'answer': 'completion'}\)",
    ),
    "splits for datasets": (
        lambda b, f: sft(b, f, DatasetDict({"train": PAIRS["gsm8k"], "test": PAIRS["boolq"]})),
        r"found the splits \['test', 'train'\] of one dataset. Pass train_dataset=dataset\[\"train\"\]",
    ),
    "a list of datasets": (
        lambda b, f: sft(b, f, list(PAIRS.values())),
        "dict of datasets by name, found a list of 3 D",
    ),
    "a plain dataset, then its run": (
        lambda b, f: sft(b, f, PAIRS["gsm8k"]).capture(),
        "trains one model as its parent class does.*Pass a dict of at least two datasets",
    ),
    "one dataset in a dict, then its run": (
        lambda b, f: sft(b, f, {"gsm8k": PAIRS["gsm8k"]}).capture(),
        "Pass a dict of at least two datasets, and peft_config=LoraConfig",
    ),
    "rows of text": (lambda b, f: sft(b, f, {"a": ["one", "two"], "b": ["x"]}), "each row as a dict, found 'one'"),
    "a path for rows": (lambda b, f: sft(b, f, {"a": "a.jsonl", "b": "b.jsonl"}), "'a': expected a datasets.Dataset"),
    "name of a Hub dataset as task": (
        lambda b, f: sft(b, f, {"openai/gsm8k": PAIRS["gsm8k"], "b": PAIRS["boolq"]}),
        "'openai/gsm8k' cannot be used as a folder name",
    ),
    "chats without a template": (lambda b, f: sft(b, f, CHATS), "expected a tokenizer with a chat template"),
    "an answer that is missing": (
        lambda b, f: sft(b, f, with_row(PAIRS, prompt="1", completion=None)),
        "'bad', split 'train', row 6 .*completion",
    ),
    "an empty dataset": (lambda b, f: sft(b, f, {**PAIRS, "none": PAIRS["gsm8k"].select([])}), "'none' is empty"),
    "evaluation rows of other names": (
        lambda b, f: sft(b, f, eval_dataset={"gsm": PAIRS["gsm8k"]}),
        r"name tasks without training rows: \['gsm'\]; the tasks are \['gsm8k', 'boolq', 'sciq'\]",
    ),
    "one table of evaluation rows": (
        lambda b, f: sft(b, f, eval_dataset=PAIRS["gsm8k"]),
        "found one Dataset without a column 'task'. Pass a dict",
    ),
    "text with labels for fine-tuning by prompts": (
        lambda b, f: classifier(b, f, {**PAIRS, **TEXTS}),
        "tasks with the same row format, found",
    ),
    "labels that are numbers with a point": (
        lambda b, f: classifier(b, f, {n: r.cast_column("label", datasets.Value("float32")) for n, r in TEXTS.items()}),
        "labels have to be integers from 0, one for each row, found 0.0. Cast",
    ),
    "labels from 1": (
        lambda b, f: classifier(b, f, {**TEXTS, "x": [{"text": "a", "label": -2}, {"text": "b", "label": 1}]}),
        "labels have to be integers from 0 to the number of classes less 1",
    ),
    "a label of no training row": (
        lambda b, f: classifier(b, f, eval_dataset={**TEXTS, "mr": [{"text": "a", "label": "neutral"}] * 2}),
        "label 'neutral' is outside the task's set of 2 labels",
    ),
    "an adapter of another task type": (
        lambda b, f: classifier(b, f, peft_config=LoraConfig(task_type="CAUSAL_LM")),
        r"LoraConfig\(task_type='SEQ_CLS'\) for text with labels, found 'CAUSAL_LM'",
    ),
    "a model folder with a typo": (
        lambda b, f: sft(f"{b}x/model", f),
        "There is no folder .* with a model",
    ),
    "a folder without a model": (lambda b, f: sft(str(f), f), "Expected a model in .*, found no config.json"),
    "an adapter as a dict": (lambda b, f: sft(b, f, peft_config={"r": 8}), "Expected peft_config to be a PeftConfig"),
    "layers that there are not": (
        lambda b, f: sft(b, f, peft_config=LoraConfig(target_modules=["query"])),
        "Target modules .*not found in the base model.*Set LoraConfig",
    ),
    "an unknown target": (lambda b, f: selection(b, f, target="gsm"), "Unknown target 'gsm'; the tasks are"),
    "no target": (lambda b, f: selection(b, f), "Unknown target None; the tasks are"),
    "more groups than datasets": (
        lambda b, f: sft(b, f, settings={"num_groups": 9}),
        "num_groups=9 is more than the 3",
    ),
    "a tracker that is not there": (
        lambda b, f: sft(b, f, settings={"report_to": "clearml"}),
        "needs the package clearml, which is not installed: pip install clearml, or set report_to='none'",
    ),
    "a tracker that does not exist": (
        lambda b, f: sft(b, f, settings={"report_to": "wandbb"}),
        "report_to='wandbb' is no tracker, expected one of",
    ),
    "an early stop without evaluations": (
        lambda b, f: sft(b, f, callbacks=[transformers.EarlyStoppingCallback(1)]),
        "eval_strategy|load_best_model_at_end|metric_for_best_model",
    ),
    "rows that are cut off": (lambda b, f: sft(b, f, settings={"max_length": 2}), "raise max_length"),
    "the run for its ensemble": (
        lambda b, f: PeftEnsembleModel.from_pretrained(_run_with_ensemble(f)),
        "it is not a saved ensemble. Did you mean .*/ensemble'",
    ),
    "a store that is not there": (lambda b, f: DataSelector.from_store(f / "none"), "Expected a gradient store in"),
    "a file with a typo": (lambda b, f: load_tasks({"a": f"{_files(f)}/mine.jsonl"}), "Did you mean .*mien.jsonl'"),
    "a semicolon for a comma": (
        lambda b, f: load_tasks([f"{_files(f)}/semicolon.csv"]),
        "found one column 'prompt;com",
    ),
}


def _files(folder):
    """Files as people have them."""
    write_rows(folder / "files" / "mien.jsonl", PAIRS["gsm8k"].to_list())
    write_rows(folder / "files" / "other.jsonl", PAIRS["boolq"].to_list())
    write_rows(folder / "files" / "questions.jsonl", QUESTIONS["sciq"].to_list())
    write_rows(folder / "files" / "texts.jsonl", TEXTS["mr"].to_list())
    (folder / "files" / "semicolon.csv").write_text("prompt;completion\n1;2\n")
    return folder / "files"


def _run_with_ensemble(folder):
    (folder / "run" / "ensemble").mkdir(parents=True)
    (folder / "run" / "ensemble" / "ensemble_config.json").write_text("{}")
    return folder / "run"


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_in_python(mistake, base, tmp_path):
    make, message = IN_PYTHON[mistake]
    with pytest.raises((ValueError, RuntimeError, OSError)) as raised:
        make(base, tmp_path)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 1000, said
    assert re.search(message, said), said


RUN = ["run", "--model_name_or_path", "{b}", "--output_dir", "{o}", "--use_cpu", "--bf16", "false"]
IN_A_TERMINAL = {
    "one file": ([*RUN, "--data", "{f}/mien.jsonl"], r"at least two datasets, found \['mien'\]. Name more in --data"),
    "a typo in a file": ([*RUN, "--data", "{f}/mine.jsonl", "{f}/other.jsonl"], "Did you mean .*mien.jsonl'"),
    "a typo in the folder": ([*RUN, "--data", "{f}s"], "there is no file or folder .*files'"),
    "columns of one's own": (
        [*RUN, "--data", "{f}/mien.jsonl", "{f}/questions.jsonl"],
        "in a --config file: datasets: {questions: {path: ..., columns: {.*question: prompt",
    ),
    "names for some": ([*RUN, "--data", "a={f}/mien.jsonl", "{f}/other.jsonl"], "Expected NAME=PATH for every dataset"),
    "data twice": ([*RUN, "--data", "{f}", "--datasets", "{}"], "Expected one of --data, --datasets and"),
    "datasets that are no mapping": ([*RUN, "--datasets", "{a"], "datasets has to be JSON"),
    "no data": (RUN, "Expected --data; see hf-ensemble run --help"),
    "no model": (["run", "--data", "{f}/mien.jsonl"], "Expected --model_name_or_path; see hf-ensemble run --help"),
    "no folder for the results": (
        ["run", "--data", "{f}/mien.jsonl", "{f}/other.jsonl", "--model_name_or_path", "{b}"],
        "Expected --output_dir",
    ),
    "a flag with a typo": (
        [*RUN, "--data", "{f}/mien.jsonl", "{f}/other.jsonl", "--num_train_epoch", "1"],
        "Unknown arguments: --num_train_epoch. Did you mean --num_train_epochs",
    ),
    "a tracker that is not there": (
        [*RUN, "--data", "{f}/mien.jsonl", "{f}/other.jsonl", "--report_to", "clearml"],
        "--report_to clearml needs the package clearml.*or set --report_to none",
    ),
    "an unknown target": (
        [*RUN, "--data", "{f}/mien.jsonl", "{f}/other.jsonl", "--target", "x"],
        "Unknown target 'x'",
    ),
    "labels among prompts": ([*RUN, "--data", "{f}/mien.jsonl", "{f}/texts.jsonl"], "tasks with the same row format"),
    "an ensemble that is not there": (
        ["generate", "--ensemble", "{f}", "--prompts", "1"],
        "it is not a saved ensemble",
    ),
    "an unknown command": (["trian"], "Did you mean 'train'"),
}


@pytest.mark.parametrize("mistake", IN_A_TERMINAL)
def test_in_a_terminal(mistake, base, tmp_path, capsys):
    words, message = IN_A_TERMINAL[mistake]
    files = str(_files(tmp_path))
    words = [word.replace("{f}", files).replace("{b}", base).replace("{o}", str(tmp_path / "out")) for word in words]
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status in (1, 2) and said.startswith("hf-ensemble: ") and len(said) < 1000
    assert re.search(message, said), said
    assert "Dataset.rename" not in said and "LoraConfig" not in said
