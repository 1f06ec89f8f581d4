"""Generation with an ensemble, token for token against plain loops over the definition."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    pipeline,
)

from helpers import ensembles, toy
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
COMBINE = {
    "logits": lambda values, weights: sum(w * v for v, w in zip(values, weights)),
    "log_probs": ensembles.geometric_mean,
    "probs": ensembles.arithmetic_mean,
}


@pytest.fixture
def model():
    return make(llama(), KINDS["ranks and scalings"], 0.4)


@pytest.fixture
def ensemble(model):
    return PeftEnsembleModel(model, NAMES, {**WEIGHTS, "minus": {"first": 0.2, "third": 0.8}})


@pytest.fixture
def batch():
    return ensembles.prompts()


def reference_logits(ensemble, model, tasks):
    """A function from a step's inputs to the combined logits, by plain forwards on the whole text so far."""
    rows = [ensemble.weights[task] for task in tasks]
    if ensemble.combination == "weights":
        copies = {task: ensembles.with_summed_deltas(model, ensemble.weights[task]) for task in set(tasks)}
        return lambda step: torch.stack([copies[task](**step).logits[row] for row, task in enumerate(tasks)])
    combine = COMBINE[ensemble.combination]
    return lambda step: ensembles.combined(ensembles.outputs_of(model, NAMES, step), rows, combine)


def beam_search(logits_of, ids, mask, steps, beams):
    """Beams of one prompt, without end-of-sequence, caches or batches: the best `beams` of all continuations, kept."""
    texts, scores = ids.repeat(1, 1), torch.zeros(1)
    for _ in range(steps):
        own = mask.repeat(len(texts), 1)
        own = torch.cat([own, torch.ones(len(texts), texts.shape[1] - own.shape[1], dtype=own.dtype)], 1)
        step = {"input_ids": texts, "attention_mask": own, "position_ids": (own.cumsum(-1) - 1).clamp(min=0)}
        log_probs = torch.log_softmax(logits_of(step)[:, -1], -1)
        total = (scores[:, None] + log_probs).flatten()
        scores, chosen = total.topk(beams)
        parent, token = chosen // log_probs.shape[1], chosen % log_probs.shape[1]
        texts = torch.cat([texts[parent], token[:, None]], 1)
    return texts[scores.argmax()]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs", "weights"])
@torch.no_grad()
def test_greedy_with_left_padding_and_a_task_a_row(ensemble, model, batch, combination, fused):
    ensemble.combination, ensemble.fused = combination, fused
    expected = ensembles.greedy(
        reference_logits(ensemble, model, TASKS), batch["input_ids"], batch["attention_mask"], 6
    )
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        assert torch.equal(ensemble.generate(**batch, task=TASKS, **GREEDY, **options), expected), options


@pytest.mark.parametrize("kind", ["targets", "dora", "embeddings", "saved modules"])
@torch.no_grad()
def test_greedy_with_every_kind_of_adapter(batch, kind):
    model = make(llama(), KINDS[kind], 0.3)
    ensemble = PeftEnsembleModel(model, NAMES, {**WEIGHTS, "minus": {"first": 0.2, "third": 0.8}})
    expected = ensembles.greedy(
        reference_logits(ensemble, model, TASKS), batch["input_ids"], batch["attention_mask"], 6
    )
    assert torch.equal(ensemble.generate(**batch, task=TASKS, **GREEDY), expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combination", ["logits", "probs", "weights"])
@torch.no_grad()
def test_beams_equal_a_plain_search_of_each_prompt(ensemble, model, batch, combination, fused):
    ensemble.combination, ensemble.fused = combination, fused
    expected = []
    for row, task in enumerate(TASKS):
        logits = lambda step, task=task: reference_logits(ensemble, model, [task] * len(step["input_ids"]))(step)  # noqa: E731
        ids, mask = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        expected.append(beam_search(logits, ids, mask, 5, 3))
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(ensemble.generate(**batch, task=TASKS, **options, **cache), torch.stack(expected)), cache


@torch.no_grad()
def test_sampling_follows_the_seed_and_the_distribution(ensemble, model, batch):
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 0, "eos_token_id": None}

    def sample(**extra):
        torch.manual_seed(5)
        return ensemble.generate(**batch, task=TASKS, **options, **extra)

    first = sample()
    assert torch.equal(first, sample()) and torch.equal(first, sample(use_cache=False))
    ensemble.fused = False
    assert torch.equal(first, sample())
    ensemble.fused = True
    # The same draws from the reference's distribution.
    logits, ids, mask = reference_logits(ensemble, model, TASKS), batch["input_ids"], batch["attention_mask"]
    torch.manual_seed(5)
    for _ in range(4):
        step = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        token = torch.multinomial(torch.softmax(logits(step)[:, -1], -1), 1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(first, ids)
    several = sample(num_return_sequences=3)
    assert several.shape == (12, 11)


@torch.no_grad()
def test_beam_sampling_and_scores(ensemble, batch):
    torch.manual_seed(0)
    sampled = ensemble.generate(**batch, task=TASKS, num_beams=2, do_sample=True, max_new_tokens=3)
    assert len(sampled) == 4
    output = ensemble.generate(**batch, task=TASKS, **GREEDY, return_dict_in_generate=True, output_logits=True)
    forward = ensemble(**batch, task=TASKS, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    assert torch.allclose(output.logits[0], forward.logits[:, -1], atol=1e-5)


@torch.no_grad()
def test_streamers_stopping_and_processors(ensemble, batch, capsys):
    tokenizer = toy.tokenizer()
    one = {key: value[:1] for key, value in batch.items()}
    expected = ensemble.generate(**one, task="z", **GREEDY)
    ensemble.generate(**one, task="z", **GREEDY, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(expected[0, 7:]).split()

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    class Never(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, expected[0, 7:8], float("-inf"))

    stopped = ensemble.generate(**one, task="z", **GREEDY, stopping_criteria=StoppingCriteriaList([AfterTwo()]))
    assert torch.equal(stopped, expected[:, :9])
    other = ensemble.generate(**one, task="z", **GREEDY, logits_processor=LogitsProcessorList([Never()]))
    assert other[0, 7] != expected[0, 7]
    # A row that ended is padded while the others go on.
    end = int(expected[0, 8])
    ended = ensemble.generate(**batch, task="z", max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert ended[0, 8] == end and (ended[0, 9:] == 0).all()


@torch.no_grad()
def test_generation_config_decides_too(ensemble, batch):
    expected = ensemble.generate(**batch, task="x", **GREEDY)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0)
    assert torch.equal(ensemble.generate(**batch, task="x", generation_config=config), expected)
    assert config.cache_implementation == "static"


@pytest.mark.parametrize("combination", ["logits", "weights"])
@torch.no_grad()
def test_padding_without_a_mask_is_told_by_its_token(model, batch, combination):
    ensemble = PeftEnsembleModel(model, NAMES, combination=combination, routing="prompt")
    weights, route = [], ensemble._routed_weights
    ensemble._routed_weights = lambda *arguments: weights.append(route(*arguments)) or weights[-1]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for end in (2, [2, 3], None):
        own = {"pad_token_id": 0, "eos_token_id": end, **options}
        expected, found = ensemble.generate(**batch, **own), ensemble.generate(batch["input_ids"], **own)
        assert torch.equal(weights[-1], weights[-2]) and torch.equal(expected.sequences, found.sequences)
        assert all(torch.equal(own, other) for own, other in zip(expected.logits, found.logits))
    # As everywhere in transformers, a token that ends texts is not taken for padding.
    found = ensemble.generate(batch["input_ids"], pad_token_id=0, eos_token_id=[2, 0], **options)
    ones = torch.ones_like(batch["input_ids"])
    expected = ensemble.generate(
        batch["input_ids"], attention_mask=ones, pad_token_id=0, eos_token_id=[2, 0], **options
    )
    assert torch.equal(weights[-1], weights[-2]) and torch.equal(found.sequences, expected.sequences)
    assert not torch.equal(weights[-1], weights[0])


@torch.no_grad()
def test_decoding_by_hand_with_a_cache(ensemble, model, batch):
    expected = ensembles.greedy(
        reference_logits(ensemble, model, TASKS), batch["input_ids"], batch["attention_mask"], 3
    )
    for combination in ("logits", "weights"):
        ensemble.combination = combination
        reference = reference_logits(ensemble, model, TASKS)
        ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
        new = ids
        for _ in range(3):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            output = ensemble(new, mask, task=TASKS, position_ids=positions, past_key_values=cache, use_cache=True)
            step = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            assert torch.allclose(output.logits[:, -1], reference(step)[:, -1], atol=1e-4)
            cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        if combination == "logits":
            assert torch.equal(ids, expected)
    assert ensemble(**batch, task=TASKS).past_key_values is None
    ensemble.combination = "logits"
    cache = ensemble(**batch, task=TASKS, use_cache=True).past_key_values
    with pytest.raises(EnsembleError, match="states of other rows or adapters"):
        ensemble(new, task="x", past_key_values=cache)


class Interrupted(RuntimeError):
    """Stands for what stops a generation: no memory, a user, a faulty processor."""


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combination", ["logits", "weights"])
@pytest.mark.parametrize("where", ["first layer", "third forward", "processor", "stopping", "tokens", "streamer"])
@torch.no_grad()
def test_the_next_call_after_an_exception_is_right(ensemble, model, batch, where, combination, fused):
    ensemble.combination, ensemble.fused = combination, fused
    expected = ensemble.generate(**batch, task=TASKS, **GREEDY)
    alone = ensembles.outputs_of(model, NAMES, batch)
    grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calls = []

    def interrupt(*_, **__):
        calls.append(1)
        if where != "third forward" or len(calls) == 3:
            raise Interrupted

    options, inputs, handle, error = {}, batch, None, Interrupted
    layer = model.get_base_model().model.layers
    if where == "first layer":
        handle = layer[0].self_attn.v_proj.base_layer.register_forward_hook(interrupt)
    elif where == "third forward":
        handle = layer[1].register_forward_pre_hook(interrupt)
    elif where == "processor":
        options["logits_processor"] = LogitsProcessorList([type("P", (LogitsProcessor,), {"__call__": interrupt})()])
    elif where == "stopping":
        options["stopping_criteria"] = StoppingCriteriaList([type("S", (StoppingCriteria,), {"__call__": interrupt})()])
    elif where == "tokens":
        inputs, error = {**batch, "input_ids": batch["input_ids"] + 1000}, IndexError
    else:
        streamer = type("T", (), {"put": interrupt, "end": interrupt})
        options["streamer"], inputs = streamer(), {key: value[:1] for key, value in batch.items()}
    task = TASKS[: len(inputs["input_ids"])]
    with pytest.raises(error):
        ensemble.generate(**inputs, task=task, **GREEDY, **options)
    if handle is not None:
        handle.remove()
    assert torch.equal(ensemble.generate(**batch, task=TASKS, **GREEDY), expected)
    after = ensembles.outputs_of(model, NAMES, batch)
    assert all(torch.equal(alone[name], after[name]) for name in NAMES)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert grad == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.active_adapters == ["first"]


@pytest.fixture
def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=45, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    kinds = [
        {"task_type": "SEQ_2_SEQ_LM", "r": r, "target_modules": ["q", "v", "wo"], "use_rslora": r == 8}
        for r in (4, 8, 2)
    ]
    return make(T5ForConditionalGeneration(config).eval(), kinds, 0.4)


def seq2seq_greedy(logits_of, inputs, steps):
    ids = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)
    for _ in range(steps):
        ids = torch.cat([ids, logits_of({**inputs, "decoder_input_ids": ids})[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("combination", ["logits", "probs", "weights"])
@torch.no_grad()
def test_encoder_decoder(t5, batch, combination, fused):
    ensemble = PeftEnsembleModel(t5, NAMES, {**WEIGHTS, "minus": {"first": 0.2, "third": 0.8}}, combination=combination)
    ensemble.fused = fused
    expected = seq2seq_greedy(reference_logits(ensemble, t5, TASKS), batch, 6)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(ensemble.generate(**batch, task=TASKS, **GREEDY, **options), expected), options
    assert torch.equal(ensemble.generate(batch["input_ids"], task=TASKS, **GREEDY), expected)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with_cache = ensemble.generate(**batch, task=TASKS, **beams)
    assert torch.equal(with_cache, ensemble.generate(**batch, task=TASKS, **beams, use_cache=False))
    for row, task in enumerate(TASKS):
        alone = ensemble.generate(
            input_ids=batch["input_ids"][row : row + 1],
            attention_mask=batch["attention_mask"][row : row + 1],
            task=task,
            **beams,
        )
        assert torch.equal(alone[0], with_cache[row])
    labels = torch.randint(3, 30, (4, 3))
    output = ensemble(**batch, labels=labels, task=TASKS)
    logits = reference_logits(ensemble, t5, TASKS)({**batch, "labels": labels})
    assert torch.allclose(output.logits, logits, atol=1e-4)
    assert float(output.loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())), abs=1e-4
    )
    with pytest.raises(EnsembleError, match="needs a causal language model"):
        ensemble.generate(**batch, routing="prompt")


@torch.no_grad()
def test_text_generation_pipeline(ensemble):
    tokenizer = toy.tokenizer("left")
    pipe = pipeline("text-generation", model=ensemble.for_task("z"), tokenizer=tokenizer)
    prompts = ["the film was", "sum : 1 + 2 ="]
    options = {"max_new_tokens": 4, "do_sample": False}
    answers = pipe(prompts, return_full_text=False, batch_size=2, **options)
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    generated = ensemble.generate(**batch, task="z", **options)[:, batch["input_ids"].shape[1] :]
    expected = tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert [answer[0]["generated_text"].strip() for answer in answers] == [text.strip() for text in expected]
    pipe = pipeline("text-generation", model=ensemble, tokenizer=tokenizer)
    assert pipe(prompts, task="z", return_full_text=False, batch_size=2, **options) == answers
    with pytest.raises(EnsembleError, match="found none.*pass model=ensemble.for_task"):
        pipe(prompts, **options)
