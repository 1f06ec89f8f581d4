"""What a run leaves, without its times, and in what two of them differ."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A checksum is of the times too.
_TIMES = ("checksum", "seconds", "prediction_seconds", "capture_seconds", "training_seconds")
# Work that a killed process had done, and sums that depend on which batches were counted.
_TIMES += ("cost", "is_resumed", "stage_costs", "flops", "training_flops", "inference_flops")
_COSTS_OF_CARD = re.compile(r"^## Costs$.*?(?=^## )", re.MULTILINE | re.DOTALL)
_TIME_OF_LOG = re.compile(r"_runtime$|_per_second$")


def artefacts(folder: Path) -> dict[str, Any]:
    """Files of a run and of what it saved, by their path; JSON as its values, others as digests."""
    found = {}
    for top in ("run", "saved"):
        for path in sorted((folder / top).rglob("*")):
            # A page shows times, and locks depend on which processes have shared the work.
            if path.is_file() and path.name != "report.html" and path.suffix != ".lock":
                found[path.relative_to(folder).as_posix()] = _content(path)
    return found


def losses(folder: Path) -> dict[str, Any]:
    """What the last process of a run returned and logged, without times."""
    log = json.loads((folder / "log.json").read_text())
    return {
        "loss": log["loss"],
        "metrics": _without_times(log["metrics"]),
        "history": [_without_times(entry) for entry in log["history"]],
    }


def differences(expected: Any, found: Any, name: str = "") -> Iterator[str]:
    """Names of the files and values in which two runs differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            if key not in found or key not in expected:
                yield f"{name}{key}: {'missing' if key in expected else 'too many'}"
            else:
                yield from differences(expected[key], found[key], f"{name}{key}: ")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, pair in enumerate(zip(expected, found)):
            yield from differences(*pair, f"{name}{number}: ")
    elif expected != found:
        yield f"{name}expected {expected!r:.200}, found {found!r:.200}"


def _content(path: Path) -> Any:
    if path.name == "adapter_config.json":
        # PEFT writes a set in an order that changes from process to process.
        config = json.loads(path.read_text())
        return {**config, "target_modules": sorted(config["target_modules"])}
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.name == "README.md":
        # The order of trl's tags changes from process to process.
        return sorted(_COSTS_OF_CARD.sub("", path.read_text()).splitlines())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: own for key, own in value.items() if key not in _TIMES and not _TIME_OF_LOG.search(key)}
        return {key: _without_times(own) for key, own in kept.items()}
    return [_without_times(own) for own in value] if isinstance(value, list) else value
