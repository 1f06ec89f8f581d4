"""Callbacks for plain trainers in trainers over several datasets, where each would act on every training of a run."""

import pytest
from datasets import Dataset

from helpers import toy
from helpers.trainers import sft_config, sft_trainer, split, text_trainer
from hf_ensemble import (
    CaptureConfig,
    EnsembleSFTTrainer,
    GradientCaptureCallback,
    ModelCardCallback,
    PushToHubCallback,
    TaskMetricsCallback,
    TaskSet,
)
from hf_ensemble.errors import ConfigurationError

INSTEAD = {
    "capture": r"found a GradientCaptureCallback, .*trainer\.capture\(\)",
    "metrics": "found a TaskMetricsCallback, .*Set eval_strategy",
    "card": r"found a ModelCardCallback, .*trainer\.create_model_card",
    "push": "found a PushToHubCallback, .*Set push_to_hub=True and hub_model_id",
    "class": "found a ModelCardCallback",
    "subclass": "found a Tagged, .*trainer.create_model_card",
}


class Tagged(ModelCardCallback):
    pass


def callbacks(tasks, folder):
    config = CaptureConfig(projection_dim=16)
    return {
        "capture": GradientCaptureCallback(tasks, folder / "gradients", config, when="train_end"),
        "metrics": TaskMetricsCallback(tasks),
        "card": ModelCardCallback(tasks),
        "push": PushToHubCallback("user/x"),
        "class": ModelCardCallback,
        "subclass": Tagged(),
    }


@pytest.mark.parametrize("name", INSTEAD)
@pytest.mark.parametrize("kind", ["sft", "text"])
def test_a_run_refuses_them_and_names_what_it_has_instead(tmp_path, base_folder, kind, name):
    rows = toy.sft_tasks() if kind == "sft" else toy.text_tasks()
    own = callbacks(TaskSet.from_datasets(rows), tmp_path)[name]

    def trainer(given=None):
        if kind == "sft":
            return sft_trainer(tmp_path / "run", base_folder, rows, given)
        return text_trainer(tmp_path / "run", toy.bert(4), rows, callbacks=given)

    with pytest.raises(ConfigurationError, match=INSTEAD[name]):
        trainer([own])
    later = trainer()
    with pytest.raises(ConfigurationError, match=INSTEAD[name]):
        later.add_callback(own)


@pytest.mark.parametrize("several", [False, True], ids=["one dataset", "no adapter"])
def test_where_the_trainer_is_its_parent_they_work(tmp_path, base_folder, monkeypatch, several):
    pushed = []
    monkeypatch.setattr(PushToHubCallback, "_push", lambda self, *args: pushed.append(self.repository.repo_id))
    rows = toy.sft_tasks(8, 4)
    tasks = TaskSet.from_datasets(rows)
    own = callbacks(tasks, tmp_path)
    trainer = EnsembleSFTTrainer(
        base_folder,
        sft_config(tmp_path / "run", max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=split(rows, "train") if several else Dataset.from_list(rows["sums"]["train"]),
        eval_dataset=Dataset.from_list(rows["sums"]["validation"]),
        peft_config=None if several else toy.lora(),
        callbacks=[own["metrics"], own["card"], own["push"], *([] if several else [own["capture"]])],
    )
    trainer.train()
    assert "eval_sums_accuracy" in trainer.evaluate()
    assert (tmp_path / "run" / "README.md").is_file() and pushed == ["user/x"]
    assert several or len(own["capture"].store) == len(tasks.table("train")) + len(tasks.table("validation"))
