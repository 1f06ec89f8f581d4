"""How much memory does scoring take, next to a training step of the same rows?

    python -m benchmarks.scoring_memory.run OUTPUT

A Llama with a vocabulary of 128,000 and rows of 2,048 tokens, once with every token an answer and once with short
answers. Each method is measured in a process of its own: the peak of the resident set above the process at rest, with
the model, all adapters and the rows in memory. The training step is the one of trl's `SFTTrainer`, with its fused head.
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

from ..common import add_machine_flags, make_parser, module_name, write_results
from .table import SMALL_TILES, STEP, table

SCORER, ROUTING, LOSS = (
    "AnswerScorer, one adapter",
    "prompt routing, 8 members",
    "forward(return_logits=False), 8 members",
)
MEMBERS = [f"score, {number} members" for number in (2, 4, 8, 16)]
# On a CPU trl's head scores every position of every row, whatever the labels: its step is the same for both answers.
METHODS = {
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


def num_members(method: str) -> int:
    """The number in a method's name, 1 without any."""
    return next((int(word) for word in method.split() if word.isdigit()), 1)


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


def scoring(arguments, method: str, rows: list[dict]) -> tuple[Callable[[], object], int]:
    """What scores the rows, and bytes that it is asked to keep."""
    model = PeftModel(make_model(arguments), lora(arguments.rank), adapter_name="m0")
    for number in range(1, num_members(method)):
        model.add_adapter(f"m{number}", lora(arguments.rank))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.requires_grad_(False)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    ids, labels = {"input_ids": batch["input_ids"]}, batch["labels"]
    if method == SCORER:
        scorer = AnswerScorer(model.eval())
        return torch.no_grad()(lambda: scorer(ids, labels)), 0
    combination = next((c for c in ("probs", "weights") if method.endswith(c)), "logits")
    ensemble = PeftEnsembleModel(model, [f"m{k}" for k in range(num_members(method))], combination=combination).eval()
    ensemble.fused = not method.endswith("in turn")
    if method.startswith("score"):
        return lambda: ensemble.score(labels, **ids), 0
    if method.startswith("fit"):
        # One token of every row.
        kept = num_members(method) * len(rows) * (1 if combination == "probs" else arguments.vocabulary)
        options = {"max_values": kept, "batch_size": len(rows)}
        return lambda: fit_ensemble(ensemble, {"task": rows}, **options), 4 * kept
    if method == ROUTING:
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


def measure(arguments, method: str, answers: str) -> dict:
    """Peak above rest of one run. A tiny model runs first, so that what libraries load is not counted."""
    small = {"vocabulary": 1000, "length": 32, "layers": 1, "hidden_size": 64}
    tiny = argparse.Namespace(**{**vars(arguments), **small})
    answer = None if answers == "every token" else 16
    with tempfile.TemporaryDirectory() as folder:
        for own in (tiny, arguments):
            rows, kept = make_rows(own, answer), 0
            if method in (STEP, SMALL_TILES):
                run = training(own, rows, method == SMALL_TILES, folder)
            else:
                run, kept = scoring(own, method, rows)
            settle()
            Path("/proc/self/clear_refs").write_text("5")
            rest, start = status("VmRSS"), time.perf_counter()
            run()
            peak, seconds = status("VmHWM") - rest, time.perf_counter() - start
    return {"rest_bytes": rest, "peak_bytes": peak, "kept_bytes": kept, "seconds": seconds}


def measure_apart(arguments, shape: dict[str, int], answers: str, method: str) -> dict:
    """[`measure`] in a process of its own."""
    options = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", module_name(__file__), "-", *options, "--threads", str(arguments.threads)]
    done = subprocess.run([*command, "--measure", answers, method], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    print(answers, method, done.stdout.splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8, help="of every adapter")
    parser.add_argument("--measure", nargs=2, metavar=("ANSWERS", "METHOD"), help="one of them, in this process")
    add_machine_flags(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        answers, method = arguments.measure
        print(json.dumps(measure(arguments, method, answers)))
        return
    names = ("vocabulary", "length", "batch_size", "hidden_size", "layers", "rank")
    shape = {name: getattr(arguments, name) for name in names}
    measured = {
        answers: {method: measure_apart(arguments, shape, answers, method) for method in methods}
        for answers, methods in METHODS.items()
    }
    write_results(arguments.output, {**shape, "answers": measured}, table)


if __name__ == "__main__":
    main()
