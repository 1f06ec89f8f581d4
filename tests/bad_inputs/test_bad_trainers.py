"""What trainers refuse in their constructors: no model is loaded and nothing is trained."""

import pytest
import transformers
from datasets import Dataset, DatasetDict
from peft import IA3Config
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.trainers import ESTIMATE, SMALL
from hf_ensemble import (
    EnsembleConfig,
    EnsembleSFTConfig,
    EnsembleSFTTrainer,
    EnsembleTrainer,
    GradientCaptureCallback,
    SelectionConfig,
    SelectionSFTConfig,
    SelectionSFTTrainer,
    SelectionTrainer,
    TaskSet,
    collect_results,
    measure_fidelity,
)
from hf_ensemble.errors import HfEnsembleError

PAIRS = {"a": toy.sum_rows(4, 1), "b": toy.sum_rows(4, 2)}
TEXTS = {"a": toy.text_rows(4, 1), "b": toy.text_rows(4, 2)}
TOKENS = {"input_ids": [15, 3, 4], "labels": [-100, 3, 2]}
USER, ASSISTANT = {"role": "user", "content": "sum"}, {"role": "assistant", "content": "3"}
CHAT = {name: [{"messages": [USER, ASSISTANT]}] for name in "ab"}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} {% else %}"
    "{% generation %}{{ m['content'] }} {% endgeneration %}{% endif %}{% endfor %}"
)
CLASSES = {
    "ensemble": (EnsembleTrainer, EnsembleConfig, TEXTS, {}),
    "ensemble sft": (EnsembleSFTTrainer, EnsembleSFTConfig, PAIRS, {}),
    "selection": (SelectionTrainer, SelectionConfig, TEXTS, {"target": "a"}),
    "selection sft": (SelectionSFTTrainer, SelectionSFTConfig, PAIRS, {"target": "a"}),
}


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "train", lambda *args, **kwargs: pytest.fail("something was trained"))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for owner in (transformers.PreTrainedModel, transformers.AutoTokenizer):
        monkeypatch.setattr(owner, "from_pretrained", lambda *args, **kwargs: pytest.fail("something was loaded"))


MODELS = {"sft": toy.llama, "text": lambda: toy.bert(2)}


def build(kind, folder, settings=None, **given):
    trainer_class, config_class, rows, options = CLASSES[kind]
    own = {**SMALL, **ESTIMATE, "output_dir": str(folder), "bf16": False}
    if "sft" in kind:
        own["gradient_checkpointing"] = False
    arguments = {
        "model": "no/such-model",
        "args": config_class(**{**own, **(settings or {})}),
        "train_dataset": rows,
        "eval_dataset": rows,
        "peft_config": toy.lora("CAUSAL_LM" if "sft" in kind else "SEQ_CLS"),
        **options,
    }
    return trainer_class(**{**arguments, **given})


ANY = ("ensemble", "ensemble sft", "selection", "selection sft")
ENSEMBLES, SELECTIONS, SFT = ANY[:2], ANY[2:], ANY[1::2]
# Name: trainers, settings, arguments, message.
BEFORE_LOADING = {
    "model is None": (
        ANY,
        {},
        {"model": None},
        "Expected model to be a model, or its name or folder, found a NoneType",
    ),
    "model is a number": (ANY, {}, {"model": 3}, "its name or folder, found a int"),
    "arguments are a dict": (ANY, {}, {"args": {"seed": 0}}, "Expected args to be a .* found a dict"),
    "rows are the splits of one dataset": (
        ANY,
        {},
        {"train_dataset": DatasetDict({split: Dataset.from_list(PAIRS["a"]) for split in ("train", "test")})},
        r"found the splits \['test', 'train'\] of one dataset",
    ),
    "evaluation rows are a list": (
        ANY,
        {},
        {"eval_dataset": PAIRS["a"]},
        "Expected evaluation rows by name.* found one",
    ),
    "one row, and none to evaluate": (
        SFT,
        {},
        {"train_dataset": {**PAIRS, "c": PAIRS["a"][:1]}, "eval_dataset": None},
        "'c': expected at least 2 rows to hold one out",
    ),
    "evaluation rows of an unknown task": (ANY, {}, {"eval_dataset": {"z": []}}, r"without training rows: \['z'\]"),
    "no adapter": (SELECTIONS, {}, {"peft_config": None}, "there is none. Pass peft_config=LoraConfig"),
    "adapter is a dict": (ANY, {}, {"peft_config": {"r": 4}}, "Expected peft_config to be a PeftConfig, found"),
    "tokenizer is a name": (ANY, {}, {"processing_class": "gpt2"}, "Expected processing_class to be a PreTrained"),
    "callbacks are no list": (
        ANY,
        {},
        {"callbacks": transformers.TrainerCallback()},
        "Expected callbacks to be a list",
    ),
    "collator is no function": (ANY, {}, {"data_collator": 3}, "Expected data_collator to be a Callable, found 3"),
    "an optimizer": (ANY, {}, {"optimizers": (object(), None)}, "Pass optimizer_cls_and_kwargs instead"),
    "best checkpoint by an unknown metric": (
        ANY,
        {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_a_bleu",
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        },
        {},
        "'eval_a_bleu' cannot be honoured .* no evaluation gives this metric",
    ),
    "early stopping without evaluations": (
        ANY,
        {},
        {"callbacks": [transformers.EarlyStoppingCallback()]},
        "EarlyStoppingCallback cannot be honoured .* eval_strategy='no'",
    ),
    "more groups than tasks": (ENSEMBLES, {"num_groups": 3}, {}, "num_groups=3 is more than the 2 tasks. Lower it"),
    "a sharded base, in one process": (ANY, {"fsdp": True}, {}, "^fsdp cannot be honoured .* there is one. Please"),
    "a sharded base and another adapter": (
        ANY,
        {"fsdp": True},
        {"peft_config": IA3Config()},
        "^fsdp cannot be honoured .* IA3 was not seen to work with it. Please use LoraConfig",
    ),
    "more auxiliary tasks than tasks": (
        SELECTIONS,
        {"max_auxiliary": 3},
        {},
        "max_auxiliary=3 is more than the 2 tasks",
    ),
    "target is unknown": (SELECTIONS, {}, {"target": "z"}, r"Unknown target 'z'; the tasks are \['a', 'b'\]"),
    "target is None": (SELECTIONS, {}, {"target": None}, "Unknown target None"),
    "target is a list": (SELECTIONS, {}, {"target": ["a"]}, r"Unknown target \['a'\]"),
    "name of a metric": (
        ("ensemble sft",),
        {},
        {"train_dataset": {**PAIRS, "mean": PAIRS["a"]}, "eval_dataset": None},
        "are used for metrics of the whole run: rename",
    ),
    "name of the baseline": (
        ("ensemble sft",),
        {},
        {"train_dataset": {**PAIRS, "baseline_2": PAIRS["a"]}, "eval_dataset": None},
        "are used for metrics of the whole run: rename",
    ),
    "name of the base model's metrics": (
        ("ensemble sft", "selection sft"),
        {},
        {"train_dataset": {**PAIRS, "base_a": PAIRS["a"]}, "eval_dataset": None},
        r"task 'base_a'.*found those of the base model on the task 'a' \(eval_base_a_loss\): rename",
    ),
    "name of the base model's mean": (
        ("ensemble sft",),
        {},
        {"train_dataset": {**PAIRS, "base_mean": PAIRS["a"]}, "eval_dataset": None},
        r"task 'base_mean'.*found those of the base model on average \(eval_base_mean_loss\): rename",
    ),
    "evaluation rows beside a set": (
        ("ensemble sft",),
        {},
        {"train_dataset": TaskSet.from_datasets(PAIRS, PAIRS)},
        "do not pass eval_dataset beside it",
    ),
}


@pytest.mark.parametrize(
    ("kind", "bad"),
    [pytest.param(kind, bad, id=f"{bad}-{kind}") for bad, own in BEFORE_LOADING.items() for kind in own[0]],
)
def test_arguments_are_refused_before_the_model_is_loaded(kind, bad, tmp_path, nothing_is_loaded):
    _, settings, given, message = BEFORE_LOADING[bad]
    with pytest.raises(HfEnsembleError, match=message):
        build(kind, tmp_path, settings, **given)


def table(row, good):
    return {"train_dataset": {"a": [good, row], "b": [good]}, "eval_dataset": {"a": [good], "b": [good]}}


ROWS = {
    "token above the vocabulary": (
        "sft",
        {},
        table({**TOKENS, "input_ids": [15, 3, 999]}, TOKENS),
        "found 999.*tokenizer",
    ),
    "label above the vocabulary": (
        "sft",
        {},
        table({**TOKENS, "labels": [-100, 3, 999]}, TOKENS),
        "labels from .*found 999",
    ),
    "labels of another length": (
        "sft",
        {},
        table({**TOKENS, "labels": [-100, 3]}, TOKENS),
        "3 labels, one for each token",
    ),
    "only the first token counts": (
        "sft",
        {},
        table({**TOKENS, "labels": [15, -100, -100]}, TOKENS),
        "expected an answer.*as no token predicts it.*Drop the row",
    ),
    "every answer is cut off": ("sft", {"max_length": 2}, {}, "No row of the tasks .* is left after tokenization"),
    "every answer of one task is cut off": (
        "sft",
        {"max_length": 9},
        {"eval_dataset": {**PAIRS, "b": [{"prompt": "sum " * 20, "completion": "3"}]}},
        r"No row of the tasks \['b'\] is left after tokenization: raise max_length",
    ),
    "no chat template": (
        "sft",
        {},
        {"train_dataset": CHAT, "eval_dataset": CHAT},
        "expected a tokenizer with a chat temp",
    ),
    "class above the labels": (
        "text",
        {},
        table({"input_ids": [3, 4], "labels": 7}, {"input_ids": [3, 4], "labels": 1}),
        "labels from 0 to 1, .*found 7",
    ),
    "another number of labels": (
        "text",
        {},
        {"train_dataset": {**TEXTS, "c": toy.text_rows(4, labels=("x", "y", "z"))}, "eval_dataset": None},
        "5 different labels, the model's head has 2",
    ),
    "text without a token": (
        "text",
        {},
        {"train_dataset": {**TEXTS, "a": [*TEXTS["a"], {"text": "", "label": 0, "label_text": "negative"}]}},
        "a text of at least one token, found ''. Drop the row",
    ),
}


@pytest.mark.parametrize("bad", ROWS)
def test_rows_are_refused_in_the_constructor(bad, tmp_path):
    kind, settings, given, message = ROWS[bad]
    trainer = "ensemble sft" if kind == "sft" else "ensemble"
    with pytest.raises(HfEnsembleError, match=message):
        build(trainer, tmp_path, settings, model=MODELS[kind](), processing_class=toy.tokenizer(), **given)


def test_rows_whose_answers_are_cut_off_are_counted(tmp_path, caplog):
    long = [{"prompt": "sum " * 20, "completion": "3"}]
    given = {
        "train_dataset": {**PAIRS, "a": [*PAIRS["a"], *long]},
        "eval_dataset": {**PAIRS, "a": [*PAIRS["a"], *long, *long]},
    }
    trainer = build(
        "ensemble sft", tmp_path, {"max_length": 12}, model=toy.llama(), processing_class=toy.tokenizer(), **given
    )
    assert len(trainer.train_dataset) == 8 and len(trainer.eval_dataset["a"]) == 4
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("1 of 9 train rows are left out: max_length") for line in said)
    assert any(line.startswith("2 of 10 validation rows are left out: max_length") for line in said)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    given = {"model": toy.llama(), "processing_class": toy.tokenizer()}
    return build("ensemble sft", tmp_path_factory.mktemp("untrained"), **given)


CALLS = {
    "search": (lambda t: t.hyperparameter_search(), "has no hyperparameter_search"),
    "checkpoint": (lambda t: t.train(resume_from_checkpoint="checkpoint-3"), "no checkpoint in resume_from_checkpoint"),
    "option of training": (lambda t: t.train(trial=1), "Expected no trial, since"),
    "upload": (lambda t: t.push_to_hub(), "There is nothing to upload yet: call train"),
    "scores": (lambda t: t.scores(), "nothing to score yet: call train"),
    "results": (collect_results, "nothing to report yet: call train"),
    "report": (lambda t: t.report(), "nothing to report yet: call train"),
    "rows of an unknown task": (lambda t: t.evaluate({"z": PAIRS["a"]}), r"Unknown tasks \['z'\]"),
    "rows without tasks": (lambda t: t.evaluate(PAIRS["a"]), "Expected a dict with the rows of each task"),
    "rows with a missing text": (lambda t: t.evaluate({"a": [{"text": None}]}), "in 'text', found None"),
    "rows without answers": (
        lambda t: t.evaluate({"a": [{"prompt": "1"}]}),
        r"'a', split 'test': expected the columns prompt \+ completion, found \['prompt'\], which lack 'completion'",
    ),
    "rows to predict without answers": (
        lambda t: t.predict({"a": Dataset.from_list([{"prompt": "1"}])}),
        "'a', split 'test'.*which lack 'completion'",
    ),
    "rows with a missing answer": (
        lambda t: t.evaluate({"a": [{"prompt": "1", "completion": None}]}),
        "in 'completion', found None",
    ),
    "no subset": (lambda t: measure_fidelity(t, num_subsets=0), "num_subsets has to be a positive integer, found 0"),
    "subsets are text": (lambda t: measure_fidelity(t, num_subsets="3"), "num_subsets has to be a positive integer"),
    "size is 0": (lambda t: measure_fidelity(t, sizes=[0]), "Each size of a subset has to be a positive integer"),
    "sizes are a number": (lambda t: measure_fidelity(t, sizes=2), "sizes of subsets as a list of integers"),
    "subset of an unknown task": (lambda t: measure_fidelity(t, subsets=[["z"]]), r"Unknown tasks of a subset \['z'\]"),
    "subset is empty": (lambda t: measure_fidelity(t, subsets=[["a"], []]), "at least one task in each subset"),
    "repeats are text": (
        lambda t: measure_fidelity(t, num_repeated="1"),
        "num_repeated has to be an integer of at least",
    ),
    "first order is negative": (
        lambda t: measure_fidelity(t, num_first_order=-1),
        "num_first_order has to be an integer",
    ),
    "seed is text": (lambda t: measure_fidelity(t, seed="x"), "seed has to be an integer of at least 0"),
}


@pytest.mark.parametrize("bad", CALLS)
def test_calls_are_refused_before_anything_is_trained(bad, untrained, monkeypatch):
    act, message = CALLS[bad]
    monkeypatch.setattr(type(untrained), "capture", lambda self: pytest.fail("gradients were captured"))
    with pytest.raises(HfEnsembleError, match=message):
        act(untrained)


CAPTURED = {
    "a text that is none": ({"a": [{"text": None}]}, {}, "row 0 .*expected a string in 'text', found None"),
    "rows without answers": ({"a": [{"prompt": "1"}]}, {}, "'a', split 'train'.*which lack 'completion'"),
    "every answer is cut off": (
        {"a": [{"prompt": "sum " * 20, "completion": "3"}]},
        {"max_length": 12},
        "No row of the task 'a' is left after tokenization: raise max_length",
    ),
    "texts with labels": ({"a": TEXTS["a"]}, {}, "found text and label, of which it learns the text alone"),
}


@pytest.mark.parametrize("when", ["train_begin", "train_end"])
@pytest.mark.parametrize("bad", CAPTURED)
def test_a_callback_refuses_rows_in_the_trainers_constructor(bad, when, tmp_path):
    rows, settings, message = CAPTURED[bad]
    row_format = None if "label" in rows["a"][0] else "sft"
    tasks = TaskSet.from_datasets(rows, rows, row_format=row_format)
    callback = GradientCaptureCallback(tasks, tmp_path / "gradients", when=when)
    with pytest.raises(HfEnsembleError, match=message):
        SFTTrainer(
            model=toy.llama(),
            args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings),
            train_dataset=Dataset.from_list(PAIRS["a"]),
            processing_class=toy.tokenizer(),
            peft_config=toy.lora(),
            callbacks=[callback],
        )
    assert not (tmp_path / "gradients").exists()
