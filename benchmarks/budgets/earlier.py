"""Seeds that were scored at another time, of which only the results are left."""

from typing import Any


def pooled(earlier: dict, later: dict) -> dict:
    """One recipe's results over the seeds of both.

    Figures are means over all seeds. So are the ends of the intervals: the rows are the same in every seed, and the
    interval of a mean is at most as wide as this, which it is where rows say the same in every seed.

    Args:
        earlier (`dict`): a recipe's results.
        later (`dict`): of other seeds.

    Raises:
        `SystemExit`: where these are of other tasks, or of another number of rows.
    """
    for name in ("tasks", "train_rows"):
        if earlier[name] != later[name]:
            raise SystemExit(f"--earlier: results of the same {name} are expected, found {earlier[name]}.")
    counts = [{one["system"]: one for one in own["systems"]} for own in (earlier, later)]
    labels = list(dict.fromkeys(label for own in counts for label in own))
    return {
        **later,
        **{name: earlier[name] + later[name] for name in ("seeds", "steps", "validation_curves")},
        "unfinished": sorted({*earlier["unfinished"], *later["unfinished"]} - set(labels)),
        "systems": [_system([own[label] for own in counts if label in own]) for label in labels],
    }


def _system(found: list[dict]) -> dict:
    seeds = [one["seeds"] for one in found]
    return {**_mean(found, seeds), "seeds": sum(seeds)}


def _mean(values: list[Any], seeds: list[int]) -> Any:
    """Mean over the seeds of figures in the same place; what is listed seed by seed is put in one list."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _of_key(name, [own[name] for own in values if name in own], seeds) for name in first}
    if isinstance(first, list):
        return [_mean(list(own), seeds) for own in zip(*values)]
    if isinstance(first, str) or None in values:
        return first
    return sum(value * count for value, count in zip(values, seeds)) / sum(seeds)


def _of_key(name: str, values: list[Any], seeds: list[int]) -> Any:
    return sum(values, []) if name == "accuracy_of_seeds" else _mean(values, seeds)
