"""Trainers over small tasks, for the tests."""

from helpers import toy
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
)

SMALL = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "logging_strategy": "no",
}
# Pages take half a second each.
ESTIMATE = {"projection_dim": 128, "num_components": 20, "save_report": False}


# Groups as a partition that is trained from the start: where a test is not about them, they cost least.
PARTITION = {"grouping_method": "direct", "group_initialization": "fresh"}


def killed_in_a_call(monkeypatch, owner, name, number):
    """Interrupt a process in the call of this number, counted from 1, of a method; returns the list of calls."""
    method, calls = getattr(owner, name), []

    def killed(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, killed)
    return calls


def without_speed(metrics):
    return {key: value for key, value in metrics.items() if not key.endswith(("_runtime", "_per_second"))}


def sft_config(folder, config_class=EnsembleSFTConfig, **changes):
    settings = {**SMALL, **ESTIMATE, "bf16": False, "gradient_checkpointing": False, "output_dir": str(folder)}
    if config_class is EnsembleSFTConfig:
        settings |= {"affinity_subsets": 20, **PARTITION}
    return config_class(**{**settings, **changes})


def split(tasks, name):
    return {task: splits[name] for task, splits in tasks.items()}


def sft_trainer(folder, base, tasks=None, callbacks=None, processing_class=None, **changes):
    tasks = tasks or toy.sft_tasks()
    return EnsembleSFTTrainer(
        model=base,
        args=sft_config(folder, **changes),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        peft_config=toy.lora(),
        callbacks=callbacks,
        processing_class=processing_class,
    )


# Arguments of the trainer; others are of its configuration.
_GIVEN = ("target", "answer_metrics", "compute_metrics", "callbacks", "data_collator")


def text_trainer(folder, model, tasks, trainer_class=EnsembleTrainer, config=EnsembleConfig, peft="SEQ_CLS", **changes):
    options = {name: changes.pop(name) for name in _GIVEN if name in changes}
    own = PARTITION if config is EnsembleConfig else {}
    return trainer_class(
        model=model,
        args=config(**{**SMALL, **own, **ESTIMATE, "output_dir": str(folder), **changes}),
        train_dataset=split(tasks, "train"),
        eval_dataset=split(tasks, "validation"),
        processing_class=toy.tokenizer(),
        peft_config=toy.lora(peft) if peft else None,
        **options,
    )
