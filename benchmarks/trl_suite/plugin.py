"""A pytest plugin that runs trl's own tests of `SFTTrainer` on local stand-ins, with a trainer of ours or with trl's.

`run.py` starts it. The test module is not changed: before its tests run, two names in its namespace are.
"""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

# Imported before pytest puts the checkout on the path: the library under the tests is the installed one.
import trl  # noqa: F401
from datasets import Dataset, IterableDataset

from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer

from .inputs import NAMES
from .vision import WITHOUT

MODES = ("parent", "single", "several")
TASKS = ("data1", "data2")
# An absolute path, of which the last part is kept.
PATH = re.compile(r"(?<![\w.…])/(?:[\w.-]+/)+([\w.-]+)")
LONGEST_REASON = 300
HUB_NAME = re.compile(r"trl-internal-testing/[\w.-]+")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trl suite")
    group.addoption("--suite_mode", choices=MODES, help="whose trainer the tests make, and of what")
    group.addoption("--suite_inputs", type=Path, help="folder of the stand-ins")
    group.addoption("--suite_report", type=Path, help="JSON file of the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out by trl's own test command")
    inputs, load_dataset = config.getoption("suite_inputs"), datasets.load_dataset

    def load_stand_in(path: str, name: str | None = None, **options: Any):
        """`datasets.load_dataset`, from the stand-in's folder."""
        if not HUB_NAME.fullmatch(path):
            return load_dataset(path, name, **options)
        folder = inputs / "datasets" / path / (name or "")
        if not folder.is_dir():
            pytest.skip(f"no stand-in for {path}")
        return load_dataset(str(folder), **options)

    datasets.load_dataset = load_stand_in
    for name in ("testing_utils.py", "test_sft_trainer.py"):
        _provide_missing_names(config.rootpath / "tests" / name)
    config.pluginmanager.register(Recorder(config.getoption("suite_report")))


def _provide_missing_names(path: Path) -> None:
    """Give the installed trl the names that a file of another version imports from it.

    What is gone is not used by the tests that run: private functions have tests of their own, and an optional package
    that trl no longer asks for counts as missing.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    setattr(module, alias.name, lambda *args, **kwargs: False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mode = config.getoption("suite_mode")
    for module in {item.module for item in items}:
        if mode != "parent":
            module.SFTConfig = EnsembleSFTConfig
            module.SFTTrainer = EnsembleSFTTrainer if mode == "single" else with_two_tasks
    available = json.loads((config.getoption("suite_inputs") / NAMES).read_text())
    for item in items:
        for name in sorted(_names(item) - set(available)):
            why = WITHOUT.get(name, "nobody has made one")
            item.add_marker(pytest.mark.skip(reason=f"no stand-in for {name.split('/')[1]}: {why}"))


def _names(item: pytest.Item) -> set[str]:
    """Hub names of the models that a test asks for: its parameters, else those that its code writes out."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {value for value in parameters if isinstance(value, str) and HUB_NAME.fullmatch(value)}
    return names or set(HUB_NAME.findall(inspect.getsource(item.function)))


def with_two_tasks(*args: Any, train_dataset: Any = None, eval_dataset: Any = None, **options: Any):
    """`EnsembleSFTTrainer` of two tasks, each of which has half of the rows.

    A function, since a trainer makes further trainers of its own class.
    """
    return EnsembleSFTTrainer(
        *args, train_dataset=in_two_tasks(train_dataset), eval_dataset=in_two_tasks(eval_dataset), **options
    )


def in_two_tasks(dataset: Any) -> Any:
    """First and second half of a dataset by task; what is no single dataset stays as it is."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    rows = len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in dataset)
    # A single row goes to both tasks.
    end = max(1, rows // 2)
    return dict(zip(TASKS, (dataset.take(end), dataset.skip(min(end, rows - 1)))))


@pytest.fixture
def lazy_shared_datadir(request: pytest.FixtureRequest) -> Path:
    """The fixture of pytest-datadir, which one test uses to read a file."""
    return request.path.parent / "data"


class Recorder:
    """Writes how each test ended.

    Args:
        path (`Path`): JSON file; by test, `outcome` and, unless it passed, the first line of `reason`.
    """

    def __init__(self, path: Path):
        self.path, self.outcomes = path, {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        result = yield
        report = result.get_result()
        if report.outcome == "passed" and call.when != "call":
            return
        name = item.nodeid.split("::")[-1]
        own = {"outcome": report.outcome}
        if report.outcome != "passed":
            own["reason"] = _reason(call, report)
        # What failed stays failed when the teardown is reported.
        if self.outcomes.get(name, own)["outcome"] == own["outcome"] or own["outcome"] == "failed":
            self.outcomes[name] = own

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.outcomes))


def _reason(call: pytest.CallInfo, report: pytest.TestReport) -> str:
    """Why a test was skipped, or the type of its error and the first line of its message, without paths."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = str(call.excinfo.value).splitlines() or [""]
    # What was raised instead stands below the first line.
    said = [line.strip() for line in lines[1:] if line.strip().startswith("Actual message")]
    message = PATH.sub(r"\1", " ".join([lines[0], *said]))
    return f"{call.excinfo.typename}: {message}"[:LONGEST_REASON]
