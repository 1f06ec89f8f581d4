"""Every file of a run, of its store and of its ensemble, damaged in every way: each is named, with what to do."""

import json
import shutil

import pytest

from helpers import toy
from helpers.damages import DAMAGES, JSON_DAMAGES, replaced_by
from helpers.trainers import sft_trainer
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleLoadError, HfEnsembleError, RecordError, StoreError
from hf_ensemble.runs import (
    EnsembleWeights,
    Estimate,
    Evaluation,
    RunDirectory,
    RunRecord,
    TasksRecord,
    run_selector,
)
from hf_ensemble.select import Grouping
from hf_ensemble.store import GradientStore
from hf_ensemble.train.task_trainer import TaskSFTTrainer

REMEDIES = (
    "Delete",
    "Capture",
    "Check the path",
    "Upgrade",
    "Install a newer",
    "Restore",
    "save it again",
    "use the release",
)
KINDS = (RunRecord, TasksRecord, Grouping, Estimate, EnsembleWeights, Evaluation)


@pytest.fixture(scope="module")
def other(tmp_path_factory, finished):
    """A finished run of another learning rate."""
    folder = tmp_path_factory.mktemp("other") / "run"
    sft_trainer(folder, finished[2], num_groups=2, learning_rate=3e-3).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run to damage."""
    shutil.copytree(finished[0].run_directory.path, tmp_path / "run")
    return tmp_path / "run"


def refused(error, path, read):
    with pytest.raises(error) as caught:
        read()
    assert isinstance(caught.value, HfEnsembleError)
    text = str(caught.value)
    assert path.name in text and any(remedy in text for remedy in REMEDIES), text


def records(folder):
    """Every record of a run by its file, and how it is read."""
    run = RunDirectory(folder)
    found = {run.where(kind): lambda kind=kind: run.read(kind) for kind in KINDS}
    for path in sorted((folder / "training").glob("*.json")):
        found[path] = lambda name=path.stem: run.trained_adapter(name)
    for path in sorted((folder / "scored_runs").glob("*.json")):
        found[path] = run.scored_runs
    return found


@pytest.mark.parametrize("damage", [*JSON_DAMAGES, "of another run"])
def test_records(run, other, damage):
    untouched = run.parent / "untouched"
    shutil.copytree(run, untouched)
    assert len(records(run)) >= 9
    for path in records(run):
        name = path.relative_to(run)
        if damage == "of another run":
            if path.name in ("run.json", "tasks.json"):
                # The one is compared with the arguments, and the other written anew, whenever a run is opened.
                continue
            replaced_by(other / name)(path)
        else:
            JSON_DAMAGES[damage](path)
        read = records(run).get(path)
        if damage in ("deleted", "replaced by a folder") and path.parent.name in ("training", "scored_runs"):
            assert read is None or path.is_dir()
        else:
            refused(RecordError, path, read)
        if path.is_dir():
            path.rmdir()
        shutil.copy(untouched / name, path)
        records(run)[path]()


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_store(run, damage):
    folder = run / "gradients"
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")
    assert len(names) == 5
    for name in names:
        if damage not in DAMAGES and not name.endswith(".json"):
            continue
        if damage == "of a newer release" and name != "manifest.json":
            continue
        path, kept = folder / name, (folder / name).read_bytes()
        JSON_DAMAGES[damage](path)
        refused(StoreError, path, lambda: GradientStore(folder))
        if path.is_dir():
            path.rmdir()
        path.write_bytes(kept)
    assert len(GradientStore(folder)) == 54


def test_a_shard_of_another_store(run, other):
    (path,) = (run / "gradients").glob("*.features.npy")
    (foreign,) = (other / "gradients").glob("*.features.npy")
    data = bytearray(foreign.read_bytes())
    data[-1] ^= 2
    path.write_bytes(bytes(data))
    refused(StoreError, path, lambda: run_selector(RunDirectory(run)))


def test_a_marker_without_checksums_is_refused(run):
    path = run / "gradients" / "shard-00000.json"
    from hf_ensemble._records import with_checksum

    for content in (
        {"rows": 54},
        {"rows": 54, "sha256": {}},
        {"rows": 54, "sha256": {"shard-00000.features.npy": "0"}},
    ):
        path.write_text(json.dumps(with_checksum(content)))
        refused(StoreError, path, lambda: GradientStore(run / "gradients"))


@pytest.mark.parametrize("damage", JSON_DAMAGES)
def test_ensemble(run, finished, damage):
    folder, base = run / "ensemble", toy.llama()
    files = [folder / "ensemble_config.json", *sorted(folder.glob("adapters/group_0/*"))]
    assert len(files) == 3
    for path in files:
        if damage not in DAMAGES and path.parent != folder:
            continue
        kept = path.read_bytes()
        JSON_DAMAGES[damage](path)
        refused(EnsembleLoadError, path, lambda: PeftEnsembleModel.from_pretrained(folder, base_model=base))
        if path.is_dir():
            path.rmdir()
        path.write_bytes(kept)
    PeftEnsembleModel.from_pretrained(folder, base_model=base)


def content(folder):
    """What a run came to: its adapters, and its choices without times."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    files |= {path.relative_to(folder): path.read_bytes() for path in folder.glob("gradients/shard*.npy")}
    run = RunDirectory(folder)
    files |= {kind: run.read(kind) for kind in (Grouping, Estimate, EnsembleWeights)}
    return files, run.read(Evaluation).scores


LOST = [
    "groups.json estimate/estimate.json tasks.json gradients/shard-00000.features.npy",
    "estimate/weights.json evaluation.json gradients/shard-00000.json ensemble/ensemble_config.json ensemble/README.md",
    "training/baseline.json ensemble/adapters/group_1 gradients/manifest.json",
]


@pytest.mark.parametrize("names", LOST)
def test_what_is_deleted_from_a_finished_run_is_made_again(run, finished, names):
    before = content(run)
    for name in names.split():
        path = run / name
        if path.name == "manifest.json":
            path = path.parent
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    sft_trainer(run, finished[2], num_groups=2).train()
    after = content(run)
    assert after[0] == before[0]
    for prefix, systems in before[1].items():
        for system, scores in systems.items():
            for task, own in scores.items():
                assert after[1][prefix][system][task].loss == pytest.approx(own.loss)


def test_a_lost_record_of_the_run_is_no_licence_for_another_configuration(run, finished, monkeypatch):
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained"))
    (run / "run.json").unlink()
    shutil.rmtree(run / "gradients")
    with pytest.raises(RecordError, match=r"baseline\.json' belongs to another run.* Delete it"):
        sft_trainer(run, finished[2], num_groups=2, learning_rate=3e-3).train()


@pytest.mark.parametrize(
    "name", ["groups.json", "estimate/weights.json", "training/baseline.json", "scored_runs/*.json", "gradients/*.npy"]
)
def test_a_restart_reads_what_it_goes_by(run, finished, name, monkeypatch):
    monkeypatch.setattr(TaskSFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    path = next(iter(run.glob(name)))
    JSON_DAMAGES["a bit flipped"](path)
    refused((RecordError, StoreError), path, sft_trainer(run, finished[2], num_groups=2).train)
