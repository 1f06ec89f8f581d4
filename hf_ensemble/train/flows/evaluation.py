"""Scores of the base model, of single adapters and of ensembles."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GenerationConfig

from ..._compat import preserve_active_adapter
from ...ensemble import PeftEnsembleModel
from ...ensemble.saving.files import load_adapter
from ...evaluate import Generate, TaskScores, mean_scores
from ...runs import Evaluation
from ..inputs.used_models import mark_as_of_a_run
from .context import FlowContext

# While an adapter of a folder is scored it has this name on the model.
SCORED_ADAPTER = "scored_adapter"


class SystemEvaluation:
    """Scores systems on token tables by task: their loss and accuracy, and the metrics of the answers they generate.

    Args:
        context (`FlowContext`): what the run works on.
    """

    def __init__(self, context: FlowContext):
        self.context = context

    def score_base(self, tables: Mapping[str, Dataset]) -> dict[str, TaskScores]:
        """Scores of the base model alone."""
        with self.context.model.disable_adapter():
            return self.score_current(tables, "Evaluating base model")

    def score_current(self, tables: Mapping[str, Dataset], description: str) -> dict[str, TaskScores]:
        """Scores of the adapter that is active now."""
        scores = self.teacher_forced(tables, description)
        return self._with_answers(scores, self.generate, tables, description)

    def teacher_forced(self, tables: Mapping[str, Dataset], description: str) -> dict[str, TaskScores]:
        """Loss and accuracy of the adapter that is active now, without generating answers."""
        return self.context.evaluator.score_tasks(self.context.answer_scorer(), tables, description)

    def score_adapter(
        self, folder: Path, tables: Mapping[str, Dataset], description: str, generates: bool = True
    ) -> dict[str, TaskScores]:
        """Scores of a saved adapter; without the metrics of its answers unless it `generates` them."""
        with self._loaded(folder):
            return (self.score_current if generates else self.teacher_forced)(tables, description)

    def score_ensemble(self, ensemble: PeftEnsembleModel, tables: Mapping[str, Dataset]) -> dict[str, TaskScores]:
        """Scores of an ensemble, each row under its task's weights."""

        def scorer(inputs, labels, tasks):
            return ensemble.score(labels=labels, task=tasks, **inputs)

        scores = self.context.evaluator.score_tasks(scorer, tables, "Evaluating ensemble")
        return self._with_answers(scores, ensemble_generate(ensemble), tables, "Evaluating ensemble")

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, tasks: Sequence[str], settings: GenerationConfig
    ) -> torch.Tensor:
        """Prompts continued by the adapter that is active now."""
        return self.context.model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings
        )

    def _with_answers(
        self,
        scores: Mapping[str, TaskScores],
        generate: Generate,
        tables: Mapping[str, Dataset],
        description: str,
    ) -> dict[str, TaskScores]:
        metrics = self.context.answers.score_tasks(generate, tables, f"{description}, answers")
        return {task: replace(own, metrics=metrics.get(task, {})) for task, own in scores.items()}

    def keep(self, prefix: str, scores: Mapping[str, Mapping[str, TaskScores]]) -> None:
        """Add the scores of each system to the run's record, beside those of other prefixes."""
        run = self.context.run
        kept = run.read(Evaluation) if run.has(Evaluation) else Evaluation()
        own = {system: dict(by_task) for system, by_task in scores.items()}
        run.write(replace(kept, scores={**kept.scores, prefix: own}))

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


def ensemble_generate(ensemble: PeftEnsembleModel) -> Generate:
    """Prompts continued by an ensemble, each under its task's weights."""

    def generate(input_ids, attention_mask, tasks, settings):
        return ensemble.generate(input_ids, tasks, attention_mask=attention_mask, generation_config=settings)

    return generate


def flat_metrics(scores: Mapping[str, Mapping[str, TaskScores]], prefix: str, main_system: str) -> dict[str, float]:
    """Scores by system and task as one dict of metrics; those of the main system carry no further name."""
    metrics: dict[str, float] = {}
    for system, by_task in scores.items():
        start = prefix if system == main_system else f"{prefix}_{system}"
        for task, own in [*by_task.items(), ("mean", mean_scores(by_task))]:
            metrics[f"{start}_{task}_loss"] = own.loss
            metrics[f"{start}_{task}_accuracy"] = own.accuracy
            metrics |= {f"{start}_{task}_{name}": value for name, value in own.metrics.items()}
    return metrics
