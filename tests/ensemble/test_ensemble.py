import gc

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel, DynamicCache

from helpers import toy
from hf_ensemble import LabelSimilarityForSequenceClassification, PeftEnsembleModel
from hf_ensemble.ensemble import fit_weights
from hf_ensemble.ensemble.weighting.objectives import mixed_loss
from hf_ensemble.errors import EnsembleError, EnsembleLoadError
from hf_ensemble.tasks import LabelSpace

WEIGHTS = {"x": {"a": 0.7, "b": 0.3}, "y": {"c": 1.0}, "z": {"a": -0.5, "b": 1.0, "c": 0.5}}


@pytest.fixture
def members(base_folder):
    """One base with three adapters of different ranks."""
    model = PeftModel(AutoModelForCausalLM.from_pretrained(base_folder), toy.lora(r=4), adapter_name="a")
    model.add_adapter("b", toy.lora(r=8, use_rslora=True))
    model.add_adapter("c", toy.lora(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    toy.randomize(model, 0.4)
    return model.eval()


@pytest.fixture
def ensemble(members):
    return PeftEnsembleModel(members, ["a", "b", "c"], WEIGHTS)


@pytest.fixture
def batch():
    torch.manual_seed(2)
    ids = torch.randint(3, 30, (4, 7))
    mask = torch.ones_like(ids)
    # Padded on the left, as prompts are.
    for row, padding in ((1, 3), (3, 1)):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


TASKS = ["x", "y", "z", "x"]


def live_copies(shapes):
    """Addresses of all tensors in the process that have one of the shapes."""
    gc.collect()
    return {x.data_ptr() for x in gc.get_objects() if isinstance(x, torch.Tensor) and tuple(x.shape) in shapes}


@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs", "weights"])
@torch.no_grad()
def test_one_base_is_in_memory(members, batch, combination):
    base = [p for name, p in members.named_parameters() if "lora_" not in name and p.dim() == 2]
    shapes = {tuple(parameter.shape) for parameter in base}
    assert not shapes & {tuple(p.shape) for name, p in members.named_parameters() if "lora_" in name}
    before = live_copies(shapes)
    assert {parameter.data_ptr() for parameter in base} <= before
    copied = base[0].clone()
    assert live_copies(shapes) - before == {copied.data_ptr()}
    del copied
    # Without the task of a negative weight, which has no place in a mean of probabilities.
    tasks = ["x", "y", "y", "x"]
    ensemble = PeftEnsembleModel(members, ["a", "b", "c"], WEIGHTS, combination=combination)
    during = []
    members.get_base_model().lm_head.register_forward_hook(lambda *_: during.append(live_copies(shapes) - before))
    ensemble(**batch, task=tasks)
    ensemble.generate(**batch, task=tasks, max_new_tokens=2)
    assert len(during) > 2 and not any(during)
    assert live_copies(shapes) == before


def reference_logits(model, batch, tasks, weights=WEIGHTS):
    """The definition, one plain forward per adapter on the whole batch."""
    total = 0
    active = model.active_adapter
    for name in ("a", "b", "c"):
        model.set_adapter(name)
        own = torch.tensor([weights[task].get(name, 0.0) for task in tasks])
        total = total + own.view(-1, 1, 1) * model(**batch).logits
    model.set_adapter(active)
    return total


def test_logits_are_the_weighted_sum(ensemble, members, batch):
    with torch.no_grad():
        expected = reference_logits(members, batch, TASKS)
        assert torch.allclose(ensemble(**batch, task=TASKS).logits, expected, atol=1e-5)
        one = ensemble(**batch, task="y").logits
        assert torch.allclose(one, reference_logits(members, batch, ["y"] * 4), atol=1e-5)
        default = {None: dict.fromkeys("abc", 1 / 3)}
        uniform = reference_logits(members, batch, [None] * 4, default)
        assert torch.allclose(ensemble(**batch, routing="default").logits, uniform, atol=1e-5)


def test_rows_run_only_the_adapters_that_they_weigh(ensemble, members, batch):
    seen = []
    layer = members.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append((module.active_adapters[0], len(inputs[0]))))
    ensemble.fused = False
    ensemble(**batch, task=TASKS)
    assert sorted(seen) == [("a", 3), ("b", 3), ("c", 2)]
    seen.clear()
    ensemble.fused = True
    ensemble(**batch, task=TASKS)
    assert [count for _, count in seen] == [8]


def test_loss_is_the_mean_over_answer_tokens(ensemble, members, batch):
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    output = ensemble(**batch, labels=labels, task=TASKS)
    logits = reference_logits(members, batch, TASKS)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected, atol=1e-5)


def test_nothing_of_the_model_is_changed(ensemble, members, batch):
    members.set_adapter("b")
    trainable = {name for name, p in members.named_parameters() if p.requires_grad}
    ensemble(**batch, task=TASKS)
    ensemble.generate(**batch, task=TASKS, max_new_tokens=2)
    with pytest.raises(IndexError):
        ensemble(input_ids=batch["input_ids"] + 1000, task="x")
    assert members.active_adapters == ["b"]
    assert trainable == {name for name, p in members.named_parameters() if p.requires_grad}
    assert "forward" not in members.get_base_model().__dict__
    assert torch.isfinite(ensemble(**batch, task="x").logits).all()


def reference_generation(model, batch, tasks, steps):
    """Greedy decoding without a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        step = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        following = reference_logits(model, step, tasks)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    return ids


@torch.no_grad()
def test_greedy_generation_equals_a_plain_loop(ensemble, members, batch):
    expected = reference_generation(members, batch, TASKS, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ensemble.generate(**batch, task=TASKS, **options), expected)
    assert torch.equal(ensemble.generate(**batch, task=TASKS, use_cache=False, **options), expected)


def test_beams_and_samples_do_not_depend_on_the_cache(ensemble, batch):
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with_cache = ensemble.generate(**batch, task=TASKS, **beams)
    assert torch.equal(with_cache, ensemble.generate(**batch, task=TASKS, use_cache=False, **beams))
    sampling = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2, "top_k": 5}
    torch.manual_seed(0)
    one = ensemble.generate(**batch, task=TASKS, **sampling)
    torch.manual_seed(0)
    two = ensemble.generate(**batch, task=TASKS, use_cache=False, **sampling)
    assert one.shape[0] == 8 and torch.equal(one, two)


def test_generation_after_an_exception_is_right(ensemble, members, batch):
    with pytest.raises(IndexError):
        ensemble.generate(input_ids=batch["input_ids"] + 1000, task="x", max_new_tokens=2)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = reference_generation(members, batch, TASKS, 3)
    assert torch.equal(ensemble.generate(**batch, task=TASKS, **options), expected)


def test_saved_ensemble_gives_the_same_logits(ensemble, members, batch, base_folder, tmp_path):
    ensemble.save_pretrained(tmp_path / "saved")
    files = sorted(str(p.relative_to(tmp_path / "saved")) for p in (tmp_path / "saved").rglob("*") if p.is_file())
    adapters = [f"adapters/{n}/adapter_{f}" for n in "abc" for f in ("config.json", "model.safetensors")]
    assert files == sorted([*adapters, "ensemble_config.json", "README.md"])
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = ensemble(**batch, task=TASKS).logits
        assert torch.allclose(loaded(**batch, task=TASKS).logits, expected, atol=1e-5)
        assert loaded.weights == ensemble.weights and not loaded.training
        given = PeftEnsembleModel.from_pretrained(tmp_path / "saved", base_model=toy.llama())
        assert torch.allclose(given(**batch, task=TASKS).logits, expected, atol=1e-5)
        # Each member is a plain PEFT adapter.
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        stock = PeftModel.from_pretrained(base, tmp_path / "saved", subfolder="adapters/b")
        members.set_adapter("b")
        assert torch.allclose(stock(**batch).logits, members(**batch).logits, atol=1e-6)


def test_adapters_of_different_folders_make_an_ensemble(ensemble, batch, base_folder, tmp_path):
    ensemble.save_pretrained(tmp_path)
    folders = {name: tmp_path / "adapters" / name for name in "abc"}
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    made = PeftEnsembleModel.from_adapters(base, folders, WEIGHTS)
    with torch.no_grad():
        assert torch.allclose(made(**batch, task=TASKS).logits, ensemble(**batch, task=TASKS).logits, atol=1e-5)
    with pytest.raises(EnsembleLoadError, match="neither a folder nor a repository"):
        PeftEnsembleModel.from_adapters(base, {"d": tmp_path / "nothing"})


def test_saving_over_an_ensemble_replaces_it(ensemble, members, batch, tmp_path):
    ensemble.save_pretrained(tmp_path)
    toy.randomize(members, 0.1)
    ensemble.save_pretrained(tmp_path)
    loaded = PeftEnsembleModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(**batch, task="x").logits, ensemble(**batch, task="x").logits, atol=1e-5)


def test_adapters_of_another_base_are_refused(ensemble, tmp_path):
    ensemble.save_pretrained(tmp_path)
    with pytest.raises(EnsembleLoadError, match="has the shape .* for this base model"):
        PeftEnsembleModel.from_pretrained(tmp_path, base_model=toy.llama(hidden_size=64))


def test_bad_arguments_are_named(ensemble, members, batch):
    for call, message in [
        (lambda: PeftEnsembleModel(members, ["a", "d"]), "different adapters of the model"),
        (lambda: PeftEnsembleModel(members, ["a", "a"]), "different adapters of the model"),
        (lambda: PeftEnsembleModel(members, []), "different adapters of the model"),
        (lambda: PeftEnsembleModel(members, ["a"], {"x": {"b": 1.0}}), "unknown adapters"),
        (lambda: PeftEnsembleModel(members, ["a"], {"x": {"a": 0.0}}), "not all zero"),
        (lambda: PeftEnsembleModel(members, ["a"], {"x": {"a": float("nan")}}), "finite"),
        (lambda: ensemble(**batch), r"the task of each row, one of \['x', 'y', 'z'\]; found none. Pass task=..., or"),
        (lambda: ensemble(**batch, task=["x", "y", "w", None]), r"found \['w'\]"),
        (lambda: ensemble.generate(**batch), "found none. Pass task=..., or routing='default'"),
        (lambda: ensemble(**batch, task=["x"]), "one task for each of 4 rows, found 1"),
        (
            lambda: ensemble.generate(**batch, task="x", cache_implementation="quantized"),
            "'dynamic' or 'static', found 'quan",
        ),
        (lambda: ensemble.generate(**batch, past_key_values=DynamicCache()), "past_key_values cannot be set"),
        (lambda: ensemble.generate(**batch, output_attentions=True), "output_attentions cannot be set"),
        (
            lambda: ensemble(**batch, routing="magic"),
            "routing has to be one of .* found 'magic'",
        ),
        (lambda: PeftEnsembleModel(members, ["a"], combination="sum"), "combination has to be one of .* found 'sum'"),
    ]:
        with pytest.raises(EnsembleError, match=message):
            call()


def test_classifier_with_saved_heads(tmp_path):
    toy.save_model(toy.bert(3), tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(base, toy.lora("SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", toy.lora("SEQ_CLS"))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".a." in name or ".b." in name:
                parameter.normal_(std=0.3)
    model.eval()
    space = LabelSpace(("no", "yes", "none"), {"x": (0, 1), "y": (1, 2)})
    ensemble = PeftEnsembleModel(model, ["a", "b"], {"x": {"a": 0.5, "b": 0.5}, "y": {"b": 1.0}}, label_space=space)
    inputs = {"input_ids": torch.randint(3, 20, (2, 5))}
    logits = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        logits[name] = model(**inputs).logits
    expected = torch.stack([(logits["a"][0] + logits["b"][0]) / 2, logits["b"][1]])
    output = ensemble(**inputs, task=["x", "y"], labels=torch.tensor([1, 2]))
    allowed = space.mask(["x", "y"])
    assert torch.allclose(output.logits[allowed], expected[allowed], atol=1e-6)
    assert output.logits[~allowed].isneginf().all()
    every = ensemble(**inputs, routing="default").logits
    assert torch.allclose(every, (logits["a"] + logits["b"]) / 2, atol=1e-6)
    own = [torch.log_softmax(expected[0, :2], -1)[1], torch.log_softmax(expected[1, 1:], -1)[1]]
    assert torch.allclose(output.loss, -sum(own) / 2, atol=1e-6)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = PeftEnsembleModel.from_pretrained(tmp_path / "saved")
    assert torch.allclose(loaded(**inputs, task=["x", "y"]).logits, output.logits, atol=1e-6)
    assert loaded.label_space == space
    with pytest.raises(EnsembleError, match="does not generate"):
        ensemble.generate(inputs["input_ids"])


def test_label_similarity_is_the_scaled_cosine_and_reloads(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(toy.VOCABULARY), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    encoder = BertModel(config, add_pooling_layer=False).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    model = LabelSimilarityForSequenceClassification.from_encoder(
        str(tmp_path / "encoder"), tokenizer, ["good_film", "bad"], logit_scale=5.0
    ).eval()
    batch = tokenizer(["the film was great", "awful"], padding=True, return_tensors="pt")

    def embed(text):
        hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return hidden / hidden.norm()

    expected = torch.stack(
        [
            5 * torch.stack([embed(t) @ embed(label) for label in ("good film", "bad")])
            for t in ("the film was great", "awful")
        ]
    )
    output = model(**batch, labels=torch.tensor([0, 1]))
    assert torch.allclose(output.logits, expected, atol=1e-5)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1])), atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_fitted_weights_reach_the_optimum_of_their_convex_problem():
    torch.manual_seed(0)
    targets, rows = torch.randint(0, 6, (60,)), torch.arange(60) // 2
    logits = torch.randn(3, 60, 6)
    logits[0, torch.arange(60), targets] += 2.0
    logits[2, torch.arange(0, 60, 3), targets[::3]] += 3.0
    fitted = fit_weights(logits, targets, rows)
    assert fitted.weights.sum() == pytest.approx(1.0) and (fitted.weights >= 0).all()
    loss = lambda w: float(mixed_loss(logits, targets, rows, torch.tensor(w)))  # noqa: E731
    assert fitted.loss == pytest.approx(loss(fitted.weights))
    assert fitted.loss <= min(loss(w) for w in [np.full(3, 1 / 3), *np.eye(3)])
    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 41) for b in np.linspace(0, 1, 41) if a + b <= 1]
    assert fitted.loss <= min(loss(np.array(w)) for w in grid) + 1e-3
    # The mean is over examples, each the mean of its two tokens.
    plain = torch.nn.functional.cross_entropy(logits[1], targets, reduction="none").view(30, 2).mean(1).mean()
    assert loss(np.array([0.0, 1.0, 0.0])) == pytest.approx(float(plain), rel=1e-5)


def test_outputs_outside_of_the_label_set_do_not_spoil_fitted_weights():
    logits = torch.randn(2, 10, 4)
    logits[:, :, 3] = float("-inf")
    fitted = fit_weights(logits, torch.randint(0, 3, (10,)), torch.arange(10))
    assert np.isfinite(fitted.loss)
