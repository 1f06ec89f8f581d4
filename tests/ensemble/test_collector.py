"""What is kept of the adapters' outputs: within the cap, spread over rows and answers, the same in any batch."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from helpers import ensembles, toy
from helpers.member_kinds import KINDS, NAMES, WEIGHTS, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import fit_ensemble
from hf_ensemble.ensemble.weighting.collation import default_collator
from hf_ensemble.ensemble.weighting.collector import AnswerCollector, keep_tokens
from hf_ensemble.ensemble.weighting.sampling import evenly_spaced, spread_sample, tokens_per_row
from hf_ensemble.errors import EnsembleError
from hf_ensemble.tasks import LabelSpace, TaskCollator

WORDS = len(toy.VOCABULARY)


@pytest.fixture
def ensemble():
    return PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES, WEIGHTS)


def token_rows(count, seed=0, longest=9):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(4, longest, (count,), generator=generator).tolist():
        ids = torch.randint(3, 30, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:], "example_id": str(len(rows)), "task": "x"})
    return rows


def collect(ensemble, rows, max_values=2**27, max_rows=None, seed=0, batch_size=4, log_probs_only=False):
    collator = default_collator(ensemble.config)
    return AnswerCollector(ensemble, collator, batch_size, max_values, max_rows, seed, log_probs_only, "no")("x", rows)


def test_everything_that_fits_is_kept(ensemble):
    rows = token_rows(7)
    found = collect(ensemble, rows)
    expected, targets, owners = [], [], []
    for number, row in enumerate(rows):
        outputs = ensembles.outputs_of(ensemble.model, NAMES, {"input_ids": torch.tensor([row["input_ids"]])})
        expected.append(torch.stack([outputs[name][0, 1:-1] for name in NAMES]))
        targets += row["input_ids"][2:]
        owners += [number] * len(row["input_ids"][2:])
    assert torch.allclose(found.values, torch.cat(expected, 1), atol=1e-5)
    # All of them are no copy.
    assert found.of_members(range(3)) is found and len(found.of_members([0, 2]).values) == 2
    assert found.targets.tolist() == targets and found.rows.tolist() == owners
    only = collect(ensemble, rows, log_probs_only=True)
    log_probs = torch.log_softmax(torch.cat(expected, 1), -1)
    assert only.values.shape == (3, len(targets))
    assert torch.allclose(only.values, log_probs[:, torch.arange(len(targets)), targets], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 20, 31, 60])
def test_the_cap_is_a_cap_and_the_sample_is_spread(ensemble, tokens):
    rows = token_rows(20)
    per_token = len(NAMES) * WORDS
    found = collect(ensemble, rows, max_values=(tokens + 1) * per_token - 1)
    assert found.values.numel() <= tokens * per_token
    kept = torch.bincount(found.rows)
    # As much is kept as fits, and every row that was taken has a token.
    assert len(found.targets) == min(tokens, sum(len(row["labels"]) - 2 for row in rows))
    assert len(kept) == min(tokens, len(rows)) and (kept > 0).all()
    everything = collect(ensemble, rows)
    for k in range(len(found.targets)):
        # Each is an answer token of the set, with the adapters' own logits.
        distance = (everything.values - found.values[:, k : k + 1]).abs().amax(dim=(0, 2))
        assert float(distance.min()) < 1e-5 and found.targets[k] == everything.targets[int(distance.argmin())]


def test_rows_of_the_whole_set_are_sampled_not_the_first():
    for seed in range(20):
        chosen = spread_sample(1000, 7, seed)
        assert len(set(chosen)) == 7 and chosen == sorted(chosen)
        # One from each seventh.
        assert [position * 7 // 1000 for position in chosen] == list(range(7))
    assert spread_sample(1000, 7, 0) != spread_sample(1000, 7, 1)
    assert spread_sample(1000, 7, 3) == spread_sample(1000, 7, 3)
    assert spread_sample(5, 7, 0) == spread_sample(5, None, 0) == [0, 1, 2, 3, 4]
    # Every position may be drawn.
    assert {position for seed in range(300) for position in spread_sample(11, 4, seed)} == set(range(11))


def test_long_answers_are_cut_before_short_ones():
    assert tokens_per_row([1, 9, 3], 13) == [1, 9, 3]
    assert tokens_per_row([1, 9, 3], 12) == [1, 8, 3]
    assert tokens_per_row([1, 9, 9], 8) == [1, 4, 3]
    assert tokens_per_row([4, 4, 4], 3) == [1, 1, 1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(1, 30, 8).tolist()
        budget = int(rng.integers(8, sum(counts) + 1))
        kept = tokens_per_row(counts, budget)
        assert sum(kept) == budget and all(1 <= own <= count for own, count in zip(kept, counts))


def test_tokens_of_a_row_are_evenly_spaced():
    assert evenly_spaced(10, 1) == [5] and evenly_spaced(10, 10) == list(range(10))
    for total in range(1, 40):
        for size in range(1, total + 1):
            chosen = evenly_spaced(total, size)
            gaps = np.diff(chosen)
            assert len(set(chosen)) == size and chosen[0] >= 0 and chosen[-1] < total
            assert not len(gaps) or gaps.max() - gaps.min() <= 1
    labels = torch.tensor([[-100, 5, 6, 7, 8], [9, -100, 4, -100, 3]])
    assert keep_tokens(labels, [2, 1], shift=True).tolist() == [[-100, -100, 6, -100, 8], [9, -100, -100, -100, 3]]
    assert keep_tokens(labels, [2, 1], shift=False).tolist() == [[-100, -100, 6, -100, 8], [-100, -100, 4, -100, -100]]


@pytest.mark.parametrize("combination", ["logits", "probs"])
def test_the_fit_depends_on_rows_and_seed_alone(ensemble, combination):
    ensemble.combination = combination
    data = {"x": token_rows(30, 0), "y": token_rows(9, 1)}
    options = {"max_values": 2 * 40 * 3 * (WORDS if combination == "logits" else 1), "max_rows": 20}
    first = fit_ensemble(ensemble, data, batch_size=4, **options)
    for batch_size in (1, 3, 16):
        again = fit_ensemble(ensemble, data, batch_size=batch_size, **options)
        for task in data:
            assert again.tasks[task].weights == pytest.approx(first.tasks[task].weights, abs=1e-4)
            assert again.tasks[task].loss == pytest.approx(first.tasks[task].loss, abs=1e-5)
    other = fit_ensemble(ensemble, data, seed=1, **options)
    assert other.tasks["x"].loss != pytest.approx(first.tasks["x"].loss, abs=1e-4)
    # All nine rows of the other task fit, and are taken whatever the seed.
    assert other.tasks["y"].uniform_loss == pytest.approx(first.tasks["y"].uniform_loss, abs=1e-5)


def test_fitting_alone_changes_nothing(ensemble):
    data = {"x": token_rows(6)}
    state = ensemble.train(), ensemble.weights, ensemble.default_weights
    fit = fit_ensemble(ensemble, data)
    assert ensemble.weights == state[1] and ensemble.default_weights == state[2] and ensemble.training
    assert ensemble.model.active_adapters == ["first"]
    set_weights = ensemble.fit_weights(data)
    assert set_weights.tasks["x"].weights == pytest.approx(fit.tasks["x"].weights, abs=1e-6)
    assert ensemble.weights["x"] == pytest.approx(fit.weights_of(fit.tasks["x"]), abs=1e-6)


def test_a_trainer_s_table_and_collator(ensemble):
    rows = token_rows(11)
    table = Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"])} for row in rows])
    for side in ("right", "left"):
        collator = TaskCollator(DataCollatorForSeq2Seq(toy.tokenizer(side), label_pad_token_id=-100))
        fit = ensemble.fit_weights({"x": table}, data_collator=collator, batch_size=4, max_rows=8, seed=2)
        expected = fit_ensemble(ensemble, {"x": rows}, max_rows=8, seed=2)
        assert fit.tasks["x"].loss == pytest.approx(expected.tasks["x"].loss, abs=1e-5)


def test_mixed_precision_runs_the_adapters_under_autocast(ensemble):
    dtypes = set()
    data = {"x": token_rows(6)}
    exact = fit_ensemble(ensemble, data)
    head = ensemble.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    rounded = fit_ensemble(ensemble, data, mixed_precision="bf16")
    assert dtypes == {torch.bfloat16}
    assert rounded.tasks["x"].loss == pytest.approx(exact.tasks["x"].loss, abs=0.05)
    assert rounded.tasks["x"].loss != exact.tasks["x"].loss


def test_batches_are_halved_where_memory_runs_out(ensemble):
    rows, sizes = token_rows(8), []
    expected = collect(ensemble, rows)

    def full(module, inputs):
        sizes.append(len(inputs[0]))
        if sizes[-1] > 3:
            raise RuntimeError("CUDA out of memory.")

    handle = ensemble.model.get_base_model().model.layers[0].register_forward_pre_hook(full)
    found = collect(ensemble, rows, batch_size=8)
    handle.remove()
    assert max(sizes) == 8 and sizes[-1] <= 3
    assert torch.allclose(found.values, expected.values, atol=1e-5) and torch.equal(found.rows, expected.rows)


def test_classifiers_keep_their_label_sets():
    model = make(toy.bert(4), [{"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}] * 3)
    space = LabelSpace(("no", "yes", "maybe", "never"), {"x": (0, 1), "y": (1, 2, 3)})
    ensemble = PeftEnsembleModel(model, NAMES, label_space=space)
    rows = [{"input_ids": [4, 5 + i, 6], "labels": i % 2} for i in range(9)]
    found = collect(ensemble, rows, max_values=5 * 3 * 4)
    assert found.values.shape == (3, 5, 4) and found.values[:, :, 2:].isneginf().all()
    assert found.values[:, :, :2].isfinite().all() and found.rows.tolist() == list(range(5))


@pytest.mark.parametrize("combination", ["logits", "probs"])
def test_a_cap_below_one_token_says_what_would_do(ensemble, combination):
    ensemble.combination = combination
    data = {"x": token_rows(4), "y": token_rows(4)}
    need = len(NAMES) * (WORDS if combination == "logits" else 1)
    with pytest.raises(EnsembleError, match=f"holds no answer token.*Pass max_values={2 * need} or more"):
        fit_ensemble(ensemble, data, max_values=2 * need - 1)
    fit_ensemble(ensemble, data, max_values=2 * need)


def test_rows_without_an_answer_are_named(ensemble):
    rows = token_rows(3)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    with pytest.raises(EnsembleError, match="an answer in every row of 'x', found no answer token in row 1"):
        fit_ensemble(ensemble, {"x": rows})
