"""How much faster are several adapters trained at once than one after the other?

    python -m benchmarks.concurrent.run OUTPUT

Adapters (LoRA on every linear layer) are trained over one base with random weights, each on random rows of its own: a
language model by `EnsembleSFTTrainer`, an encoder of the shape of all-MiniLM-L6-v2 by `EnsembleTrainer`. Times are CPU
times of the process (wall times on a GPU) of whole trainings, with their trainers; both ways take turns. A training
before counts operations, which later ones follow from.
"""

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_ensemble import EnsembleConfig, EnsembleSFTConfig, EnsembleSFTTrainer, EnsembleTrainer
from hf_ensemble.train.flows.adapter_training import run_concurrently

from ..common import add_machine_flags, clock, make_parser, shape_of, write_results
from ..skills import tokenizer
from .table import table

_CLASSES = 2


def language_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
        )
    )


def encoder() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=_CLASSES,
        )
    )


def random_rows(count: int, lengths: list[int], vocabulary: int, is_text: bool, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = rng.integers(10, vocabulary, rng.integers(lengths[0], lengths[1] + 1)).tolist()
        rows.append({"input_ids": ids, "label": number % _CLASSES} if is_text else {"input_ids": ids, "labels": ids})
    return rows


def make_trainer(arguments, kind: str, batch_size: int, folder: Path) -> EnsembleTrainer | EnsembleSFTTrainer:
    """A trainer over as many tasks as adapters are trained at most."""
    torch.manual_seed(0)
    is_text = kind == "encoder"
    model = encoder() if is_text else language_model()
    # A saved ensemble has to load its base again.
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base")
    options = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": batch_size,
        "max_steps": arguments.steps,
        "learning_rate": 1e-3,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.device != "cpu",
    }
    if not is_text:
        options |= {"activation_checkpointing": False}
    count = arguments.steps * batch_size
    names = [f"task_{number}" for number in range(max(arguments.adapters))]
    rows = partial(random_rows, lengths=arguments.lengths, vocabulary=model.config.vocab_size, is_text=is_text)
    kind_of_trainer, config = (EnsembleTrainer, EnsembleConfig) if is_text else (EnsembleSFTTrainer, EnsembleSFTConfig)
    return kind_of_trainer(
        model=model,
        args=config(**options),
        train_dataset={name: rows(count, seed=number) for number, name in enumerate(names)},
        eval_dataset={name: rows(4, seed=100 + number) for number, name in enumerate(names)},
        processing_class=tokenizer(),
        peft_config=LoraConfig(
            r=arguments.rank, target_modules="all-linear", task_type="SEQ_CLS" if is_text else "CAUSAL_LM"
        ),
    )


def seconds(trainer: EnsembleTrainer | EnsembleSFTTrainer, count: int, num_at_once: int, device: str) -> float:
    """Of the trainings of so many adapters."""
    training, run = trainer.flow.training, trainer.run_directory

    def job(name: str, own):
        return own.run(name, [name], run.path / str(num_at_once) / name)

    names = trainer.tasks.names[:count]
    for name in names:
        run.forget_training(name)
    shutil.rmtree(run.path / str(num_at_once), ignore_errors=True)
    start = clock(device)
    if num_at_once == 1:
        for name in names:
            job(name, training)
    else:
        run_concurrently(training, [partial(job, name) for name in names], num_at_once)
    return clock(device) - start


def difference(folder: Path, count: int, names: list[str]) -> float:
    """The largest one between weights of adapters that were trained alone and at once."""
    found = 0.0
    for name in names[:count]:
        one, other = (load_file(folder / number / name / "adapter_model.safetensors") for number in ("1", str(count)))
        found = max(found, *(float((one[key] - other[key]).abs().max()) for key in one))
    return found


def measure(arguments, kind: str, batch_size: int) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp())
    trainer = make_trainer(arguments, kind, batch_size, folder)
    results = []
    with trainer.working():
        seconds(trainer, 1, 1, arguments.device)
        for count in arguments.adapters:
            times: dict[int, list[float]] = {1: [], count: []}
            for _ in range(arguments.repetitions):
                for num_at_once in times:
                    times[num_at_once].append(seconds(trainer, count, num_at_once, arguments.device))
            results.append(
                {
                    "model": kind,
                    "batch_size": batch_size,
                    "adapters": count,
                    "alone": times[1],
                    "at_once": times[count],
                    "ratio": statistics.median(one / other for one, other in zip(times[1], times[count])),
                    "difference": difference(trainer.run_directory.path, count, trainer.tasks.names),
                }
            )
    shutil.rmtree(folder)
    return results


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--models", nargs="+", default=["language model", "encoder"])
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 4], help="numbers of adapters")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="rows of each adapter in a step")
    parser.add_argument("--lengths", type=int, nargs=2, default=[16, 64], help="fewest and most tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    add_machine_flags(parser, device=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = [
        entry for kind in arguments.models for size in arguments.batch_sizes for entry in measure(arguments, kind, size)
    ]
    write_results(
        arguments.output, {"shape": shape_of(arguments), "settings": settings}, table, device=arguments.device
    )


if __name__ == "__main__":
    main()
