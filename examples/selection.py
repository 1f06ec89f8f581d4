"""Fine-tune for one target: choose the datasets that help it by predicted validation loss, then train once on them.

`--data` holds `NAME/train.jsonl` and `NAME/validation.jsonl` of prompts and completions.

    python examples/selection.py --model Qwen/Qwen3-0.6B --data data --target gsm8k --output_dir out
"""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, HfArgumentParser

from hf_ensemble import SelectionSFTConfig, SelectionSFTTrainer, load_task_folder


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Base model: Hub id or folder."})
    data: str = field(metadata={"help": "Folder with NAME/train.jsonl and NAME/validation.jsonl for each dataset."})
    target: str = field(metadata={"help": "Name of the dataset to do well on."})


def main(script_args, training_args):
    trainer = SelectionSFTTrainer(
        model=script_args.model,
        args=training_args,
        train_dataset=load_task_folder(script_args.data),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        target=script_args.target,
    )
    metrics = trainer.train().metrics
    print(trainer.selection.summary)
    for task, score in sorted(trainer.selection.scores.items(), key=lambda item: item[1]):
        chosen = "taken" if task in trainer.selection.auxiliary else "left"
        print(f"{task}: {chosen}, predicted loss of {script_args.target} {score:.4f}")
    print(f"{script_args.target}: loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_accuracy']:.3f}")

    # The result is one plain PEFT adapter.
    base = AutoModelForCausalLM.from_pretrained(script_args.model)
    model = PeftModel.from_pretrained(base, Path(training_args.output_dir) / "adapter")
    print(f"Loaded the adapter {model.active_adapter!r}.")


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, SelectionSFTConfig)).parse_args_into_dataclasses())
