"""What a run's systems and stages took, as tables."""

from ...runs import Results
from ...runs.costs import figure_with_prefix
from ...runs.systems import system_name
from .tables import Cell, PageTable


def cost_tables(results: Results) -> list[PageTable]:
    """What each system costs to train, to keep and to run, and what each stage took."""
    tables = []
    if results.system_costs:
        columns = ["system", "training FLOPs", "trained parameters", "stored parameters", "FLOPs per token"]
        rows = []
        for system, cost in results.system_costs.items():
            figures = (cost.training_flops, cost.trained_parameters, cost.stored_parameters, cost.inference_flops)
            rows.append([Cell(system_name(system)), *map(_figure, figures)])
        tables.append(PageTable("Systems", columns, rows))
    costs = results.stage_costs
    most = max((cost.seconds for cost in costs.values()), default=0.0) or 1.0
    rows = [
        [
            Cell(name.replace(":", " ").replace("_", " ")),
            Cell(f"{cost.seconds:,.1f}", cost.seconds, bar=cost.seconds / most),
            _figure(cost.flops),
            _figure(cost.tokens),
            _figure(cost.peak_memory, "B"),
        ]
        for name, cost in costs.items()
    ]
    if rows:
        sums = [sum(getattr(cost, name) for cost in costs.values()) for name in ("seconds", "flops", "tokens")]
        most_memory = max(cost.peak_memory for cost in costs.values())
        foot = [Cell("together"), Cell(f"{sums[0]:,.1f}", sums[0]), *map(_figure, sums[1:]), _figure(most_memory, "B")]
        tables.append(PageTable("Stages", ["stage", "seconds", "FLOPs", "tokens", "peak memory"], rows, foot))
    return tables


def _figure(value: float | None, unit: str = "") -> Cell:
    return Cell("-") if value is None else Cell(figure_with_prefix(value, unit), value)
