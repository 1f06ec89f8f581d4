"""Which stages a run has, what each needs, and how far they are: what jobs on a cluster are made of."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .._processes import run_on_main
from .._settings import check_one_of
from ..errors import ConfigurationError, StageNotReadyError
from ..select import Grouping, calibration_subsets
from ..store import num_shards
from .directory import RunDirectory
from .lock import holder_of
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
    record, names, arguments = run.record, list(run.read(TasksRecord).tasks), _arguments(run)
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


def _arguments(run: RunDirectory) -> dict[str, Any]:
    """The trainer's arguments that the run's results depend on."""
    configuration = run.record.configuration
    return {**configuration.get("arguments", {}), **configuration.get("capture", {}), **run.record.choices}


def _is_sequential(run: RunDirectory) -> bool:
    """Whether each group is chosen when the one before it is trained."""
    arguments = _arguments(run)
    return arguments.get("grouping_method") == "mixtures" and bool(arguments.get("sequential_groups"))


def check_alone(run: RunDirectory, name: str, shard: tuple[int, int] | None) -> None:
    """Raise `ConfigurationError` for a part of the adapters in a run that chooses each group after the one before."""
    if name.partition(":")[0] == ADAPTER and (name != ADAPTER or shard is not None) and _is_sequential(run):
        found = name if shard is None else f"shard={shard[0]}/{shard[1]}"
        raise ConfigurationError(
            f"With sequential_groups=True each group is chosen anew when the one before it is trained, so that one "
            f"process trains them in turn; found {found}.",
            python="Call run_stage('adapter') without a shard.",
            terminal="Use --stage adapter without --shard.",
        )


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
    if name == ADAPTER and _is_sequential(run):
        # Whoever trains the first one goes on with those that are chosen after it.
        return found[:1]
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
    # What an evaluation has not as a stage of its own is made by a process that works in the run as a whole.
    if (whole := holder_of(run.path)) is not None:
        holders[run.stage_lock(EVALUATION).name] = whole
    return [_progress(run, name, needs, holders) for name, needs in stage_needs(run).items()]


def _progress(run: RunDirectory, name: str, needs: Sequence[str], holders: dict[str, str]) -> StageProgress:
    if _is_done(run, name):
        return StageProgress(name, "done")
    missing = [own for own in needs if not _is_done(run, own)]
    lock = run.stage_lock(name).name
    # Those of its parts, too.
    details = [holder for own, holder in holders.items() if own == lock or own.startswith(f"{lock}-")]
    is_running = bool(details) and not (name == EVALUATION and missing)
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


def wait_for_stage(
    run: RunDirectory, name: str, shard: tuple[int, int] | None, seconds: float, tell: Callable[[str], None]
) -> None:
    """[`wait_for_needs`] of all stages that a name stands for.

    Raises:
        `ConfigurationError`: for an unknown stage, and for a part of one that has no parts in this run.
    """
    run_on_main(lambda: check_alone(run, name, shard))
    for stage in run_on_main(lambda: stages_named(run, name)):
        wait_for_needs(run, stage, seconds, tell)


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

    def looked() -> str:
        missing = _missing(run, name)
        left = end - time.monotonic()
        if missing and left <= 0:
            raise StageNotReadyError(
                f"{name} needs what the run in {str(run.path)!r} does not hold yet: {missing}.",
                python="Run these stages first, or pass wait=SECONDS.",
                terminal="Run these stages first, or pass --wait SECONDS; the same command works when they are done.",
            )
        if missing and missing != told:
            tell(f"{name} waits for {missing}")
        if missing:
            time.sleep(min(left, _SECONDS))
        return missing

    # One look at a time: the other processes of a job give up on a collective that takes as long as the whole wait.
    while told := run_on_main(looked):
        pass


def _missing(run: RunDirectory, name: str) -> str:
    """What a stage needs and the run does not hold, each with how far it is."""
    needs = stage_needs(RunDirectory(run.path)).get(name, ())
    return ", ".join(str(own) for own in run_progress(run) if own.name in needs and own.status != "done")
