"""Which stages a run has, what each needs, and how far they are: what jobs on a cluster are made of."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .._settings import check_one_of
from ..errors import ConfigurationError, StageNotReadyError
from ..select import Grouping, calibration_subsets
from ..store import num_shards
from .directory import RunDirectory
from .records import RunRecord, TasksRecord
from .systems import BASELINE

GRADIENTS, AT_BASELINE, CALIBRATION = "gradients", "gradients_at_baseline", "calibration"
GROUP, ADAPTER, SELECT, META = "group", "adapter", "select", "meta"
WEIGHTS, BOOSTING, EVALUATION = "weights", "boosting", "evaluation"
STAGES = (META, GRADIENTS, BASELINE, CALIBRATION, AT_BASELINE, GROUP, SELECT, ADAPTER, WEIGHTS, BOOSTING, EVALUATION)
# Those that several processes may share.
_WITH_PARTS = (GRADIENTS, AT_BASELINE, CALIBRATION, ADAPTER)
# Between two looks at what other processes have recorded, while a process waits for them.
_SECONDS = 2.0


@dataclass(frozen=True)
class StageProgress:
    """How far a stage of a run is.

    Args:
        name (`str`): as the run's record has it.
        status (`str`):
            `"done"`; `"running"` where a process works on it; `"interrupted"` where one has begun it, or a part of it;
            `"ready"` where it can be begun; `"waiting"` where it needs others first.
        needs (`list[str]`): the stages that it needs and that are not done.
        detail (`str`): which processes work on it, and how many of its shards are there.
    """

    name: str
    status: Literal["done", "running", "interrupted", "ready", "waiting"]
    needs: list[str] = field(default_factory=list)
    detail: str = ""

    def __str__(self) -> str:
        needs = f"needs {', '.join(self.needs)}" if self.needs else ""
        said = ", ".join(part for part in (self.status, self.detail, needs) if part)
        return f"{self.name} ({said})"


def check_stage(name: Any, shard: tuple[int, int] | None) -> None:
    """Raise `ConfigurationError` for what no run has: a stage of another name, and parts of a stage that has none."""
    kind = name.partition(":")[0] if isinstance(name, str) else name
    check_one_of("stage", kind, STAGES)
    if shard is not None and kind not in _WITH_PARTS:
        raise ConfigurationError(f"{name} has no parts, found shard={shard[0]}/{shard[1]}. Leave it out.")


def stage_needs(run: RunDirectory) -> dict[str, list[str]]:
    """The stages of a run in their order, and which others each needs.

    Adapters are known once groups are chosen; until then `"adapter"` stands for them.
    """
    record, names = run.record, list(run.read(TasksRecord).tasks)
    arguments = {**record.configuration.get("arguments", {}), **record.choices}
    has_baseline = bool(arguments.get("train_baseline"))
    calibrating = list(calibration_stages(names, arguments))
    if "target" in arguments:
        start = [META] if arguments.get("meta_initialization") else []
        needs = {name: [] for name in start} | {GRADIENTS: start} | dict.fromkeys(calibrating, start)
        return needs | {SELECT: [GRADIENTS, *calibrating], ADAPTER: [SELECT], EVALUATION: [ADAPTER]}
    needs = {GRADIENTS: []} | ({BASELINE: []} if has_baseline else {}) | {name: [] for name in calibrating}
    if arguments.get("group_initialization") == "baseline":
        needs[AT_BASELINE] = [BASELINE]
    needs[GROUP] = list(needs)
    groups = run.read(Grouping).groups if GROUP in record.stages and run.has(Grouping) else ()
    adapters = [f"{ADAPTER}:{name}" for name in groups] or [ADAPTER]
    needs |= {name: [GROUP] for name in adapters} | {WEIGHTS: adapters}
    if arguments.get("boosting_steps"):
        needs[BOOSTING] = [WEIGHTS]
    return needs | {EVALUATION: adapters}


def calibration_stages(names: Sequence[str], arguments: dict[str, Any]) -> dict[str, list[str]]:
    """The stages that fine-tune subsets which nothing else trains on, and their tasks.

    Args:
        names (`Sequence[str]`): the run's tasks.
        arguments (`dict`): `calibration_runs`, `seed`, and `train_baseline` where there is a baseline.
    """
    subsets = calibration_subsets(names, arguments.get("calibration_runs", 0), arguments["seed"])
    made = [list(names)] if arguments.get("train_baseline") else []
    found = {}
    for number, subset in enumerate(subsets, start=1):
        if subset not in made:
            found[f"{CALIBRATION}:{number}"] = subset
            made.append(subset)
    return found


def stages_named(run: RunDirectory, name: str, shard: tuple[int, int] | None = None) -> list[str]:
    """The stages that a name stands for: its own, or all of a kind, of which `shard` takes every n-th.

    Gradients are one stage, whose rows are shared out.

    Raises:
        `ConfigurationError`: for an unknown stage.
    """
    known = list(stage_needs(run))
    found = [own for own in known if own == name or own.startswith(f"{name}:")]
    # Groups that are not chosen yet.
    if not found and ADAPTER in known and name.startswith(f"{ADAPTER}:"):
        return [ADAPTER]
    if not found:
        # The same jobs serve every configuration: what this run has none of has nothing to do.
        if name in (META, BASELINE, AT_BASELINE, CALIBRATION, BOOSTING):
            return []
        raise ConfigurationError(f"Unknown stage {name!r}; the stages are {known}. Name one.")
    if shard is None or name in (GRADIENTS, AT_BASELINE):
        return found
    index, count = shard
    return found[index::count]


def run_progress(run: RunDirectory) -> list[StageProgress]:
    """How far every stage of a run is by now.

    Raises:
        `ConfigurationError`: for a folder without a run.
        `RecordError`: for damaged records.
    """
    if not (run.has(RunRecord) and run.has(TasksRecord)):
        raise ConfigurationError(f"Expected a run in {str(run.path)!r}, found none. Name the output_dir of a run.")
    # What other processes have recorded since.
    run = RunDirectory(run.path)
    holders = run.holders()
    return [_progress(run, name, needs, holders) for name, needs in stage_needs(run).items()]


def _progress(run: RunDirectory, name: str, needs: Sequence[str], holders: dict[str, str]) -> StageProgress:
    if _is_done(run, name):
        return StageProgress(name, "done")
    missing = [own for own in needs if not _is_done(run, own)]
    lock = run.stage_lock(name).name
    # Those of its parts, too.
    details = [holder for own, holder in holders.items() if own == lock or own.startswith(f"{lock}-")]
    is_running = bool(details)
    stores = {GRADIENTS: run.gradients, AT_BASELINE: run.baseline_gradients}
    if name in stores:
        there, count = num_shards(stores[name])
        details += [f"{there} of {count} shards"] if count else []
    if is_running:
        status = "running"
    elif missing:
        status = "waiting"
    else:
        status = "interrupted" if name in run.record.stages else "ready"
    return StageProgress(name, status, missing, ", ".join(details))


def _is_done(run: RunDirectory, name: str) -> bool:
    """Whether a stage was finished; an evaluation is run again whenever it is asked for."""
    return run.is_done(f"{EVALUATION}:eval" if name == EVALUATION else name)


def wait_for_needs(run: RunDirectory, name: str, seconds: float, tell: Callable[[str], None]) -> None:
    """Return when everything that a stage needs is done.

    Args:
        run (`RunDirectory`): the run.
        name (`str`): the stage.
        seconds (`float`): how long to wait for it; 0 for not at all.
        tell (`Callable`): is told what is waited for, whenever that changes.

    Raises:
        `StageNotReadyError`: when something is missing after that time; every stage is named with how far it is.
    """
    end, told = time.monotonic() + seconds, ""
    while True:
        needs = stage_needs(RunDirectory(run.path)).get(name, ())
        missing = [own for own in run_progress(run) if own.name in needs and own.status != "done"]
        if not missing:
            return
        named = ", ".join(map(str, missing))
        left = end - time.monotonic()
        if left <= 0:
            raise StageNotReadyError(
                f"{name} needs what the run in {str(run.path)!r} does not hold yet: {named}.",
                python="Run these stages first, or pass wait=SECONDS.",
                terminal="Run these stages first, or pass --wait SECONDS; the same command works when they are done.",
            )
        if named != told:
            tell(f"{name} waits for {named}")
            told = named
        time.sleep(min(left, _SECONDS))
