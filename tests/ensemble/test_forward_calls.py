"""What a call of the ensemble takes and returns, beside its logits."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from helpers import ensembles
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel


@pytest.fixture(scope="module")
def ensemble():
    return PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES, WEIGHTS)


@pytest.fixture
def batch():
    return ensembles.prompts()


@pytest.mark.parametrize("kind", [tuple, np.array, pd.Series, lambda tasks: Dataset.from_dict({"task": tasks})["task"]])
@torch.no_grad()
def test_tasks_come_in_any_sequence(ensemble, batch, kind):
    tasks = kind(TASKS)
    assert torch.equal(ensemble(**batch, task=tasks).logits, ensemble(**batch, task=TASKS).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        ensemble.generate(**batch, task=tasks, **options), ensemble.generate(**batch, task=TASKS, **options)
    )
