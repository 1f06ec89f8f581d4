"""Tokens with a class, as scripts over `transformers.Trainer` make them, over several datasets."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from helpers import toy
from helpers.trainers import ESTIMATE, SMALL, text_trainer
from hf_ensemble import EnsembleConfig, EnsembleTrainer, TaskSet
from hf_ensemble.errors import TaskError

NOUNS = {"films": "film", "books": "book"}


def tokens(count, seed, **options):
    """Two tasks' rows as a script's `map` leaves them: the texts, the class and the tokens."""

    def tokenized(rows):
        return toy.tokenizer()(rows["text"], **options)

    texts = {name: Dataset.from_list(toy.text_rows(count, seed, noun)) for name, noun in NOUNS.items()}
    return {name: rows.map(tokenized, batched=True) for name, rows in texts.items()}


def with_task(datasets):
    return concatenate_datasets([rows.add_column("task", [name] * len(rows)) for name, rows in datasets.items()])


def arguments(folder, config=EnsembleConfig, **changes):
    own = ESTIMATE if config is EnsembleConfig else {}
    return config(**{**SMALL, **own, "output_dir": str(folder), **changes})


@pytest.mark.parametrize("column, collator", [("label", default_data_collator), ("labels", None)])
def test_a_run_is_that_over_the_texts(tmp_path, column, collator):
    texts = {
        name: {"train": toy.text_rows(12, 1, noun), "validation": toy.text_rows(6, 2, noun)}
        for name, noun in NOUNS.items()
    }
    of_texts = text_trainer(tmp_path / "texts", toy.bert(2), texts)
    expected = of_texts.train()
    rows = [tokens(12, 1, padding="max_length", max_length=10), tokens(6, 2, padding="max_length", max_length=10)]
    rows = [{name: own.rename_columns({"label": column}) for name, own in split.items()} for split in rows]
    trainer = EnsembleTrainer(
        model=toy.bert(2),
        args=arguments(tmp_path / "tokens"),
        train_dataset=rows[0],
        # One table with the column `task` stands for a dict.
        eval_dataset=with_task(rows[1]),
        data_collator=collator,
        processing_class=toy.tokenizer(),
        peft_config=toy.lora("SEQ_CLS"),
    )
    found = trainer.train()
    features = [own.capture().table("train").features[:] for own in (of_texts, trainer)]
    np.testing.assert_allclose(*features, rtol=1e-4, atol=1e-5)
    assert found.training_loss == pytest.approx(expected.training_loss, rel=1e-5)
    for name in NOUNS:
        for figure in (f"eval_{name}_loss", f"eval_{name}_accuracy", f"eval_baseline_{name}_loss"):
            assert found.metrics[figure] == pytest.approx(expected.metrics[figure], rel=1e-4), figure


def test_one_model_on_all_is_the_parent_on_the_concatenated_rows(tmp_path):
    rows = tokens(12, 1)
    trainers = [
        Trainer(
            toy.bert(2),
            arguments(tmp_path / "parent", TrainingArguments),
            DataCollatorWithPadding(toy.tokenizer()),
            concatenate_datasets(list(rows.values())),
        ),
        EnsembleTrainer(toy.bert(2), arguments(tmp_path / "ours"), None, rows, processing_class=toy.tokenizer()),
    ]
    losses = [trainer.train().training_loss for trainer in trainers]
    assert losses[0] == losses[1]


def test_classes_are_known_by_their_column():
    rows = tokens(4, 1)
    named = rows["films"].cast_column("label", ClassLabel(names=["bad", "good"]))
    tasks = TaskSet.from_datasets({"films": named, "books": rows["books"]})
    assert tasks.labels_are_classes and tasks.table("train")["labels"][:4] == rows["films"]["label"][:]
    renamed = TaskSet.from_datasets({"films": named.rename_column("label", "labels")})
    assert renamed.labels_are_classes and renamed.table("train")["labels"][:] == rows["films"]["label"][:]
    answers = rows["films"].remove_columns("label").map(lambda row: {"labels": row["input_ids"]})
    assert not TaskSet.from_datasets({"films": answers}).labels_are_classes


def test_one_table_of_evaluation_rows_has_to_name_their_tasks(tmp_path):
    one = concatenate_datasets(list(tokens(4, 2).values()))
    for table, message in [
        (one, "without a column 'task'"),
        (with_task({"other": one}), r"without training rows: \['o"),
    ]:
        with pytest.raises(TaskError, match=message):
            EnsembleTrainer(
                model=toy.bert(2),
                args=arguments(tmp_path),
                train_dataset=tokens(4, 1),
                eval_dataset=table,
                processing_class=toy.tokenizer(),
                peft_config=toy.lora("SEQ_CLS"),
            )


def test_predictions_stand_in_the_order_of_one_table(tmp_path):
    rows = tokens(6, 3)
    trainer = EnsembleTrainer(
        model=toy.bert(2),
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=tokens(12, 1),
        eval_dataset=tokens(6, 2),
        processing_class=toy.tokenizer(),
        peft_config=toy.lora("SEQ_CLS"),
    )
    mixed = with_task(rows).select([7, 0, 8, 1, 2, 9, 11, 3, 4, 10, 5, 6])
    for _ in range(2):
        apart = {name: trainer.predict({name: own}).predictions for name, own in rows.items()}
        together = trainer.predict(mixed)
        hidden = trainer.predict(mixed.remove_columns("label")).predictions
        np.testing.assert_allclose(hidden, together.predictions, atol=1e-6)
        assert together.label_ids.tolist() == mixed["label"][:]
        order = {(name, own["text"]): i for name, of_task in rows.items() for i, own in enumerate(of_task)}
        for row, found in zip(mixed, together.predictions):
            np.testing.assert_allclose(found, apart[row["task"]][order[row["task"], row["text"]]], atol=1e-5)
        trainer.train()
