"""From the records of a run to its page."""

import base64
import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..._files import write_atomically
from ...ensemble.saving.card import public_name
from ...errors import ConfigurationError
from ...runs import Evaluation, ExampleRows, Results, RunDirectory, RunRecord, run_results
from ...runs.systems import ordered_systems, system_name
from ...runs.verdict import number
from ..card_data import public_values
from .sections import sections_of

TEMPLATE, STYLE, SCRIPT = "run_report.html.jinja", "run_report.css", "run_report.js"


def write_report(run: str | Path, path: str | Path | None = None) -> Path:
    """Write a run as one HTML file, which needs no other file and no network.

    Args:
        run (`str` or `Path`): a trainer's `output_dir`.
        path (`str` or `Path`, *optional*): the file; `report.html` in the run by default.

    Returns:
        `Path`: the file.

    Raises:
        `ConfigurationError`: for a folder that holds no run that was evaluated.
        `RecordError`: when a record of the run is damaged.
    """
    directory = RunDirectory(run)
    if not directory.has(RunRecord) or not directory.has(Evaluation):
        raise ConfigurationError(
            f"Expected the output_dir of a run that was trained and evaluated, found none in {str(directory.path)!r}. "
            "Check the path, or let train() end."
        )
    target = directory.report if path is None else Path(path)
    text = render(directory)
    write_atomically(target, lambda file: file.write(text.encode("utf-8", "replace")))
    return target


def render(run: RunDirectory) -> str:
    """The page of a run."""
    files = resources.files("hf_ensemble.model_cards")
    template, style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in (TEMPLATE, STYLE, SCRIPT))
    record, results = run.read(RunRecord), run_results(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    configuration = public_values({"configuration": record.configuration, "choices": record.choices})
    return environment.from_string(template).render(
        title=f"{run.path.resolve().name or 'run'}",
        base=public_name(str((record.configuration.get("model") or {}).get("name") or "")) or "a local model",
        results=results,
        tiles=list(_tiles(results)),
        sections=[section for section in sections_of(run, results) if section.charts or section.tables],
        examples=run.read_if_there(ExampleRows),
        configuration=json.dumps(configuration, indent=2, ensure_ascii=False),
        versions=results.versions,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _tiles(results: Results) -> Iterator[tuple[str, str, str]]:
    """Name, figure and note of what is seen first."""
    for system in ordered_systems(results.scores):
        known = results.intervals.get(system)
        low, high = known.mean["loss"] if known else (None, None)
        note = f"{number(low)} to {number(high)}" if known else ""
        yield f"mean loss, {system_name(system)}", number(results.mean_loss[system]), note
