"""File and folder names of a run. No other module knows them."""

from .._records import Record
from ..select import ExampleScores, Grouping, Mixture, Selection
from .boosting import Boosting
from .comparison import Comparison
from .costs import Costs
from .evaluation import EvaluatedRows, Evaluation
from .example_rows import ExampleRows
from .fidelity_report import FidelityReport
from .records import Concurrency, EnsembleWeights, Estimate, RunRecord, TasksRecord, TrainedAdapter
from .results import Results
from .systems import BASELINE

GRADIENTS = "gradients"
BASELINE_GRADIENTS = "gradients_at_baseline"
META_INITIALIZATION = "meta"
ADAPTER = "adapter"
ENSEMBLE = "ensemble"
COMPARED = "compared"
TRAINING = "training"
# Locks of the stages that processes work on.
LOCKS = ".stages"
# The values that the adapter begins at.
START = "theta0.safetensors"
SCORED_RUNS = "scored_runs"
# What the names of trainings begin with whose adapters are made for their scores alone.
SCORED_TRAINING = "scored-"
COMPARISON_TABLE = "comparison.md"
REPORT = "report.html"
ESTIMATES = "estimate"
FIDELITY_PICTURE = f"{ESTIMATES}/fidelity.png"
RECORDS: dict[type[Record], str] = {
    RunRecord: "run.json",
    TasksRecord: "tasks.json",
    Grouping: "groups.json",
    Selection: "selection.json",
    Mixture: "mixture.json",
    ExampleScores: "example_scores.json",
    ExampleRows: "example_rows.json",
    Estimate: f"{ESTIMATES}/estimate.json",
    EnsembleWeights: f"{ESTIMATES}/weights.json",
    Concurrency: f"{ESTIMATES}/concurrency.json",
    Boosting: f"{ESTIMATES}/boosting.json",
    FidelityReport: f"{ESTIMATES}/fidelity.json",
    Evaluation: "evaluation.json",
    EvaluatedRows: "evaluated_rows.json",
    Costs: "costs.json",
    Comparison: "comparison.json",
    Results: "results.json",
}
# Folders that a run writes files and folders into.
WRITTEN_FOLDERS = (ESTIMATES, TRAINING, SCORED_RUNS, ENSEMBLE, f"{ENSEMBLE}/adapters", f"{ENSEMBLE}/assets", COMPARED)
# Records that depend on the choice of groups or auxiliary tasks: a run of another choice does not share them.
CHOICE_RECORDS: tuple[type[Record], ...] = (
    Grouping,
    Selection,
    Estimate,
    Concurrency,
    EnsembleWeights,
    Boosting,
    ExampleRows,
    Evaluation,
    EvaluatedRows,
    Costs,
    Comparison,
    Results,
)
# Records that stay what they are however gradients are captured.
TRAINED_RECORDS: tuple[type[Record], ...] = (TasksRecord, TrainedAdapter)
# Everything in the run that depends on the choice, and the stages that make it.
CHOICE_ARTEFACTS = (
    *(RECORDS[kind] for kind in CHOICE_RECORDS),
    COMPARISON_TABLE,
    COMPARED,
    REPORT,
    ENSEMBLE,
    ADAPTER,
)
CHOICE_STAGES = ("calibration", "group", "select", "weights", "boosting", "adapter", "evaluation", "comparison")
# What else depends on how gradients are captured, and of which rows, and the stages that make it. Scored runs hold the
# losses of the captured rows.
CAPTURE_ARTEFACTS = (GRADIENTS, BASELINE_GRADIENTS, ESTIMATES, SCORED_RUNS)
CAPTURE_STAGES = ("gradients", "gradients_at_baseline")
# What else a run over other rows or with another model does not share, the run's own record last.
BASIC_ARTEFACTS = (
    BASELINE,
    META_INITIALIZATION,
    TRAINING,
    START,
    RECORDS[TasksRecord],
    RECORDS[RunRecord],
)
