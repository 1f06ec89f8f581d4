"""Peak memory of everything that scores answers, beside a training step of the same rows.

    OMP_NUM_THREADS=1 python benchmarks/scoring_memory/scoring_memory.py benchmarks/scoring_memory/scoring_memory

writes the JSON and the table. A Llama with a vocabulary of 128,000 and rows of 2,048 tokens, once with every token an
answer and once with short answers. Each side is measured in a process of its own: the peak of the resident set above
the process at rest, with the model, all adapters and the rows in memory. The training step is that of trl's
`SFTTrainer`, which computes the loss with its fused head, with and without activation checkpointing.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import fit_ensemble
from hf_ensemble.models.answer_scorer import AnswerScorer

STEP, SMALL_TILES = "training step", "training step, tiles of 64 MiB"
SCORER, ROUTING, LOSS = (
    "AnswerScorer, one adapter",
    "prompt routing, 8 members",
    "forward(return_logits=False), 8 members",
)
MEMBERS = [f"score, {number} members" for number in (2, 4, 8, 16)]
# On a CPU trl's head scores every position of every row, whatever the labels: its step is the same for both answers.
SIDES = {
    "every token": [STEP, SMALL_TILES, SCORER, MEMBERS[0], MEMBERS[-1], ROUTING],
    "the last 16 tokens": [
        SCORER,
        *MEMBERS,
        "score, 8 members, probs",
        "score, 8 members, weights",
        "score, 8 members, in turn",
        "fit_ensemble, 8 members",
        "fit_ensemble, 8 members, probs",
        LOSS,
    ],
}


def num_members(side: str) -> int:
    """The number in a side's name, 1 without any."""
    return next((int(word) for word in side.split() if word.isdigit()), 1)


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def make_model(arguments) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.hidden_size * 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden_size // 64,
            max_position_embeddings=arguments.length,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def make_rows(arguments, answer: int | None) -> list[dict]:
    """Rows of random tokens; the last `answer` of each are the answer, or all."""
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch_size, arguments.length)
    rows = torch.randint(3, arguments.vocabulary, shape, generator=generator).tolist()
    prompt = 0 if answer is None else arguments.length - answer
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in rows]


def training(arguments, rows: list[dict], small_tiles: bool, folder: str) -> Callable[[], object]:
    """One optimizer step of trl's trainer; the rows of the benchmark as one batch."""
    import trl.trainer.utils as trainer_utils
    from trl import SFTConfig, SFTTrainer
    from trl.kernels import chunked_logprob

    if small_tiles:
        chunked_logprob.TOKEN_CHUNK_SIZE = trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE = 4096
    args = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=arguments.batch_size,
        max_steps=1,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    data = Dataset.from_list(rows)
    return SFTTrainer(
        make_model(arguments), args, train_dataset=data, processing_class=tokenizer, peft_config=lora(arguments.rank)
    ).train


def scoring(arguments, side: str, rows: list[dict]) -> tuple[Callable[[], object], int]:
    """What scores the rows, and bytes that it is asked to keep."""
    model = PeftModel(make_model(arguments), lora(arguments.rank), adapter_name="m0")
    for number in range(1, num_members(side)):
        model.add_adapter(f"m{number}", lora(arguments.rank))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.requires_grad_(False)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    ids, labels = {"input_ids": batch["input_ids"]}, batch["labels"]
    if side == SCORER:
        scorer = AnswerScorer(model.eval())
        return torch.no_grad()(lambda: scorer(ids, labels)), 0
    combination = next((c for c in ("probs", "weights") if side.endswith(c)), "logits")
    ensemble = PeftEnsembleModel(model, [f"m{k}" for k in range(num_members(side))], combination=combination).eval()
    ensemble.fused = not side.endswith("in turn")
    if side.startswith("score"):
        return lambda: ensemble.score(labels, **ids), 0
    if side.startswith("fit"):
        # One token of every row.
        kept = num_members(side) * len(rows) * (1 if combination == "probs" else arguments.vocabulary)
        options = {"max_values": kept, "batch_size": len(rows)}
        return lambda: fit_ensemble(ensemble, {"task": rows}, **options), 4 * kept
    if side == ROUTING:
        # Scores what is no answer: here all of every row but its last token.
        labels[:, :-1] = -100
        return lambda: ensemble.score(labels, routing="prompt", **ids), 0
    return torch.no_grad()(lambda: ensemble(**ids, labels=labels, return_logits=False)), 0


def status(name: str) -> int:
    """Bytes of a line of the process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(arguments, side: str, answers: str) -> dict:
    """Peak above rest of one run. A tiny model runs first, so that what libraries load is not counted."""
    small = {"vocabulary": 1000, "length": 32, "layers": 1, "hidden_size": 64}
    tiny = argparse.Namespace(**{**vars(arguments), **small})
    answer = None if answers == "every token" else 16
    with tempfile.TemporaryDirectory() as folder:
        for own in (tiny, arguments):
            rows, kept = make_rows(own, answer), 0
            if side in (STEP, SMALL_TILES):
                run = training(own, rows, side == SMALL_TILES, folder)
            else:
                run, kept = scoring(own, side, rows)
            settle()
            Path("/proc/self/clear_refs").write_text("5")
            rest, start = status("VmRSS"), time.perf_counter()
            run()
            peak, seconds = status("VmHWM") - rest, time.perf_counter() - start
    return {"rest_bytes": rest, "peak_bytes": peak, "kept_bytes": kept, "seconds": seconds}


def table(results: dict) -> str:
    shape = results["shape"]
    lines = [
        f"Llama of {shape['layers']} layers and hidden size {shape['hidden_size']}, vocabulary "
        f"{shape['vocabulary']:,}, {shape['batch_size']} rows of {shape['length']:,} tokens, LoRA of rank "
        f"{shape['rank']} on every linear layer, float32 on a CPU. Peak of the resident set above the process at rest, "
        "in MiB, and as a multiple of that of a training step, as trl computes it and with tiles of 64 MiB. The logits "
        "that `max_values` asks to keep are subtracted and given apart.",
    ]
    steps = [results["answers"]["every token"][step]["peak_bytes"] for step in (STEP, SMALL_TILES)]
    for answers, sides in results["answers"].items():
        columns = [f"answers: {answers}", "MiB", "x step", "x step with tiles of 64 MiB", "kept, MiB", "seconds"]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for side, own in sides.items():
            peak = own["peak_bytes"] - own["kept_bytes"]
            kept = f"{own['kept_bytes'] / 2**20:.0f}" if own["kept_bytes"] else ""
            ratios = " | ".join(f"{peak / step:.2f}" for step in steps)
            lines.append(f"| {side} | {peak / 2**20:.0f} | {ratios} | {kept} | {own['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="path of the results without .json and .md")
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--measure", nargs=2, metavar=("ANSWERS", "SIDE"), help="one of them, in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        answers, side = arguments.measure
        print(json.dumps(measure(arguments, side, answers)))
        return
    shape = {key: value for key, value in vars(arguments).items() if isinstance(value, int)}
    results: dict = {"torch": torch.__version__, "shape": shape, "answers": {}}
    options = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    for answers, sides in SIDES.items():
        for side in sides:
            command = [sys.executable, __file__, "-", *options, "--measure", answers, side]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results["answers"].setdefault(answers, {})[side] = json.loads(done.stdout.splitlines()[-1])
            print(answers, side, results["answers"][answers][side], flush=True)
    Path(f"{arguments.output}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{arguments.output}.md").write_text(table(results))


if __name__ == "__main__":
    main()
