"""Every command at toy size, one after the other on one run."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from peft import AutoPeftModelForCausalLM

from helpers import toy
from helpers.task_files import flags, write_rows, write_tasks
from hf_ensemble.cli.command import COMMANDS
from hf_ensemble.cli.commands import push
from hf_ensemble.cli.main import TRY_AGAIN, main
from hf_ensemble.cli.prompts import Prompt, prompts_of, texts_of
from hf_ensemble.cli.saved_arguments import GenerateArguments
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.runs import RunDirectory, TrainedAdapter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, data, and a run whose stages were made one command at a time."""
    folder = tmp_path_factory.mktemp("world")
    base = toy.save_model(toy.llama(), folder / "base")
    data = write_tasks(folder / "data", toy.sft_tasks())
    given = {"data": data, "model_name_or_path": base, "output_dir": folder / "run", "bf16": "false"}
    given |= {"num_groups": 2, "affinity_subsets": 10, "gradient_checkpointing": "false"}
    line = [*flags(**given), "--lora_target_modules", "all-linear"]
    made = {}
    for name, words in {
        "capture": ["capture", *line],
        "groups": ["train", *line, "--until", "groups"],
        "one": ["train", *line, "--stage", "adapter:group_1"],
    }.items():
        made[name] = as_json([*words])
    trained = sorted(own.name for own in RunDirectory(folder / "run").trainings())
    made["run"] = as_json(["run", *line])
    return folder, line, made, trained


def as_json(words, status=0):
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert main([*words, "--json"]) == status
        printed = sys.stdout.getvalue()
    finally:
        sys.stdout = out
    # One line for scripts, and nothing else.
    assert printed.count("\n") == 1
    return json.loads(printed)


def test_stages_are_made_one_by_one(world):
    folder, _, made, trained = world
    rows = sum(len(split) for splits in toy.sft_tasks().values() for split in splits.values())
    assert made["capture"]["rows"] == rows and made["capture"]["features"] == 64
    assert sorted(made["capture"]["tasks"]) == sorted(toy.sft_tasks())
    assert len(made["groups"]["groups"]) == 2 and made["groups"]["adapters"] == {}
    assert made["one"]["stage"] == "adapter:group_1"
    assert trained == ["baseline", "group_1"]
    results = made["run"]
    assert results["groups"] == made["groups"]["groups"] and set(results["scores"]) >= {"base", "baseline", "ensemble"}
    alone = RunDirectory(folder / "run").trained_adapter("group_1")
    assert isinstance(alone, TrainedAdapter) and alone.status == "done"


def test_a_group_is_trained_by_one_process_alone(world, capsys):
    folder, line, _, _ = world
    # As another process holds it.
    with FileLock(folder / "run" / ".stages" / "adapter-group_1" / ".run.lock"):
        assert main(["train", *line, "--stage", "adapter:group_1"]) == TRY_AGAIN
        assert "Another process works in the run in" in capsys.readouterr().err
        assert main(["train", *line, "--stage", "adapter:group_0"]) == 0
        # Nor by one that trains all of them.
        assert main(["train", *line]) == TRY_AGAIN
        assert "on adapter:group_1: an unknown one" in capsys.readouterr().err
    assert main(["train", *line, "--stage", "adapter", "--shard", "1/2"]) == 0


def test_a_group_alone_starts_no_run_over(world, capsys):
    folder, line, _, _ = world
    assert main(["train", *line, "--stage", "adapter", "--num_groups", "1", "--overwrite_run"]) == 1
    assert "To start over, delete output_dir first." in capsys.readouterr().err
    assert RunDirectory(folder / "run").trained_adapter("group_1").status == "done"


def test_groups_alone_need_groups(world, tmp_path, capsys, monkeypatch):
    _, line, _, _ = world
    other = [str(tmp_path / "new") if word.endswith("/run") else word for word in line]
    assert main(["train", *other, "--stage", "adapter:group_0"]) == TRY_AGAIN
    said = capsys.readouterr().err
    assert "does not hold yet: group (waiting, needs gradients, baseline, gradients_at_baseline)" in said
    assert "--wait SECONDS" in said
    # Now that the run is there, before a model is loaded.
    with monkeypatch.context() as patch:
        patch.setattr("hf_ensemble.cli.trainers.EnsembleSFTTrainer", lambda **_: pytest.fail("loaded"))
        assert main(["train", *other, "--stage", "adapter:group_0"]) == TRY_AGAIN
    assert "does not hold yet: group (waiting" in capsys.readouterr().err
    assert main(["train", *line, "--stage", "adapter:group_9"]) == 1
    assert "Unknown stage 'adapter:group_9'; the stages are ['gradients', 'baseline'" in capsys.readouterr().err
    assert main(["train", *line, "--target", "sums"]) == 1
    assert "a selection trains once" in capsys.readouterr().err
    assert main(["eval", *other]) == 1
    assert "Expected a finished run in" in capsys.readouterr().err


def test_groups_that_go_on_need_gradients_of_the_baseline(world, tmp_path, capsys):
    run = shutil.copytree(world[0] / "run", tmp_path / "fresh")
    shutil.rmtree(RunDirectory(run).baseline_gradients)
    line = ["--store", str(run), "--num_components", "10", "--output_dir", str(tmp_path / "choice")]
    line += ["--grouping_method", "mixtures", "--group_initialization", "baseline"]
    assert main(["group", *line]) == 1
    assert "holds no gradients at its adapter for all tasks: its groups began where" in capsys.readouterr().err


def test_status_lists_stages(world, tmp_path, capsys):
    run = str(world[0] / "run")
    found = {stage["name"]: stage for stage in as_json(["status", run])["stages"]}
    assert list(found)[:2] == ["gradients", "baseline"] and "adapter:group_1" in found
    assert {stage["status"] for stage in found.values()} == {"done"}
    assert main(["status", str(tmp_path)]) == 1
    assert "Expected a run in" in capsys.readouterr().err


def test_choices_from_a_run(world, tmp_path):
    folder = world[0]
    store = ["--store", str(folder / "run"), "--num_components", "10", "--output_dir", str(tmp_path / "choice")]
    selected = as_json(["select", *store, "--target", "sums"])
    assert "sums" in selected["targets"] and (tmp_path / "choice" / "selection.json").is_file()
    mixture = as_json(["mixture", *store, "--target", "sums", "--caps", '{"diffs": 0.25}'])
    assert mixture["weights"]["sums"] == 1.0 and mixture["weights"].get("diffs", 0) <= 0.25
    assert (tmp_path / "choice" / "mixture.json").is_file()
    grouped = as_json(["group", *store, "--num_groups", "2"])
    assert len(grouped["groups"]) == 2
    mixtures = ["--grouping_method", "mixtures", "--compute_budget", "2", "--affinity_subsets", "10"]
    grouped = as_json(["group", *store, *mixtures, "--target", "sums"])
    assert grouped["settings"]["targets"] == {"sums": 1.0}


@pytest.mark.parametrize("words", [["select", "--target", "sums"], ["mixture", "--target", "sums"], ["group"]])
def test_a_choice_does_not_overwrite_a_runs_own(world, capsys, words):
    run = str(world[0] / "run")
    files = {path: path.stat().st_mtime_ns for path in Path(run).iterdir()}
    assert main([*words, "--store", run, "--num_components", "10", "--output_dir", run]) == 1
    assert "Expected another folder than a run's own" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path(run).iterdir()} == files


def test_caps_are_checked(world, capsys):
    store = ["--store", str(world[0] / "run"), "--num_components", "10"]
    for caps in ("half", "[1]"):
        assert main(["mixture", *store, "--caps", caps]) == 1
        assert "caps has to be a number from 0 to 1, or JSON" in capsys.readouterr().err


def test_eval_scores_a_split(world, capsys):
    folder, line, made, _ = world
    scored = as_json(["eval", *line, "--split", "test", "--disable_tqdm", "false"])
    expected = made["run"]["scores"]["ensemble"]["sums"]
    assert scored["scores"]["ensemble"]["sums"]["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    said = capsys.readouterr().err
    assert "Loss (accuracy) on test rows" in said and "one adapter for all" in said
    # Like every stage, each evaluation is announced.
    assert re.search(r"Stage \d of \d: evaluation\n.*Next: evaluation on test rows\n", said, flags=re.DOTALL)


def test_generate_answers_prompts_files_and_lines(world, tmp_path, monkeypatch, capsys):
    ensemble = ["--ensemble", str(world[0] / "run" / "ensemble"), "--max_new_tokens", "3"]
    prompts = [row["prompt"] for row in toy.sum_rows(3, 9)]
    answers = as_json(["generate", *ensemble, "--task", "sums", "--prompts", *prompts])["answers"]
    assert [answer["prompt"] for answer in answers] == prompts and {own["task"] for own in answers} == {"sums"}
    rows = [{"prompt": prompt, "task": "sums"} for prompt in prompts]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    assert as_json(["generate", *ensemble, "--file", file])["answers"] == answers
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts)))
    assert as_json(["generate", *ensemble, "--task", "sums", "--batch_size", "1"])["answers"] == answers
    capsys.readouterr()
    assert main(["generate", *ensemble, "--task", "summs", "--prompts", "1"]) == 1
    assert "found ['summs']. Pass --task" in capsys.readouterr().err
    assert main(["generate", *ensemble, "--prompts", "1", "--file", file]) == 1
    assert "found both" in capsys.readouterr().err
    assert main(["generate", "--prompts", "1"]) == 1
    assert "Expected --ensemble; see hf-ensemble generate --help" in capsys.readouterr().err


def test_generate_prints_prompts_and_answers_as_they_are(world, tmp_path, monkeypatch, capsys):
    line = ["generate", "--ensemble", str(world[0] / "run" / "ensemble"), "--max_new_tokens", "2", "--task", "sums"]
    prompts = ["1 [bold]+[/bold] :apple: [/x]", "http://x 2 'y' =" + " 1" * 100]
    monkeypatch.setattr("hf_ensemble.cli.commands.generate._answers", lambda *given: ["[red]1"] * 2)
    assert main([*line, "--prompts", *prompts]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{prompt} [red]1" for prompt in prompts]


def test_generate_takes_chats(tmp_path):
    chat = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    write_rows(tmp_path / "chats.jsonl", [{"messages": chat, "task": "sums"}, {"messages": chat[:1], "task": None}])
    prompts = prompts_of(GenerateArguments(file=str(tmp_path / "chats.jsonl"), task="diffs"))
    assert prompts == [Prompt(chat[:1], "sums"), Prompt(chat[:1], "diffs")] and prompts[0].last_text == "1 + 1"
    tokenizer = toy.tokenizer()
    with pytest.raises(ConfigurationError, match="chat template for prompts that are messages, found none"):
        texts_of(prompts, tokenizer, False)
    with pytest.raises(ConfigurationError, match="chat template for --chat, found none. Leave it out"):
        texts_of([Prompt("1", None)], tokenizer, True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    assert texts_of(prompts, tokenizer, False) == (["<user>1 + 1<a>"] * 2, True)
    assert texts_of([Prompt("1", None)], tokenizer, True) == (["<user>1<a>"], True)
    assert texts_of([Prompt("1", None)], tokenizer, False) == (["1"], False)
    for rows in ([{"prompt": "1"}, {"prompt": None}], [{"prompt": chat}, {"prompt": chat[1:]}], [{"text": "1"}, {}]):
        write_rows(tmp_path / "bad.jsonl", rows)
        with pytest.raises(ConfigurationError, match="bad.jsonl', row 1 .counted from 0.: expected a text, or"):
            prompts_of(GenerateArguments(file=str(tmp_path / "bad.jsonl")))


def test_merge_and_export_write_plain_adapters(world, tmp_path, capsys):
    ensemble = ["--ensemble", str(world[0] / "run" / "ensemble")]
    merged = as_json(["merge", *ensemble, "--task", "sums", "--output_dir", str(tmp_path / "merged"), "--rank", "1"])
    assert merged["rank"] == 1 and 0 <= merged["relative_error"] < 1
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "merged").peft_config["default"].r == 1
    served = as_json(["export", *ensemble, "--output_dir", str(tmp_path / "served"), "--tasks", "sums", "diffs"])
    assert set(served["adapters"]) == {"sums", "diffs"}
    for folder in served["adapters"].values():
        AutoPeftModelForCausalLM.from_pretrained(folder)
    line = served["command"].split()
    assert line[:3] == ["vllm", "serve", str(world[0] / "base")] and "--enable-lora" in line
    assert line[line.index("--max-lora-rank") + 1] == str(served["max_lora_rank"])
    assert line[line.index("--lora-modules") + 1 :] == [f"{task}={path}" for task, path in served["adapters"].items()]
    assert (tmp_path / "served" / "serve.sh").read_text() == served["command"] + "\n"
    capsys.readouterr()
    assert main(["merge", *ensemble]) == 1
    assert "Expected --task" in capsys.readouterr().err


def test_push_uploads_the_ensemble_of_a_run(world, monkeypatch):
    seen = {}

    class Commit:
        repo_url, commit_url = "https://hub/user/x", "https://hub/user/x/commit/1"

    def upload(run, repo_id, **options):
        seen.update(run=run, repo_id=repo_id, **options)
        return Commit()

    monkeypatch.setattr(push, "push_run_to_hub", upload)
    done = as_json(["push", "--run", str(world[0] / "run"), "--repo_id", "user/x", "--private", "true"])
    assert done == {"repository": Commit.repo_url, "commit": Commit.commit_url}
    assert seen["repo_id"] == "user/x" and seen["private"] is True and seen["revision"] is None


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("shel: zsh\n")
    Path("d.yaml").write_text("shell: [bash, zsh]\n")
    assert main(["completion", "--shell", shell]) == 0
    script = capsys.readouterr().out
    assert all(command.name in script for command in COMMANDS)
    assert "--num_groups" in script and "--max_new_tokens" in script
    assert as_json(["completion", "--shell", shell])["script"] + "\n" == script
    capsys.readouterr()
    for words, message in (
        (["--shell", "fish"], "shell has to be one of"),
        (["--shell"], "expected one argument"),
        (["--x"], "--x. See"),
        (["--config", "c.yaml"], "--shel, in c.yaml. Did you mean --shell?"),
        (["--config", "d.yaml"], "shell in d.yaml takes one value, found 2"),
    ):
        assert main(["completion", *words]) == 1 and message in capsys.readouterr().err
