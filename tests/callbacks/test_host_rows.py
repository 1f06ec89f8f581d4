"""What the callback captures is what its trainer trains on, in every form of rows."""

import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from helpers import toy
from hf_ensemble import CaptureConfig, GradientCaptureCallback, TaskSet
from hf_ensemble.callbacks.host_rows import check_against_trained, sft_splits
from hf_ensemble.errors import ConfigurationError
from hf_ensemble.tasks import RowFormat, encode

# With markers around what the assistant says, as assistant_only_loss needs them.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    ": {% generation %}{{ m['content'] }} yes{% endgeneration %} {% else %}sum {{ m['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}: {% endif %}"
)
SETTINGS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
SETTINGS |= {"per_device_train_batch_size": 4, "logging_strategy": "no"}
SFT = {**SETTINGS, "bf16": False, "gradient_checkpointing": False}


def tokenizer():
    own = toy.tokenizer()
    own.chat_template = TEMPLATE
    return own


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": str(turn).strip()} for i, turn in enumerate(turns)]


ROWS = toy.sum_rows(8, 1)
TEXTS = [row["prompt"] + row["completion"] for row in ROWS]
IDS = [toy.tokenizer()(text)["input_ids"] for text in TEXTS]
FORMS = {
    "completions": ROWS,
    "texts": [{"text": text} for text in TEXTS],
    "own text field": [{"document": text, "number": 3} for text in TEXTS],
    "chats": [{"messages": chat(row["prompt"], row["completion"])} for row in ROWS],
    "chats of several turns": [{"messages": chat("3", "4", row["prompt"], row["completion"])} for row in ROWS],
    "chats that end with the user": [{"messages": chat("3", "4", row["prompt"])} for row in ROWS],
    "chat completions": [{"prompt": chat(r["prompt"]), "completion": chat(0, r["completion"])[1:]} for r in ROWS],
    "several turns completed": [
        {"prompt": chat(r["prompt"], "4", "5"), "completion": chat(0, "5", "6", r["completion"])[1:]} for r in ROWS
    ],
    "conversations": [
        {"conversations": [{"from": "user", "value": r["prompt"]}, {"from": "assistant", "value": r["completion"]}]}
        for r in ROWS
    ],
    "tokens": [{"input_ids": own} for own in IDS],
    "labelled tokens": [{"input_ids": own, "labels": [-100, *own[1:]]} for own in IDS],
    "masked tokens": [{"input_ids": own, "completion_mask": [0, 0, *[1] * (len(own) - 2)]} for own in IDS],
}
CHATS = [name for name in FORMS if "chat" in name or "turns" in name or name == "conversations"]
CASES = [(form, {}) for form in FORMS if form not in ("own text field", "masked tokens")]
CASES += [(form, {"assistant_only_loss": True}) for form in CHATS if form != "conversations"]
CASES += [
    ("own text field", {"dataset_text_field": "document"}),
    ("masked tokens", {"completion_only_loss": True}),
    ("masked tokens", {}),
    ("completions", {"completion_only_loss": False}),
    ("several turns completed", {"completion_only_loss": False}),
    ("completions", {"completion_only_loss": True, "max_length": 8}),
    ("texts", {"max_length": 4}),
    ("chats of several turns", {"max_length": 9, "truncation_mode": "keep_end"}),
    ("completions", {"packing": True, "max_length": 16}),
    ("chats", {"packing": True, "max_length": 24, "assistant_only_loss": True}),
    ("completions", {"padding_free": True, "max_length": None}),
    ("completions", {"shuffle_dataset": True, "pad_to_multiple_of": 8}),
    ("completions", {"eos_token": "yes"}),
    ("labelled tokens", {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}),
]

MODEL = toy.llama()


def tasks_of(rows):
    return TaskSet.from_datasets({"a": rows}, {"a": rows[:2]}, row_format="sft")


def answers(rows):
    """Tokens with the labels that are learnt, in any order."""
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def documents(packed):
    for row in packed:
        ends = np.cumsum(row["seq_lengths"])
        for start, end in zip([0, *ends], ends):
            yield {name: row[name][start:end] for name in ("input_ids", "labels")}


@pytest.mark.parametrize("form, settings", CASES, ids=str)
def test_labels_are_those_that_trl_makes(tmp_path, form, settings, caplog):
    rows, own = FORMS[form], tokenizer()
    args = SFTConfig(output_dir=str(tmp_path), **SFT, **settings)
    trainer = SFTTrainer(MODEL, args, None, Dataset.from_list(rows), None, own)
    captured = sft_splits(tasks_of(rows), own, args, max_length=args.max_length)["train"]
    trained = trainer.train_dataset
    assert answers(documents(trained) if args.packing else trained) == answers(captured)
    with caplog.at_level(logging.WARNING, "hf_ensemble"):
        check_against_trained(captured, trainer.get_train_dataloader())
        assert "None of the captured rows" not in caplog.text
        if args.packing:
            return
        captured = captured.map(lambda row: {"labels": [-100] * len(row["labels"])})
        with pytest.raises(ConfigurationError, match=" 0 tokens would be captured"):
            check_against_trained(captured, trainer.get_train_dataloader())


def test_a_formatting_function_is_passed_on(tmp_path, caplog):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]

    def formatted(row):
        return f"{row['question']} : {row['answer']} yes"

    def train(folder, tasks, **options):
        callback = GradientCaptureCallback(tasks, folder / "store", CaptureConfig(projection_dim=8), **options)
        SFTTrainer(
            toy.llama(),
            SFTConfig(output_dir=str(folder), **SFT),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=toy.lora(),
            formatting_func=formatted,
            callbacks=[callback],
        ).train()
        return callback.store

    store = train(tmp_path / "own", tasks_of(rows), formatting_func=formatted)
    assert "None of the captured rows" not in caplog.text
    already = tasks_of([{"text": formatted(row)} for row in rows])
    other = train(tmp_path / "texts", already)
    np.testing.assert_array_equal(store.table("train").features[:], other.table("train").features[:])
    train(tmp_path / "unknown", tasks_of(FORMS["completions"]))
    assert "None of the captured rows is among those that are trained on" in caplog.text


def test_a_loss_that_is_not_the_likelihood_is_said(tmp_path, caplog):
    for settings, warned in (({}, 0), ({"label_smoothing_factor": 0.1}, 1), ({"loss_type": "dft"}, 1)):
        caplog.clear()
        callback = GradientCaptureCallback(tasks_of(ROWS), tmp_path / str(settings), CaptureConfig(projection_dim=8))
        SFTTrainer(
            toy.llama(),
            SFTConfig(output_dir=str(tmp_path), **SFT, **settings),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer(),
            peft_config=toy.lora(),
            callbacks=[callback],
        ).train()
        assert caplog.text.count("the training has another loss") == warned
        assert (callback.store.recipe is None) == bool(warned)


def plain_trainer(folder, model, rows, collator, tasks):
    callback = GradientCaptureCallback(tasks, folder / "store", CaptureConfig(projection_dim=8))
    args = TrainingArguments(output_dir=str(folder), **SETTINGS)
    own = toy.tokenizer()
    return Trainer(model, args, collator(own), rows, processing_class=own, callbacks=[callback]), callback


def test_a_plain_trainer_that_trains_on_other_tokens_is_stopped(tmp_path):
    tasks = TaskSet.from_datasets({"a": ROWS}, {"a": ROWS[:2]})
    rows = encode(tasks.table("train"), toy.tokenizer(), RowFormat.PROMPT_COMPLETION)
    rows = rows.remove_columns(["task", "example_id"])
    trainer, callback = plain_trainer(
        tmp_path / "same", toy.with_lora(toy.llama()), rows, DataCollatorForSeq2Seq, tasks
    )
    trainer.train()
    assert len(callback.store) == 10

    def all_tokens(own):
        return DataCollatorForLanguageModeling(own, mlm=False)

    whole = rows.remove_columns("labels")
    trainer, callback = plain_trainer(tmp_path / "other", toy.with_lora(toy.llama()), whole, all_tokens, tasks)
    with pytest.raises(ConfigurationError, match=r"of task 'a' \d tokens would be captured.*and [67] are trained"):
        trainer.train()
    assert callback.store is None


def test_a_comparison_leaves_no_trace():
    class Drawing:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(1)

        def __call__(self, rows):
            torch.rand(1), torch.rand(1, generator=self.generator), random.random(), np.random.rand()
            return DataCollatorForSeq2Seq(toy.tokenizer())(rows)

    collator = Drawing()
    rows = Dataset.from_list([{"input_ids": own, "labels": own, "task": "a", "example_id": "1"} for own in IDS])
    loader = torch.utils.data.DataLoader(rows.select_columns(["input_ids", "labels"]), collate_fn=collator)
    states = torch.get_rng_state(), collator.generator.get_state()
    numbers = random.getstate(), np.random.get_state()[1].tolist()
    check_against_trained(rows, loader)
    assert all(map(torch.equal, states, (torch.get_rng_state(), collator.generator.get_state())))
    assert numbers == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_plain_trainer_with_other_classes_is_stopped(tmp_path):
    texts = {"a": toy.text_rows(8, 1), "b": toy.text_rows(8, 2, "book", ("no", "yes"))}
    tasks = TaskSet.from_datasets(texts, {name: rows[:2] for name, rows in texts.items()})
    # The second task's labels are outputs 2 and 3 of a head for both.
    right = encode(tasks.table("train"), toy.tokenizer(), tasks.row_format, tasks.label_space)
    right = right.remove_columns(["task", "example_id"])
    wrong = concatenate_datasets([Dataset.from_list(rows) for rows in texts.values()])
    wrong = wrong.map(lambda row: toy.tokenizer()(row["text"]))
    for rows, stopped in ((right, False), (wrong, True)):
        folder = tmp_path / str(stopped)
        trainer, callback = plain_trainer(folder, toy.with_lora(toy.bert(4)), rows, DataCollatorWithPadding, tasks)
        if stopped:
            with pytest.raises(ConfigurationError, match=r"of task 'b' 1 tokens would be captured, \[[23]\]"):
                trainer.train()
        else:
            trainer.train()
            assert len(callback.store) == 20
