"""Systems of a run: their names in records, and what they are called where people read."""

from collections.abc import Mapping

# The base model alone.
BASE = "base"
# The one adapter for all tasks: as a system, as a training, as a member of an ensemble and as a folder.
BASELINE = "baseline"
# What systems are called where people read, in the order of the columns.
SYSTEM_NAMES = {
    BASE: "base model",
    BASELINE: "one adapter for all",
    "ensemble": "ensemble",
    "selection": "selection",
    "scaled": "one adapter for all, logits scaled",
    "longer": "one adapter for all, as long as the ensemble",
    "longer_scaled": "one adapter for all, as long as the ensemble, logits scaled",
    "wider": "one adapter for all, of higher rank",
    "per_task": "one adapter per task",
    "finetuned": "one adapter for all, then each task",
    "random_groups": "random groups",
    "gradient_clusters": "k-means of gradients",
    "average": "average of the tasks' adapters",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "tsv": "TSV-Merge",
    "knots": "KnOTS",
    "lorahub": "LoRAHub",
    "arrow": "Arrow",
    "seeds": "several seeds",
}


def system_name(system: str) -> str:
    """What a system is called where people read."""
    return SYSTEM_NAMES.get(system, system.replace("_", " "))


def ordered_systems(scores: Mapping[str, object]) -> list[str]:
    """The systems that were scored: those of every run first."""
    return [*(own for own in SYSTEM_NAMES if own in scores), *(own for own in scores if own not in SYSTEM_NAMES)]


def main_system(scores: Mapping[str, object]) -> str:
    """The system that a run is about: the ensemble or the adapter of a selection, else the last that was scored."""
    return next((own for own in ("ensemble", "selection") if own in scores), ordered_systems(scores)[-1])
