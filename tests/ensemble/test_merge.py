"""One adapter made of several, against the sum of the dense deltas."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight as dequantize
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from helpers import ensembles, toy
from helpers.devices import DEVICES
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble._compat import keep_quantized_weights_in_place
from hf_ensemble.ensemble.merging import task_vectors
from hf_ensemble.ensemble.merging.deltas import lora_modules
from hf_ensemble.ensemble.merging.low_rank import truncated
from hf_ensemble.errors import EnsembleError

WEIGHTS = {"first": 0.5, "second": 0.75, "third": -0.25}


def ensemble_of(model, weights=WEIGHTS, **options):
    return PeftEnsembleModel(model, NAMES, {"x": weights}, weights, combination="weights", **options)


def dense_deltas(model, names=NAMES):
    """Of each module with adapters, each adapter's change as PEFT computes it."""
    result = {}
    for path, layer in lora_modules(model, names):
        held = [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]
        result[path] = {name: layer.get_delta_weight(name).detach() for name in held}
    return result


@pytest.fixture
def model():
    return make(llama(), KINDS["ranks and scalings"])


@pytest.fixture
def batch():
    return ensembles.prompts()


@pytest.mark.parametrize("kind", ["ranks and scalings", "targets", "embeddings", "output layer"])
@torch.no_grad()
def test_exact_merge_equals_the_weights_and_loads_with_stock_peft(kind, batch, tmp_path):
    for first in (True, False):
        kinds = KINDS[kind] if first else [{**KINDS[kind][0], "use_rslora": True}, *KINDS[kind][1:]]
        model = make(llama(), kinds)
        ensemble = ensemble_of(model)
        merged = ensemble.merge("x")
        assert merged.relative_error == 0.0 and merged.module_errors == {}
        folder = tmp_path / f"merged-{first}"
        folder.mkdir()
        (folder / "notes").touch()
        merged.save_pretrained(folder)
        files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "notes"]
        assert sorted(path.name for path in folder.iterdir()) == files
        stock = PeftModel.from_pretrained(llama(), folder).eval()
        expected = ensemble(**batch, task="x").logits
        assert torch.allclose(stock(**batch).logits, expected, atol=1e-5)
        by_definition = ensembles.with_summed_deltas(model, WEIGHTS)(**batch).logits
        assert torch.allclose(stock(**batch).logits, by_definition, atol=1e-5)
        # Saved again by PEFT, it is the same.
        stock.save_pretrained(tmp_path / f"again-{first}")
        again = PeftModel.from_pretrained(llama(), tmp_path / f"again-{first}").eval()
        assert torch.equal(again(**batch).logits, stock(**batch).logits)


@torch.no_grad()
def test_merged_adapter_beside_the_members(model, batch):
    ensemble = ensemble_of(model)
    expected = ensemble(**batch, task="x").logits
    merged = ensemble.merge()
    merged.add_to(model, "merged")
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".merged." in n)
    with pytest.raises(EnsembleError, match="already has an adapter 'merged'"):
        merged.add_to(model, "merged")
    alone = merged.add_to(llama())
    assert torch.allclose(alone(**batch).logits, expected, atol=1e-5)


def test_an_adapter_names_the_base_that_its_members_do_not_name(tmp_path):
    path = toy.save_model(llama(), tmp_path / "base")
    model = make(AutoModelForCausalLM.from_pretrained(path), KINDS["targets"])
    assert {config.base_model_name_or_path for config in model.peft_config.values()} == {None}
    assert ensemble_of(model).merge("x").config.base_model_name_or_path == str(path)
    assert ensemble_of(make(llama(), KINDS["targets"])).merge("x").config.base_model_name_or_path is None


def test_merged_adapters_have_one_rank_and_short_names(model):
    merged = ensemble_of(model).merge("x")
    assert (merged.rank, merged.config.lora_alpha) == (14, 14) and not merged.config.rank_pattern
    assert merged.vllm_rank == 16 and merged.vllm_obstacles() == []
    assert set(merged.config.target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    some = make(llama(), [{"target_modules": ["layers.1.self_attn.q_proj"]}] * 3)
    assert ensemble_of(some).merge("x").config.target_modules == {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("kind", ["ranks and scalings", "embeddings"])
@torch.no_grad()
def test_a_padded_adapter_computes_the_same(kind, batch):
    merged = ensemble_of(make(llama(), KINDS[kind])).merge("x")
    wide = merged.padded(32)
    assert (wide.rank, wide.config.lora_alpha) == (32, 32) and (merged.rank, merged.config.r) != (32, 32)
    expected = merged.add_to(llama())(**batch).logits
    assert torch.allclose(wide.add_to(llama())(**batch).logits, expected, atol=1e-6)
    with pytest.raises(EnsembleError, match=f"rank has to be an integer of at least {merged.rank}, found 1"):
        merged.padded(1)


@pytest.mark.parametrize(
    "kind, tied",
    [
        ("ranks and scalings", False),
        ("ranks and scalings", True),
        ("embeddings", False),
        ("output layer", False),
        ("saved modules", False),
    ],
)
@torch.no_grad()
def test_new_embeddings_of_a_resized_vocabulary_are_written(kind, tied, tmp_path):
    base = toy.save_model(llama(tie_word_embeddings=tied), tmp_path / "base")
    resized = AutoModelForCausalLM.from_pretrained(base)
    tokens = resized.config.vocab_size + 3
    torch.manual_seed(5)
    resized.resize_token_embeddings(tokens, mean_resizing=False)
    ensemble = ensemble_of(make(resized, KINDS[kind]))
    ids = torch.tensor([[tokens - 1, 5, tokens - 2, 7]])
    expected = ensemble(ids, task="x").logits
    merged = ensemble.merge("x")
    assert "a resized vocabulary" in merged.vllm_obstacles()
    merged.save_pretrained(tmp_path / "merged")

    def larger():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    stock = PeftModel.from_pretrained(larger(), tmp_path / "merged").eval()
    assert torch.allclose(stock(ids).logits, expected, atol=1e-5)
    assert torch.allclose(merged.add_to(larger())(ids).logits, expected, atol=1e-5)
    alone = PeftEnsembleModel.from_adapters(base, {"a": tmp_path / "merged"})
    assert torch.allclose(alone(ids, routing="default").logits, expected, atol=1e-5)
    # On the smaller base it is refused instead of computing something else.
    small = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(EnsembleError, match=rf"{tokens} tokens, found one of {tokens - 3}. Call .*\({tokens}, mean"):
        merged.add_to(small)
    assert not hasattr(small, "peft_config")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(small, tmp_path / "merged")
    # The card's code makes it fit, and offers no server.
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"base.resize_token_embeddings({tokens}, mean_resizing=False)" in card and "vllm" not in card


@torch.no_grad()
def test_a_merged_adapter_of_a_resized_base_stands_beside_the_members(tmp_path):
    resized = AutoModelForCausalLM.from_pretrained(toy.save_model(llama(), tmp_path))
    resized.resize_token_embeddings(resized.config.vocab_size + 3, mean_resizing=False)
    model = make(resized, KINDS["ranks and scalings"])
    ensemble = ensemble_of(model)
    ids = torch.tensor([[resized.config.vocab_size - 1, 5]])
    expected = ensemble(ids, task="x").logits
    ensemble.merge("x").add_to(model, "merged")
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 13])
@torch.no_grad()
def test_stated_error_of_a_truncated_merge_is_the_measured_one(model, rank):
    merged = ensemble_of(model).merge("x", rank=rank)
    assert merged.rank == rank
    lost = total = 0.0
    for path, deltas in dense_deltas(model).items():
        wanted = sum(WEIGHTS[name] * delta for name, delta in deltas.items())
        down, up = (merged.state_dict[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        error = float((up @ down - wanted).norm())
        assert merged.module_errors[path] == pytest.approx(error / float(wanted.norm()), rel=1e-4)
        # No matrix of this rank is nearer.
        assert error == pytest.approx(float(torch.linalg.svdvals(wanted)[rank:].norm()), rel=1e-4)
        lost, total = lost + error**2, total + float(wanted.norm()) ** 2
    assert merged.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert ensemble_of(model).merge("x", rank=100).relative_error == 0.0


def test_truncation_of_dependent_factors_is_exact():
    torch.manual_seed(0)
    down, up = torch.randn(3, 20), torch.randn(30, 3)
    again, still, error, size = truncated(torch.cat([down, down]), torch.cat([up, 2 * up], 1), 3)
    assert torch.allclose(still @ again, 3 * up @ down, atol=1e-4) and error < 1e-8 * size


@torch.no_grad()
def test_dora_needs_a_rank_and_keeps_what_it_can(batch, tmp_path):
    kinds = [{"use_dora": True, "target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}, {"use_dora": True}]
    model = make(llama(), kinds)
    ensemble = ensemble_of(model, {"first": 1.0})
    with pytest.raises(EnsembleError, match="DoRA.*full-rank.*Pass rank="):
        ensemble.merge("x")
    merged = ensemble.merge("x", rank=32)
    assert 0 < ensemble.merge("x", rank=4).relative_error < 1 and merged.relative_error < 1e-5
    assert torch.allclose(merged.add_to(llama())(**batch).logits, ensemble(**batch, task="x").logits, atol=1e-4)
    assert ensemble.vllm_obstacles() == {"first": ["DoRA"], "second": [], "third": ["DoRA"]}


@torch.no_grad()
def test_saved_heads_are_averaged(tmp_path):
    toy.save_model(toy.bert(3), tmp_path / "base")
    load = lambda: AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)  # noqa: E731
    model = get_peft_model(load(), toy.lora("SEQ_CLS"), adapter_name="first")
    for name in NAMES[1:]:
        model.add_adapter(name, toy.lora("SEQ_CLS"))
    ensembles.randomize_adapters(model, NAMES)
    ensemble = PeftEnsembleModel(model.eval(), NAMES, {"x": {"first": 0.25, "second": 0.75}}, combination="weights")
    ids = torch.randint(3, 20, (3, 6))
    merged = ensemble.merge("x")
    assert merged.config.modules_to_save == ["classifier"]
    merged.save_pretrained(tmp_path / "merged")
    stock = PeftModel.from_pretrained(load(), tmp_path / "merged").eval()
    assert torch.allclose(stock(input_ids=ids).logits, ensemble(input_ids=ids, task="x").logits, atol=1e-5)
    head = 0.25 * model.base_model.model.classifier.modules_to_save["first"].weight
    head = head + 0.75 * model.base_model.model.classifier.modules_to_save["second"].weight
    assert torch.allclose(merged.state_dict["base_model.model.classifier.weight"], head, atol=1e-6)


@torch.no_grad()
def test_a_saved_head_of_several_layers_is_loaded_as_one_module(tmp_path):
    """RoBERTa's head has a hidden layer: PEFT replaces all of it, by the name of the whole."""
    settings = {"vocab_size": 45, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 66, "num_labels": 3, "pad_token_id": 1}

    def load():
        torch.manual_seed(0)
        return RobertaForSequenceClassification(RobertaConfig(**settings)).eval()

    model = get_peft_model(load(), toy.lora("SEQ_CLS"), adapter_name="first")
    model.add_adapter("second", toy.lora("SEQ_CLS"))
    ensembles.randomize_adapters(model, ["first", "second"])
    weights = {"x": {"first": 0.25, "second": 0.75}, "one": {"second": 1.0}}
    ensemble = PeftEnsembleModel(model.eval(), ["first", "second"], weights)
    ids = torch.randint(3, 20, (3, 6))
    for task in weights:
        merged = ensemble.merge(task)
        merged.save_pretrained(tmp_path / task)
        stock = PeftModel.from_pretrained(load(), tmp_path / task).eval()
        head = stock.base_model.model.classifier.modules_to_save["default"]
        own = model.base_model.model.classifier.modules_to_save
        for key, value in head.state_dict().items():
            mean = sum(weight * own[name].state_dict()[key] for name, weight in weights[task].items())
            assert torch.allclose(value, mean, atol=1e-6)
        assert torch.equal(merged.add_to(load())(input_ids=ids).logits, stock(input_ids=ids).logits)
        ensemble.combination = "weights"
        assert torch.allclose(stock(input_ids=ids).logits, ensemble(input_ids=ids, task=task).logits, atol=1e-5)
        rows = ensemble(input_ids=ids, task=["one", task, "one"]).logits
        assert torch.allclose(rows[1], stock(input_ids=ids).logits[1], atol=1e-5)
        ensemble.combination = "logits"
    assert torch.allclose(stock(input_ids=ids).logits, ensemble(input_ids=ids, task="one").logits, atol=1e-5)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_leaves_every_random_state_alone(method, model, monkeypatch):
    seeded = []
    # It also seeds the generators of devices that this machine may lack.
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.random, "manual_seed", seeded.append)
    state = torch.random.get_rng_state()
    ensemble_of(model).merge("x", method=method)
    assert not seeded and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["sum", "tsv", "knots"])
def test_merging_on_a_device_stays_there(model, device, method):
    expected = ensemble_of(model).merge("x", rank=5, method=method)
    merged = ensemble_of(model.to(device)).merge("x", rank=5, method=method)
    assert {value.device.type for value in merged.state_dict.values()} == {device}
    assert merged.relative_error == pytest.approx(expected.relative_error, rel=1e-3)


@torch.no_grad()
def test_task_vector_methods_on_a_model(model, batch, tmp_path):
    ensemble = ensemble_of(model)
    deltas = dense_deltas(model)
    values = torch.tensor(list(WEIGHTS.values()))
    for method, options in [
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5, "seed": 1}),
        ("dare_ties", {}),
        ("breadcrumbs", {"drop_smallest": 0.5}),
        ("pcb", {"density": 0.3}),
        ("tsv", {}),
        ("knots", {"density": 0.5}),
    ]:
        assert ensemble.merge("x", rank=32, method=method, **options).relative_error < 1e-5
        merged = ensemble.merge("x", method=method, **options)
        for path, own in deltas.items():
            module = {"module": path} if method.startswith("dare") else {}
            wanted = getattr(task_vectors, method)(list(own.values()), values, **module, **options)
            down, up = (merged.state_dict[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
            # Without a cap, the sum of the adapters' ranks.
            assert merged.rank == 14
            error = float((up @ down - wanted).norm() / wanted.norm())
            assert error == pytest.approx(merged.module_errors[path], rel=1e-3, abs=1e-5)
        merged.save_pretrained(tmp_path / method)
        assert PeftModel.from_pretrained(llama(), tmp_path / method)(**batch).logits.isfinite().all()
    lines = ensemble.merge("x", method="lines", alpha=0.5, beta=0.5)
    assert lines.relative_error == 0.0
    for path, own in deltas.items():
        factor = 0.5 if ".layers.0." in path else 1.0
        down, up = (lines.state_dict[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        assert torch.allclose(up @ down, factor * sum(WEIGHTS[n] * d for n, d in own.items()), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_quantized_base_is_warned_of_with_figures(bits, batch, tmp_path, monkeypatch):
    folder = toy.save_model(toy.llama(hidden_size=64, intermediate_size=128), tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        folder, quantization_config=BitsAndBytesConfig(**options)
    )
    model = make(load(), [{"r": 4}, {"r": 8, "use_rslora": True}, {"r": 2}], 0.05)
    ensemble = ensemble_of(model)
    messages = []
    monkeypatch.setattr(
        "hf_ensemble.ensemble.merging.quantization.logger.warning", lambda text, *a: messages.append(text % a)
    )
    merged = ensemble.merge("x")
    assert len(messages) == 1 and f"({bits} bits)" in messages[0]
    stated = float(messages[0].split("by ")[1].split(" times")[0])
    assert 0.005 < stated < 20
    if bits == 4:
        # Folding in for real loses as much as is stated.
        folded = merged.add_to(load()).merge_and_unload()
        lost = total = 0.0
        for path, own in dense_deltas(model).items():
            wanted = sum(WEIGHTS[n] * d for n, d in own.items())
            before = dequantize(model.get_base_model().get_submodule(path).base_layer).float()
            after = dequantize(folded.get_submodule(path)).float()
            lost += float((after - before - wanted).norm()) ** 2
            total += float(wanted.norm()) ** 2
        assert stated == pytest.approx((lost / total) ** 0.5, rel=0.05)
        stock = merged.add_to(load())
        keep_quantized_weights_in_place(stock)
        assert torch.allclose(stock(**batch).logits, ensemble(**batch, task="x").logits, atol=1e-4)


def test_merges_that_have_no_meaning_are_refused(model):
    ensemble = ensemble_of(model)
    biased = make(llama(), KINDS["lora bias"])
    tokens = make(llama(), KINDS["tokens"])
    for call, message in [
        (lambda: ensemble.merge("w"), r"No weights for the task 'w'; known: \['x'\]"),
        (lambda: ensemble.merge("x", method="mean"), "method has to be one of .'sum', 'lines', 'ties'.* found 'mean'"),
        (lambda: ensemble.merge("x", rank=0), "rank has to be a positive integer or None, found 0"),
        (lambda: ensemble.merge("x", density=0.5), "'sum' takes no options"),
        (lambda: ensemble.merge("x", method="ties", gamma=1), r"ties does not take the options \['gamma'\]"),
        (lambda: ensemble_of(biased).merge("x"), "LoRA bias"),
        (lambda: ensemble_of(tokens).merge("x"), "trainable tokens"),
    ]:
        with pytest.raises(EnsembleError, match=message):
            call()


@torch.no_grad()
def test_merging_leaves_the_model_as_it_was(model, batch):
    before = copy.deepcopy(model.state_dict())
    for method in ("sum", "ties", "pcb"):
        ensemble_of(model).merge("x", rank=3, method=method)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert model.active_adapters == ["first"]
