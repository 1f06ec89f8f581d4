"""A step of boosting in gradients at an adapter of the ensemble, in place of those at the start."""

import shutil
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset

from hf_ensemble._files import remove_folder
from hf_ensemble.capture import capture_gradients, parameter_update, row_update
from hf_ensemble.ensemble import EnsembleMember, PeftEnsembleModel
from hf_ensemble.ensemble.saving.files import save_adapter
from hf_ensemble.ensemble.weighting.added_member import AddedMember, added_member
from hf_ensemble.ensemble.weighting.sampling import spread_sample
from hf_ensemble.estimate import linear_step
from hf_ensemble.runs import BoostingStep
from hf_ensemble.runs.boosting import START
from hf_ensemble.runs.systems import BASELINE
from hf_ensemble.store import FeatureTable, GradientStore
from hf_ensemble.tasks import EXAMPLE_ID, TASK
from hf_ensemble.train.flows.adapter_training import rows_of
from hf_ensemble.train.flows.boosting.held_out import added_answers
from hf_ensemble.train.flows.boosting.stage import EnsembleBoosting

# In units of the squared mean norm of the rows' gradients, from short steps to long ones.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3)


class BoostingAtAdapters(EnsembleBoosting):
    """Makes one step, theta + w, where theta is the adapter with most weight for the worst group.

    The gradients x_i of a sample of the group's training rows are captured at theta, and w minimizes

        sum_i log(1 + exp(-(m_i + x_i.w))) / n + l2 |w|^2

    with the ensemble's margins m_i, or the loss of another method. Of a few penalties l2, the one with the least
    validation loss is taken. What the step adds is its logits less those at theta.

    Args:
        *args, **kwargs: see [`EnsembleBoosting`].
        num_rows (`int`): most training rows of a task that gradients are captured of.
    """

    def __init__(self, *args, num_rows: int, **kwargs):
        super().__init__(*args, **kwargs)
        self._num_rows = num_rows

    def start_of(self, ensemble: PeftEnsembleModel, target: str) -> str:
        """The member with most weight for a group's tasks."""
        tasks, names = self.targets[target], [member.name for member in ensemble.members]
        return max(names, key=lambda name: sum(ensemble.weights[task].get(name, 0.0) for task in tasks))

    def begin_at(self, start: str) -> None:
        """Let steps begin at this member, and its logits be what is taken off theirs."""
        run = self.context.run
        remove_folder(run.member(START))
        shutil.copytree(run.baseline if start == BASELINE else run.member(start), run.member(START))

    def _step(self, ensemble: PeftEnsembleModel, name: str, target: str) -> BoostingStep:
        self.begin_at(self.start_of(ensemble, target))
        return super()._step(ensemble, name, target)

    def _solve(self, ensemble: PeftEnsembleModel, tasks: list[str], name: str) -> None:
        context, model = self.context, self.context.model
        rows = rows_of(context.train_table, dict.fromkeys(tasks, 1.0))
        owners = np.array(rows[TASK])
        parts = [np.flatnonzero(owners == task) for task in tasks]
        sampled = [own[spread_sample(len(own), self._num_rows, context.args.seed)] for own in parts]
        rows = rows.select(np.concatenate(sampled))
        held_out = {task: context.eval_tables[task] for task in tasks}
        weights = {task: ensemble.weights[task] for task in tasks}
        beside = self.assembly.ensemble(self._members(ensemble, tasks), weights, ensemble.scales)
        fixed = added_answers(context, beside, {START: 1.0}, held_out)
        margin = self._scores(ensemble, rows, context.args.margin).margin
        best: AddedMember | None = None
        with context.model_state.restored():
            try:
                self.training.load(context.run.member(START))
                theta = {key: own.detach().clone() for key, own in model.named_parameters() if own.requires_grad}
                store, table, order = self._captured(rows, tasks)
                for relative in PENALTIES:
                    put(model, theta)
                    update = self._update(store, table, rows.select(order), margin[order], relative)
                    put(model, {key: own + update[key].to(own) for key, own in theta.items()})
                    found = self._tried(fixed, held_out)
                    if best is not None and found.loss >= best.loss:
                        break
                    best = found
                    save_adapter(model, context.adapter_name, context.run.member(name))
            finally:
                self.training.reset()

    def _captured(self, rows: Dataset, tasks: list[str]) -> tuple[GradientStore, FeatureTable, list[int]]:
        """Gradients of these rows where the model is now, and the positions of the rows in their order."""
        context, folder = self.context, self.context.run.path / "gradients_at_step"
        config = replace(context.args.capture_config(), capture_rows=None, capture_validation_rows=None)
        remove_folder(folder)
        store = capture_gradients(
            context.model,
            context.tasks,
            config,
            folder,
            data_collator=context.data_collator,
            encoded={"train": rows},
            disable_tqdm=True,
        )
        table = store.table("train", tasks)
        position = {key: i for i, key in enumerate(zip(rows[TASK], rows[EXAMPLE_ID]))}
        keys = zip((table.task_names[index] for index in table.task), table.example_id.tolist())
        return store, table, [position[key] for key in keys]

    def _update(
        self, store: GradientStore, table: FeatureTable, rows: Dataset, margin: np.ndarray, relative: float
    ) -> dict[str, torch.Tensor]:
        context, args = self.context, self.context.args
        features = np.asarray(table.features[:], dtype=np.float32)
        penalty = relative * float(np.linalg.norm(features, axis=1).mean()) ** 2
        counts = None if table.num_tokens is None else table.num_tokens / table.num_tokens.mean()
        step = linear_step(features, margin, penalty, args.boosting_method, counts, args.num_components)
        if store.dim == sum(own.numel() for own in self.training.theta0.values()):
            return parameter_update(context.model, store, step.coefficients)
        size, collator = args.capture_config().batch_size, context.data_collator
        return row_update(context.model, store, rows, step.row_coefficients, collator, size, context.label_space)

    def _tried(self, fixed: list, held_out: Mapping[str, Dataset]) -> AddedMember:
        """What the model's own adapter, as it is now, comes to as a step."""
        context, own = self.context, self.context.adapter_name
        weights = {task: {own: 1.0} for task in held_out}
        alone = PeftEnsembleModel(
            context.model, [EnsembleMember(own, list(held_out))], weights, label_space=context.label_space
        )
        steps = added_answers(context, alone, {own: 1.0}, held_out)
        changes = [replace(one, change=two.change - one.change) for one, two in zip(fixed, steps, strict=True)]
        return added_member(changes, context.args.seed)


@torch.no_grad()
def put(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters these values."""
    for key, parameter in model.named_parameters():
        if key in values:
            parameter.copy_(values[key])
