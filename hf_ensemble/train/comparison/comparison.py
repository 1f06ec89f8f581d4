"""`BaselineComparison`: an ensemble beside the simpler systems that it has to beat."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from datasets import Dataset
from peft import ArrowConfig, LoraConfig
from peft.tuners.lora.arrow import check_loaded_lora_compatibility_arrow

from ..._files import write_atomically
from ..._processes import is_main_process, run_on_main, wait_for_everyone
from ..._settings import check_at_least, check_number
from ...ensemble import PeftEnsembleModel
from ...errors import ConfigurationError
from ...evaluate import TaskScores
from ...logging import get_logger
from ...models.usage import Usage
from ...runs import ComparedSystem, Comparison, Costs, RowFigures
from ...runs.systems import BASELINE
from ..ensemble_trainer import EnsembleSFTTrainer, EnsembleTrainer
from ..flows.system_costs import system_cost
from ..inputs.evaluation_rows import labelled_test_rows
from .adapters import loaded_adapters
from .baselines import chosen_baselines
from .makers import MadeSystem, SystemMaker, training_ratio

logger = get_logger(__name__)

# Systems that a run scores by itself.
_OF_THE_RUN = ("base", BASELINE, "ensemble")
_ROUTER = "compared_router"


class BaselineComparison:
    """Compares an ensemble run with simpler systems, each trained, scored and costed by the run's own code.

    | name | system |
    |---|---|
    | `scaled` | one adapter for all, its logits scaled for each task as the ensemble's are |
    | `longer` | one adapter for all, trained as long as the ensemble's adapters together |
    | `longer_scaled` | the same, its logits scaled |
    | `wider` | the same, of a rank that stores as much as the ensemble |
    | `per_task` | one adapter per task |
    | `finetuned` | one adapter for all, then continued on each task (MTL-FT) |
    | `random_groups` | one adapter per group of a random partition |
    | `gradient_clusters` | one per cluster of the tasks' mean gradients, by k-means (arXiv 2502.00089: of rows) |
    | `average` | the mean of the tasks' adapters as one adapter |
    | `task_arithmetic` | their sum, scaled by what is best on evaluation rows (arXiv 2212.04089) |
    | `ties`, `tsv`, `knots` | merged by TIES, TSV-Merge or KnOTS |
    | `lorahub` | a sum for each task, with weights searched for on evaluation rows (arXiv 2307.13269) |
    | `arrow` | PEFT's Arrow router over the tasks' adapters (arXiv 2405.11157) |
    | `seeds` | the mean logits of several seeds of one adapter for all |

    Adapters lie in the run's folder; what it holds already is not trained again, and a comparison that was killed goes
    on where it stopped. A system whose settings were others is made anew.

    Args:
        trainer (`EnsembleTrainer` or `EnsembleSFTTrainer`): over the tasks; its run is trained first where it is not.
        baselines (`str` or `Sequence[str]`, *optional*, defaults to `"all"`):
            Names from the table. With `"all"`, those that the adapters do not allow are left out, with the reason.
        continued_length (`float`, *optional*, defaults to 0.5):
            `finetuned`: length of each task's own training, in multiples of a training.
        num_groups (`int`, *optional*): of `random_groups` and `gradient_clusters`; as many as the ensemble has, and at
            least two, by default.
        num_seeds (`int`, *optional*): of `seeds`; as many as the ensemble has adapters, and at least two, by default.
        seed (`int`, *optional*, defaults to 0): of the random groups.

    Raises:
        `ConfigurationError`: for another trainer, unknown names, systems asked for by name that cannot be made, and
            values out of range.

    Example:

    ```python
    >>> comparison = BaselineComparison(trainer, ["longer", "per_task"]).run()  # doctest: +SKIP
    >>> print(comparison.to_markdown())  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        trainer: EnsembleTrainer | EnsembleSFTTrainer,
        baselines: str | Sequence[str] = "all",
        continued_length: float = 0.5,
        num_groups: int | None = None,
        num_seeds: int | None = None,
        seed: int = 0,
    ):
        if not isinstance(trainer, (EnsembleTrainer, EnsembleSFTTrainer)) or trainer.trains_directly:
            raise ConfigurationError(
                "Expected an EnsembleTrainer or EnsembleSFTTrainer over several datasets, with an adapter; found "
                f"{type(trainer).__name__}{' that trains one model' if hasattr(trainer, 'trains_directly') else ''}."
            )
        if not trainer.args.train_baseline:
            raise ConfigurationError(
                "A comparison is with one adapter for all, which train_baseline=False does not train. Leave it out."
            )
        check_number("continued_length", continued_length, 0, above=True)
        check_at_least("num_groups", num_groups, 2, optional=True)
        check_at_least("num_seeds", num_seeds, 2, optional=True)
        check_at_least("seed", seed, 0)
        if num_groups is not None and num_groups > len(trainer.tasks):
            raise ConfigurationError(f"Expected num_groups up to {len(trainer.tasks)} tasks, found {num_groups}.")
        self.trainer = trainer
        self.names, self.left_out = chosen_baselines(baselines, trainer.adapter_model, trainer.tasks)
        self.continued_length = continued_length
        self.num_groups = num_groups
        self.num_seeds = num_seeds
        self.seed = seed

    def run(self) -> Comparison:
        """Train and score what the run does not hold yet.

        Systems are scored on the tasks' test rows, or on evaluation rows unless all tasks have test rows with labels.

        Returns:
            `Comparison`: also in the run's folder, as `comparison.json` and `comparison.md`.
        """
        trainer = self.trainer
        if trainer.ensemble is None:
            trainer.train()
        split, tables = self._rows()
        with trainer.working():
            maker = self._maker()
            found = self._known(split, maker)
            for name in (*_OF_THE_RUN, *self.names):
                if name not in found.systems:
                    with trainer.run_directory.repeated("comparison", adds_up=True):
                        found = replace(found, systems={**found.systems, name: self._system(name, tables, maker)})
                    self._write(found)
            order = [*_OF_THE_RUN, *self.names]
            found = replace(found, systems={name: found.systems[name] for name in order}, left_out=self.left_out)
            self._write(found)
        return found

    def _rows(self) -> tuple[str, Mapping[str, Dataset]]:
        trainer, context = self.trainer, self.trainer.flow.context
        rows = labelled_test_rows(trainer.tasks)
        if rows is None:
            return "eval", context.eval_tables
        return "test", {name: context.model_columns(own) for name, own in trainer.prepare_rows(rows).items()}

    def _known(self, split: str, maker: SystemMaker) -> Comparison:
        """What the run holds of a comparison on these rows, without the systems of other settings."""
        run = self.trainer.run_directory
        known = run_on_main(lambda: run.read_if_there(Comparison))
        if known is None or known.split != split:
            return Comparison(split)
        return replace(
            known,
            systems={name: own for name, own in known.systems.items() if own.settings == maker.settings(name)},
        )

    def _write(self, found: Comparison) -> None:
        run = self.trainer.run_directory
        if is_main_process():
            run.write(found)
            text = found.to_markdown().encode()
            write_atomically(run.comparison_table, lambda file: file.write(text))
        wait_for_everyone()

    def _system(self, name: str, tables: Mapping[str, Dataset], maker: SystemMaker) -> ComparedSystem:
        flow, made = self.trainer.flow, MadeSystem()
        if name in _OF_THE_RUN:
            with flow.context.model_state.restored():
                scores = flow.score_system(name, tables)
            cost = flow.costs[name]
        else:
            logger.info("Comparing with %s.", name)
            made = maker.make(name)
            with flow.context.model_state.restored():
                scores, forward = self._scored(name, made, tables)
            cost = system_cost(made.trainings, made.folders, forward)
        rows = {task: RowFigures.of(own.rows) for task, own in scores.items() if own.rows is not None}
        return ComparedSystem(scores, rows, cost, made.search_flops, made.note, maker.settings(name))

    def _maker(self) -> SystemMaker:
        flow = self.trainer.flow
        costs = run_on_main(lambda: flow.context.run.read(Costs)).systems
        members, tasks = len(flow.ensemble.adapter_names), len(self.trainer.tasks)
        return SystemMaker(
            flow,
            training_ratio(costs["ensemble"], costs[BASELINE]),
            self.continued_length,
            self.num_groups or min(max(len(flow.grouping.groups), 2), tasks),
            self.num_seeds or max(members, 2),
            self.seed,
        )

    def _scored(
        self, name: str, made: MadeSystem, tables: Mapping[str, Dataset]
    ) -> tuple[dict[str, TaskScores], Usage]:
        flow = self.trainer.flow
        if name == "arrow":
            with loaded_adapters(flow, made.together) as members:
                return self._routed(members, tables), flow.evaluation.forward
        if made.together:
            with loaded_adapters(flow, made.together) as members:
                ensemble = PeftEnsembleModel(
                    flow.context.model, members, label_space=flow.context.label_space, scales=made.scales
                )
                equal = dict.fromkeys(members, 1.0 / len(members))
                ensemble.weights = {task: dict(equal) for task in tables}
                return flow.evaluation.score_ensemble(ensemble, tables), flow.evaluation.forward
        scores, forward = {}, Usage()
        for folder in made.folders:
            own = {task: rows for task, rows in tables.items() if made.serving[task] == folder}
            scores |= flow.evaluation.score_adapter(folder, own, f"Evaluating {name}", kind=name)
            forward.add(flow.evaluation.forward)
        return {task: scores[task] for task in tables}, forward

    def _routed(self, members: list[str], tables: Mapping[str, Dataset]) -> dict[str, TaskScores]:
        """Scores under PEFT's router over adapters that are on the model."""
        context = self.trainer.flow.context
        model = context.model
        targets, rank = check_loaded_lora_compatibility_arrow(model, adapter_names=members)
        config = ArrowConfig(top_k=min(3, len(members)))
        config.task_adapter_names, config.gks_adapter_names = members, []
        model.add_adapter(_ROUTER, LoraConfig(arrow_config=config, target_modules=targets, r=rank))
        try:
            model.set_adapter(_ROUTER, inference_mode=True)
            return self.trainer.flow.evaluation.score_current(tables, "Evaluating arrow", "arrow")
        finally:
            model.set_adapter(context.adapter_name, inference_mode=True)
            model.delete_adapter(_ROUTER)
            for module in model.modules():
                # What PEFT leaves of a router.
                if hasattr(module, "lora_arrow"):
                    del module.lora_arrow
                    module.lora_variant.pop(_ROUTER, None)
