"""Labels as they come: numbers, booleans, texts, hidden ones, and several a row."""

import json

import pytest
from datasets import ClassLabel, Dataset
from transformers import Trainer, TrainingArguments

from helpers import toy
from helpers.trainers import ESTIMATE, SMALL
from hf_ensemble import EnsembleConfig, EnsembleTrainer, TaskSet, capture_gradients, load_task_folder
from hf_ensemble.errors import ConfigurationError, TaskError
from hf_ensemble.evaluate import Evaluator
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.tasks import RowFormat, data_collator_for, encode


def texts(*labels):
    return [{"text": f"the film {number} was good", "label": label} for number, label in enumerate(labels)]


def test_labels_that_are_texts_are_numbered_by_the_training_rows(tmp_path):
    for split, labels in (("train", ("poor", "good", "poor")), ("validation", ("good",))):
        path = tmp_path / "films" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, texts(*labels))))
    task = load_task_folder(tmp_path)["films"]
    assert task.label_names == ("good", "poor")
    assert [task.splits[split]["label"][:] for split in ("train", "validation")] == [[1, 0, 1], [0]]
    # Names that are known already: of a ClassLabel, and of `label_text`.
    named = Dataset.from_list(texts(1, 0)).cast_column("label", ClassLabel(names=["poor", "good"]))
    with_texts = [{**row, "label_text": ("bad", "fine")[row["label"]]} for row in texts(0, 1)]
    tasks = TaskSet.from_datasets({"a": named, "b": with_texts}, {"a": texts("good"), "b": texts("bad")})
    assert [rows["label"][:] for rows in tasks.split("validation").values()] == [[1], [0]]
    with pytest.raises(TaskError, match=r"'a', split 'validation': label 'fine' is outside .*\['poor', 'good'\]"):
        TaskSet.from_datasets({"a": named}, {"a": texts("fine")})
    with pytest.raises(TaskError, match="row 1 .*expected a label, found none"):
        TaskSet.from_datasets({"a": texts("good", None)})


def with_labels(rows):
    """The same rows, with the class in `labels`."""
    return Dataset.from_list(rows).rename_column("label", "labels")


@pytest.mark.parametrize("labels", [(0, 1, 1), ("good", "poor", "good"), (True, False, True), ([0, 1], [1, 1], [0, 0])])
def test_a_class_may_stand_in_labels(labels):
    named = TaskSet.from_datasets({"a": {"train": texts(*labels), "validation": texts(*labels)}})
    found = TaskSet.from_datasets({"a": {"train": with_labels(texts(*labels)), "validation": texts(*labels)}})
    assert found.row_format is RowFormat.CLASSIFICATION and found.fingerprint == named.fingerprint
    classes = with_labels(texts(0, 1)).cast_column("labels", ClassLabel(names=["poor", "good"]))
    assert TaskSet.from_datasets({"a": classes})["a"].label_names == ("poor", "good")


def test_other_values_in_labels_are_refused_and_other_formats_keep_theirs():
    for labels, found in (((0.0, 1.5), "found 0.0"), ((0, None), "expected a label, found none")):
        with pytest.raises(TaskError, match=found):
            TaskSet.from_datasets({"a": with_labels(texts(*labels))})
    for row_format in ("text", "sft"):
        assert TaskSet.from_datasets({"a": with_labels(texts(0, 1))}, row_format=row_format).label_space is None
    rows = [{"prompt": "1", "completion": "2", "text": "12", "labels": 0}]
    assert TaskSet.from_datasets({"a": rows}).row_format is RowFormat.PROMPT_COMPLETION


def test_a_trainer_takes_classes_in_labels_as_in_label(tmp_path):
    """Tables and streams, of several datasets and of one, in the constructor and in predictions."""
    rows = {name: toy.text_rows(12, seed) for seed, name in enumerate("ab")}
    renamed = {name: with_labels(own) for name, own in rows.items()}
    stream = {name: own.to_iterable_dataset() for name, own in renamed.items()}
    settings = {**SMALL, **ESTIMATE, "max_steps": 2, "output_dir": str(tmp_path)}

    def trainer(train, peft=False):
        given = {"processing_class": toy.tokenizer(), "peft_config": toy.lora("SEQ_CLS") if peft else None}
        return EnsembleTrainer(toy.bert(2), EnsembleConfig(**settings), train_dataset=train, **given)

    for peft in (True, False):
        tables = [trainer(own, peft).train_dataset for own in (rows, renamed)]
        assert tables[0].to_list() == tables[1].to_list()
    tables = [trainer(own).train_dataset for own in (Dataset.from_list(rows["a"]), renamed["a"])]
    assert tables[0].to_list() == tables[1].to_list()
    for own in (stream, stream["a"]):
        drawn = list(trainer(own).train_dataset.take(20))
        assert {row["labels"] for row in drawn} == {0, 1} and "label" not in drawn[0]
    tokens = [{**toy.tokenizer()(row["text"]), "label": row["label"]} for row in rows["a"]]
    drawn = list(
        trainer({name: Dataset.from_list(tokens).to_iterable_dataset() for name in "ab"}).train_dataset.take(9)
    )
    assert {row["labels"] for row in drawn} == {0, 1}
    run = trainer(renamed, peft=True)
    predicted = [run.predict({"a": own}) for own in (rows["a"], renamed["a"])]
    assert predicted[0].label_ids.tolist() == predicted[1].label_ids.tolist()
    hidden = renamed["a"].remove_columns("labels").add_column("labels", [-1] * 12)
    assert run.predict({"a": hidden}).label_ids is None


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("rows", [[{"text": "the film was good"}] * 4, [{"input_ids": [3, 4], "labels": [0, 1]}] * 4])
def test_a_classifier_refuses_rows_without_a_class(tmp_path, rows, peft):
    args = EnsembleConfig(str(tmp_path), **SMALL, **ESTIMATE)
    given = {"processing_class": toy.tokenizer(), "peft_config": toy.lora("SEQ_CLS") if peft else None}
    with pytest.raises(ConfigurationError, match="rows with one class each for a BertForSequenceClassification"):
        EnsembleTrainer(toy.bert(2), args, train_dataset={"a": rows, "b": rows}, **given)


def test_evaluation_rows_have_the_labels_of_the_training_rows(tmp_path):
    rows = {name: texts("poor", "good", "poor", "good") for name in "ab"}
    args = EnsembleConfig(str(tmp_path), **SMALL, **ESTIMATE)
    given = {"train_dataset": rows, "processing_class": toy.tokenizer(), "peft_config": toy.lora("SEQ_CLS")}
    trainer = EnsembleTrainer(toy.bert(2), args, **given)
    assert trainer.prepare_rows({"a": texts("poor", "good")})["a"]["labels"][:] == [1, 0]
    other = Dataset.from_list(texts(0, 1)).cast_column("label", ClassLabel(names=["poor", "good"]))
    with pytest.raises(TaskError, match=r"in their order, \['good', 'poor'\], found \['poor', 'good'\]"):
        trainer.prepare_rows({"a": other})


def test_hidden_labels_of_test_rows_are_not_scored(tokenizer):
    rows = {"train": texts(0, 1), "test": texts(1, -1, 0)}
    tasks = TaskSet.from_datasets({"a": rows})
    table = encode(tasks["a"].splits["test"], tokenizer, RowFormat.CLASSIFICATION, tasks.label_space)
    assert table["labels"][:] == [1, -100, 0]
    model = toy.bert(2)
    collator = data_collator_for(RowFormat.CLASSIFICATION, tokenizer, labels_are_tokens=False)
    scorer = AnswerScorer(model, tasks.label_space)
    evaluator = Evaluator(model, collator, 2, disable_tqdm=True)
    told = evaluator.score_tasks(scorer, {"a": table.select([0, 2])})["a"]
    assert evaluator.score_tasks(scorer, {"a": table})["a"] == told and told.num_examples == 2
    with pytest.raises(TaskError, match="'a' can be scored: expected labels, found hidden ones .*Use predict"):
        evaluator.score_tasks(scorer, {"a": table.select([1])})
    for split, remedy in (("train", "can only be test rows"), ("validation", "leave these rows out to hold")):
        with pytest.raises(TaskError, match=f"-1.*Drop these rows.*{remedy}"):
            TaskSet.from_datasets({"a": {"train": texts(0, 1), split: texts(0, -1)}})


def several(*labels):
    return Dataset.from_list(texts(*labels))


LABELS = ([1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1])


def multi_label_bert():
    model = toy.bert(3)
    model.config.problem_type = "multi_label_classification"
    return model


def test_several_labels_a_row_are_trained_as_by_the_parent(tmp_path):
    """One dataset, and several without an adapter, as text and as tokens."""
    tokenizer = toy.tokenizer()
    plain = several(*LABELS).map(
        lambda row: {**tokenizer(row["text"]), "labels": [float(value) for value in row["label"]]},
        remove_columns=["text", "label"],
    )
    two = plain.select([0, 1]), plain.select([2, 3])
    texts_in_two = {"a": several(*LABELS).select([0, 1]), "b": several(*LABELS).select([2, 3])}
    settings = {**SMALL, "max_steps": 2, "per_device_train_batch_size": 4}
    losses = []
    for trainer_class, train in (
        (Trainer, plain),
        (EnsembleTrainer, several(*LABELS)),
        (EnsembleTrainer, texts_in_two),
        (EnsembleTrainer, dict(zip("ab", two))),
    ):
        args = (TrainingArguments if trainer_class is Trainer else EnsembleConfig)(str(tmp_path), **settings)
        trainer = trainer_class(multi_label_bert(), args, train_dataset=train, processing_class=tokenizer)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]
    assert losses == pytest.approx([losses[0]] * 4)


def test_several_labels_a_row_are_refused_where_one_answer_is_needed(tmp_path):
    rows = {"a": several(*LABELS), "b": several(*LABELS)}
    tokenizer = toy.tokenizer()
    given = {"args": EnsembleConfig(str(tmp_path), **SMALL), "processing_class": tokenizer}
    with pytest.raises(ConfigurationError, match=r"one answer a row, and the rows of \['a', 'b'\] have several"):
        EnsembleTrainer("no/model", train_dataset=rows, peft_config=toy.lora("SEQ_CLS"), **given)
    with pytest.raises(ConfigurationError, match="one answer a row"):
        capture_gradients(toy.with_lora(toy.bert(3)), TaskSet.from_datasets(rows, rows), processing_class=tokenizer)
    with pytest.raises(ConfigurationError, match="3 labels each.*found 2 outputs.*num_labels=3"):
        EnsembleTrainer(toy.bert(2), train_dataset=rows, **given)
    for other, message in [
        (several([1, 0]), r"same length in all tasks, found {'a': 3, 'b': 2}"),
        (texts(0, 1), r"found {'a': 3, 'b': 1}"),
    ]:
        with pytest.raises(TaskError, match=message):
            TaskSet.from_datasets({"a": rows["a"], "b": other})
    for row in ([1, 0], [1, 0, 2], None):
        with pytest.raises(TaskError, match="'a', split 'train', row 1 .*lists of 3 zeros and ones"):
            TaskSet.from_datasets({"a": several([1, 0, 1], row)})


def test_booleans_are_classes():
    tokens = [{"input_ids": [3, 4], "labels": label} for label in (True, False)]
    assert TaskSet.from_datasets({"a": tokens}).table("train")["labels"][:] == [1, 0]
