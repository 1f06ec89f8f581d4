"""A script of text classification as those over `transformers.Trainer` are: it tokenizes its rows itself.

`--data` holds `NAME/train.jsonl`, `NAME/validation.jsonl` and `NAME/test.jsonl` with `text` and `label`, an integer
from 0 on, which is an output of the model. All rows stand in one table, whose column `task` says where they come from.
The trainer is given the training rows apart, and evaluates and predicts on the tables as they are.

    python examples/classification_script.py --model bert-base-uncased --data data --output_dir out \
        --do_train --do_eval --do_predict
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets, load_dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

from hf_ensemble import EnsembleConfig, EnsembleTrainer

SPLITS = ("train", "validation", "test")


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Base model: Hub id or folder."})
    data: str = field(metadata={"help": "Folder with a folder of JSONL files for each dataset."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})


def load_table(folder, split):
    """The rows of all datasets, each with the name of its own."""
    parts = []
    for path in sorted(Path(folder).iterdir()):
        rows = load_dataset("json", data_files=str(path / f"{split}.jsonl"), split="train")
        parts.append(rows.add_column("task", [path.name] * len(rows)))
    return concatenate_datasets(parts)


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main(script_args, training_args):
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script_args.model)

    def tokenize(rows):
        return tokenizer(rows["text"], max_length=script_args.max_seq_length, truncation=True)

    tables = {split: load_table(script_args.data, split).map(tokenize, batched=True) for split in SPLITS}
    model = AutoModelForSequenceClassification.from_pretrained(
        script_args.model, num_labels=len(tables["train"].unique("label"))
    )
    train, names = tables["train"], tables["train"].unique("task")
    trainer = EnsembleTrainer(
        model=model,
        args=training_args,
        train_dataset={name: train.filter(lambda row, name=name: row["task"] == name) for name in names},
        eval_dataset=tables["validation"],
        compute_metrics=accuracy,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="SEQ_CLS"),
    )
    if training_args.do_train:
        metrics = trainer.train().metrics
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate(tables["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_args.do_predict:
        predictions = trainer.predict(tables["test"].remove_columns("label"), metric_key_prefix="predict").predictions
        lines = [f"{number}\t{label}\n" for number, label in enumerate(predictions.argmax(-1))]
        Path(training_args.output_dir, "predictions.txt").write_text("".join(lines))
    trainer.create_model_card(finetuned_from=script_args.model, tasks="text-classification")


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, EnsembleConfig)).parse_args_into_dataclasses())
