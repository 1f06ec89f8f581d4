"""Fitting a router of prompts to the loss of the mixture that it makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from ..forward.router import PromptRouter, without_light
from .collector import CollectedAnswers
from .objectives import fit_objective

CONSTANT, ADAPTERS, TASKS = "constant", "adapters", "tasks"
# Of the squared coefficients of features of variance one.
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_NUM_FOLDS = 5
_MAX_COMPONENTS = 64
_MAX_STEPS = 200
_NO_TASKS = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class RouterFit:
    """A fitted router, and what it was chosen by.

    Args:
        router ([`PromptRouter`]): the router.
        losses (`dict[str, float]`):
            Mean loss over the tasks, in nats, of rows left out, by candidate: with the same weights for all rows
            (`constant`), and by what prompts are told apart into and the penalty, as in `"tasks, 0.1"`.
        chosen (`str`): the candidate with the least loss, which is the router.
    """

    router: PromptRouter
    losses: dict[str, float]
    chosen: str


def fit_prompt_router(
    answers: Mapping[str, CollectedAnswers],
    states: Mapping[str, torch.Tensor],
    combination: str,
    seed: int = 0,
    more_states: Mapping[str, torch.Tensor] | None = None,
) -> RouterFit:
    """Multinomial regression from hidden states to weights; the tasks count equally.

    There are two kinds of it. `adapters` regresses on which adapter answers a row best, whatever its task: the
    coefficients minimise the loss -log sum_k w_k p_k of the mixture of the adapters' distributions. `tasks` regresses
    on which task a prompt is of, and weights the adapters as is best for the tasks that a prompt may be of,
    w = sum_t p(t | x) w_t, with the weights w_t of the least loss of each task. Inputs are the first principal
    components of the standardised states, scaled to variance one; squared coefficients are penalised. Kind and penalty,
    or constant weights, are chosen by the cross-validated loss of the ensemble's own combination.

    Args:
        answers (`dict[str, CollectedAnswers]`): what `m` adapters say of the rows of each task.
        states (`dict[str, torch.Tensor]`): mean hidden states `(rows, H)` of the same rows.
        combination (`str`): `logits`, `log_probs` or `probs`.
        seed (`int`, *optional*, defaults to 0): of the folds.
        more_states (`dict[str, torch.Tensor]`, *optional*):
            Of further rows of these tasks, whose answers nobody looks at: they say what a task's prompts are like.
    """
    stacked = torch.cat([states[task] for task in answers]).double()
    more = {number: more_states[task].double() for number, task in enumerate(answers) if task in (more_states or {})}
    mean, axes = _principal_axes(torch.cat([stacked, *more.values()]).numpy())
    more = {number: (own - mean) @ axes for number, own in more.items()}
    problem = _Problem(answers, (stacked - mean) @ axes, combination, more)
    rng = np.random.default_rng(seed)
    # Each fold has its share of every task.
    folds = torch.cat([torch.from_numpy(rng.permutation(found.num_rows) % _NUM_FOLDS) for found in answers.values()])
    kinds = [ADAPTERS, TASKS] if len(answers) > 1 else [ADAPTERS]
    tried = {CONSTANT: (ADAPTERS, None)} | {f"{kind}, {own}": (kind, own) for kind in kinds for own in _PENALTIES}
    weights = {name: torch.zeros(len(stacked), problem.num_members, dtype=torch.float64) for name in tried}
    for fold in folds.unique():
        regressions = problem.without(folds == fold, kinds)
        for name, (kind, penalty) in tried.items():
            found = regressions[kind]
            shares = found.routed(found.fit(penalty), problem.inputs[folds == fold])
            weights[name][folds == fold] = without_light(shares)
    losses = {name: problem.loss(own) for name, own in weights.items()}
    chosen = min(losses, key=losses.get)
    kind, penalty = tried[chosen]
    whole = problem.without(torch.zeros(len(stacked), dtype=torch.bool), [kind])[kind]
    found = whole.fit(penalty)
    matrix, bias, mixtures = axes @ found[:-1], found[-1], whole.mixtures
    return RouterFit(PromptRouter(*(own.float() for own in (mean, matrix, bias, mixtures))), losses, chosen)


def _principal_axes(states: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(H,)` of states, and axes `(H, d)` along which those of variance one are, once it is subtracted."""
    scaler = StandardScaler().fit(states)
    count = min(_MAX_COMPONENTS, max(1, len(states) // 5), states.shape[1])
    found = PCA(count, random_state=0).fit(scaler.transform(states))
    sizes = np.sqrt(found.explained_variance_)
    # Where states differ along fewer axes.
    lengths = np.divide(1, sizes, out=np.zeros(count), where=sizes > 1e-6 * sizes.max())
    return torch.from_numpy(scaler.mean_), torch.from_numpy(found.components_.T * lengths / scaler.scale_[:, None])


class _Problem:
    """The rows of all tasks: the regression's inputs `(rows, d)`, and what the adapters say of their answers.

    `more` are inputs of further rows by the number of their task.
    """

    def __init__(
        self,
        answers: Mapping[str, CollectedAnswers],
        inputs: torch.Tensor,
        combination: str,
        more: Mapping[int, torch.Tensor],
    ) -> None:
        self.answers, self.inputs, self.combination = list(answers.values()), inputs, combination
        self.more = torch.cat([inputs[:0], *more.values()])
        self.tasks_of_more = torch.cat([torch.full((len(own),), number) for number, own in more.items()] or [_NO_TASKS])
        self.sizes = [own.num_rows for own in self.answers]
        self.num_members = len(self.answers[0].values)
        starts = np.cumsum([0, *self.sizes[:-1]]).tolist()
        self.rows = torch.cat([own.rows + start for own, start in zip(self.answers, starts)])
        self.shares = torch.cat([own.token_shares() / len(self.answers) for own in self.answers])
        self.log_probs = torch.cat([own.log_probs() for own in self.answers], 1).double()
        self.tasks = torch.arange(len(self.answers)).repeat_interleave(torch.tensor(self.sizes))

    def loss(self, weights: torch.Tensor) -> float:
        """Mean over the tasks with weights of each row `(rows, m)`."""
        by_task = zip(self.answers, weights.split(self.sizes))
        return float(np.mean([own.routed_losses(found, self.combination).mean() for own, found in by_task]))

    def without(self, left_out: torch.Tensor, kinds: Sequence[str]) -> dict[str, "_Regression"]:
        """The regressions of these kinds on the rows that are not left out."""
        made = {ADAPTERS: self._of_adapters, TASKS: self._of_tasks}
        return {kind: made[kind](left_out) for kind in kinds}

    def _of_adapters(self, left_out: torch.Tensor) -> "_Regression":
        tokens = ~left_out[self.rows]
        mixtures = torch.eye(self.num_members, dtype=torch.float64)
        return _Regression(self.inputs, self.log_probs[:, tokens], self.rows[tokens], self.shares[tokens], mixtures)

    def _of_tasks(self, left_out: torch.Tensor) -> "_Regression":
        inputs = torch.cat([self.inputs[~left_out], self.more])
        tasks = torch.cat([self.tasks[~left_out], self.tasks_of_more])
        shares = 1 / tasks.bincount().double()[tasks]
        is_of_task = tasks == torch.arange(len(self.answers))[:, None]
        mixtures = self._task_weights(left_out)
        return _Regression(inputs, is_of_task.double().log(), torch.arange(len(tasks)), shares, mixtures)

    def _task_weights(self, left_out: torch.Tensor) -> torch.Tensor:
        """Weights `(tasks, m)` of the least loss of each task's rows that are not left out; equal ones for none."""
        size, combination = self.num_members, self.combination
        found = torch.full((len(self.answers), size), 1 / size, dtype=torch.float64)
        for task, (own, without) in enumerate(zip(self.answers, left_out.split(self.sizes))):
            if not without.all():
                kept = own.of_rows((~without).nonzero().squeeze(1).numpy())
                optimum = fit_objective(kept.objective(combination), size, "simplex", combination)
                found[task] = torch.from_numpy(optimum.weights)
        return found


@dataclass(frozen=True)
class _Regression:
    """From inputs `(rows, d)` to g kinds of rows, each with weights of its own, `mixtures` `(g, m)`.

    `values` `(g, n)` are the logarithms of how likely n tokens of `rows` are, of which each counts its share, if the
    row is of a kind.
    """

    inputs: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor
    shares: torch.Tensor
    mixtures: torch.Tensor

    def routed(self, coefficients: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.softmax(inputs @ coefficients[:-1] + coefficients[-1], 1) @ self.mixtures

    def fit(self, penalty: float | None) -> torch.Tensor:
        """Coefficients `(d + 1, g)`; those of the inputs are 0 without a penalty."""
        kinds, width = len(self.values), self.inputs.shape[1]
        inputs = self.inputs[:, :0] if penalty is None else self.inputs

        @torch.enable_grad()
        def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
            given = torch.from_numpy(values).view(-1, kinds).requires_grad_()
            log_weights = torch.log_softmax(inputs @ given[:-1] + given[-1], 1)[self.rows]
            loss = -(torch.logsumexp(log_weights + self.values.T, 1) * self.shares).sum() / self.shares.sum()
            loss = loss + (penalty or 0.0) * given[:-1].square().sum() / width
            loss.backward()
            return float(loss.detach()), given.grad.flatten().numpy()

        start = np.zeros((inputs.shape[1] + 1) * kinds)
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": _MAX_STEPS})
        given = torch.from_numpy(found.x).view(-1, kinds)
        return torch.cat([given.new_zeros(width + 1 - len(given), kinds), given])
