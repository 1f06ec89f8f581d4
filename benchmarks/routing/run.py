"""How much of what weights of known tasks gain is left where the ensemble is not told the task?

    python -m benchmarks.routing.run OUTPUT --folders OUT/short-150-0 --system LABEL FLAGS

FOLDERS are those of `benchmarks.budgets.train`, one a seed, and FLAGS those of its trainer: nothing is trained here.
The adapters of one of their systems that serve every task are weighted equally, by each task's cross-validated weights,
and, as for rows of no known task, by a router of the prompts' hidden states, which was fitted to the validation rows of
all tasks or to those of all others, with and without the training rows' prompts. Gradients take the place of hidden
states, too: those of the log-odds of the answer that the adapter for all tasks itself gives.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from hf_ensemble.ensemble.forward.router import prompt_states
from hf_ensemble.ensemble.weighting.collector import CollectedAnswers
from hf_ensemble.ensemble.weighting.cross_validation import cross_validated_weights
from hf_ensemble.ensemble.weighting.objectives import fit_objective
from hf_ensemble.ensemble.weighting.router_fitting import RouterFit, fit_prompt_router

from ..budgets.run import MIN_WEIGHT, Outputs
from ..common import make_parser, read_rows, write_results
from ..trainers import flag_value
from .gradients import SPLITS, GradientWeights, gradient_features, mixtures_of
from .table import COSINES, EQUAL, GRADIENTS, KNOWN, OTHERS, PROMPTS, ROUTED, table

_BATCH = 64


class Prompts:
    """Mean hidden states of texts."""

    def __init__(self, name: str):
        self.model, self.tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)

    def states(self, texts: list[str]) -> torch.Tensor:
        """`(rows, H)` of texts, in batches of like length."""
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        found = torch.cat([self._of_batch([texts[number] for number in batch]) for batch in batches])
        return found[torch.tensor(order).argsort()]

    def _of_batch(self, texts: list[str]) -> torch.Tensor:
        return prompt_states(self.model, self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))


def losses(answers: CollectedAnswers, weights: np.ndarray | torch.Tensor) -> float:
    """Mean loss with weights `(m,)` for all rows, or `(rows, m)`."""
    if isinstance(weights, torch.Tensor):
        return float(answers.routed_losses(weights.double(), "logits").mean())
    return float(answers.row_losses(weights[None], "logits").mean())


def of_seed(folder: Path, label: str, prompts: Prompts, flags: list[str]) -> dict:
    """Mean test loss of each task by the way to weight adapters, and what the routers were chosen by."""
    outputs = Outputs(folder)
    system = next(one for one in outputs.plan["systems"] if one["label"] == label)
    tasks = outputs.tasks
    members = [name for name in system["parts"] if all(f"test/{task}" in outputs.part(name) for task in tasks)]
    states = {
        split: {task: prompts.states(texts(folder / "tasks" / task / f"{split}.jsonl")) for task in tasks}
        for split in SPLITS
    }
    with TemporaryDirectory() as run:
        own = [*flags, "--data", str(folder / "tasks")]
        gradients = gradient_features(Path(run), folder / "run-0" / "baseline", own)
    answers = {
        split: {task: outputs.answers(members, split, task) for task in tasks} for split in ("validation", "test")
    }

    def fitted(known: list[str], has_prompts: bool, inputs: dict[str, dict[str, torch.Tensor]]) -> RouterFit:
        own = [{task: of_task[task] for task in known} for of_task in (answers["validation"], inputs["validation"])]
        return fit_prompt_router(*own, "logits", more_states=inputs["train"] if has_prompts else None)

    routers = {
        ROUTED: fitted(tasks, False, states),
        PROMPTS: fitted(tasks, True, states),
        GRADIENTS: fitted(tasks, True, gradients),
    }
    by_cosines = GradientWeights(gradients["train"], mixtures_of(outputs.plan, members))
    found = {way: {} for way in (EQUAL, KNOWN, ROUTED, PROMPTS, OTHERS, GRADIENTS, COSINES)}
    size = len(members)
    for task in tasks:
        validation, test = (answers[split][task] for split in ("validation", "test"))
        optimum = fit_objective(validation.objective("logits"), size, "simplex", "logits", MIN_WEIGHT)
        known = cross_validated_weights(validation, members, "logits", optimum, min_weight=MIN_WEIGHT)
        found[EQUAL][task] = losses(test, np.full(size, 1 / size))
        found[KNOWN][task] = losses(test, known.weights)
        without = fitted([name for name in tasks if name != task], True, states)
        for way, fit in {**routers, OTHERS: without}.items():
            inputs = gradients if way == GRADIENTS else states
            found[way][task] = losses(test, fit.router.weights(inputs["test"][task]))
        found[COSINES][task] = losses(test, by_cosines(gradients["test"][task]))
    chosen = {way: {"chosen": fit.chosen, **fit.losses} for way, fit in routers.items()}
    return {"losses": found, "members": size, "routers": chosen}


def texts(file: Path) -> list[str]:
    """Of the rows of a file."""
    return [row["text"] for row in read_rows(file)]


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--folders", nargs="+", type=Path, required=True, help="of the seeds")
    parser.add_argument("--system", required=True, metavar="LABEL", help="whose adapters are weighted")
    own, flags = parser.parse_known_args()
    prompts = Prompts(flag_value(flags, "--model_name_or_path"))
    seeds = [of_seed(folder, own.system, prompts, flags) for folder in own.folders]
    write_results(own.output, {"system": own.system, "seeds": seeds}, table)


if __name__ == "__main__":
    main()
