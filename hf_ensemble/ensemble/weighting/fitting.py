"""Fitting an ensemble's weights to rows of its tasks, on outputs that the adapters compute once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..._settings import check_at_least, check_flag, check_number, check_one_of, checked_mapping
from ...errors import EnsembleError
from ...models.precision import MIXED_PRECISIONS
from ...models.wrappers import evaluation_mode
from ...tasks import TASK
from ..forward.router import NUM_STATES
from ..members import standing_alone
from .collation import Collator, default_collator
from .collector import AnswerCollector, CollectedAnswers, Members, Rows
from .cross_validation import check_own_adapters, cross_validated_weights
from .objectives import FittedWeights, check_constraint, fit_objective
from .router_fitting import RouterFit, fit_prompt_router


@dataclass(frozen=True)
class WeightFit:
    """Fitted weights, and how they compare with equal weights and single adapters.

    Args:
        adapter_names (`list[str]`): adapter names, in the order of the weights.
        tasks (`dict[str, FittedWeights]`): weights of each task.
        overall (`FittedWeights`): one set of weights for all tasks, which count equally.
    """

    adapter_names: list[str]
    tasks: dict[str, FittedWeights]
    overall: FittedWeights

    def weights_of(self, fitted: FittedWeights) -> dict[str, float]:
        """Weight of each adapter, without those of weight 0."""
        return {name: float(w) for name, w in zip(self.adapter_names, fitted.weights) if w}

    @property
    def scales(self) -> dict[str, float]:
        """What each task's combined logits are multiplied by, where it is not 1."""
        return {task: fitted.scale for task, fitted in self.tasks.items() if fitted.scale != 1.0}

    def report(self) -> dict[str, dict[str, float]]:
        """Mean example loss, in nats, of each task and of `overall` on the rows themselves.

        `fitted` is that of the weights with their scale, `uniform` of equal weights, `one_hot` of the best single
        adapter, and `gap` bounds how far the weights, without their scale, are above the least loss of any. What
        weights are chosen by are the losses of rows that they were not fitted to: `tasks[name].validation`.
        """
        return {
            task: {
                "fitted": fitted.loss,
                "uniform": fitted.uniform_loss,
                "one_hot": float(fitted.one_hot_losses.min()),
                "gap": fitted.gap,
            }
            for task, fitted in [*self.tasks.items(), ("overall", self.overall)]
        }


def fit_ensemble(
    ensemble: Members,
    dataset: "Mapping[str, Rows] | Rows",
    constraint: str = "simplex",
    data_collator: Collator | None = None,
    batch_size: int = 8,
    min_weight: float = 0.0,
    max_values: int = 2**27,
    max_rows: int | None = None,
    seed: int = 0,
    mixed_precision: str = "no",
    cross_validate: bool = True,
    own_adapters: Mapping[str, Mapping[str, float]] | None = None,
) -> WeightFit:
    """Fit the weights of each task, and one set of weights for all tasks, on the adapters' outputs.

    Every adapter runs once over the rows; everything else is found on the kept logits, in which the mean loss of the
    combined outputs is convex in the weights. A task's weights are chosen by cross-validation, see
    [`cross_validated_weights`]; those for all tasks, which rest on all rows, are the optimum. The ensemble stays as it
    is. Results depend on the rows and the seed, and on the batch size by rounding only.

    Args:
        ensemble ([`PeftEnsembleModel`]): the ensemble.
        dataset (`dict[str, Dataset]` or rows with a column `task`):
            Rows of token ids and labels, by task. Use rows that the adapters were not trained on.
        constraint (`str`, *optional*, defaults to `"simplex"`):
            `simplex` (none below 0, sum 1), `nonnegative` (none below 0, any sum) or `unconstrained`.
        data_collator (`Callable`, *optional*): from rows to a batch; pads on the right by default.
        batch_size (`int`, *optional*, defaults to 8): rows per forward, halved where memory runs out.
        min_weight (`float`, *optional*, defaults to 0.0): on the simplex, lighter adapters are left out.
        max_values (`int`, *optional*): most values to keep of all tasks together, 4 bytes each.
        max_rows (`int`, *optional*): most rows of a task; a seeded sample is drawn from larger ones.
        seed (`int`, *optional*, defaults to 0): seed of the samples.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"bf16"` or `"fp16"` runs the adapters under autocast.
        cross_validate (`bool`, *optional*, defaults to `True`):
            Set to `False` for the weights with the least loss on these rows, which overfit few of them.
        own_adapters (`dict[str, dict[str, float]]`, *optional*):
            By task, weights of the adapters that were trained for it: what its weights are shrunk towards.

    Returns:
        [`WeightFit`]: the weights, with the losses of equal weights and of single adapters.

    Raises:
        `EnsembleError`:
            Without rows, labels or answers, for tokens and labels outside of the model's, for arguments out of range,
            for a `max_values` that holds no answer token, and for the combination
            `weights`, whose loss is not convex in its weights.
    """
    check_constraint(constraint, ensemble.combination)
    check_number("min_weight", min_weight, 0, 1, error=EnsembleError)
    check_flag("cross_validate", cross_validate, EnsembleError)
    own_adapters = check_own_adapters(own_adapters, ensemble.adapter_names)
    if ensemble.combination == "weights":
        raise EnsembleError(
            "With the combination 'weights' the loss is not convex in the weights: fit them with combination='logits', "
            "and compare the losses before using them for 'weights'."
        )
    collect, tables = _collector(
        ensemble, dataset, data_collator, batch_size, max_values, max_rows, seed, mixed_precision
    )
    with evaluation_mode(ensemble):
        answers = {task: collect(task, rows) for task, rows in tables.items()}
    names, combination = ensemble.adapter_names, ensemble.combination
    optima = {
        task: fit_objective(own.objective(combination), len(names), constraint, combination, min_weight)
        for task, own in answers.items()
    }
    overall = _overall(answers, optima, names, constraint, combination, min_weight)
    if not cross_validate:
        return WeightFit(names, optima, overall)
    chosen = {
        task: cross_validated_weights(
            own, names, combination, optima[task], own_adapters.get(task), min_weight, seed=seed
        )
        for task, own in answers.items()
    }
    return WeightFit(names, chosen, overall)


def _collector(
    ensemble: Members,
    dataset: "Mapping[str, Rows] | Rows",
    data_collator: Collator | None,
    batch_size: int,
    max_values: int,
    max_rows: int | None,
    seed: int,
    mixed_precision: str,
    values_per_row: int = 0,
) -> tuple[AnswerCollector, dict[str, Rows]]:
    """What collects the answers of a task, from arguments of [`fit_ensemble`], and the rows of each task."""
    check_at_least("batch_size", batch_size, 1, error=EnsembleError)
    check_at_least("max_values", max_values, 1, error=EnsembleError)
    check_at_least("max_rows", max_rows, 1, optional=True, error=EnsembleError)
    check_at_least("seed", seed, 0, error=EnsembleError)
    check_one_of("mixed_precision", mixed_precision, MIXED_PRECISIONS, EnsembleError)
    tables = rows_by_task(dataset)
    collect = AnswerCollector(
        ensemble,
        data_collator or default_collator(ensemble.config),
        batch_size,
        max_values // len(tables),
        max_rows,
        seed,
        log_probs_only=ensemble.combination == "probs",
        mixed_precision=mixed_precision,
        values_per_row=values_per_row,
    )
    _check_room(collect, max_values, len(tables))
    return collect, tables


def _check_room(collect: AnswerCollector, max_values: int, num_tasks: int) -> None:
    least = num_tasks * (collect.values_per_token + collect.values_per_row)
    if max_values < least:
        raise EnsembleError(
            f"max_values={max_values} holds no answer token of {len(collect.members.adapter_names)} adapters for each "
            f"of {num_tasks} tasks. Pass max_values={least} or more."
        )


def _overall(
    answers: Mapping[str, CollectedAnswers],
    optima: Mapping[str, FittedWeights],
    names: list[str],
    constraint: str,
    combination: str,
    min_weight: float,
) -> FittedWeights:
    """One set of weights for all tasks, which count equally."""
    if len(optima) == 1:
        return next(iter(optima.values()))
    objectives = [own.objective(combination) for own in answers.values()]

    def objective(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        parts = [own(w) for own in objectives]
        return tuple(sum(values) / len(parts) for values in zip(*parts))

    return fit_objective(objective, len(names), constraint, combination, min_weight)


def rows_by_task(dataset: "Mapping[str, Rows] | Rows") -> dict[str, Rows]:
    """The rows of each task; raises `EnsembleError` for other forms and for none."""
    if isinstance(dataset, Mapping):
        tables: dict[str, Any] = dict(dataset)
    else:
        tables = {}
        if isinstance(dataset, str) or not isinstance(dataset, Iterable):
            raise EnsembleError(f"Expected a dict of rows by task, found {dataset!r:.60}.")
        for row in dataset:
            if not isinstance(row, Mapping) or TASK not in row:
                raise EnsembleError(
                    f"Expected a dict of rows by task, or rows with a column 'task', found the row {row!r:.60}."
                )
            tables.setdefault(row[TASK], []).append(row)
    checked_mapping("rows by task", tables, EnsembleError)
    empty = sorted(task for task, rows in tables.items() if not len(rows))
    if empty or not tables:
        raise EnsembleError(f"Expected rows of at least one task, found none{f' of {empty}' if empty else ''}.")
    return tables


def fit_router(
    ensemble: Members,
    dataset: "Mapping[str, Rows] | Rows",
    data_collator: Collator | None = None,
    batch_size: int = 8,
    max_values: int = 2**27,
    max_rows: int | None = 200,
    seed: int = 0,
    mixed_precision: str = "no",
    prompts: "Mapping[str, Rows] | Rows | None" = None,
    max_prompts: int | None = 1000,
) -> RouterFit:
    """Fit a router of prompts of unknown tasks, see [`fit_prompt_router`]. The ensemble stays as it is.

    Every adapter runs once over the rows, and the base model once over their prompts, whose hidden states count towards
    `max_values` too. Boosting steps make no sense alone, and are routed no rows. The arguments are those of
    [`fit_ensemble`], and:

    Args:
        prompts (`dict[str, Dataset]` or rows with a column `task`, *optional*):
            Further rows of these tasks, from which the router learns what a task's prompts are like: the training rows.
            They need no labels, and no adapter runs over them; their hidden states take up to another `max_values`.
        max_prompts (`int`, *optional*, defaults to 1000):
            Most of these rows of a task to use; a sample of them is drawn from more. `None` uses all.

    Raises:
        `EnsembleError`: as [`fit_ensemble`], and for inputs without `input_ids` and prompts of other tasks.
    """
    if ensemble.combination == "weights":
        raise EnsembleError(
            "A router is fitted to the loss of combined outputs: fit it with combination='logits', and compare the "
            "losses before using it for 'weights'."
        )
    check_at_least("max_prompts", max_prompts, 1, optional=True, error=EnsembleError)
    num_states = NUM_STATES * getattr(ensemble.config.get_text_config(), "hidden_size", 0)
    collect, tables = _collector(
        ensemble, dataset, data_collator, batch_size, max_values, max_rows, seed, mixed_precision, num_states
    )
    more = {} if prompts is None else rows_by_task(prompts)
    if unknown := sorted(set(more) - set(tables)):
        raise EnsembleError(
            f"Expected prompts of the tasks whose answers the router is fitted to ({', '.join(sorted(tables))}), found "
            f"prompts of {unknown}. Add answered rows of these tasks, or leave their prompts out."
        )
    alone = standing_alone(ensemble.members)
    with evaluation_mode(ensemble):
        answers = {task: collect(task, rows).of_members(alone) for task, rows in tables.items()}
        states = {task: collect.states(rows) for task, rows in tables.items()}
        more_states = {task: collect.states_of_prompts(rows, max_prompts) for task, rows in more.items()}
    return fit_prompt_router(answers, states, ensemble.combination, seed, more_states)
