"""Supervised fine-tuning on several datasets with hf_ensemble: they are grouped and one adapter a group is trained.

`--data` holds `NAME/train.jsonl` and `NAME/validation.jsonl` of prompts and completions:

    python examples/sft_after.py --model Qwen/Qwen3-0.6B --data data --output_dir out
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser

from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer, PeftEnsembleModel


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Base model: Hub id or folder."})
    data: str = field(metadata={"help": "Folder with NAME/train.jsonl and NAME/validation.jsonl for each dataset."})


def load_folder(folder: str) -> dict:
    """Name of each dataset to its splits."""
    return {
        path.name: load_dataset("json", data_files={s: str(path / f"{s}.jsonl") for s in ("train", "validation")})
        for path in sorted(Path(folder).iterdir())
    }


def main(script_args, training_args):
    datasets = load_folder(script_args.data)
    trainer = EnsembleSFTTrainer(
        model=script_args.model,
        args=training_args,
        train_dataset={name: splits["train"] for name, splits in datasets.items()},
        eval_dataset={name: splits["validation"] for name, splits in datasets.items()},
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name in datasets:
        print(f"{name}: loss {metrics[f'eval_{name}_loss']:.4f}")
    trainer.save_model()

    model = PeftEnsembleModel.from_pretrained(Path(training_args.output_dir) / "ensemble")
    tokenizer = AutoTokenizer.from_pretrained(script_args.model)
    for name, splits in datasets.items():
        prompt = splits["validation"][0]["prompt"]
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        generated = model.generate(**inputs, task=name, max_new_tokens=16, do_sample=False)
        print(f"{name}: {tokenizer.decode(generated[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*HfArgumentParser((ScriptArguments, EnsembleSFTConfig)).parse_args_into_dataclasses())
