"""The study of routers compares what it says, on the outputs of another study."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.budgets.train import PLAN, TARGETS
from benchmarks.routing import run as study
from benchmarks.routing.gradients import GradientWeights, gradient_features, log_odds_of_own_answer
from benchmarks.routing.table import COSINES, EQUAL, GRADIENTS, KNOWN, OTHERS, PROMPTS, ROUTED
from benchmarks.trainers import trainer_from_flags
from helpers import toy
from helpers.task_files import write_rows

# Films and books are answered by one adapter, songs by another; a third one serves songs alone.
NOUNS = {"films": ("film", 0), "books": ("book", 0), "songs": ("song", 1)}
ROWS = {"train": 50, "validation": 40, "test": 60}


@pytest.fixture
def folder(tmp_path):
    """What a study of budgets leaves of a seed."""
    made, rng = tmp_path / "seed", np.random.default_rng(0)
    arrays = {name: {} for name in ("first", "second", "own", TARGETS)}
    for task, (noun, right) in NOUNS.items():
        for number, (split, count) in enumerate(ROWS.items()):
            rows = toy.text_rows(count, number, noun, ("bad", "good"))
            write_rows(made / "tasks" / task / f"{split}.jsonl", rows)
            targets = np.array([row["label"] for row in rows], dtype=np.int16)
            for member, name in enumerate(("first", "second")):
                logits = 0.5 * rng.normal(size=(count, 2))
                logits[np.arange(count), targets] += 2.0 if member == right else -1.0
                values = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                arrays[name][f"{split}/{task}"] = values.astype(np.float16)
            arrays[TARGETS][f"{split}/{task}"] = targets
            if task == "songs":
                arrays["own"][f"{split}/{task}"] = values.astype(np.float16)
    (made / "outputs").mkdir()
    for name, own in arrays.items():
        np.savez(made / "outputs" / f"{name}.npz", **own)
    system = {"label": "both", "parts": ["first", "second", "own"], "own": {}, "predicted": {}, "together": False}
    mixtures = {"first": {"films": 1.0, "books": 1.0}, "second": {"songs": 1.0}, "own": {"songs": 1.0}}
    parts = {name: {"mixture": mixture} for name, mixture in mixtures.items()}
    (made / PLAN).write_text(json.dumps({"tasks": list(NOUNS), "systems": [system], "parts": parts}))
    return made


@pytest.fixture
def flags(folder, tmp_path):
    """Those of the trainer that has made the adapter for all tasks."""
    model = toy.save_model(toy.bert(2).bert, tmp_path / "encoder")
    flags = ["--model_name_or_path", model, "--head", "label_similarity", "--use_cpu", "true", "--max_steps", "4"]
    flags += ["--lora_target_modules", "query", "value", "--report_to", "none", "--learning_rate", "0.01"]
    trainer, _ = trainer_from_flags([*flags, "--data", str(folder / "tasks"), "--output_dir", str(folder / "run-0")])
    trainer.open_run()
    with trainer.working():
        trainer.flow.training.run("baseline", list(trainer.tasks), trainer.run_directory.baseline)
    return flags


def test_what_a_router_keeps_is_measured_beside_known_tasks(folder, flags, tmp_path, monkeypatch, capsys):
    command = [study.__file__, str(tmp_path / "results"), "--folders", str(folder), "--system", "both"]
    monkeypatch.setattr(sys, "argv", [*command, *flags])
    study.main()
    (seed,) = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert seed["members"] == 2
    losses = {way: np.mean(list(own.values())) for way, own in seed["losses"].items()}
    assert set(losses) == {EQUAL, KNOWN, ROUTED, PROMPTS, OTHERS, GRADIENTS, COSINES}
    # The noun says which adapter is right; of songs the other tasks do not know it.
    for way, share in ((ROUTED, 0.9), (PROMPTS, 0.9), (GRADIENTS, 0.5)):
        assert losses[KNOWN] - 1e-6 <= losses[way] < losses[EQUAL] - share * (losses[EQUAL] - losses[KNOWN])
    assert seed["losses"][OTHERS]["songs"] > seed["losses"][EQUAL]["songs"]
    table = (tmp_path / "results.md").read_text()
    assert "| 100% |" in table and seed["routers"][PROMPTS]["chosen"] in table and "| 0% |" in table


def test_gradients_of_a_model_s_own_answers_need_no_labels(folder, flags, tmp_path):
    def found(name, labels):
        for file in (folder / "tasks").rglob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            write_rows(file, [{**row, **labels(number)} for number, row in enumerate(rows)])
        own = [*flags, "--data", str(folder / "tasks")]
        return gradient_features(tmp_path / name, folder / "run-0" / "baseline", own)

    names = ("bad", "good")
    first = found("first", lambda number: {"label": number % 2, "label_text": names[number % 2]})
    second = found("second", lambda number: {"label": number // 2 % 2, "label_text": names[number // 2 % 2]})
    for split, by_task in first.items():
        for task, features in by_task.items():
            assert features.shape == (ROWS[split], 2048)
            torch.testing.assert_close(features.norm(dim=1), torch.ones(ROWS[split]))
            torch.testing.assert_close(features, second[split][task], atol=1e-4, rtol=1e-3)


def test_the_own_answer_is_the_most_probable_one():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    found = log_odds_of_own_answer(probabilities.log() + 3.0, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([0.7, 0.5]).logit())


def test_adapters_are_weighted_by_what_they_were_trained_on():
    rng = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, 16, generator=rng), dim=1)

    def rows(own):
        return torch.nn.functional.normalize(own + 0.1 * torch.randn(30, 16, generator=rng), dim=1)

    features = {"films": rows(directions[0]), "songs": rows(directions[1])}
    weights = GradientWeights(features, [{"films": 1.0}, {"films": 0.2, "songs": 1.0}])
    films, songs = weights(directions)
    assert films.argmax() == 0 and songs.argmax() == 1
    torch.testing.assert_close(weights(features["films"]).sum(1), torch.ones(30))
