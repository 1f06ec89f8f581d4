"""`hf-ensemble select`: tasks that help a target, from gradients that were captured before."""

import json
from collections.abc import Mapping, Sequence

from ...errors import ConfigurationError
from ...select import Selection
from ..choice_arguments import SelectArguments
from ..choices import save_choice, selector_of
from ..parsing import parse
from ..tables import console, example_table, path_table, selection_table


def main(argv: Sequence[str]) -> Selection:
    """Select tasks for targets; writes the selection and its pictures.

    Raises:
        `HfEnsembleError`: for bad arguments and stores.
    """
    (arguments,), _ = parse([SelectArguments], argv, command="select")
    selector = selector_of(arguments, _clusters(arguments.clusters))
    selection = selector.select(
        arguments.target,
        include=arguments.include,
        exclude=arguments.exclude or (),
        **arguments.select_arguments(),
    )
    out = console()
    out.print(path_table(selection))
    out.print(selection_table(selection))
    save_choice(selection, arguments.output_dir, out)
    if arguments.score_examples:
        scores = selector.score_examples(arguments.target, selection.weights)
        out.print(example_table(scores))
        save_choice(scores, arguments.output_dir, out)
    return selection


def _clusters(text: Mapping[str, int] | str | None) -> Mapping[str, int] | None:
    try:
        counts = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"clusters has to be JSON like '{{\"mr\": 5}}', found {text!r}: {error}") from error
    if counts is not None and not isinstance(counts, Mapping):
        raise ConfigurationError(f"clusters has to map tasks to numbers, found {text!r}.")
    return counts
