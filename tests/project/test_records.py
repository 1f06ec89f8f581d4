"""Records kept as JSON: they come back as they were, and anything else is refused by name."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from hf_ensemble._files import read_json
from hf_ensemble._records import Record
from hf_ensemble.errors import HfEnsembleError, RecordError


@dataclass(frozen=True)
class Score:
    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Report(Record):
    format: ClassVar[str] = "hf_ensemble.report"
    format_version: ClassVar[int] = 2

    name: str
    count: int
    is_final: bool
    kind: Literal["a", "b"]
    score: Score
    best: Score | None
    scores: dict[str, Score]
    history: list[Score]
    by_size: dict[int, float]
    names: tuple[str, ...]
    interval: tuple[float, float] | None
    losses: list[float | None]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count has to be positive.")


def report(**changes):
    values = {
        "name": "first",
        "count": 3,
        "is_final": True,
        "kind": "a",
        "score": Score(0.5, 1.0),
        "best": None,
        "scores": {"sums": Score(0.25)},
        "history": [Score(0.7, 0.5), Score(0.6)],
        "by_size": {1: 0.5, 2: 0.25},
        "names": ("sums", "copies"),
        "interval": (0.1, 0.2),
        "losses": [0.5, None],
        "extra": {"seed": 0, "nested": {"list": [1, "two"]}},
    }
    return Report(**{**values, **changes})


@pytest.mark.parametrize("changes", [{}, {"best": Score(0.1)}, {"interval": None}, {"scores": {}, "extra": {}}])
def test_round_trip(tmp_path, changes):
    original = report(**changes)
    original.save(tmp_path / "nested" / "report.json")
    assert Report.load(tmp_path / "nested" / "report.json") == original
    data = json.loads((tmp_path / "nested" / "report.json").read_text())
    assert list(data)[:2] == ["format", "format_version"]
    assert data["format"] == "hf_ensemble.report" and data["format_version"] == 2
    assert [path.name for path in (tmp_path / "nested").iterdir()] == ["report.json"]


def test_numbers_that_are_not_finite_are_null_where_none_is_allowed():
    data = report(losses=[math.nan, 0.5], score=Score(0.5, math.inf), extra={"ceiling": math.nan}).to_dict()
    assert data["losses"] == [None, 0.5]
    assert data["score"] == {"loss": 0.5, "accuracy": None}
    assert data["extra"] == {"ceiling": None}
    json.dumps(data, allow_nan=False)
    with pytest.raises(RecordError, match=r"scores\['sums'\]\.loss has to be finite, found nan"):
        report(scores={"sums": Score(math.nan)}).to_dict()


def test_numpy_values_become_plain_ones():
    data = report(count=np.int64(3), losses=np.array([0.5, 0.25]), by_size={1: np.float64(0.5)}).to_dict()
    assert data["losses"] == [0.5, 0.25]
    assert json.loads(json.dumps(data))["count"] == 3
    with pytest.raises(RecordError, match="extra.*has no JSON form: found a set"):
        report(extra={"names": {"a"}}).to_dict()


def saved(tmp_path, **changes):
    """A file like a saved report with other entries; `...` removes one."""
    data = {**report().to_dict(), **changes}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hf_ensemble.selection"}, "has format 'hf_ensemble.selection'; expected 'hf_ensemble.report'"),
        ({"format": ...}, "has format None; expected 'hf_ensemble.report'"),
        ({"format_version": 3}, r"has format version 3, this release reads up to 2\. Upgrade hf_ensemble\."),
        ({"format_version": ...}, "expected a format_version from 1 to 2, found None"),
        ({"format_version": "2"}, "expected a format_version from 1 to 2, found '2'"),
        ({"format_version": True}, "expected a format_version from 1 to 2, found True"),
        ({"format_version": 0}, "expected a format_version from 1 to 2, found 0"),
        ({"count": ...}, r"missing fields \['count'\]"),
        ({"extra": ...}, r"missing fields \['extra'\]"),
        ({"count": ..., "counts": 1}, r"missing fields \['count'\] and unknown fields \['counts'\]"),
        ({"score": {"loss": 1.0}}, r"'score' has missing fields \['accuracy'\]"),
        ({"name": 5}, "'name' should be a string, found 5"),
        ({"count": 1.5}, "'count' should be an integer, found 1.5"),
        ({"count": True}, "'count' should be an integer, found True"),
        ({"count": None}, "'count' should be an integer, found None"),
        ({"is_final": 1}, "'is_final' should be true or false, found 1"),
        ({"kind": "c"}, r"'kind' should be one of \('a', 'b'\), found 'c'"),
        ({"score": 1.0}, "'score' should be an object, found 1.0"),
        ({"score": {"loss": "low", "accuracy": None}}, "'score.loss' should be a number, found 'low'"),
        ({"scores": []}, "'scores' should be an object, found a list"),
        ({"scores": {"sums": 1}}, r"scores\['sums'\]\" should be an object, found 1"),
        ({"history": {}}, "'history' should be a list, found an object"),
        ({"history": [{"loss": 1, "accuracy": "x"}]}, r"'history\[0\]\.accuracy' should be a number, found 'x'"),
        ({"by_size": {"one": 1.0}}, "'by_size' should have integers as keys, found 'one'"),
        ({"names": "sums"}, "'names' should be a list, found 'sums'"),
        ({"interval": [0.1]}, "'interval' should have 2 items, found 1"),
        ({"count": -1}, "count has to be positive"),
    ],
)
def test_other_content_is_refused(tmp_path, changes, message):
    path = saved(tmp_path, **changes)
    with pytest.raises(RecordError, match=message) as error:
        Report.load(path)
    assert str(path) in str(error.value)
    assert any(word in str(error.value) for word in ("Delete it and run", "Check the path", "Upgrade"))


@pytest.mark.parametrize("text", ["", '{"format": "hf_ensemble.rep', "\xff"])
def test_damaged_files_are_named(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("latin-1"))
    for read in (Report.load, read_json):
        with pytest.raises(RecordError, match="truncated or not JSON") as error:
            read(path)
        assert str(path) in str(error.value)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(RecordError, match="nowhere.json' does not exist: expected a file of format"):
        Report.load(tmp_path / "nowhere.json")
    with pytest.raises(RecordError, match="cannot be read"):
        Report.load(tmp_path)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(RecordError, match="expected an object of format 'hf_ensemble.report', found a list"):
        Report.load(tmp_path / "list.json")


def test_altered_values_and_records_of_another_run_are_named(tmp_path):
    path = tmp_path / "report.json"
    report().save(path, run="one")
    assert Report.load(path) == Report.load(path, run="one") == report()
    with pytest.raises(RecordError, match=r"report\.json' belongs to another run.* Delete it"):
        Report.load(path, run="two")
    data = json.loads(path.read_text())
    for changed, message in [
        ({**data, "count": 4}, "was altered since it was written"),
        ({**data, "run": "two"}, "was altered since it was written"),
        ({key: value for key, value in data.items() if key != "checksum"}, "has no checksum"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(RecordError, match=rf"report\.json' {message}\. Delete it"):
            Report.load(path)


def test_older_versions_are_read():
    data = {**report().to_dict(), "format_version": 1}
    assert Report.from_dict(data, "the report") == report()


def test_errors_can_be_caught_as_builtins():
    with pytest.raises(ValueError, match="the report"):
        Report.from_dict({}, "the report")
    assert issubclass(RecordError, HfEnsembleError)
    # Only the outermost record carries its format.
    assert asdict(report())["score"] == report().to_dict()["score"]
