"""How much of what weights of known tasks gain is left where the ensemble is not told the task?

    python -m benchmarks.routing.run OUTPUT --folders OUT/short-150-0 --system LABEL --model_name_or_path ENCODER

FOLDERS are those of `benchmarks.budgets.train`, one a seed: nothing is trained here. The adapters of one of their
systems that serve every task are weighted equally, by each task's cross-validated weights, and, as for rows of no known
task, by a router of the prompts' hidden states, which was fitted to the validation rows of all tasks or to those of all
others, with and without the training rows' prompts.
"""

from pathlib import Path

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
from .table import EQUAL, KNOWN, OTHERS, PROMPTS, ROUTED, table

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


def of_seed(folder: Path, label: str, prompts: Prompts) -> dict:
    """Mean test loss of each task by the way to weight adapters, and what the routers were chosen by."""
    outputs = Outputs(folder)
    system = next(one for one in outputs.plan["systems"] if one["label"] == label)
    tasks = outputs.tasks
    members = [name for name in system["parts"] if all(f"test/{task}" in outputs.part(name) for task in tasks)]
    states = {
        split: {task: prompts.states(texts(folder / "tasks" / task / f"{split}.jsonl")) for task in tasks}
        for split in ("train", "validation", "test")
    }
    answers = {
        split: {task: outputs.answers(members, split, task) for task in tasks} for split in ("validation", "test")
    }

    def fitted(known: list[str], more: dict[str, torch.Tensor] | None) -> RouterFit:
        own = [{task: of_task[task] for task in known} for of_task in (answers["validation"], states["validation"])]
        return fit_prompt_router(*own, "logits", more_states=more)

    routers = {ROUTED: fitted(tasks, None), PROMPTS: fitted(tasks, states["train"])}
    found = {way: {} for way in (EQUAL, KNOWN, ROUTED, PROMPTS, OTHERS)}
    size = len(members)
    for task in tasks:
        validation, test = (answers[split][task] for split in ("validation", "test"))
        optimum = fit_objective(validation.objective("logits"), size, "simplex", "logits", MIN_WEIGHT)
        known = cross_validated_weights(validation, members, "logits", optimum, min_weight=MIN_WEIGHT)
        found[EQUAL][task] = losses(test, np.full(size, 1 / size))
        found[KNOWN][task] = losses(test, known.weights)
        without = fitted([name for name in tasks if name != task], states["train"])
        for way, fit in {**routers, OTHERS: without}.items():
            found[way][task] = losses(test, fit.router.weights(states["test"][task]))
    chosen = {way: {"chosen": fit.chosen, **fit.losses} for way, fit in routers.items()}
    return {"losses": found, "members": size, "routers": chosen}


def texts(file: Path) -> list[str]:
    """Of the rows of a file."""
    return [row["text"] for row in read_rows(file)]


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--folders", nargs="+", type=Path, required=True, help="of the seeds")
    parser.add_argument("--system", required=True, metavar="LABEL", help="whose adapters are weighted")
    parser.add_argument("--model_name_or_path", required=True, help="the encoder that they were trained on")
    own = parser.parse_args()
    prompts = Prompts(own.model_name_or_path)
    seeds = [of_seed(folder, own.system, prompts) for folder in own.folders]
    write_results(own.output, {"system": own.system, "seeds": seeds}, table)


if __name__ == "__main__":
    main()
