"""A script of supervised fine-tuning as trl's own is: every argument on the command line, LoRA by `--use_peft`.

`--data` holds `NAME/train.jsonl` and `NAME/validation.jsonl` in any form that trl takes. With `SFTTrainer` this script
differs in the import, the classes and in one concatenated dataset in place of the dict.

    python examples/sft_script.py --model_name_or_path Qwen/Qwen3-0.6B --data data --output_dir out --use_peft
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_ensemble import EnsembleSFTConfig, EnsembleSFTTrainer


@dataclass
class ScriptArguments:
    data: str = field(metadata={"help": "Folder with a folder of JSONL files for each dataset."})


def main(script_args, training_args, model_args):
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    datasets = {path.name: load_dataset(str(path)) for path in sorted(Path(script_args.data).iterdir())}

    trainer = EnsembleSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset={name: splits["train"] for name, splits in datasets.items()},
        eval_dataset={name: splits["validation"] for name, splits in datasets.items()},
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, EnsembleSFTConfig, ModelConfig)).parse_args_and_config())
