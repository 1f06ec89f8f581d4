"""Pictures of every kind of choice, and the commands that make them from a store."""

import json
import xml.dom.minidom

import pytest
from matplotlib.image import imread

from helpers import toy
from helpers.captures import capture
from hf_ensemble import DataSelector, Grouping, ObservedRun, Selection, draw_choice
from hf_ensemble.cli.main import main
from hf_ensemble.publish.mixture_pictures import taken_point
from hf_ensemble.store import GradientStore

RUN = ObservedRun({"sums": 1.0, "diffs": 1.0}, {"sums": 2.0, "diffs": 2.5})
CHOICES = {
    "selection": (lambda selector: selector.select("sums"), ["selection_path"]),
    "backward": (lambda selector: selector.select(None, "backward"), ["selection_path"]),
    "weights": (lambda selector: selector.select("sums", "mixture", caps=0.5), ["selection_path", "weights"]),
    "mixture": (lambda selector: selector.mixture(["sums", "diffs"]), ["weights"]),
    "groups": (lambda selector: selector.group(affinity_subsets=20), ["affinity", "groups"]),
    "one number": (lambda selector: selector.group(2, affinity_subsets=20), ["affinity"]),
    "mixtures": (
        lambda selector: selector.group(2, "mixtures", affinity_subsets=20, has_baseline=False),
        ["affinity", "cost_curve", "mixtures"],
    ),
    "rows": (lambda selector: selector.score_examples("sums"), ["example_scores"]),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return capture(tmp_path_factory.mktemp("stores") / "store")


@pytest.mark.parametrize(("expected_loss", "place"), [(1.6, 1), (1.5, 2), (None, 1)])
def test_the_set_that_is_taken_is_marked_among_those_of_its_cost(expected_loss, place):
    points = [(1.0, 2.0), (2.0, 1.6), (2.0 + 1e-12, 1.5), (1.9, 1.6)]
    curve = [{"cost": cost, "expected_loss": loss} for cost, loss in points]
    grouping = Grouping(
        groups={"group_0": ["sums"]},
        mixtures={"group_0": {"sums": 1.0}},
        method="mixtures",
        task_names=["sums"],
        affinity=None,
        predicted_loss={},
        cost=2.0,
        cost_curve=curve,
        expected_loss=expected_loss,
        summary="",
        settings={},
    )
    assert taken_point(grouping) == place


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("runs", [[], [RUN]], ids=["no interval", "intervals"])
def test_every_choice_is_drawn(store, tmp_path, kind, runs):
    choose, names = CHOICES[kind]
    choice = choose(DataSelector.from_store(store, None, 20, runs))
    if kind == "weights" and len(set(choice.weights.values())) == 1:
        names = ["selection_path"]
    drawn = draw_choice(choice, tmp_path)
    assert {path.name for path in drawn} == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    for path in drawn:
        if path.suffix == ".png":
            height, width = imread(path).shape[:2]
            assert height > 150 and width > 500
        else:
            assert xml.dom.minidom.parse(str(path)).documentElement.tagName == "svg"


def test_select_and_group_are_commands(store, tmp_path, capsys):
    command = ["--store", str(store.folder), "--num_components", "20", "--output_dir", str(tmp_path / "out")]
    flags = ["--target", "sums", "--max_auxiliary", "1", "--score_examples", "true", "--clusters", '{"diffs": 2}']
    assert main(["select", *command, *flags, "--exclude", "diffs/1"]) == 0
    selection = Selection.load(tmp_path / "out" / "selection.json")
    assert selection.targets == {"sums": 1.0} and len(selection.auxiliary) <= 1
    assert set(selection.scores) <= {"diffs/0", "more_sums"}
    scores = json.loads((tmp_path / "out" / "example_scores.json").read_text())
    assert set(scores["scores"]) == {"sums", "diffs/0", "diffs/1", "more_sums"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "How forward selection came there" in printed and "baseline: all" in printed and "that harm" in printed
    assert main(["group", *command, "--max_groups", "2", "--overlapping_groups", "true"]) == 0
    grouping = Grouping.load(tmp_path / "out" / "groups.json")
    assert len(grouping.predicted_loss) == 2 and grouping.settings["overlapping_groups"]
    assert "2 groups" in capsys.readouterr().out
    assert (tmp_path / "out" / "groups.svg").is_file() and (tmp_path / "out" / "selection_path.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Expected --store FOLDER"),
        (["--store", "{store}", "--target", "z"], "Unknown targets ['z']"),
        (["--store", "{store}", "--clusters", "{"], "clusters has to be JSON"),
        (["--store", "{store}", "--clusters", "[1]"], "clusters has to map tasks to numbers"),
        (["--store", "nowhere"], "Expected a gradient store in 'nowhere'"),
        (["--store", "{store}", "--speed", "1"], "Unknown arguments"),
    ],
)
def test_bad_commands_are_explained(store, tmp_path, capsys, flags, message):
    flags = [flag.replace("{store}", str(store.folder)) for flag in flags]
    assert main(["select", *flags, "--output_dir", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_run_brings_its_fine_tunings(tmp_path, base_folder, capsys):
    folder = tmp_path / "data"
    for name, splits in toy.sft_tasks().items():
        (folder / name).mkdir(parents=True)
        for split, rows in splits.items():
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "data": folder,
        "model_name_or_path": base_folder,
        "output_dir": tmp_path / "run",
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": "true",
        "num_train_epochs": "1",
        "projection_dim": "64",
        "num_components": "10",
        "lora_r": "2",
        "num_groups": "2",
    }
    assert main(["run", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]) == 0
    assert len(GradientStore(tmp_path / "run" / "gradients").task_names) == 3
    out = ["--output_dir", str(tmp_path / "out"), "--num_components", "10"]
    assert main(["select", "--store", str(tmp_path / "run"), "--target", "sums", *out]) == 0
    selection = Selection.load(tmp_path / "out" / "selection.json")
    assert selection.settings["estimator"]["l2_evidence"] == "observed_runs"
    assert selection.path[0]["interval"] is not None
    # What was trained on other tasks too does not count.
    assert main(["select", "--store", str(tmp_path / "run"), "--target", "sums", "--tasks", "sums", "diffs", *out]) == 0
    fewer = Selection.load(tmp_path / "out" / "selection.json")
    assert fewer.settings["estimator"]["observed_runs"] == []
