"""What the documents say is true: their code runs, and every public name is documented."""

import re
import shlex
from pathlib import Path

import datasets
import pytest

import hf_ensemble
from helpers import toy
from hf_ensemble.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
# The README names a model of the Hub and three datasets; here a tiny model and toy rows stand in for them.
MODEL = "Qwen/Qwen3-0.6B"
DATASETS = ("gsm8k", "boolq", "sciq")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """The README's command lines of one command."""
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"hf-ensemble {name} ")]


@pytest.fixture
def readers_folder(tmp_path, monkeypatch, base_folder):
    """A working directory as the README's reader has it."""
    for name, splits in zip(DATASETS, toy.sft_tasks().values()):
        for split, rows in splits.items():
            path = tmp_path / "data" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_json(path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return base_folder


def test_readme_snippets_run_one_after_another(readers_folder):
    snippets = blocks(README, "python")
    assert len(snippets) >= 5
    namespace: dict = {}
    for number, snippet in enumerate(snippets):
        # trl trains in bfloat16 on a GPU unless it is told to stay on the CPU.
        snippet = snippet.replace(MODEL, readers_folder).replace(
            "Config(output_dir=", "Config(use_cpu=True, output_dir="
        )
        exec(compile(snippet, f"README.md, python block {number}", "exec"), namespace)
    groups = namespace["selector"].group(num_groups=2).groups
    assert sorted(task for tasks in groups.values() for task in tasks) == sorted(DATASETS)
    assert len(namespace["generated"]) == len(namespace["prompts"])
    assert set(namespace["model"].weights) == set(DATASETS)
    for command in commands("select") + commands("group"):
        assert main(shlex.split(command)[1:]) == 0
    for saved in (
        "choice/selection.json",
        "choice/groups.json",
        "choice/groups.png",
        "out/ensemble/README.md",
        "for-gsm8k/adapter/adapter_model.safetensors",
        "plain/gradients",
    ):
        assert Path(saved).exists(), saved


def test_readme_command_line_runs(readers_folder):
    (command,) = commands("run")
    flags = shlex.split(command.replace(MODEL, readers_folder))[1:]
    assert main([*flags, "--use_cpu", "--num_train_epochs", "1", "--disable_tqdm", "True"]) == 0
    assert Path("run/results.json").is_file()
    assert Path("run/ensemble/ensemble_config.json").is_file()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_names_the_make_targets(target):
    assert re.search(rf"^make {target}\b", README, flags=re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("name", hf_ensemble.__all__)
def test_public_names_are_documented(name):
    documentation = getattr(hf_ensemble, name).__doc__
    # A dataclass without a docstring gets its signature for one.
    assert documentation and not documentation.startswith(f"{name}("), f"{name} has no docstring"
    assert any(re.search(rf"\b{name}\b", text) for text in DOCUMENTS), f"{name} is in no document"


def test_relative_links_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
