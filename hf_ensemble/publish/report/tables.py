"""Tables of the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...evaluate import Interval
from ...runs import Results
from ...runs.result_rows import LOWER_IS_BETTER
from ...runs.systems import main_system, ordered_systems, system_name
from ...runs.verdict import number

# Columns of one number each whose heads stand upright.
_MOST_UPRIGHT = 8


@dataclass(frozen=True)
class Cell:
    """An entry of a table.

    Args:
        text (`str`): what is read.
        value (`float`, *optional*): what the column is sorted by, where it is a number.
        note (`str`): in small print behind the text.
        heat (`float`, *optional*): from -1 to 1: how far the cell is coloured, in blue above zero and in orange below.
        bar (`float`, *optional*): from 0 to 1: length of a bar below the text.
    """

    text: str
    value: float | None = None
    note: str = ""
    heat: float | None = None
    bar: float | None = None


@dataclass(frozen=True)
class PageTable:
    """A table whose first column names the rows.

    Args:
        caption (`str`): what it shows.
        columns (`list[str]`): their heads.
        rows (`list[list[Cell]]`): each as long as the columns.
        foot (`list[Cell]`, *optional*): a last row that is not sorted.
        is_matrix (`bool`): whether there are many columns, of one number each: their heads are turned.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    foot: list[Cell] = field(default_factory=list)
    is_matrix: bool = False

    def is_numeric(self, column: int) -> bool:
        return any(row[column].value is not None for row in self.rows)


def result_page_tables(results: Results, groups: dict[str, str]) -> list[PageTable]:
    """The figures of every task and system, each with its interval: loss, accuracy, further metrics."""
    systems = ordered_systems(results.scores)
    main = main_system(results.scores)
    scores = [own for system in systems for own in results.scores[system].values()]
    names = dict.fromkeys(name for own in scores for name in own.figures())
    found = []
    for name in names:
        figures = {s: {task: own.figures().get(name) for task, own in results.scores[s].items()} for s in systems}
        values = [value for own in figures.values() for value in own.values() if value is not None]
        if name not in LOWER_IS_BETTER and not any(values):
            continue
        compared = results.intervals[main] if main in results.intervals and results.reference else None
        columns = ["task", *(["adapter"] if groups else []), *map(system_name, systems)]
        has_difference = compared is not None and name in compared.mean_difference
        if has_difference:
            columns.append(f"difference to {system_name(results.reference)}")
        most = max(map(abs, values), default=0.0) or 1.0
        rows = []
        for task in results.scores[main]:
            row = [Cell(task), *([Cell(groups.get(task, "-"))] if groups else [])]
            for system in systems:
                known = results.intervals.get(system)
                interval = known.tasks.get(task, {}).get(name) if known else None
                row.append(_figure(figures[system].get(task), interval, most))
            if has_difference:
                row.append(_difference(compared.differences.get(task, {}).get(name)))
            rows.append(row)
        foot = [Cell("mean"), *([Cell("")] if groups else [])]
        for system in systems:
            own = [value for value in figures[system].values() if value is not None]
            interval = results.intervals[system].mean.get(name) if system in results.intervals else None
            foot.append(_figure(sum(own) / len(own) if own else None, interval))
        if has_difference:
            foot.append(_difference(compared.mean_difference[name]))
        unit = ", in nats per token; lower is better" if name == "loss" else ""
        found.append(PageTable(f"{name.replace('_', ' ').capitalize()}{unit}", columns, rows, foot))
    return found


def _figure(value: float | None, interval: Interval | None = None, most: float | None = None) -> Cell:
    if value is None:
        return Cell("-")
    note = f"{number(interval[0])} to {number(interval[1])}" if interval is not None else ""
    return Cell(number(value), value, note, bar=None if most is None else abs(value) / most)


def _difference(found) -> Cell:
    if found is None:
        return Cell("-")
    low, high = found.interval
    clear = "" if found.is_clear else ", may be chance"
    return Cell(signed(found.value), found.value, f"{signed(low)} to {signed(high)}{clear}")


def signed(value: float, digits: int = 3) -> str:
    """A difference; what rounds to nothing has no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def heat_table(
    caption: str, corner: str, columns: Sequence[str], rows: dict[str, Sequence[float | None]], digits: int = 2
) -> PageTable:
    """Numbers whose colours say how large they are; `None` and zeros stay empty."""
    most = max((abs(value) for row in rows.values() for value in row if value is not None), default=0.0) or 1.0
    return PageTable(
        caption,
        [corner, *columns],
        [
            [
                Cell(name),
                *(Cell("") if not value else Cell(f"{value:.{digits}f}", value, heat=value / most) for value in row),
            ]
            for name, row in rows.items()
        ],
        is_matrix=len(columns) > _MOST_UPRIGHT,
    )
