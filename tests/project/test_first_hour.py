"""A newcomer's first hour: README.md from top to bottom, word by word, on one's own three files."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

from helpers import toy
from helpers.task_files import write_rows
from hf_ensemble.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Tiny models in folders stand for those of the Hub.
MODEL, ENCODER = "Qwen/Qwen3-0.6B", "sentence-transformers/all-MiniLM-L6-v2"
# Set-up, which is done; the demo and the tests are tested elsewhere; uploads are tested against a local Hub.
NOT_HERE = ("pip ", "make ", "hf-ensemble push", "git ")
QUICK = ["--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A working directory with one's own files."""
    for name, rows in zip(("gsm8k", "boolq", "sciq"), toy.sft_tasks(18).values()):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows["train"])
    for seed, name in enumerate(("reviews", "tweets", "news")):
        labels = ("no", "yes") if name == "news" else ("negative", "positive")
        rows = [{"text": row["text"], "label": row["label_text"]} for row in toy.text_rows(16, seed, "film", labels)]
        write_rows(tmp_path / "texts" / f"{name}.jsonl", rows)
    (tmp_path / "texts" / "news.jsonl").unlink()
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "texts" / "news.csv")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folders = {MODEL: toy.llama(), ENCODER: toy.bert().bert}
    return {name: toy.save_model(model, tmp_path / "hub" / name) for name, model in folders.items()}


def steps(text):
    """Language and content of every block of commands or Python, in their order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(language, block, namespace, name):
    if language == "python":
        # trl trains in bfloat16 on a GPU unless it is told to stay on the CPU.
        block = block.replace("Config(output_dir=", "Config(use_cpu=True, num_train_epochs=1, output_dir=")
        exec(compile(block, name, "exec"), namespace)
        return
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words and not line.startswith(NOT_HERE):
            assert main([*words[1:], *(QUICK if words[1] == "run" else [])]) == 0, line


def test_readme_word_by_word(own_folder, capsys):
    namespace: dict = {}
    found = steps(README)
    assert len(found) >= 5
    for number, (language, block) in enumerate(found):
        for model, folder in own_folder.items():
            block = block.replace(model, folder)
        run(language, block, namespace, f"README.md, block {number}")
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "Error" not in printed.err
    for saved in (
        *("run/results.json", "run/report.html", "run/ensemble/ensemble_config.json", "run/ensemble/README.md"),
        *("out/ensemble/README.md", "classifier/ensemble/ensemble_config.json"),
    ):
        assert Path(saved).exists(), saved
    names = {"gsm8k", "boolq", "sciq"}
    grouped = {task for tasks in namespace["trainer"].grouping.groups.values() for task in tasks}
    assert grouped == {"reviews", "tweets", "news"}
    assert {"eval_gsm8k_loss", "eval_baseline_gsm8k_loss"} <= set(namespace["metrics"])
    capsys.readouterr()
    line = ["generate", "--ensemble", "classifier/ensemble", "--task", "news", "--prompts", "the film was good"]
    assert main(line) == 0
    assert capsys.readouterr().out.strip() in ("no", "yes")
    card = Path("run/ensemble/README.md").read_text(encoding="utf-8")
    (language, snippet), *_ = steps(card)
    loaded: dict = {}
    run(language, snippet, loaded, "the card's snippet")
    assert set(loaded["model"].weights) == names and len(loaded["answers"]) == 2
