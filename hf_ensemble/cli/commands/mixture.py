"""`hf-ensemble mixture`: sampling weights of the tasks, from gradients that were captured before."""

import json
from collections.abc import Sequence

from rich.table import Table

from ...errors import ConfigurationError
from ...select import Mixture
from ..choice_arguments import MixtureArguments
from ..choices import save_choice, selector_of
from ..parsing import parse
from ..tables import console


def main(argv: Sequence[str]) -> Mixture:
    """Find sampling weights; writes the mixture and its pictures.

    Raises:
        `HfEnsembleError`: for bad arguments and stores.
    """
    (arguments,), _ = parse([MixtureArguments], argv, command="mixture")
    caps = {} if arguments.caps is None else {"caps": _caps(arguments.caps)}
    selector = selector_of(arguments)
    options = {"max_iterations": arguments.max_iterations, "search_rows": arguments.search_rows}
    mixture = selector.mixture(arguments.target, **options, **caps)
    out = console()
    out.print(_table(mixture))
    save_choice(mixture, arguments.output_dir, out)
    return mixture


def _caps(text: str) -> float | dict[str, float]:
    try:
        caps = json.loads(text)
    except json.JSONDecodeError:
        caps = None
    if not isinstance(caps, (int, float, dict)) or isinstance(caps, bool):
        raise ConfigurationError(
            f"caps has to be a number from 0 to 1, or JSON like '{{\"mr\": 0.5}}', found {text!r:.60}. Correct it."
        )
    return caps


def _table(mixture: Mixture) -> Table:
    table = Table(title=f"Sampling weights for {', '.join(mixture.targets)}", caption=mixture.summary)
    table.add_column("task")
    table.add_column("weight of a row", justify="right")
    table.add_column("share of the rows drawn", justify="right")
    for task, weight in sorted(mixture.weights.items(), key=lambda item: -item[1]):
        table.add_row(task, f"{weight:.3f}", f"{mixture.probabilities[task]:.3f}")
    table.add_section()
    for name, loss in {"this mixture": mixture.predicted_loss, **mixture.baselines}.items():
        table.add_row(name.replace("_", " "), f"predicted loss {loss:.4f}", "")
    return table
