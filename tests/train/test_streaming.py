"""Streaming datasets: trained on by weight, captured and evaluated by their first rows."""

from collections import Counter

import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    interleave_datasets,
)
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers import toy
from helpers.sft_rows import chat_tokenizer, forms
from helpers.trainers import ESTIMATE, SMALL, sft_config, split
from hf_ensemble import EnsembleConfig, EnsembleSFTTrainer, EnsembleTrainer
from hf_ensemble.errors import ConfigurationError, TaskError

SFT = {**SMALL, "bf16": False, "gradient_checkpointing": False}
TASKS = toy.sft_tasks(train=30)


def stream(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def streams(tasks=TASKS, name="train"):
    return {task: stream(rows) for task, rows in split(tasks, name).items()}


def run(folder, base, train, callbacks=None, evaluation=None, **changes):
    args = sft_config(folder, **{"max_steps": 4, "num_groups": 2, "streaming_rows": 16, **changes})
    given = {"train_dataset": train, "eval_dataset": evaluation, "peft_config": toy.lora(), "callbacks": callbacks}
    return EnsembleSFTTrainer(base, args, **given)


def drawn(trainer, weights, num_rows=600):
    rows = trainer.adapter_trainer(trainer.args, trainer.train_dataset, trainer.eval_dataset, weights).train_dataset
    return list(rows.take(num_rows))


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 32}, {"gradient_accumulation_steps": 2}])
def test_without_an_adapter_it_is_the_parent_on_the_interleaved_streams(tmp_path, base_folder, changes):
    changes = {"max_steps": 4, **changes}
    endless = [rows.repeat(None) for rows in streams().values()]
    plain = SFTTrainer(
        base_folder,
        SFTConfig(str(tmp_path / "plain"), **SFT, **changes),
        train_dataset=interleave_datasets(endless, probabilities=[1 / 3] * 3, seed=42),
    )
    ours = EnsembleSFTTrainer(base_folder, SFTConfig(str(tmp_path), **SFT, **changes), train_dataset=streams())
    assert plain.train().training_loss == ours.train().training_loss
    weights = ours.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())


def test_a_run_over_streams_and_tables(tmp_path, base_folder):
    """Their first rows are captured, the rows before those held out; trainings go on to rows after them."""
    sums = TASKS["sums"]["train"]
    trainer = run(tmp_path / "run", base_folder, {**streams(), "sums": Dataset.from_list(sums)})
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"sums": 15, "diffs": 8, "more_sums": 8}
    counts = Counter(trainer.train_dataset["task"])
    assert counts == {"sums": 15, "diffs": 8, "more_sums": 8}
    weights = trainer.tasks.sampling_weights
    assert {weights[name] * count for name, count in counts.items()} == {8.0}
    prompts = [row["prompt"] for row in TASKS["diffs"]["train"]]
    assert trainer.tasks["diffs"].splits["validation"]["prompt"][:] == prompts[:8]
    assert trainer.tasks["diffs"].splits["train"]["prompt"][:] == prompts[8:16]

    rows = drawn(trainer, weights)
    shares = Counter(row["task"] for row in rows)
    assert all(150 < shares[name] < 250 for name in counts)
    tokens = [row["input_ids"] for row in rows if row["task"] == "diffs"]
    tokenizer = toy.tokenizer()
    expected = [tokenizer(r["prompt"] + r["completion"] + "<eos>")["input_ids"] for r in TASKS["diffs"]["train"][8:]]
    assert tokens[:44] == expected * 2
    assert {row["task"] for row in drawn(trainer, {**weights, "sums": 2 * weights["sums"]})} == set(counts)

    trainer.train()
    records = [trainer.run_directory.trained_adapter(name) for name in ("baseline", *trainer.grouping.groups)]
    assert {record.global_step for record in records} == {4}
    card = (trainer.run_directory.ensemble / "README.md").read_text()
    assert "| 8 first ones of a stream | 8 |" in card and "| 15 | 15 |" in card
    assert len(trainer.capture().table("train").margin) == 31


def test_a_training_on_a_subset_draws_its_tasks_alone_in_proportion_to_their_weights(tmp_path, base_folder):
    trainer = run(tmp_path, base_folder, streams(), packing=True, max_length=32)
    rows = trainer.train_dataset.filter(lambda row: row["task"] != "sums")
    inner = trainer.adapter_trainer(trainer.args, rows, {}, {"diffs": 3.0, "more_sums": 1.0})
    shares = Counter(row["task"] for row in inner.train_dataset.take(400))
    assert set(shares) == {"diffs", "more_sums"} and 260 < shares["diffs"] < 340
    assert all(len(row["input_ids"]) <= 32 and row["seq_lengths"] for row in inner.train_dataset.take(20))
    (packed,) = Counter(row["task"] for row in drawn(trainer, {"sums": 1.0, "diffs": 0.0, "more_sums": 0.0}, 9)).items()
    assert packed == ("sums", 9)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_with_the_rows_that_it_would_have_had(tmp_path, base_folder):
    def trained(name, callbacks=None, resume=None):
        args = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8}
        outer = run(tmp_path / name, base_folder, streams(), callbacks, **args)
        inner = outer.adapter_trainer(outer.args, outer.train_dataset, {}, outer.tasks.sampling_weights)
        loss = inner.train(resume_from_checkpoint=resume).training_loss
        return loss, {name: value.clone() for name, value in inner.model.named_parameters() if value.requires_grad}

    with pytest.raises(KeyboardInterrupt):
        trained("killed", [Stop()])
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    (loss, resumed), (expected, whole) = trained("killed", resume=True), trained("whole")
    assert loss == expected
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_rows_in_different_forms_and_evaluation_streams(tmp_path, base_folder):
    train = streams()
    texts = [{"text": row["prompt"] + row["completion"]} for row in TASKS["diffs"]["train"]]
    train["diffs"] = IterableDatasetDict(train=stream(texts), validation=stream(texts[:9]))
    evaluation = {name: stream(rows) for name, rows in split(TASKS, "validation").items() if name != "diffs"}
    trainer = run(tmp_path, base_folder, train, evaluation=evaluation, streaming_rows=5)
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == dict.fromkeys(train, 5)
    rows = {row["task"]: row for row in drawn(trainer, trainer.tasks.sampling_weights, 30)}
    assert rows["diffs"]["labels"][0] != -100 and rows["sums"]["labels"][0] == -100


def generated(name):
    yield from forms()[name]


def test_a_stream_that_knows_no_columns_has_the_tokens_of_a_table(tmp_path, base_folder):
    """In every form of rows; none of those that are held out is trained on, whoever reads the stream."""
    train = {name: IterableDataset.from_generator(generated, gen_kwargs={"name": name}) for name in forms()}
    args = sft_config(tmp_path, max_steps=2, dataloader_num_workers=2)
    given = {"peft_config": toy.lora(), "processing_class": chat_tokenizer()}
    ours = EnsembleSFTTrainer(base_folder, args, train_dataset=train, **given)
    tables = {name: Dataset.from_list(rows) for name, rows in forms().items()}
    alone = EnsembleSFTTrainer(base_folder, args, train_dataset=tables, eval_dataset=tables, **given)
    for name, stream in ours._streams.items():
        expected = alone.eval_dataset[name]
        held_out = ours.eval_dataset[name]["input_ids"][:]
        for column in ("input_ids", "labels"):
            rows = [row[column] for row in stream]
            wanted = [own for own, ids in zip(expected[column], expected["input_ids"]) if ids not in held_out]
            assert rows == wanted, name


def test_held_out_rows_stay_out_with_several_workers(tmp_path, base_folder):
    tables = {name: Dataset.from_list(rows) for name, rows in split(TASKS, "train").items()}
    train = {name: rows.to_iterable_dataset(num_shards=3).shuffle(seed=1) for name, rows in tables.items()}
    trainer = run(tmp_path, base_folder, train, dataloader_num_workers=2)
    held_out = trainer.eval_dataset["sums"]["input_ids"][:]
    rows = DataLoader(trainer._streams["sums"], batch_size=None, num_workers=2, collate_fn=lambda row: row["input_ids"])
    seen = list(rows)
    assert seen and not [ids for ids in seen if ids in held_out]


def test_evaluation_of_a_stream(tmp_path, base_folder):
    trainer = run(tmp_path, base_folder, streams(), streaming_rows=5)
    assert len(trainer.prepare_rows({"sums": streams()["sums"]})["sums"]) == 5


def labelled(labels):
    rows = [{"text": f"the film {i % 20} was good", "label": label} for i, label in enumerate(labels)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    return Dataset.from_list(rows, features=features).to_iterable_dataset()


def test_classifiers(tmp_path):
    train = {"a": labelled([0, 1] * 20), "b": labelled(["good", "bad"] * 20)}
    args = EnsembleConfig(str(tmp_path), **SMALL, **ESTIMATE, max_steps=2, streaming_rows=8)
    given = {"processing_class": toy.tokenizer(), "train_dataset": train}
    trainer = EnsembleTrainer(toy.bert(2), args, **given, peft_config=toy.lora("SEQ_CLS"))
    assert trainer.label_space.names == ("bad", "good")
    inner = trainer.adapter_trainer(args, trainer.train_dataset, trainer.eval_dataset, {"a": 1.0, "b": 1.0})
    rows = list(inner.train_dataset.take(40))
    assert {row["task"] for row in rows} == {"a", "b"} and {row["labels"] for row in rows} == {0, 1}
    assert inner.train().global_step == 2
    # Without an adapter, and a single one as the parent takes it.
    for own in (train, train["a"]):
        assert EnsembleTrainer(toy.bert(2), args, **{**given, "train_dataset": own}).train().global_step == 2
    assert args.accelerator_config.dispatch_batches is None


def test_a_row_of_a_stream_is_checked_when_it_comes(tmp_path, base_folder):
    rows = [*TASKS["sums"]["train"][:20], {"prompt": "sum", "completion": None}]
    trainer = run(tmp_path, base_folder, {**streams(), "sums": stream(rows)}, streaming_rows=4)
    with pytest.raises(TaskError, match="'sums', split 'train', row 18 .*in 'completion', found None"):
        drawn(trainer, trainer.tasks.sampling_weights)
    texts = toy.text_rows(12, labels=("x", "y", "z"))
    texts = {name: stream([*texts[:2] * 5, *texts]) for name in "ab"}
    args = EnsembleConfig(str(tmp_path), **SMALL, **ESTIMATE, max_steps=2, streaming_rows=2)
    trainer = EnsembleTrainer(toy.bert(2), args, train_dataset=texts, processing_class=toy.tokenizer())
    with pytest.raises(TaskError, match="label 2 is outside the task's set of 2 labels .*raise streaming_rows"):
        list(trainer.train_dataset.take(30))


REFUSED = {
    "no number of steps": (streams(), {"max_steps": -1}, "expected max_steps for the streaming datasets .*found -1"),
    "one row to hold out": ({**streams(), "sums": stream(TASKS["sums"]["train"][:1])}, {}, "at least 2 rows"),
    "one row is read": (streams(), {"streaming_rows": 1}, "streaming_rows has to be an integer of at least 2"),
    "no row": (
        {**streams(), "sums": stream(TASKS["sums"]["train"]).skip(99)},
        {},
        "'sums' is empty: its stream has no rows",
    ),
    "splits of one dataset": (
        IterableDatasetDict(train=streams()["sums"], test=streams()["sums"]),
        {},
        r"found the splits \['test', 'train'\] of one dataset",
    ),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_streams_are_refused_in_the_constructor(bad, tmp_path):
    train, changes, message = REFUSED[bad]
    with pytest.raises((ConfigurationError, TaskError), match=message):
        run(tmp_path, "no/such-model", train, **changes)


def test_datasets_with_the_names_of_splits_are_warned_of(tmp_path, base_folder, caplog):
    sums = {name: Dataset.from_list(rows) for name, rows in TASKS["sums"].items()}
    run(tmp_path, base_folder, sums, max_steps=-1)
    assert "named ['train', 'validation'], like the splits of one dataset" in caplog.text
    with pytest.raises(TaskError, match="of one dataset"):
        run(tmp_path, base_folder, DatasetDict(sums))


def test_given_weights_multiply_the_equal_shares_of_streams(tmp_path, base_folder):
    equal = run(tmp_path / "equal", base_folder, streams())
    weighted = run(tmp_path / "weighted", base_folder, streams(), sampling_weights={"sums": 3.0})
    expected = {
        task: weight * (3.0 if task == "sums" else 1.0) for task, weight in equal.tasks.sampling_weights.items()
    }
    assert weighted.tasks.sampling_weights == pytest.approx(expected)
    for changes in ({"task_sampling": "temperature"}, {"sample_with_replacement": True}):
        with pytest.raises(ConfigurationError, match="sizes of streams are unknown"):
            run(tmp_path / "refused", base_folder, streams(), **changes)
