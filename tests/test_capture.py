import oracles
import pytest
import torch
import toy
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel

from hf_ensemble.capture import CaptureConfig, GradientExtractor, SeededProjection, capture_gradients, log_odds, margins
from hf_ensemble.errors import CaptureError, ConfigurationError, StoreError, StoreMismatchError
from hf_ensemble.store import GradientStore
from hf_ensemble.tasks import TaskCollator, TaskSet, data_collator_for, encode, score_answers


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def causal_batch(padding_side, count=5):
    tokenizer = toy.tokenizer(padding_side)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    tasks = TaskSet.from_datasets({"t": toy.sum_rows(count)}, {"t": toy.sum_rows(2)})
    rows = list(encode(tasks.table("train"), tokenizer, tasks.row_format))
    # Different lengths, so that something is padded.
    for i, row in enumerate(rows):
        for key in ("input_ids", "attention_mask", "labels"):
            row[key] = row[key][i % 3 :]
    return rows, TaskCollator(pad)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_absolute_positions_do_not_count_padding(padding_side):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(toy.VOCABULARY), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"]))
    toy.randomize(model)
    rows, collator = causal_batch(padding_side)
    extractor = GradientExtractor(model, projection_dim=None)
    together = extractor(collator(rows)).features
    alone = torch.cat([extractor(collator([row])).features for row in rows])
    assert not extractor.fallback and relative_error(together, alone) < 1e-5


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["geometric_mean", "mean_log_odds"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}])
def test_causal_lm_gradients_equal_one_backward_per_example(padding_side, kind, settings):
    model = toy.with_lora(toy.llama(), **settings).train()
    rows, collator = causal_batch(padding_side)
    found = GradientExtractor(model, projection_dim=None, margin=kind)(collator(rows))
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()

    def margin_alone(i):
        ids, labels = (torch.tensor([rows[i][key]]) for key in ("input_ids", "labels"))
        return oracles.margins(model(input_ids=ids).logits, labels, kind)[0]

    expected = oracles.per_example_gradients(model, margin_alone, len(rows))
    assert relative_error(found.features, expected) < 1e-5
    assert relative_error(found.margin, torch.stack([margin_alone(i) for i in range(len(rows))])) < 1e-5
    assert torch.allclose(nn.functional.softplus(-found.margin), found.loss, atol=1e-6) or kind == "mean_log_odds"


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_classifier_gradients_equal_one_backward_per_example(padding_side):
    tokenizer = toy.tokenizer(padding_side)
    tasks = TaskSet.from_datasets(toy.text_tasks(train=3))
    space = tasks.label_space
    model = toy.with_lora(toy.bert(len(space)), r=3)
    rows = list(encode(tasks.table("train"), tokenizer, tasks.row_format, space))
    collator = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=False)
    extractor = GradientExtractor(model, projection_dim=None, label_space=space)
    found = extractor(collator(rows))
    # The head is trained too, with its bias, and read by hooks like the adapter.
    assert any("classifier" in name and name.endswith("bias") for name in extractor.hooked)
    assert not extractor.fallback

    def margin_alone(i):
        # BERT reads its answer off the first position and numbers positions from the padding on, so what it says
        # depends on the side: right-padded rows are checked alone, left-padded ones as they stand in the batch.
        inputs = {"input_ids": torch.tensor([rows[i]["input_ids"]])}
        if padding_side == "left":
            inputs = {key: collator(rows)[key][i : i + 1] for key in ("input_ids", "attention_mask")}
        own = list(space.task_labels[rows[i]["task"]])
        return oracles.margins(model(**inputs).logits[:, own], torch.tensor([own.index(rows[i]["labels"])]))[0]

    expected = oracles.per_example_gradients(model, margin_alone, len(rows))
    assert relative_error(found.features, expected) < 1e-5


def test_any_batch_size_and_order_gives_the_same_features():
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right", count=6)
    extractor = GradientExtractor(model, projection_dim=256)
    together = extractor(collator(rows)).features
    alone = torch.cat([extractor(collator([row])).features for row in rows])
    backward = extractor(collator(rows[::-1])).features.flip(0)
    assert relative_error(alone, together) < 1e-5
    assert relative_error(backward, together) < 1e-5


def test_activation_checkpointing_changes_nothing():
    model = toy.with_lora(toy.llama())
    rows, collator = causal_batch("right")
    plain = GradientExtractor(model, projection_dim=None)(collator(rows)).features
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(GradientExtractor(model.train(), projection_dim=None)(collator(rows)).features, plain)


class Flattened(nn.Module):
    """A layer that mixes examples into one long batch, as a mixture of experts does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def test_layers_that_hooks_cannot_read_take_the_exact_fallback():
    model = toy.with_lora(toy.llama())
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.up_proj = Flattened(mlp.up_proj)
    rows, collator = causal_batch("right")
    extractor = GradientExtractor(model, projection_dim=None)
    found = extractor(collator(rows)).features
    assert {name.split(".")[-3] for name in extractor.fallback} == {"lora_A", "lora_B"}

    def margin_alone(i):
        ids, labels = (torch.tensor([rows[i][key]]) for key in ("input_ids", "labels"))
        return oracles.margins(model(input_ids=ids).logits, labels)[0]

    assert relative_error(found, oracles.per_example_gradients(model, margin_alone, len(rows))) < 1e-5


class Reweighted(nn.Module):
    """A layer whose weight is also used outside of its forward, which a hook cannot see."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + nn.functional.linear(x, self.layer.weight)


def test_hooks_that_do_not_add_up_to_autograd_are_replaced():
    model = toy.bert(4)
    model.requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    model.classifier = Reweighted(model.classifier)
    extractor = GradientExtractor(model, projection_dim=None)
    ids = torch.randint(3, 20, (3, 6))
    labels = torch.tensor([0, 3, 1])
    found = extractor({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}).features
    assert extractor.fallback == ["classifier.layer.weight"]

    def margin_alone(i):
        return oracles.margins(model(input_ids=ids[i : i + 1]).logits, labels[i : i + 1])[0]

    assert relative_error(found, oracles.per_example_gradients(model, margin_alone, 3)) < 1e-5


def test_margin_is_finite_for_any_probability():
    log_probs = torch.tensor([-200.0, -30.0, -1.0, -1e-3, -1e-9, 0.0])
    assert torch.isfinite(log_odds(log_probs)).all()
    assert torch.isclose(log_odds(torch.tensor(0.25).log()), torch.tensor(1 / 3).log())
    with pytest.raises(ConfigurationError, match="margin has to be one of"):
        margins(score_answers(torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.long)), "mean")


def projection(dim, seed=0, shapes=((7, 50), (3, 130), (11,))):
    return SeededProjection({f"p{i}": torch.Size(s) for i, s in enumerate(shapes)}, dim, seed)


def project(own, gradient):
    """Project flat gradients (n, P)."""
    features = torch.zeros(len(gradient), own.dim)
    offset = 0
    for name, shape in own.shapes.items():
        own.add(features, name, gradient[:, offset : offset + shape.numel()].reshape(-1, *shape))
        offset += shape.numel()
    return features


def test_projection_matrix_is_signs_with_unit_rows():
    own = projection(64)
    matrix = project(own, torch.eye(own.num_parameters))
    assert torch.equal(matrix.abs().sum(1), torch.ones(own.num_parameters))
    assert torch.equal((matrix != 0).sum(1), torch.ones(own.num_parameters, dtype=torch.long))
    assert 0.4 < (matrix.sum(1) > 0).float().mean() < 0.6
    assert torch.equal(matrix, project(projection(64), torch.eye(own.num_parameters)))
    assert not torch.equal(matrix, project(projection(64, seed=1), torch.eye(own.num_parameters)))


@pytest.mark.parametrize("dim", [64, 500, None])
def test_transpose_is_the_adjoint(dim):
    own = projection(dim)
    gradient, w = torch.randn(3, own.num_parameters), torch.randn(own.dim)
    moved = torch.cat([part.reshape(-1) for part in own.transpose(w).values()])
    assert torch.allclose(project(own, gradient) @ w, gradient @ moved, atol=1e-3)


def test_inner_products_are_unbiased_and_their_error_falls_with_the_root_of_dim():
    torch.manual_seed(0)
    shapes = ((40, 100), (4000,))
    x, y = torch.randn(2, 8000)
    y = 0.5 * x + y
    errors = {}
    for dim in (64, 256, 1024):
        products = []
        for seed in range(100):
            features = project(projection(dim, seed, shapes), torch.stack([x, y]))
            products.append(float(features[0] @ features[1]))
        difference = torch.tensor(products) - float(x @ y)
        errors[dim] = float(difference.std())
        assert abs(difference.mean()) < 4 * difference.std() / 10
        # A dense Rademacher projection has this standard deviation.
        dense = float(((x.norm() * y.norm()) ** 2 + (x @ y) ** 2) ** 0.5) / dim**0.5
        assert errors[dim] < 1.3 * dense
    assert 1.4 < errors[64] / errors[256] < 2.9
    assert 1.4 < errors[256] / errors[1024] < 2.9


def test_projection_needs_parameters_and_a_positive_size():
    with pytest.raises(CaptureError, match="no trainable parameter"):
        SeededProjection({}, 4)
    with pytest.raises(CaptureError, match="positive"):
        projection(0)
    assert projection(10**6).exact


def capture(folder, model=None, rows=None, **changes):
    config = CaptureConfig(**{"projection_dim": 64, "feature_dtype": "float32", "batch_size": 4, **changes})
    tasks = TaskSet.from_datasets(rows or toy.sft_tasks(train=24, validation=6))
    model = model or toy.with_lora(toy.llama())
    return capture_gradients(model, tasks, config, folder, processing_class=toy.tokenizer(), disable_tqdm=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.startswith("shard")}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("hf_ensemble.capture.capture.SHARD_SIZE", 20)


@pytest.fixture
def whole_store(tmp_path):
    return tmp_path / "whole", capture(tmp_path / "whole")


def test_store_explains_itself(whole_store):
    _, store = whole_store
    assert store.task_names == ("sums", "diffs", "more_sums")
    assert len(store) == 3 * 30 and store.dim == 64
    identity = store.identity
    assert identity["config"]["margin"] == "geometric_mean" and identity["model"]["adapter"]["default"]["r"] == 4
    assert store.manifest["status"] == "complete" and store.manifest["versions"]["torch"]
    assert store.manifest["coverage"]["fallback"] == [] and len(store.manifest["coverage"]["hooked"]) == 28


def test_store_rows_equal_the_extractor(whole_store):
    _, store = whole_store
    model, tokenizer = toy.with_lora(toy.llama()), toy.tokenizer()
    tasks = TaskSet.from_datasets(toy.sft_tasks(train=24, validation=6))
    rows = list(encode(tasks.table("validation"), tokenizer, tasks.row_format))
    collator = data_collator_for(tasks.row_format, tokenizer, labels_are_tokens=True)
    expected = GradientExtractor(model, 64)(collator(rows))
    table = store.table("validation")
    assert table.example_id.tolist() == [row["example_id"] for row in rows]
    assert relative_error(torch.from_numpy(table.features), expected.features) < 1e-5
    assert relative_error(torch.from_numpy(table.margin.copy()), expected.margin) < 1e-5
    some = store.table("validation", ["more_sums", "sums"])
    assert some.task_names == ("more_sums", "sums") and (some.features[some.task == 1] == table.features[:6]).all()


@pytest.mark.parametrize("kill_after", [0, 1, 3])
def test_a_killed_capture_goes_on_and_ends_with_the_same_store(tmp_path, monkeypatch, whole_store, kill_after):
    from hf_ensemble.store import GradientStoreWriter

    folder = tmp_path / "store"
    write, written = GradientStoreWriter.write_shard, []

    def killed(self, shard, rows):
        if len(written) == kill_after:
            # What a process leaves that dies between the features and the marker of a shard.
            (self.folder / f"shard-{shard:05d}.features.npy").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, rows)

    monkeypatch.setattr(GradientStoreWriter, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        capture(folder)
    with pytest.raises(StoreError, match="unfinished"):
        GradientStore(folder)
    redone = []
    monkeypatch.setattr(
        GradientStoreWriter, "write_shard", lambda self, shard, rows: (redone.append(shard), write(self, shard, rows))
    )
    capture(folder)
    assert not set(redone) & set(written)
    assert contents(folder) == contents(whole_store[0])


def test_a_capture_killed_before_its_last_word_is_completed(tmp_path, monkeypatch):
    from hf_ensemble.store import GradientStoreWriter

    with monkeypatch.context() as patch:
        patch.setattr(GradientStoreWriter, "finish", lambda self, **records: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            capture(tmp_path / "store")
    monkeypatch.setattr(GradientStoreWriter, "write_shard", lambda *a: pytest.fail("captured again"))
    assert len(capture(tmp_path / "store")) == 90


def test_fingerprint_of_a_tensor_with_more_entries_than_float32_counts():
    from hf_ensemble.capture.identity import _hash

    large = torch.zeros(2**24 + 2**20 + 3, dtype=torch.int8)
    first = _hash({"w": large}, 64)
    large[-1] = 1
    assert _hash({"w": large}, 64) != first


def test_a_store_of_something_else_is_refused_by_name(tmp_path):
    rows = toy.sft_tasks()
    folder = tmp_path / "store"
    first = capture(folder, rows=rows)
    again = capture(folder, rows=rows)
    assert (again.table("train").features == first.table("train").features).all()
    other = toy.sft_tasks()
    other["sums"]["train"][0]["completion"] = " 19"
    changed_base = toy.with_lora(toy.llama(seed=1))
    for arguments, name in [
        ({"rows": other}, "data.fingerprint"),
        ({"rows": rows, "projection_seed": 1}, "config.projection_seed"),
        ({"rows": rows, "margin": "mean_log_odds"}, "config.margin"),
        ({"rows": rows, "projection_dim": 32}, "dim: found 64, expected 32"),
        ({"rows": rows, "model": toy.with_lora(toy.llama(), seed=1)}, "model.theta0"),
        ({"rows": rows, "model": changed_base}, "model.base_weights"),
        ({"rows": rows, "model": toy.with_lora(toy.llama(), lora_alpha=16)}, "model.adapter.default.lora_alpha"),
    ]:
        with pytest.raises(StoreMismatchError, match=name):
            capture(folder, **arguments)
    assert len(GradientStore(folder)) == len(first)


def test_gradients_that_are_not_finite_are_named(tmp_path):
    model = toy.with_lora(toy.llama())
    rows = toy.sft_tasks(train=4, validation=2)
    # The word "diff" alone makes the model overflow.
    with torch.no_grad():
        model.get_input_embeddings().weight[toy.VOCABULARY.index("diff")] = float("nan")
    with pytest.raises(StoreError, match=r"6 examples have gradients that are not finite: diffs/"):
        capture(tmp_path / "store", model, rows)


def test_a_model_without_adapter_and_rows_without_answer_are_named(tmp_path):
    model = toy.llama()
    model.requires_grad_(False)
    with pytest.raises(CaptureError, match="no trainable parameter"):
        capture(tmp_path / "store", model, toy.sft_tasks())
    extractor = GradientExtractor(toy.with_lora(toy.llama()), 64)
    ids = torch.randint(3, 20, (2, 4))
    with pytest.raises(CaptureError, match="no answer token"):
        extractor({"input_ids": ids, "labels": torch.full((2, 4), -100)})


def test_config_is_checked():
    for settings, message in [
        ({"projection_dim": 0}, "projection_dim"),
        ({"batch_size": 0}, "batch_size"),
        ({"margin": "mean"}, "margin"),
        ({"feature_dtype": "bfloat16"}, "float16"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            CaptureConfig(**settings)


def test_capture_leaves_model_and_random_state_alone(tmp_path):
    model = toy.with_lora(toy.llama(), lora_dropout=0.3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    capture(tmp_path / "store", model, toy.sft_tasks())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
