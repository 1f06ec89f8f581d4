"""Scores at the answers' positions, against the definition on all logits."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import ensembles, toy
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make, rows_of
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import forward
from hf_ensemble.errors import EnsembleError, ScoringError
from hf_ensemble.models import answer_head
from hf_ensemble.models.answer_scorer import AnswerScorer
from hf_ensemble.tasks import LabelSpace, restrict_to_labels, score_answers

WORDS = len(toy.VOCABULARY)
POSITIVE = {**WEIGHTS, "minus": {"first": 0.2, "third": 0.8}}
COMBINE = {
    "logits": lambda values, weights: sum(w * v for v, w in zip(values, weights)),
    "log_probs": ensembles.geometric_mean,
    "probs": ensembles.arithmetic_mean,
}


@pytest.fixture(params=[64 * 2**20, 4 * WORDS * 7], ids=["one piece", "pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(answer_head, "LOGITS_BYTES", request.param)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(answer_head, "LOGITS_BYTES", 4 * WORDS * 7)


def answers(side="right", rows=4, length=7):
    """A batch with answers of 1 to 4 tokens, padded to one side."""
    batch = ensembles.prompts(rows, length)
    if side == "right":
        batch = {key: value.flip(1) for key, value in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row in range(rows):
        own = (labels[row] != -100).nonzero().flatten()
        labels[row, own[: len(own) - 1 - row % 4]] = -100
    return batch, labels


def reference(model, weights, batch, tasks, combination):
    """Combined logits by plain forwards of each adapter."""
    if combination == "weights":
        copies = {task: ensembles.with_summed_deltas(model, weights[task]) for task in set(tasks)}
        return torch.stack([copies[task](**batch).logits[row] for row, task in enumerate(tasks)])
    outputs = ensembles.outputs_of(model, NAMES, batch)
    return ensembles.combined(outputs, [weights[task] for task in tasks], COMBINE[combination])


def assert_equal(found, expected, atol=1e-5):
    assert torch.equal(found.num_tokens, expected.num_tokens) and torch.equal(found.rows, expected.rows)
    assert torch.allclose(found.log_probs, expected.log_probs, atol=atol)
    assert torch.equal(found.correct, expected.correct)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "in turn"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_adapter(kind, fused, piece):
    model = make(llama(), KINDS[kind])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    ensemble.fused = fused
    batch, labels = answers()
    expected = score_answers(ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS)), labels)
    assert_equal(ensemble.score(labels, task=TASKS, **batch), expected)
    assert model.active_adapters == ["first"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs", "weights"])
@torch.no_grad()
def test_every_combination(combination, side, piece):
    model = make(llama(), KINDS["output layer"])
    ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, combination=combination)
    batch, labels = answers(side)
    expected = score_answers(reference(model, POSITIVE, batch, TASKS, combination), labels)
    for fused in (True, False):
        ensemble.fused = fused
        assert_equal(ensemble.score(labels, task=TASKS, **batch), expected)


def gemma2():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    # The cap is low enough to change every logit.
    config = Gemma2Config(vocab_size=WORDS, final_logit_softcapping=0.5, initializer_range=0.3, **sizes, **heads)
    return Gemma2ForCausalLM(config).eval(), [{"target_modules": ["q_proj", "down_proj"], "r": r} for r in (2, 4, 3)]


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval(), [{"target_modules": ["c_attn"], "fan_in_fan_out": True}] * 3


def tied():
    return toy.llama(tie_word_embeddings=True), [{"target_modules": ["embed_tokens", "v_proj"]}, {}, {}]


def tied_tokens():
    kinds = [{"trainable_token_indices": [5, 6]}, {}, {"trainable_token_indices": [7, 9]}]
    return toy.llama(tie_word_embeddings=True), kinds


@pytest.mark.parametrize("architecture", [gemma2, gpt2, tied, tied_tokens])
@torch.no_grad()
def test_what_a_model_does_behind_its_body(architecture, piece):
    model = make(*architecture(), scale=0.3)
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    batch, labels = answers()
    expected = score_answers(ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS)), labels)
    assert_equal(ensemble.score(labels, task=TASKS, **batch), expected)
    # Padding on the other side changes no position.
    batch, labels = answers("left")
    found = ensemble.score(labels, task=TASKS, **batch)
    for row, task in enumerate(TASKS):
        own = batch["attention_mask"][row].bool()
        alone = ensemble.score(labels[row][own][None], task=task, input_ids=batch["input_ids"][row][own][None])
        assert torch.allclose(found.loss[row], alone.loss[0], atol=1e-5)


@pytest.mark.parametrize("combination", ["logits", "probs", "weights"])
@torch.no_grad()
def test_encoder_decoders(combination, piece):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, pad_token_id=0, **sizes))
    kinds = [{"task_type": "SEQ_2_SEQ_LM", "r": r, "target_modules": ["q", "v", "wo"]} for r in (4, 8, 2)]
    model = make(base.eval(), kinds, 0.4)
    ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, combination=combination)
    batch, labels = ensembles.prompts(), torch.randint(3, WORDS, (4, 5))
    labels[1, 3:] = labels[2, 1:] = -100
    logits = reference(model, POSITIVE, {**batch, "labels": labels}, TASKS, combination)
    for fused in (True, False):
        ensemble.fused = fused
        assert_equal(ensemble.score(labels, task=TASKS, **batch), score_answers(logits, labels, shift=False))
        assert torch.allclose(ensemble(**batch, labels=labels, task=TASKS).logits, logits, atol=1e-4)


@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs", "weights"])
@torch.no_grad()
def test_classifiers(combination):
    kinds = [{"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}] * 3
    model = make(toy.bert(4), kinds)
    space = LabelSpace(("no", "yes", "maybe", "never"), {"x": (0, 1), "y": (1, 2, 3)})
    ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, label_space=space, combination=combination)
    inputs, labels, tasks = {"input_ids": torch.randint(3, 20, (3, 5))}, torch.tensor([0, 3, 1]), ["x", "y", "x"]
    logits = ensemble(**inputs, task=tasks).logits
    expected = score_answers(logits, labels)
    assert torch.equal(restrict_to_labels(logits, space.mask(tasks)), logits)
    for fused in (True, False):
        ensemble.fused = fused
        assert_equal(ensemble.score(labels, task=tasks, **inputs), expected)
        output = ensemble(**inputs, labels=labels, task=tasks, return_logits=False)
        assert output.logits is None and torch.allclose(output.loss, expected.loss.mean(), atol=1e-5)


@torch.no_grad()
def test_one_member_scores_as_its_adapter_does(small):
    model = make(llama(), KINDS["saved modules"])
    ensemble = PeftEnsembleModel(model, NAMES, {name: {name: 1.0} for name in NAMES})
    batch, labels = answers("left")
    for name in NAMES:
        model.set_adapter(name)
        assert_equal(ensemble.score(labels, task=name, **batch), AnswerScorer(model)(batch, labels))


def watch(model):
    """Rows of each run of the body, and sizes of all outputs of the head, from here on."""
    rows, sizes = [], []
    base = model.get_base_model()
    base.model.layers[0].register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    base.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    return rows, sizes


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "in turn"])
@pytest.mark.parametrize("kind", ["targets", "output layer"])
@torch.no_grad()
def test_neither_logits_nor_rows_grow_with_the_members(kind, fused, small):
    model = make(llama(), KINDS[kind])
    ensemble = PeftEnsembleModel(model, NAMES)
    ensemble.fused = fused
    batch, labels = answers(length=12)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = score_answers(ensembles.weighted_logits(model, NAMES, batch, [dict.fromkeys(NAMES, 1 / 3)] * 4), labels)
    rows, sizes = watch(model)
    assert_equal(ensemble.score(labels, **batch), expected)
    # Of one row at a time, since the hidden states of one row fill the budget.
    assert max(rows) <= len(labels) and sum(rows) == 3 * len(labels)
    assert max(sizes) <= 7 * WORDS and sum(sizes) >= 3 * int(expected.num_tokens.sum()) * WORDS


@torch.no_grad()
def test_full_batches_run_one_adapter_after_the_other():
    model = make(llama(), KINDS["targets"])
    rows, _ = watch(model)
    batch, labels = answers()
    PeftEnsembleModel(model, NAMES).score(labels, **batch)
    assert rows == [4, 4, 4]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "in turn"])
@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs"])
@torch.no_grad()
def test_all_logits_are_combined_piece_by_piece(combination, fused, small):
    model = make(llama(), KINDS["output layer"])
    ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, combination=combination)
    ensemble.fused = fused
    batch, labels = answers()
    expected = reference(model, POSITIVE, batch, TASKS, combination)
    _, sizes = watch(model)
    output = ensemble(**batch, task=TASKS, labels=labels)
    assert torch.allclose(output.logits, expected, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, loss, atol=1e-5)
    # At most one position of every pair of a row and an adapter.
    assert max(sizes) <= 8 * WORDS
    # A text that is decoded by hand keeps its cache.
    first = ensemble(batch["input_ids"][:, :5], task=TASKS, use_cache=True)
    second = ensemble(batch["input_ids"][:, 5:], task=TASKS, past_key_values=first.past_key_values)
    plain = reference(model, POSITIVE, {"input_ids": batch["input_ids"]}, TASKS, combination)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), plain, atol=1e-4)


@torch.no_grad()
def test_pieces_are_as_large_as_the_device_takes(monkeypatch):
    ensemble = PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"]), NAMES, WEIGHTS)
    asked = {}
    for module in (forward.answers, forward.combined_forward, forward.scoring):
        known = asked.setdefault(module.__name__, [])
        monkeypatch.setattr(
            module, "tokens_at_once", lambda rows, width, device, known=known: known.append(device) or 1
        )
    batch, labels = answers()
    ensemble.score(labels, task=TASKS, **batch)
    ensemble(**batch, labels=labels, task=TASKS)
    assert all(known and set(known) == {ensemble.device} for known in asked.values())


@torch.no_grad()
def test_modules_are_not_walked_for_every_token_that_is_generated(monkeypatch):
    monkeypatch.setattr(forward.combined_forward, "is_sharded", lambda model: pytest.fail("all modules were walked"))
    ensemble = PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"]), NAMES, POSITIVE)
    ensemble(answers()[0]["input_ids"], task=TASKS)


@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs", "weights"])
def test_the_loss_alone(combination, small):
    model = make(llama(), KINDS["ranks and scalings"])
    ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, combination=combination)
    batch, labels = answers()
    with torch.no_grad():
        expected = ensemble(**batch, labels=labels, task=TASKS).loss
        _, sizes = watch(model)
        output = ensemble(**batch, labels=labels, task=TASKS, return_logits=False)
        assert output.logits is None and max(sizes) <= 7 * WORDS
        assert torch.allclose(output.loss, expected, atol=1e-5)
    model.set_adapter("first")
    output = ensemble(**batch, labels=labels, task=TASKS, return_logits=False)
    output.loss.backward()
    assert output.logits is None and torch.allclose(output.loss, expected, atol=1e-5)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["first"].weight.grad.abs().sum() > 0
    with pytest.raises(EnsembleError, match="return_logits=False leaves only the loss: expected labels"):
        ensemble(**batch, return_logits=False)


@torch.no_grad()
def test_rows_are_routed_by_their_prompts_piece_by_piece(monkeypatch):
    model = make(llama(), KINDS["output layer"])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS, routing="prompt")
    batch, labels = answers("left")
    tasks = [None, "x", None, "unheard"]
    expected = ensemble.score(labels, task=tasks, **batch)
    logits = ensemble(**batch, task=tasks, labels=labels).logits
    assert torch.allclose(expected.loss, score_answers(logits, labels).loss, atol=1e-5)
    monkeypatch.setattr(answer_head, "LOGITS_BYTES", 4 * WORDS * 7)
    rows, sizes = watch(model)
    assert_equal(ensemble.score(labels, task=tasks, **batch), expected)
    assert max(sizes) <= 7 * WORDS and max(rows) <= 4


@torch.no_grad()
def test_members_own_logits_by_token(small):
    model = make(llama(), KINDS["output layer"])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    batch, labels = answers()
    wanted = labels[:, 1:] != -100
    outputs = ensembles.outputs_of(model, NAMES, batch)
    expected = torch.stack([outputs[name][:, :-1][wanted] for name in NAMES])
    found, seen = torch.full_like(expected, float("nan")), 0
    for member, tokens, targets, logits in ensemble.member_answers(labels, **batch):
        found[member, tokens] = logits
        assert torch.equal(targets, labels[:, 1:][wanted][tokens])
        seen += len(tokens)
    assert seen == 3 * int(wanted.sum()) and torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_what_mixes_rows_is_scored_in_turn(monkeypatch):
    model = make(llama(), KINDS["ranks and scalings"])
    layer = model.get_base_model().model.layers[1].mlp
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: plain(x.flatten(0, 1)[None]).view_as(x))
    batch, labels = answers()
    expected = score_answers(ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS)), labels)
    assert_equal(PeftEnsembleModel(model, NAMES, WEIGHTS).score(labels, task=TASKS, **batch), expected)
    assert model.active_adapters == ["first"]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "in turn"])
@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs", "weights"])
@torch.no_grad()
def test_under_autocast(combination, fused):
    model = make(llama(), KINDS["ranks and scalings"])
    ensemble = PeftEnsembleModel(model, NAMES, POSITIVE, combination=combination)
    ensemble.fused = fused
    batch, labels = answers()
    # All groups of one size take the batched products, others one pair of products each.
    for tasks in (TASKS, ["z"] * 4):
        exact = ensemble(**batch, task=tasks).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = ensemble(**batch, task=tasks).logits
            expected = reference(model, POSITIVE, batch, tasks, combination) if combination != "weights" else exact
            scores = ensemble.score(labels, task=tasks, **batch)
            generated = ensemble.generate(**batch, task=tasks, max_new_tokens=3)
        assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
        assert torch.allclose(rounded, expected, atol=0.05) and torch.allclose(rounded, exact, atol=0.1)
        assert torch.allclose(scores.loss, score_answers(rounded, labels).loss, atol=0.05)
        assert generated.shape == (4, 10)


@torch.no_grad()
def test_rows_that_cannot_be_scored_are_refused():
    ensemble = PeftEnsembleModel(make(llama(), KINDS["targets"]), NAMES)
    batch, labels = answers()
    labels[2] = -100
    with pytest.raises(ScoringError, match="found none in row 2 of the batch"):
        ensemble.score(labels, **batch)
    with pytest.raises(ScoringError, match="found seq_lengths"):
        ensemble.score(batch["input_ids"], seq_lengths=torch.tensor([4, 3]), **batch)
