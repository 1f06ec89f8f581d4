"""File and folder names of a run. No other module knows them."""

from .._records import Record
from ..select import ExampleScores, Grouping, Mixture, Selection
from .boosting import Boosting
from .comparison import Comparison
from .costs import Costs
from .evaluation import EvaluatedRows, Evaluation
from .example_rows import ExampleRows
from .fidelity_report import FidelityReport
from .records import EnsembleWeights, Estimate, RunRecord, TasksRecord
from .results import Results
from .systems import BASELINE

GRADIENTS = "gradients"
BASELINE_GRADIENTS = "gradients_at_baseline"
META_INITIALIZATION = "meta"
ADAPTER = "adapter"
ENSEMBLE = "ensemble"
COMPARED = "compared"
TRAINING = "training"
SCORED_RUNS = "scored_runs"
# What the names of trainings begin with whose adapters are made for their scores alone.
SCORED_TRAINING = "scored-"
REPORT = "report.html"
FIDELITY_PICTURE = "estimate/fidelity.png"
RECORDS: dict[type[Record], str] = {
    RunRecord: "run.json",
    TasksRecord: "tasks.json",
    Grouping: "groups.json",
    Selection: "selection.json",
    Mixture: "mixture.json",
    ExampleScores: "example_scores.json",
    ExampleRows: "example_rows.json",
    Estimate: "estimate/estimate.json",
    EnsembleWeights: "estimate/weights.json",
    Boosting: "estimate/boosting.json",
    FidelityReport: "estimate/fidelity.json",
    Evaluation: "evaluation.json",
    EvaluatedRows: "evaluated_rows.json",
    Costs: "costs.json",
    Comparison: "comparison.json",
    Results: "results.json",
}
# Folders that a run writes files and folders into.
WRITTEN_FOLDERS = ("estimate", TRAINING, SCORED_RUNS, ENSEMBLE, f"{ENSEMBLE}/adapters", f"{ENSEMBLE}/assets", COMPARED)
# What depends on the choice of groups or auxiliary tasks, and what the choice depends on.
CHOICE_ARTEFACTS = (
    *(RECORDS[kind] for kind in (Grouping, Selection, Boosting, ExampleRows, Evaluation, EvaluatedRows)),
    *(RECORDS[kind] for kind in (Costs, Comparison, Results)),
    COMPARED,
    REPORT,
    ENSEMBLE,
    ADAPTER,
)
# Records that a run of another choice does not share.
CHOICE_RECORDS: tuple[type[Record], ...] = (
    Grouping,
    Selection,
    Estimate,
    EnsembleWeights,
    Boosting,
    ExampleRows,
    Evaluation,
    EvaluatedRows,
    Costs,
    Comparison,
    Results,
)
CHOICE_STAGES = ("group", "select", "weights", "boosting", "adapter", "evaluation", "comparison")
BASIC_ARTEFACTS = (
    GRADIENTS,
    BASELINE_GRADIENTS,
    "estimate",
    BASELINE,
    META_INITIALIZATION,
    TRAINING,
    SCORED_RUNS,
    RECORDS[TasksRecord],
    RECORDS[RunRecord],
)
