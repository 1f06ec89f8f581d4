"""What does an ensemble's forward cost, next to other ways to run several adapters over one base model?

    python -m benchmarks.ensemble_inference.run OUTPUT

A Llama-shaped model with random weights and m adapters (LoRA on every linear layer) answers B rows, once for a whole
prompt (prefill) and token by token after it (decode). All methods return B combined rows of logits, except the two
references, which run one adapter alone. Times are CPU times of the process (device times on a GPU); the methods take
turns, so that a busy machine slows them all down.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, PeftModel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.forward.cache import EnsembleCache, cache_maker

from ..common import add_machine_flags, clock, machine, make_parser, shape_of, write_results
from ..models import randomize_lora_b
from .table import table


def make_model(arguments, device: torch.device) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).eval()
    lora = LoraConfig(r=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = PeftModel(base, lora, adapter_name="m0")
    for number in range(1, max(arguments.members)):
        model.add_adapter(f"m{number}", lora)
    return randomize_lora_b(model).requires_grad_(False).eval().to(device)


class Decoder:
    """One adapter (or PEFT's mixed batch) as `forward(ids, cache)` on a `PeftModel`."""

    def __init__(self, model: PeftModel, adapter: str | None, adapter_names: list[str] | None = None):
        self.model, self.adapter = model, adapter
        self.extra = {} if adapter_names is None else {"adapter_names": adapter_names}

    def __call__(self, ids: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        if self.adapter is not None:
            self.model.set_adapter(self.adapter, inference_mode=True)
        return self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **self.extra).logits


def methods(model: PeftModel, members: int, batch_size: int) -> dict[str, Callable]:
    """Factories `make(cached)` of runners `run(ids) -> logits`, by method; ids are `(B, T)`."""
    names = [f"m{k}" for k in range(members)]
    config = model.config

    def alone(copies: int):
        def make(cached: bool):
            model.set_adapter("m0", inference_mode=True)
            cache, run = DynamicCache(config=config) if cached else None, Decoder(model, None)
            return lambda ids: run(ids.repeat(copies, 1), cache)

        return make

    def in_turn(cached: bool):
        caches = [DynamicCache(config=config) if cached else None for _ in names]
        runs = [Decoder(model, name) for name in names]
        return lambda ids: sum(run(ids, cache) for run, cache in zip(runs, caches)) / members

    def mixed(cached: bool):
        cache = DynamicCache(config=config) if cached else None
        run = Decoder(model, None, [name for name in names for _ in range(batch_size)])
        return lambda ids: run(ids.repeat(members, 1), cache).view(members, len(ids), -1, config.vocab_size).mean(0)

    def ensemble(fused: bool = True, combination: str = "logits", tasks=None, weights=None):
        def make(cached: bool):
            own = PeftEnsembleModel(model, names, weights, combination=combination)
            own.fused = fused
            cache = None
            if cached:
                plain = cache_maker(model.get_base_model().config)
                cache = plain() if combination == "weights" else EnsembleCache(plain)
            return lambda ids: own(ids, task=tasks, past_key_values=cache).logits

        return make

    single = {name: {name: 1.0} for name in names}
    return {
        "one adapter, m x B rows": alone(members),
        "set_adapter in turn": in_turn,
        "mixed batch": mixed,
        "ensemble, one after the other": ensemble(fused=False),
        "ensemble, all at once": ensemble(),
        "one adapter, B rows": alone(1),
        "ensemble, weights": ensemble(combination="weights"),
        "ensemble, one adapter a row": ensemble(
            tasks=[names[row % members] for row in range(batch_size)], weights=single
        ),
    }


@torch.no_grad()
def measure(
    model: PeftModel, members: int, arguments, device: torch.device, wanted: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Median milliseconds of a prefill and of one decoded token, by method: those wanted, all by default."""
    torch.manual_seed(1)
    shape = (arguments.batch_size, arguments.length)
    prompt = torch.randint(0, arguments.vocabulary, shape, device=device)
    token = torch.randint(0, arguments.vocabulary, (arguments.batch_size, 1), device=device)
    own = methods(model, members, arguments.batch_size)
    own = {name: own[name] for name in wanted or own}
    prefill: dict[str, list[float]] = {name: [] for name in own}
    decode: dict[str, list[float]] = {name: [] for name in own}
    for repetition in range(arguments.repetitions + 1):
        for name, make in own.items():
            run = make(cached=False)
            start = clock(device)
            run(prompt)
            # The first round is a warm-up.
            if repetition:
                prefill[name].append(clock(device) - start)
    for _ in range(arguments.repetitions):
        for name, make in own.items():
            run = make(cached=True)
            run(prompt)
            times = []
            for _ in range(arguments.tokens):
                start = clock(device)
                run(token)
                times.append(clock(device) - start)
            # The first token after a prompt still fills what later tokens reuse.
            decode[name] += times[1:]
    return {
        name: {"prefill": 1e3 * statistics.median(prefill[name]), "decode": 1e3 * statistics.median(decode[name])}
        for name in own
    }


@torch.no_grad()
def generation(model: PeftModel, members: int, arguments, device: torch.device) -> dict[str, float]:
    """Median milliseconds of `generate`, prompt included."""
    prompt = torch.randint(0, arguments.vocabulary, (arguments.batch_size, arguments.length), device=device)
    names = [f"m{k}" for k in range(members)]
    options = {"max_new_tokens": arguments.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ensemble = PeftEnsembleModel(model, names)
    mixed = [name for name in names for _ in range(arguments.batch_size)]
    repeated = prompt.repeat(members, 1)
    runs = {
        "one adapter, m x B rows": lambda: model.generate(input_ids=repeated, **options),
        "mixed batch": lambda: model.generate(input_ids=repeated, adapter_names=mixed, **options),
        "ensemble, all at once": lambda: ensemble.generate(prompt, **options),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repetitions):
        for name, run in runs.items():
            model.set_adapter("m0", inference_mode=True)
            start = clock(device)
            run()
            times[name].append(clock(device) - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8], help="numbers of adapters")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    add_machine_flags(parser, device=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    model = make_model(arguments, device)
    results = {
        "machine": {**machine(arguments.device), "dtype": str(model.dtype)},
        "shape": shape_of(arguments, "device", "members"),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
        "members": {},
        "generate": {},
    }
    for members in arguments.members:
        results["members"][str(members)] = measure(model, members, arguments, device)
        results["generate"][str(members)] = generation(model, members, arguments, device)
        write_results(arguments.output, results, table)


if __name__ == "__main__":
    main()
