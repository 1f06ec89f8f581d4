"""Scores of the base model, of single adapters and of ensembles."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GenerationConfig
from transformers.trainer_utils import speed_metrics

from ..._compat import preserve_active_adapter
from ..._values import is_number
from ...ensemble import PeftEnsembleModel
from ...ensemble.saving.files import load_adapter
from ...evaluate import AnswerFigures, Generate, Scorer, TaskScores, mean_scores
from ...logging import get_logger
from ...models.usage import FlopSamples, Usage, measured_usage
from ...runs import EvaluatedRows, Evaluation, RowFigures, run_results
from ..inputs.used_models import mark_as_of_a_run
from .context import FlowContext
from .predictions import prediction_trainer

logger = get_logger(__name__)

# While an adapter of a folder is scored it has this name on the model.
SCORED_ADAPTER = "scored_adapter"


class SystemEvaluation:
    """Scores systems on token tables by task: their loss and accuracy, and their metrics.

    Metrics are those of the answers that a system generates, and what the trainer's `compute_metrics` returns: the
    parent's evaluation loop hands it the predictions, in a pass of its own over the rows.

    Args:
        context (`FlowContext`): what the run works on.

    Attributes:
        forward (`Usage`): what the forward passes took by which loss and accuracy were scored last.
        ignore_keys (`list[str]`, *optional*): outputs that `compute_metrics` does not get, as during the trainings.
    """

    def __init__(self, context: FlowContext):
        self.context = context
        self.forward = Usage()
        self.ignore_keys: list[str] | None = None
        # By kind of adapter: those of a run differ in their weights alone.
        self._samples: dict[str, FlopSamples] = defaultdict(FlopSamples)

    def score_base(self, tables: Mapping[str, Dataset]) -> dict[str, TaskScores]:
        """Scores of the base model alone."""
        with self.context.model.disable_adapter():
            return self.score_current(tables, "Evaluating base model", "base")

    def score_current(
        self, tables: Mapping[str, Dataset], description: str, kind: str = "adapter"
    ) -> dict[str, TaskScores]:
        """Scores of the adapter that is active now; adapters of one `kind` differ in their weights alone."""
        scores = self.teacher_forced(tables, description, kind)
        return self._with_metrics(scores, self.generate, tables, description)

    def teacher_forced(
        self, tables: Mapping[str, Dataset], description: str, kind: str = "adapter"
    ) -> dict[str, TaskScores]:
        """Loss and accuracy of what is active now, without generating answers."""
        return self._scored(self.context.answer_scorer(), tables, description, self._samples[kind])

    def _scored(
        self, scorer: Scorer, tables: Mapping[str, Dataset], description: str, samples: FlopSamples | None
    ) -> dict[str, TaskScores]:
        with measured_usage() as self.forward:
            return self.context.evaluator.score_tasks(scorer, tables, description, samples)

    def score_adapter(
        self,
        folder: Path,
        tables: Mapping[str, Dataset],
        description: str,
        has_metrics: bool = True,
        kind: str = "adapter",
    ) -> dict[str, TaskScores]:
        """Scores of a saved adapter, with its metrics unless only loss and accuracy are asked for."""
        with self._loaded(folder):
            return (self.score_current if has_metrics else self.teacher_forced)(tables, description, kind)

    def score_ensemble(self, ensemble: PeftEnsembleModel, tables: Mapping[str, Dataset]) -> dict[str, TaskScores]:
        """Scores of an ensemble, each row under its task's weights."""
        # Each task has adapters of its own.
        scores = self._scored(ensemble_scorer(ensemble), tables, "Evaluating ensemble", None)
        return self._with_metrics(scores, ensemble_generate(ensemble), tables, "Evaluating ensemble", ensemble)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tasks: Sequence[str], settings: GenerationConfig
    ) -> torch.Tensor:
        """Prompts continued by the adapter that is active now."""
        return self.context.model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings
        )

    def _with_metrics(
        self,
        scores: Mapping[str, TaskScores],
        generate: Generate,
        tables: Mapping[str, Dataset],
        description: str,
        ensemble: PeftEnsembleModel | None = None,
    ) -> dict[str, TaskScores]:
        answered = self.context.answers.score_tasks(generate, tables, f"{description}, answers")
        computed = self._computed(tables, ensemble)
        nothing = AnswerFigures({}, {})
        figures = {task: answered.get(task, nothing) for task in scores}
        hidden = sorted(
            {name for task, own in figures.items() for name in set(own.figures) & set(computed.get(task, {}))}
        )
        if hidden:
            logger.warning_once(
                "compute_metrics and answer_metrics both return %s: those of generated answers are reported. Rename "
                "the others.",
                ", ".join(hidden),
            )
        return {
            task: replace(
                own,
                metrics={**computed.get(task, {}), **figures[task].figures},
                rows=None if own.rows is None else replace(own.rows, metrics=figures[task].rows),
            )
            for task, own in scores.items()
        }

    def _computed(
        self, tables: Mapping[str, Dataset], ensemble: PeftEnsembleModel | None
    ) -> dict[str, dict[str, float]]:
        """What the trainer's `compute_metrics` returns for each task."""
        if not self.context.computes_metrics():
            return {}
        with prediction_trainer(self.context, tables, ensemble) as trainer:
            found = {task: trainer.computed_metrics(task, self.ignore_keys) for task in tables}
        for is_reported, what in ((is_number, "no numbers"), (math.isfinite, "not finite")):
            odd = sorted({name for own in found.values() for name, value in own.items() if not is_reported(value)})
            if odd:
                logger.warning_once(
                    "compute_metrics returns %s, which are %s: they are not reported.", ", ".join(odd), what
                )
            found = {
                task: {name: float(value) for name, value in own.items() if is_reported(value)}
                for task, own in found.items()
            }
        return found

    def speed(self, prefix: str, start: float, scores: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, float]:
        """Time since `start`, and the rows and batches that were scored in it, all systems together."""
        counts = [own.num_examples for by_task in scores.values() for own in by_task.values()]
        args = self.context.args
        batch_size = args.per_device_eval_batch_size * args.world_size
        return speed_metrics(prefix, start, sum(counts), sum(math.ceil(count / batch_size) for count in counts))

    def is_kept(self, prefix: str, tasks: Collection[str], is_of_own_rows: bool) -> bool:
        """Whether scores of these tasks belong into the run's records.

        Those of the prefix `eval` are of the run's own evaluation rows, and those of some tasks do not take the place
        of those of more.
        """
        if prefix == "eval":
            return is_of_own_rows
        known = (self.context.run.read_if_there(Evaluation) or Evaluation()).scores.get(prefix, {})
        return all(set(by_task) <= set(tasks) for by_task in known.values())

    def keep(self, prefix: str, scores: Mapping[str, Mapping[str, TaskScores]]) -> None:
        """Add the scores of each system to the run's records, beside those of other prefixes, and renew its results."""
        run = self.context.run
        kept = run.read_if_there(Evaluation) or Evaluation()
        own = {system: dict(by_task) for system, by_task in scores.items()}
        run.write(replace(kept, scores={**kept.scores, prefix: own}))
        rows = run.read_if_there(EvaluatedRows) or EvaluatedRows()
        known = {
            system: {task: RowFigures.of(one.rows) for task, one in by_task.items() if one.rows is not None}
            for system, by_task in scores.items()
        }
        run.write(EvaluatedRows({**rows.rows, prefix: known}))
        run.write(run_results(run))

    @contextmanager
    def _loaded(self, folder: Path) -> Iterator[None]:
        """While open, a saved adapter is the active one."""
        model = self.context.model
        with preserve_active_adapter(model):
            load_adapter(model, folder, SCORED_ADAPTER)
            mark_as_of_a_run(model.peft_config[SCORED_ADAPTER])
            try:
                model.set_adapter(SCORED_ADAPTER, inference_mode=True)
                yield
            finally:
                model.set_adapter(self.context.adapter_name, inference_mode=True)
                model.delete_adapter(SCORED_ADAPTER)


def ensemble_scorer(ensemble: PeftEnsembleModel) -> Scorer:
    """Answers scored by an ensemble, each row under its task's weights."""

    def scorer(inputs, labels, tasks):
        return ensemble.score(labels=labels, task=tasks, **inputs)

    return scorer


def ensemble_generate(ensemble: PeftEnsembleModel) -> Generate:
    """Prompts continued by an ensemble, each under its task's weights."""

    def generate(input_ids, attention_mask, tasks, settings):
        return ensemble.generate(input_ids, tasks, attention_mask=attention_mask, generation_config=settings)

    return generate


def flat_metrics(
    scores: Mapping[str, Mapping[str, TaskScores]], prefix: str, main_system: str, target: str | None = None
) -> dict[str, float]:
    """Scores by system and task as one dict of metrics; those of the main system carry no further name.

    Without a task's name, `PREFIX_loss`, are the target's scores, or the means over the tasks where there is no target.
    """
    metrics: dict[str, float] = {}
    for system, by_task in scores.items():
        start = prefix if system == main_system else f"{prefix}_{system}"
        for task, own in [*by_task.items(), ("mean", mean_scores(by_task))]:
            metrics |= _named(f"{start}_{task}", own)
    main = scores[main_system]
    return metrics | _named(prefix, main[target] if target in main else mean_scores(main))


def _named(prefix: str, scores: TaskScores) -> dict[str, float]:
    values = {"loss": scores.loss, "accuracy": scores.accuracy, **scores.metrics}
    return {f"{prefix}_{name}": value for name, value in values.items()}
