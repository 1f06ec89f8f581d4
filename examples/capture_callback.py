"""Gradients from a plain trl training: a callback captures them, and the questions are asked afterwards.

`--data` holds `NAME/train.jsonl` and `NAME/validation.jsonl` of prompts and completions. The training is the same with
and without the callback.

    python examples/capture_callback.py --model Qwen/Qwen3-0.6B --data data --target gsm8k --output_dir out
"""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_ensemble import DataSelector, GradientCaptureCallback, load_task_folder


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Base model: Hub id or folder."})
    data: str = field(metadata={"help": "Folder with NAME/train.jsonl and NAME/validation.jsonl for each dataset."})
    target: str = field(metadata={"help": "Name of the dataset that the others shall help."})


def main(script_args, training_args):
    tasks = load_task_folder(script_args.data)
    gradients = Path(training_args.output_dir) / "gradients"
    trainer = SFTTrainer(
        model=script_args.model,
        args=training_args,
        train_dataset=tasks.table("train").select_columns(["prompt", "completion"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[GradientCaptureCallback(tasks, gradients)],
    )
    trainer.train()
    trainer.save_model()

    # From here on no model is needed: this part may run later, elsewhere, on a CPU.
    selector = DataSelector.from_store(gradients)
    print(selector.select(script_args.target).summary)
    for name, members in selector.group().groups.items():
        print(f"{name}: {', '.join(members)}")
    subsets = [[script_args.target], list(tasks)]
    for subset, losses in zip(subsets, selector.estimator.predict_subsets(subsets).loss):
        loss = losses[tasks.names.index(script_args.target)]
        print(f"Predicted loss of {script_args.target} after training on {', '.join(subset)}: {loss:.4f}")


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, SFTConfig)).parse_args_into_dataclasses())
