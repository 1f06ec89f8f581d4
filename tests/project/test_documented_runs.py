"""What the documents show works: their command lines and their Python run, page by page, on tiny models and files."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml
from peft import LoraConfig
from transformers import EarlyStoppingCallback

import hf_ensemble
from helpers import toy
from helpers.task_files import write_rows, write_tasks
from hf_ensemble.cli.command import COMMANDS
from hf_ensemble.cli.main import main
from hf_ensemble.evaluate import AnswerEvaluator

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Tiny models in folders stand for those of the Hub.
MODEL, ENCODER = "Qwen/Qwen3-0.6B", "sentence-transformers/all-MiniLM-L6-v2"
NAMES = ("gsm8k", "boolq", "sciq")
TRAINING = {"use_cpu": True, "num_train_epochs": 1, "disable_tqdm": True, "report_to": "none", "save_report": False}
# Further options of command lines: those that make them short, and those that "..." leaves out.
SHORT = {
    "compare": "--baselines average",
    "fidelity": "--fidelity_subsets 2 --num_repeated 1 --fidelity_sizes 1 2 --num_first_order 1",
}
OF_A_RUN = {"data": "data", "model_name_or_path": MODEL, "lora_target_modules": "all-linear"}
# Pages whose Python is run by another test, and what cannot be run here.
ELSEWHERE = {"ensemble.md": "tests/ensemble/test_ensemble_document.py"}
LEFT_OUT = {
    "pip install": "installs packages, from the network",
    "torchrun": "starts a script of the reader's; tests/train/test_distributed.py trains in several processes",
    "accelerate launch": "the same",
    "vllm serve": "vLLM is not installed, and needs a GPU",
}
# What a page makes anew of what there is already.
MADE = {"index.md": "out", "which-datasets-help.md": "plain"}
# What pages leave to the reader: a page's own words, and what stands for them here.
WORDS = {
    "index.md": {'f"data/{name}/': 'f"splits/{name}/'},
    "data.md": {"gsm8k=openai/gsm8k": "gsm8k=data/gsm8k.jsonl", " ...": ""},
    "estimation.md": {
        "--data TASKS": "--data data",
        "--model_name_or_path MODEL": "",
        "--output_dir OUT": "--output_dir run",
    },
    "evaluation.md": {
        "    ...,\n": "    **arguments,\n",
        "hf-ensemble run ...": "hf-ensemble run --data answers",
    },
    "qlora.md": {"hf-ensemble run ...": "hf-ensemble run"},
    "training.md": {"num_train_epochs=10, ": "", '"out", eval_strategy': '"best", eval_strategy'},
    "command-line.md": {"hf-ensemble COMMAND": "hf-ensemble run"},
}


def parts(page: Path) -> Iterator[tuple[str, str]]:
    """Every block of Python and every line for a shell of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    fenced = r"^```(?P<language>\w*)\n(?P<block>.*?)^```$"
    inline = r"`(?:eval \"\$\()?(?P<line>hf-ensemble [^`]*? [^`]*?)(?:\)\")?`"
    for found in re.finditer(f"{fenced}|{inline}", text, flags=re.DOTALL | re.MULTILINE):
        if found["language"] == "python":
            yield "python", found["block"]
        elif found["line"]:
            yield "command", found["line"]
        else:
            lines = found["block"].splitlines()
            yield from (
                ("command", line) for line in lines if found["language"] == "bash" or "hf-ensemble " in line[:12]
            )


PAGES = {page.name: page for page in sorted(DOCS.rglob("*.md")) if any(parts(page))}


def arguments_of(line: str, places: dict[str, str]) -> list[str]:
    """A command's words, with the options that a run needs and that the line leaves to the reader."""
    words = shlex.split(line.split(" | ")[0], comments=True)[1:]
    words += shlex.split(SHORT.get(words[0], ""))
    if words[0] in ("run", "train", "compare", "fidelity") and "--help" not in words:
        given = {} if "--config" in words else {**OF_A_RUN, "output_dir": f"run-{len(list(Path.cwd().glob('run-*')))}"}
        for name, value in {**given, **TRAINING}.items():
            words += [] if f"--{name}" in words else [f"--{name}", str(value)]
    return [places.get(word, word) for word in words]


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        # Help ends so, without a code.
        return stop.code or 0


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a user's files, models and a finished run, and what stands for the models of the Hub."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = toy.tokenizer()
    tokenizer.add_tokens(["####", "answer"])
    models = {MODEL: toy.llama(vocab_size=len(tokenizer)), ENCODER: toy.bert().bert}
    for number, (name, model) in enumerate(models.items()):
        model.save_pretrained(folder / "hub" / str(number))
        (tokenizer if name == MODEL else toy.tokenizer()).save_pretrained(folder / "hub" / str(number))
    write_tasks(folder / "splits", dict(zip(NAMES, toy.sft_tasks(18).values())))
    for name, splits in zip(NAMES, toy.sft_tasks(18).values()):
        write_rows(folder / "data" / f"{name}.jsonl", splits["train"])
        answer = " the answer is #### 7" if name == "gsm8k" else " the answer is yes"
        answers = [{**row, "completion": answer} for row in splits["train"]]
        write_rows(folder / "answers" / f"{name}.jsonl", answers)
    for seed, name in enumerate(("reviews", "tweets", "news")):
        rows = [{"text": row["text"], "label": row["label_text"]} for row in toy.text_rows(16, seed)]
        write_rows(folder / "texts" / f"{name}.jsonl", rows)
    table = datasets.Dataset.from_list(toy.sum_rows(18))
    for own in (folder / "texts" / "news.csv", folder / "mine" / "a.csv", folder / "b.csv"):
        own.parent.mkdir(exist_ok=True)
        (datasets.Dataset.from_list(rows) if own.parent.name == "texts" else table).to_csv(own)
    (folder / "texts" / "news.jsonl").unlink()
    table.to_parquet(folder / "mine" / "b.parquet")
    write_rows(folder / "mine" / "a.jsonl", toy.sum_rows(18))
    write_rows(folder / "questions.jsonl", [{"question": "sum : 1", "answer": " 1"}] * 4)
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"], "task": "gsm8k"} for row in toy.sum_rows(2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        # Answers are short, uploads end where the network begins, and nobody looks at the pictures.
        settings = AnswerEvaluator._settings
        patch.setattr(AnswerEvaluator, "_settings", lambda self, max_new_tokens: settings(self, min(max_new_tokens, 4)))
        commit = SimpleNamespace(repo_url="https://hub/user/x", commit_url="https://hub/user/x/commit/1")
        patch.setattr("hf_ensemble.ensemble.saving.pushing.push_folder", lambda *args, **kwargs: commit)
        patch.setattr("hf_ensemble.publish.card._draw_one", lambda draw, data: None)
        places = {name: str(folder / "hub" / str(number)) for number, name in enumerate(models)}
        assert exit_code(arguments_of("hf-ensemble run --output_dir run", places)) == 0
        config = {"data": "data", "model_name_or_path": places[MODEL], "output_dir": "grouped", "num_groups": 2}
        Path("run.yaml").write_text(yaml.safe_dump({**config, "lora_target_modules": "all-linear"}))
        trainer = hf_ensemble.EnsembleSFTTrainer(**trainer_arguments(places[MODEL], folder / "out"))
        trainer.train()
        shutil.copytree("out/gradients", "plain/gradients")
        yield SimpleNamespace(folder=folder, places=places, trainer=trainer)


def splits_of(split: str) -> dict[str, datasets.Dataset]:
    return {name: datasets.Dataset.from_list(own[split]) for name, own in zip(NAMES, toy.sft_tasks(18).values())}


def trainer_arguments(model: str, output_dir: Path, train: dict | None = None) -> dict:
    return {
        "model": model,
        "args": hf_ensemble.EnsembleSFTConfig(output_dir=str(output_dir), **TRAINING),
        "train_dataset": train or splits_of("train"),
        "peft_config": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    }


def in_place(text: str, places: dict[str, str]) -> str:
    for name, own in places.items():
        text = text.replace(name, own)
    return text


def namespace(desk) -> dict:
    """What pages take for granted: what was imported, loaded or trained on a page before."""
    # Final answers of the kinds that docs/evaluation.md asks for.
    answers = {"gsm8k": "#### 7", "boolq": "yes", "squad": "the film"}
    answered = {name: [{"prompt": "sum :", "completion": f" {answer}"}] * 24 for name, answer in answers.items()}
    train = splits_of("train")
    return {
        **{name: getattr(hf_ensemble, name) for name in hf_ensemble.__all__},
        **{"load_dataset": datasets.load_dataset, "LoraConfig": LoraConfig},
        "EarlyStoppingCallback": EarlyStoppingCallback,
        **{"train": train, "validation": splits_of("validation"), "test_rows": splits_of("validation")},
        "tasks": hf_ensemble.TaskSet.from_datasets(train, splits_of("validation")),
        "paths": dict.fromkeys(NAMES, "json"),
        "arguments": trainer_arguments(desk.places[MODEL], Path("answered"), answered),
        "trainer": desk.trainer,
        "model": hf_ensemble.PeftEnsembleModel.from_pretrained(desk.folder / "out" / "ensemble"),
    }


def shortened(block: str) -> str:
    """A block whose trainings are short, and stay on the CPU."""
    settings = ", ".join(f"{name}={value!r}" for name, value in TRAINING.items())
    plain = ", ".join(f"{name}={value!r}" for name, value in TRAINING.items() if name != "save_report")
    block = re.sub(r"\bSFTConfig\((?=\s*output_dir)", f"SFTConfig({plain}, ", block)
    return re.sub(r"(?<=\w)(SFT)?Config\((?=\s*output_dir)", rf"\1Config({settings}, ", block)


@pytest.mark.parametrize("page", PAGES)
def test_pages_run_from_top_to_bottom(page, desk, tmp_path, monkeypatch, capsys):
    shutil.copytree(
        desk.folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("hub", "cache", MADE.get(page, ""))
    )
    monkeypatch.chdir(tmp_path)
    known = namespace(desk)
    for number, (kind, text) in enumerate(parts(PAGES[page])):
        if (kind == "python" and page in ELSEWHERE) or text.startswith(tuple(LEFT_OUT)):
            continue
        text = in_place(text, WORDS.get(page, {}))
        if kind == "python":
            block = shortened(in_place(text, desk.places))
            exec(compile(block, f"{page}, part {number}", "exec"), known)
        else:
            assert exit_code(arguments_of(text, desk.places)) == 0, f"{page}: {text}\n{capsys.readouterr().err}"

    if page in PROMISES:
        PROMISES[page](known)


def quickstart(known: dict) -> None:
    """What docs/index.md promises of what it has made."""
    assert len(known["generated"]) == len(known["prompts"]) == 2
    assert known["classify"]("the film was good")[0]["label"] in ("negative", "positive")
    for saved in ("for-gsm8k/adapter", "out/merged-gsm8k"):
        assert Path(saved, "adapter_model.safetensors").is_file()
    # Python and the command line save the same ensemble, and score the same, to the last digit.
    folders = ("classifier", "classifier-run")
    load = hf_ensemble.PeftEnsembleModel.from_pretrained
    ours, theirs = (load(Path(name, "ensemble")).base_model_reference for name in folders)
    assert ours == theirs
    ours, theirs = (json.loads(Path(name, "evaluation.json").read_text())["scores"]["eval"] for name in folders)
    assert all(ours[system] == theirs[system] for system in ("baseline", "ensemble"))


def helping_datasets(known: dict) -> None:
    """What docs/how-to/which-datasets-help.md promises."""
    assert known["selection"].path and set(known["scores"].worst(0.05)) <= set(NAMES)
    assert set(known["selector"].mixture(["gsm8k", "sciq"], caps=0.5).weights) <= set(NAMES)


PROMISES = {"index.md": quickstart, "which-datasets-help.md": helping_datasets}


def test_what_is_left_out_is_in_the_documents():
    found = [text for page in PAGES.values() for kind, text in parts(page) if kind == "command"]
    assert all(any(line.startswith(own) for line in found) for own in LEFT_OUT)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
    assert {*WORDS, *ELSEWHERE, *MADE} <= set(PAGES)
    commands = {shlex.split(line, comments=True)[1] for line in found if line.startswith("hf-ensemble ")}
    assert commands >= {command.name for command in COMMANDS} - {"capture", "eval", "demo"}
