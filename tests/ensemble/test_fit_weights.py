"""Fitted weights against slow and plain minimisers of the same loss."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from helpers import ensembles, toy
from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble import fit_weights
from hf_ensemble.ensemble.weighting.convex import MAX_WEIGHT
from hf_ensemble.ensemble.weighting.objectives import logits_objective, mixed_loss, probs_objective
from hf_ensemble.errors import EnsembleError
from hf_ensemble.tasks import LabelSpace, TaskCollator, token_scores


def cached(seed, members=4, examples=40, width=7, strength=2.0):
    """Logits of adapters that each know some of the answers."""
    torch.manual_seed(seed)
    rows = torch.sort(torch.cat([torch.arange(examples), torch.randint(0, examples, (examples,))])).values
    targets = torch.randint(0, width, (len(rows),))
    logits = torch.randn(members, len(rows), width)
    for k in range(members):
        known = torch.rand(len(rows)) < (k + 1) / (members + 2)
        logits[k, known, targets[known]] += strength
    return logits, targets, rows


def plain_loss(logits, targets, rows, w, combination):
    """Example by example, token by token."""
    examples = []
    for example in rows.unique():
        losses = []
        for i in (rows == example).nonzero().flatten():
            if combination == "probs":
                p = sum(wk * torch.softmax(own[i].double(), -1) for wk, own in zip(w, logits))
                losses.append(-torch.log(p[targets[i]]))
            else:
                z = sum(wk * own[i].double() for wk, own in zip(w, logits))
                losses.append(torch.logsumexp(z, -1) - z[targets[i]])
        examples.append(sum(losses) / len(losses))
    return float(sum(examples) / len(examples))


def objective_of(combination, logits, targets, rows):
    if combination == "logits":
        return logits_objective(logits, targets, rows)
    return probs_objective(torch.stack([token_scores(own, targets)[0] for own in logits]), rows)


@pytest.mark.parametrize("combination", ["logits", "probs"])
def test_objective_has_its_definition_gradient_and_hessian(combination):
    data = cached(0)
    objective = objective_of(combination, *data)
    w = np.array([0.1, 0.2, 0.3, 0.4])
    value, gradient, hessian = objective(w)
    assert value == pytest.approx(plain_loss(*data, w, combination), rel=1e-6)
    if combination == "logits":
        assert value == pytest.approx(float(mixed_loss(*data, torch.tensor(w))), rel=1e-6)
    for k, direction in enumerate(np.eye(4) * 1e-5):
        up, down = objective(w + direction), objective(w - direction)
        assert gradient[k] == pytest.approx((up[0] - down[0]) / 2e-5, abs=1e-7)
        assert np.allclose(hessian[k], (up[1] - down[1]) / 2e-5, atol=1e-6)


@pytest.mark.parametrize("constraint", ["simplex", "nonnegative", "unconstrained"])
@pytest.mark.parametrize("seed", range(4))
def test_fitted_weights_are_the_optimum_to_a_millionth(constraint, seed):
    data = cached(seed, members=2 + seed, strength=1.0 + seed)
    fitted = fit_weights(*data, constraint=constraint)
    loss = lambda w: float(mixed_loss(*data, torch.tensor(w)))  # noqa: E731
    objective = logits_objective(*data)
    members = 2 + seed
    bounds = [
        ((0.0 if constraint != "unconstrained" else -MAX_WEIGHT), (1.0 if constraint == "simplex" else MAX_WEIGHT))
    ]
    sums = {"type": "eq", "fun": lambda w: w.sum() - 1.0}
    other = minimize(
        lambda w: objective(w)[:2],
        np.full(members, 1 / members),
        jac=True,
        bounds=bounds * members,
        constraints=[sums] if constraint == "simplex" else [],
        method="trust-constr",
        options={"gtol": 1e-12, "xtol": 1e-14, "barrier_tol": 1e-12, "maxiter": 400},
    )
    assert fitted.loss == pytest.approx(loss(fitted.weights), abs=1e-6)
    assert fitted.loss <= other.fun + 1e-6 and fitted.gap <= 1e-6
    # The gap is a true bound.
    assert fitted.loss - fitted.gap <= other.fun + 1e-9
    assert fitted.loss <= min(fitted.uniform_loss, *fitted.one_hot_losses)
    assert fitted.uniform_loss == pytest.approx(loss(np.full(members, 1 / members)), abs=1e-6)
    if constraint == "simplex":
        assert fitted.weights.sum() == pytest.approx(1.0) and (fitted.weights >= 0).all()


def test_the_sparse_and_the_extreme_optimum():
    logits, targets, rows = cached(1)
    # An adapter that is right everywhere is taken alone; where any sum may be, it grows up to its bound.
    logits[2] = 0.0
    logits[2, torch.arange(len(targets)), targets] = 0.5
    known = torch.stack([logits[2], logits[2] * 0, -logits[2]])
    assert fit_weights(known, targets, rows).weights == pytest.approx([1, 0, 0], abs=1e-9)
    assert fit_weights(known, targets, rows, constraint="nonnegative").weights[0] == pytest.approx(MAX_WEIGHT)
    # Two alike adapters leave the split open, not the loss.
    twice = torch.cat([logits[:2], logits[:1]])
    assert fit_weights(twice, targets, rows).loss == pytest.approx(
        fit_weights(logits[:2], targets, rows).loss, abs=1e-7
    )


def test_light_adapters_are_left_out_on_request():
    data = cached(2, strength=1.0)
    full, sparse = fit_weights(*data), fit_weights(*data, min_weight=0.2)
    assert (full.weights[full.weights > 0] < 0.2).any()
    assert (sparse.weights[sparse.weights > 0] >= 0.2).all()
    assert full.loss <= sparse.loss <= min(sparse.uniform_loss, *sparse.one_hot_losses)
    assert sparse.loss - sparse.gap == pytest.approx(full.loss - full.gap, abs=1e-8)


@pytest.mark.parametrize("constraint", ["simplex", "nonnegative", "unconstrained"])
def test_impossible_labels_do_not_spoil_weights_of_either_sign(constraint):
    logits, targets, rows = cached(3)
    logits = torch.cat([logits, torch.full((*logits.shape[:2], 2), float("-inf"))], -1)
    fitted = fit_weights(logits, targets, rows, constraint=constraint)
    assert fitted.loss == pytest.approx(fit_weights(*cached(3), constraint=constraint).loss, abs=1e-7)


def test_mean_of_distributions_reaches_its_optimum():
    data = cached(5, members=3)
    fitted = fit_weights(*data, combination="probs")
    objective = objective_of("probs", *data)
    grid = [np.array([a, b, 1 - a - b]) for a in np.linspace(0, 1, 101) for b in np.linspace(0, 1, 101) if a + b <= 1]
    best = min(objective(w)[0] for w in grid)
    assert fitted.gap <= 1e-6 and best - 1e-4 < fitted.loss <= best
    with pytest.raises(EnsembleError, match="expected constraint='simplex'"):
        fit_weights(*data, combination="probs", constraint="unconstrained")
    with pytest.raises(EnsembleError, match="constraint has to be one of .* found 'ridge'"):
        fit_weights(*data, constraint="ridge")


@pytest.fixture
def ensemble():
    return PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES)


def rows_of(count, seed):
    torch.manual_seed(seed)
    rows = []
    for length in torch.randint(4, 9, (count,)).tolist():
        ids = torch.randint(3, 30, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:], "example_id": str(len(rows)), "text": "x"})
    return rows


@pytest.mark.parametrize("combination", ["logits", "log_probs", "probs"])
def test_an_ensemble_fits_its_own_loss(ensemble, combination):
    """The reported losses are those of the ensemble's own forward, one example at a time."""
    ensemble.combination = combination
    data = {"x": rows_of(7, 0), "y": rows_of(5, 1)}
    fit = ensemble.fit_weights(data, batch_size=3, cross_validate=False)

    def loss_of(task, rows):
        known = {"routing": "default"} if task is None else {"task": task}
        with torch.no_grad():
            return np.mean(
                [
                    float(ensemble(**{k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}, **known).loss)
                    for row in rows
                ]
            )

    report = fit.report()
    for task, rows in data.items():
        assert report[task]["fitted"] == pytest.approx(loss_of(task, rows), abs=1e-5)
        assert report[task]["fitted"] <= min(report[task]["uniform"], report[task]["one_hot"]) + 1e-12
        assert report[task]["gap"] <= 1e-6
    assert report["overall"]["fitted"] == pytest.approx(
        np.mean([loss_of(None, rows) for rows in data.values()]), abs=1e-5
    )
    ensemble.weights["even"] = dict.fromkeys(NAMES, 1 / 3)
    assert report["x"]["uniform"] == pytest.approx(loss_of("even", data["x"]), abs=1e-5)
    ensemble.weights["one"] = {"second": 1.0}
    assert fit.tasks["x"].one_hot_losses[1] == pytest.approx(loss_of("one", data["x"]), abs=1e-5)


def test_forms_of_data(ensemble):
    data = {"x": rows_of(7, 0), "y": rows_of(5, 1)}
    first = ensemble.fit_weights(data)
    table = [{**row, "task": task} for task, rows in data.items() for row in rows]
    again = ensemble.fit_weights(table, batch_size=4)
    assert again.report()["y"] == pytest.approx(first.report()["y"], abs=1e-6)
    assert set(ensemble.weights) == {"x", "y"}
    for bad, message in [
        ({}, "rows of at least one task, found none"),
        ({"x": []}, r"found none of \['x'\]"),
        ([{"input_ids": [1]}], "rows with a column 'task'"),
        ({"x": [{"input_ids": [4, 5]}]}, "'x' have no labels"),
        ({"x": [{"input_ids": [4, 5], "labels": [-100, -100]}]}, "no answer token"),
    ]:
        with pytest.raises(EnsembleError, match=message):
            ensemble.fit_weights(bad)
    ensemble.combination = "weights"
    with pytest.raises(EnsembleError, match="not convex"):
        ensemble.fit_weights(data)


def test_a_trainer_s_collator_serves(ensemble):
    data = {"x": rows_of(7, 0), "y": rows_of(5, 1)}
    first = ensemble.fit_weights(data)
    named = {task: [{**row, "task": task} for row in rows] for task, rows in data.items()}
    for row in named["x"] + named["y"]:
        del row["text"]
    collator = TaskCollator(DataCollatorForSeq2Seq(toy.tokenizer(), label_pad_token_id=-100))
    again = ensemble.fit_weights(named, data_collator=collator)
    assert again.report()["y"] == pytest.approx(first.report()["y"], abs=1e-6)


def test_classifiers_fit_within_their_label_sets():
    model = make(toy.bert(4), [{"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}] * 3)
    space = LabelSpace(("no", "yes", "maybe", "never"), {"x": (0, 1), "y": (1, 2, 3)})
    ensemble = PeftEnsembleModel(model, NAMES, label_space=space)
    torch.manual_seed(0)
    data = {
        task: [{"input_ids": torch.randint(3, 20, (5,)).tolist(), "labels": labels[i % 2]} for i in range(6)]
        for task, labels in (("x", (0, 1)), ("y", (1, 3)))
    }
    fit = ensemble.fit_weights(data, constraint="unconstrained")
    assert fit.tasks["y"].validation is not None
    with torch.no_grad():
        ids = torch.tensor([row["input_ids"] for row in data["y"]])
        loss = ensemble(input_ids=ids, labels=torch.tensor([row["labels"] for row in data["y"]]), task="y").loss
    assert fit.tasks["y"].loss == pytest.approx(float(loss), abs=1e-5)


def test_encoder_decoders_fit_too():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=45, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    kinds = [{"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]}] * 3
    model = make(T5ForConditionalGeneration(config).eval(), kinds)
    ensemble = PeftEnsembleModel(model, NAMES)
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [5, 6], "labels": [8, 9, 10, 1]}]
    fit = ensemble.fit_weights({"x": rows})
    losses = []
    for row in rows:
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        losses.append(float(ensemble(**batch, task="x").loss.detach()))
    assert fit.tasks["x"].loss == pytest.approx(np.mean(losses), abs=1e-5)
    outputs = ensembles.outputs_of(
        model, NAMES, {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9]])}
    )
    assert len(outputs) == 3
