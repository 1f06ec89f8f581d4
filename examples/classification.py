"""Text classification on several datasets: an ensemble of adapters over one encoder.

`--data` holds `NAME/train.jsonl` and `NAME/validation.jsonl` with `text`, `label` (integers from 0 on) and, if labels
have names, `label_text`. Labels of the same name are one output of the classifier, whatever dataset they come from.

    python examples/classification.py --model bert-base-uncased --data data --output_dir out
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser

from hf_ensemble import EnsembleConfig, EnsembleTrainer, PeftEnsembleModel, load_task_folder


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Base model: Hub id or folder."})
    data: str = field(metadata={"help": "Folder with NAME/train.jsonl and NAME/validation.jsonl for each dataset."})


def main(script_args, training_args):
    tasks = load_task_folder(script_args.data)
    trainer = EnsembleTrainer(
        model=script_args.model,
        args=training_args,
        train_dataset=tasks,
        peft_config=LoraConfig(r=8, lora_alpha=16, task_type="SEQ_CLS"),
    )
    metrics = trainer.train().metrics
    print(trainer.grouping.summary)
    for name in tasks:
        print(f"{name}: accuracy {metrics[f'eval_{name}_accuracy']:.3f}, one adapter for all ", end="")
        print(f"{metrics[f'eval_baseline_{name}_accuracy']:.3f}")

    model = PeftEnsembleModel.from_pretrained(Path(training_args.output_dir) / "ensemble")
    tokenizer = AutoTokenizer.from_pretrained(script_args.model)
    rows = [task.splits["validation"][0] for task in tasks.values()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch, task=[row["task"] for row in rows]).logits
    for row, answer in zip(rows, logits.argmax(-1)):
        print(f"{row['task']}: {row['text']!r} is {tasks.label_space.names[answer]}")


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, EnsembleConfig)).parse_args_into_dataclasses())
