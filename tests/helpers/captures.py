"""Batches and stores of tiny models, for the tests."""

from transformers import DataCollatorForSeq2Seq

from helpers import toy
from hf_ensemble.capture import CaptureConfig, capture_gradients
from hf_ensemble.tasks import TaskCollator, TaskSet, encode


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def contents(folder):
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def causal_batch(padding_side, count=5):
    tokenizer = toy.tokenizer(padding_side)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    tasks = TaskSet.from_datasets({"t": toy.sum_rows(count)}, {"t": toy.sum_rows(2)})
    rows = list(encode(tasks.table("train"), tokenizer, tasks.row_format))
    # Different lengths, so that something is padded.
    for i, row in enumerate(rows):
        for key in ("input_ids", "attention_mask", "labels"):
            row[key] = row[key][i % 3 :]
    return rows, TaskCollator(pad)


def capture(folder, model=None, rows=None, recipe=None, shard=None, **changes):
    config = CaptureConfig(**{"projection_dim": 64, "feature_dtype": "float32", "batch_size": 4, **changes})
    tasks = TaskSet.from_datasets(rows or toy.sft_tasks(train=24, validation=6))
    model = model or toy.with_lora(toy.llama())
    return capture_gradients(
        model, tasks, config, folder, processing_class=toy.tokenizer(), disable_tqdm=True, recipe=recipe, shard=shard
    )
