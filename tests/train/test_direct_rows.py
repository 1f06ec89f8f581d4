"""What a trainer without an adapter is asked about: rows as its constructor takes them, and its parent's tokens."""

import numpy as np
import pytest
from datasets import Dataset

from helpers import toy
from helpers.trainers import ESTIMATE, PARTITION, SMALL, sft_config, split, text_trainer, without_speed
from hf_ensemble import EnsembleConfig, EnsembleSFTTrainer, EnsembleTrainer
from hf_ensemble.errors import TaskError

TEXTS, PAIRS = toy.text_tasks(), toy.sft_tasks()


def tables(tasks, name="validation"):
    return {task: Dataset.from_list(rows) for task, rows in split(tasks, name).items()}


def in_turn(datasets):
    """One table with a row of each task in turn."""
    rows = {name: own.to_list() for name, own in datasets.items()}
    return Dataset.from_list(
        [{**row, "task": name} for row_of_each in zip(*rows.values()) for name, row in zip(rows, row_of_each)]
    )


def tokens(rows, *columns):
    made = Dataset.from_list(rows)
    return made.map(lambda row: toy.tokenizer()(row["text"])).select_columns(["input_ids", "attention_mask", *columns])


def losses(metrics):
    return {key: value for key, value in without_speed(metrics).items() if key.endswith("loss")}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return text_trainer(tmp_path_factory.mktemp("texts"), toy.bert(4), TEXTS, peft=None)


def test_raw_rows_are_evaluated_as_those_of_the_constructor(classifier):
    expected = losses(classifier.evaluate())
    assert set(expected) == {"eval_loss", *(f"eval_{task}_loss" for task in TEXTS)}
    for rows in (tables(TEXTS), split(TEXTS, "validation")):
        assert losses(classifier.evaluate(rows)) == expected
    assert (
        losses(classifier.evaluate({"songs": tables(TEXTS)["songs"]}))["eval_songs_loss"] == expected["eval_songs_loss"]
    )
    together = losses(classifier.evaluate(in_turn(tables(TEXTS))))
    assert together == {"eval_loss": pytest.approx(expected["eval_loss"])}
    # Another evaluation has the trainer's own rows again.
    assert losses(classifier.evaluate()) == expected


def test_raw_rows_are_predicted_in_their_order_and_without_labels(classifier):
    whole = classifier.predict(tables(TEXTS))
    assert losses(whole.metrics) == {
        key.replace("eval_", "test_"): value for key, value in losses(classifier.evaluate()).items()
    }
    table = in_turn(tables(TEXTS))
    found = classifier.predict(table)
    places = np.arange(18).reshape(3, 6).T.flatten()
    assert np.allclose(found.predictions, whole.predictions[places]) and found.label_ids.tolist() == (
        whole.label_ids[places].tolist()
    )
    hidden = tables(TEXTS)
    hidden["films"] = hidden["films"].remove_columns("label").add_column("label", [-1] * 6)
    hidden |= {name: hidden[name].remove_columns("label") for name in ("books", "songs")}
    for rows, order in ((hidden, slice(None)), (table.remove_columns("label"), places)):
        bare = classifier.predict(rows)
        assert bare.label_ids is None and np.allclose(bare.predictions, whole.predictions[order])


def test_tokens_of_texts_need_a_task_and_labels_that_are_outputs(classifier, tmp_path):
    expected = losses(classifier.evaluate())
    films, songs = TEXTS["films"]["validation"], TEXTS["songs"]["validation"]
    found = classifier.evaluate({"films": tokens(films, "label")})
    assert found["eval_films_loss"] == pytest.approx(expected["eval_films_loss"])
    with pytest.raises(TaskError, match="'songs': its labels are the outputs .2, 3. .*numbers beside tokens"):
        classifier.evaluate({"songs": tokens(songs, "label")})
    unlabelled = classifier.predict({"songs": tokens(songs)})
    assert np.allclose(unlabelled.predictions, classifier.predict({"songs": songs}).predictions)
    for rows in (tokens(films, "label"), {"other": tokens(films, "label")}):
        with pytest.raises(TaskError, match="Expected rows of the tasks .*whose labels differ"):
            classifier.evaluate(rows)
    with pytest.raises(TaskError, match="expected rows of tokens with a class in 'labels', found none"):
        classifier.evaluate({"films": tokens(films)})
    shared = text_trainer(tmp_path, toy.bert(2), {name: TEXTS[name] for name in ("films", "books")}, peft=None)
    plain = shared.evaluate(tokens(films, "label"))["eval_loss"]
    assert plain == pytest.approx(shared.evaluate({"films": films})["eval_loss"])


def test_what_the_tasks_do_not_take_is_refused(classifier, tmp_path):
    with pytest.raises(TaskError, match=r"Unknown tasks \['plays'\]"):
        classifier.evaluate({"plays": TEXTS["films"]["validation"]})
    with pytest.raises(TaskError, match="a dict with the rows of each task"):
        classifier.predict(tables(TEXTS)["films"])
    model = text_trainer(tmp_path, toy.llama(), PAIRS, peft=None)
    assert losses(model.evaluate(tables(PAIRS))) == losses(model.evaluate())
    with pytest.raises(TaskError, match="'sums', split 'test'.*lack .'completion'"):
        model.evaluate({"sums": [{"prompt": "1"}]})


def test_some_tasks_alone_may_have_evaluation_rows(tmp_path):
    films = split(TEXTS, "validation")["films"]
    trainer = EnsembleTrainer(
        model=toy.bert(4),
        args=EnsembleConfig(
            **{**SMALL, **PARTITION, **ESTIMATE, "output_dir": str(tmp_path), "eval_strategy": "epoch"}
        ),
        train_dataset=split(TEXTS, "train"),
        eval_dataset={"films": films},
        processing_class=toy.tokenizer(),
    )
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"films": len(films)}
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_films_loss" in entry]
    assert len(evaluated) == 2 and not any("eval_books_loss" in entry for entry in evaluated)


@pytest.mark.parametrize("name", [None, "films"])
def test_one_dataset_of_texts_is_asked_about_texts(tmp_path, name):
    train, evaluation = (Dataset.from_list(TEXTS["films"][part]) for part in ("train", "validation"))
    trainer = EnsembleTrainer(
        model=toy.bert(2),
        args=EnsembleConfig(**SMALL, output_dir=str(tmp_path)),
        train_dataset=train if name is None else {name: train},
        eval_dataset=evaluation,
        processing_class=toy.tokenizer(),
    )
    expected = trainer.evaluate()["eval_loss"]
    for rows in (evaluation, tokens(TEXTS["films"]["validation"], "label"), evaluation.to_iterable_dataset()):
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected)
    several = trainer.evaluate({"a": evaluation, "b": evaluation})
    assert several["eval_a_loss"] == several["eval_b_loss"] == pytest.approx(expected)
    predicted = trainer.predict(evaluation)
    assert predicted.metrics["test_loss"] == pytest.approx(expected)
    bare = trainer.predict(evaluation.remove_columns("label"))
    assert bare.label_ids is None and np.allclose(bare.predictions, predicted.predictions)


def test_sft_rows_are_checked_and_predicted_as_they_are(tmp_path):
    trainer = EnsembleSFTTrainer(
        model=toy.llama(),
        args=sft_config(tmp_path),
        train_dataset=split(PAIRS, "train"),
        eval_dataset=tables(PAIRS),
        processing_class=toy.tokenizer(),
    )
    expected = trainer.predict(trainer.eval_dataset)
    found = trainer.predict(tables(PAIRS))
    assert losses(found.metrics) == losses(expected.metrics) and np.array_equal(found.label_ids, expected.label_ids)
    alone = trainer.predict(tables(PAIRS)["sums"])
    assert alone.metrics["test_loss"] == pytest.approx(expected.metrics["test_sums_loss"])
    assert losses(trainer.evaluate(tables(PAIRS))) == losses(trainer.evaluate())
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(TaskError, match="'sums', split 'test'.*lack 'completion'"):
            call({"sums": Dataset.from_list([{"prompt": "1"}])})
