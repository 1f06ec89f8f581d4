"""Each combination against its definition; all adapters at once against one after the other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from helpers import ensembles, toy
from helpers.member_kinds import KINDS, NAMES, TASKS, WEIGHTS, llama, make, rows_of
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.errors import EnsembleError


@pytest.fixture
def model():
    return make(llama(), KINDS["ranks and scalings"])


@pytest.fixture
def ensemble(model):
    return PeftEnsembleModel(model, NAMES, WEIGHTS)


@pytest.fixture
def batch():
    return ensembles.prompts()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_adapter_at_once_and_in_turn(kind, batch):
    model = make(llama(), KINDS[kind])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    expected = ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS))
    for fused in (True, False):
        ensemble.fused = fused
        assert torch.allclose(ensemble(**batch, task=TASKS).logits, expected, atol=1e-5), fused
    # All groups of one size take the batched products, others one pair of products each.
    ensemble.fused = True
    even = ["z", "z", "z", "z"]
    expected = ensembles.weighted_logits(model, NAMES, batch, rows_of(even))
    assert torch.allclose(ensemble(**batch, task="z").logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["ranks and scalings", "targets"])
@torch.no_grad()
def test_all_adapters_really_run_at_once(kind, batch):
    model = make(llama(), KINDS[kind])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    seen = []
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    base.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    ensemble(**batch, task="z")
    assert seen == [12]


@torch.no_grad()
def test_one_adapter_a_row_costs_the_rows_of_one_adapter(ensemble, model, batch):
    seen = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda m, i, output: seen.append(len(output)))
    ensemble.weights = {name: {name: 1.0} for name in NAMES}
    ensemble(**batch, task=["first", "third", "third", "second"])
    assert seen == [4]


@torch.no_grad()
def test_distributions_are_combined_by_their_definitions(ensemble, model, batch):
    outputs = ensembles.outputs_of(model, NAMES, batch)
    tasks = ["x", "y", "z", "x"]
    for combination, combine in (("log_probs", ensembles.geometric_mean), ("probs", ensembles.arithmetic_mean)):
        ensemble.combination = combination
        expected = ensembles.combined(outputs, rows_of(tasks), combine)
        for fused in (True, False):
            ensemble.fused = fused
            found = ensemble(**batch, task=tasks).logits
            assert torch.allclose(found, expected, atol=1e-5)
            assert torch.allclose(found.exp().sum(-1), torch.ones(4, 7), atol=1e-5)
    ensemble.combination = "probs"
    with pytest.raises(EnsembleError, match="no weight below 0"):
        ensemble(**batch, task="minus")


@torch.no_grad()
def test_improbable_tokens_stay_finite_in_a_mean_of_probabilities(model, batch):
    model.get_base_model().lm_head.weight.mul_(1000)
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS, combination="probs")
    logits = ensemble(**batch, task="z").logits
    assert logits.isfinite().all() and logits.min() < -200


@pytest.mark.parametrize("kind", ["ranks and scalings", "targets", "embeddings", "output layer"])
@torch.no_grad()
def test_weights_are_the_sum_of_the_deltas(kind, batch):
    model = make(llama(), KINDS[kind])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS, combination="weights")
    expected = [
        ensembles.with_summed_deltas(model, WEIGHTS[task])(**batch).logits[row] for row, task in enumerate(TASKS)
    ]
    assert torch.allclose(ensemble(**batch, task=TASKS).logits, torch.stack(expected), atol=1e-5)
    alike = ensembles.with_summed_deltas(model, WEIGHTS["z"])(**batch).logits
    assert torch.allclose(ensemble(**batch, task="z").logits, alike, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "saved modules", "tokens", "lora bias"])
@torch.no_grad()
def test_weights_of_one_adapter_are_that_adapter(kind, batch):
    model = make(llama(), KINDS[kind])
    weights = {name: {name: 1.0} for name in NAMES}
    ensemble = PeftEnsembleModel(model, NAMES, weights, combination="weights")
    outputs = ensembles.outputs_of(model, NAMES, batch)
    tasks = ["first", "third", "second", "third"]
    expected = torch.stack([outputs[task][row] for row, task in enumerate(tasks)])
    assert torch.allclose(ensemble(**batch, task=tasks).logits, expected, atol=1e-5)


@torch.no_grad()
def test_weights_cost_one_forward(ensemble, model, batch):
    seen = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda m, i, output: seen.append(len(output)))
    ensemble.combination = "weights"
    ensemble(**batch, task=TASKS)
    assert seen == [4]


@pytest.mark.parametrize("tasks", [TASKS, ["z"] * 4], ids=["by row", "alike"])
@torch.no_grad()
def test_weights_are_summed_once_for_a_decoding(ensemble, model, tasks, monkeypatch):
    import hf_ensemble.ensemble.forward.summed as summed

    made = []
    concatenated = summed._concatenated
    monkeypatch.setattr(summed, "_concatenated", lambda *args: made.append(1) or concatenated(*args))
    ensemble.combination = "weights"
    tokens = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    output = ensemble(input_ids=tokens[:, :6], task=tasks, use_cache=True)
    first, parts = len(made), [output.logits]
    for position in range(6, 9):
        output = ensemble(
            input_ids=tokens[:, position : position + 1], task=tasks, past_key_values=output.past_key_values
        )
        parts.append(output.logits)
    assert len(made) == first > 0
    assert torch.allclose(torch.cat(parts, 1), ensemble(input_ids=tokens, task=tasks).logits, atol=1e-5)
    # Another text is computed with the adapters as they are then.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(2)
    changed = ensemble(input_ids=tokens, task=tasks, use_cache=True).logits
    assert not torch.allclose(changed, torch.cat(parts, 1), atol=1e-3)


@torch.no_grad()
def test_conv1d_layers_of_gpt2(batch):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=45, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=2)
    kinds = [{"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": r} for r in (2, 4, 8)]
    model = make(GPT2LMHeadModel(config).eval(), kinds)
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    expected = ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS))
    assert torch.allclose(ensemble(**batch, task=TASKS).logits, expected, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_quantized_bases(bits, batch, tmp_path):
    folder = toy.save_model(toy.llama(hidden_size=64, intermediate_size=128), tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    model = make(base, KINDS["ranks and scalings"], scale=0.2)
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    ensemble.fused = False
    expected = ensemble(**batch, task="z").logits
    assert torch.allclose(
        expected, ensembles.weighted_logits(model, NAMES, batch, rows_of(["z"] * 4)), atol=1e-5, rtol=1e-5
    )
    ensemble.fused = True
    found = ensemble(**batch, task="z").logits
    # An 8-bit layer quantizes its input too: rounding depends on the last bit of what comes in.
    assert torch.allclose(found, expected, atol=1e-5 if bits == 4 else 0.05 * float(expected.std()))
    ensemble.combination = "weights"
    assert torch.isfinite(ensemble(**batch, task="z").logits).all()


@torch.no_grad()
def test_bfloat16_base_and_autocast(batch):
    model = make(llama().to(torch.bfloat16), KINDS["ranks and scalings"])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    exact = make(llama(), KINDS["ranks and scalings"])
    expected = ensembles.weighted_logits(exact, NAMES, batch, rows_of(TASKS))
    own = {}
    for fused in (True, False):
        ensemble.fused = fused
        own[fused] = (ensemble(**batch, task=TASKS).logits - expected).abs().mean()
    # Neither path rounds more than the other.
    assert own[True] < 1.3 * own[False]
    with torch.autocast("cpu", torch.bfloat16):
        cast = PeftEnsembleModel(exact, NAMES, WEIGHTS)
        at_once = cast(**batch, task=TASKS).logits
        cast.fused = False
        assert (at_once - expected).abs().mean() < 1.3 * (cast(**batch, task=TASKS).logits - expected).abs().mean()


def test_gradients_reach_the_adapters(ensemble, model, batch):
    """The fused path in grad mode equals the loop's output, and can be trained through."""
    model.set_adapter("first")
    loss = ensemble(**batch, task="z", labels=batch["input_ids"]).loss
    loss.backward()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["first"].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_training_mode_takes_the_layers_own_forward(batch):
    model = make(llama(), [{"lora_dropout": 0.5}, {}, {}])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS).train()
    once, again = (ensemble(**batch, task="x").logits for _ in range(2))
    assert not torch.allclose(once, again)
    ensemble.eval()
    assert torch.equal(ensemble(**batch, task="x").logits, ensemble(**batch, task="x").logits)


@torch.no_grad()
def test_tasks_without_weights_take_the_default(ensemble, model, batch, caplog):
    default = dict.fromkeys(NAMES, 1 / 3)
    expected = ensembles.weighted_logits(model, NAMES, batch, [WEIGHTS["x"], default, default, WEIGHTS["y"]])
    found = ensemble(**batch, task=["x", None, "unheard", "y"], routing="default").logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert ensemble.row_weights(["unheard"], 1).tolist() == [[pytest.approx(1 / 3)] * 3]


@torch.no_grad()
def test_prompts_route_themselves(ensemble, model, batch):
    outputs = ensembles.outputs_of(model, NAMES, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    scores = []
    for name in NAMES:
        own = torch.log_softmax(outputs[name][:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        own = [[float(v) for v, a, b in zip(o, m[1:], m[:-1]) if a and b] for o, m in zip(own, mask)]
        scores.append([sum(o) / len(o) for o in own])
    expected = torch.softmax(torch.tensor(scores).T / 0.1, -1)
    weights = [dict(zip(NAMES, row.tolist())) for row in expected]
    weights[2] = WEIGHTS["y"]
    logits = ensembles.combined(outputs, weights, lambda v, w: sum(a * b for a, b in zip(v, w)))
    tasks = [None, "unheard", "y", None]
    assert torch.allclose(ensemble(**batch, task=tasks, routing="prompt").logits, logits, atol=1e-4)
    # An answer must not tell the weights: only the prompt's tokens count.
    labels = ids.clone()
    labels[:, :4] = -100
    masked = ensemble(**batch, labels=labels, routing="prompt").logits
    ids = ids.clone()
    ids[:, 5:] = 3
    other = ensemble(input_ids=ids, attention_mask=mask, labels=labels, routing="prompt").logits
    assert torch.allclose(masked[:, :5], other[:, :5], atol=1e-5)
    generated = ensemble.generate(**batch, routing="prompt", max_new_tokens=2)
    assert generated.shape == (4, 9)


@torch.no_grad()
def test_patches_are_taken_off_also_after_an_exception(ensemble, model, batch):
    expected = ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS))
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    for combination in ("logits", "weights"):
        ensemble.combination = combination
        plain = ensemble(**batch, task=TASKS).logits
        handle = layer.base_layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ensemble(**batch, task=TASKS)
        with pytest.raises(ZeroDivisionError):
            ensemble.generate(**batch, task=TASKS, max_new_tokens=3)
        handle.remove()
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(ensemble(**batch, task=TASKS).logits, plain)
    ensemble.combination = "logits"
    assert torch.allclose(ensemble(**batch, task=TASKS).logits, expected, atol=1e-5)
    assert torch.allclose(ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS)), expected, atol=1e-6)


@torch.no_grad()
def test_what_mixes_rows_runs_one_adapter_after_the_other(ensemble, model, batch, monkeypatch):
    """A layer that sees other rows than the batch's cannot tell adapters apart."""
    layer = model.get_base_model().model.layers[1].mlp
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: plain(x.flatten(0, 1)[None]).view_as(x))
    expected = ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS))
    assert torch.allclose(ensemble(**batch, task=TASKS).logits, expected, atol=1e-5)
    generated = ensemble.generate(**batch, task=TASKS, max_new_tokens=4, eos_token_id=None, do_sample=False)
    ensemble.fused = False
    slow = ensemble.generate(**batch, task=TASKS, max_new_tokens=4, eos_token_id=None, do_sample=False)
    assert torch.equal(generated, slow)
    # With weights of their own rows cannot be mixed; with the same weights for all they may be.
    ensemble.combination = "weights"
    with pytest.raises(EnsembleError, match="cannot be computed"):
        ensemble(input_ids=torch.ones(4, 7, dtype=torch.long)[:3, :5], task=["x", "y", "z"])
    assert ensemble(**batch, task="x").logits.isfinite().all()


@torch.no_grad()
def test_adapters_of_experts_run_one_after_the_other(batch):
    """PEFT adapts the experts of a mixture through bare parameters, which have no rows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 45, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = make(base, [{**experts, "r": r} for r in (2, 4, 2)])
    ensemble = PeftEnsembleModel(model, NAMES, WEIGHTS)
    expected = ensembles.weighted_logits(model, NAMES, batch, rows_of(TASKS))
    assert torch.allclose(ensemble(**batch, task=TASKS).logits, expected, atol=1e-5)
    ensemble.combination = "weights"
    with pytest.raises(EnsembleError, match="'weights' cannot be computed: .*Use 'logits'"):
        ensemble(**batch, task=TASKS)
