"""Cross-validated weights on generated logits whose truth is known."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from helpers.member_kinds import KINDS, NAMES, llama, make
from hf_ensemble import PeftEnsembleModel
from hf_ensemble.ensemble.weighting.collector import CollectedAnswers
from hf_ensemble.ensemble.weighting.cross_validation import cross_validated_weights
from hf_ensemble.ensemble.weighting.objectives import fit_objective
from hf_ensemble.errors import EnsembleError
from hf_ensemble.estimate.output_scale import SCALE_SPREAD


def answers_of(logits, targets, tokens_per_row=1):
    rows = torch.arange(len(targets)) // tokens_per_row
    return CollectedAnswers(torch.from_numpy(logits).float(), torch.from_numpy(targets), rows)


def softmax(values):
    shares = np.exp(values - values.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


class World:
    """Adapters that know the true logits z up to a factor, a common error and errors of their own."""

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        self.members, self.classes = int(rng.integers(2, 5)), int(rng.choice([2, 4]))
        alike = rng.random() < 0.25
        self.signal = np.full(self.members, 0.7) if alike else rng.uniform(0.0, 1.0, self.members)
        self.noise = np.full(self.members, 0.6) if alike else rng.uniform(0.2, 1.0, self.members)
        self.common, self.sharpness = rng.uniform(0, 0.6), rng.choice([1.0, rng.uniform(0.5, 2.0)])
        best = int(np.argmax(self.signal / self.noise))
        # The adapter trained for the task is mostly the best one.
        self.own = best if rng.random() < 0.6 else int(rng.integers(self.members))
        self.names = [f"group_{k}" for k in range(self.members)]

    def draw(self, count):
        rng, shape = self.rng, (count, self.classes)
        truth, common = 2 * rng.normal(size=shape), self.common * rng.normal(size=shape)
        logits = np.stack([a * truth + common + s * rng.normal(size=shape) for a, s in zip(self.signal, self.noise)])
        targets = (softmax(truth).cumsum(1) > rng.random((count, 1))).argmax(1)
        return answers_of(self.sharpness * logits, targets)

    def fit(self, answers, **options):
        optimum = fit_objective(answers.objective("logits"), self.members)
        return optimum, cross_validated_weights(
            answers, self.names, "logits", optimum, {self.names[self.own]: 1.0}, **options
        )


def test_test_loss_is_at_most_that_of_every_fixed_choice():
    """Over worlds, on average: no way to weigh is better than the cross-validated one, for 10 to 200 rows."""
    margins = {}
    for size, worlds in ((10, 60), (20, 40), (60, 20), (200, 8)):
        losses = {}
        for seed in range(worlds):
            world = World(1000 * size + seed)
            optimum, chosen = world.fit(world.draw(size))
            test, eye = world.draw(1000), np.eye(world.members)
            ways = {
                "uniform": np.full(world.members, 1 / world.members),
                "own": eye[world.own],
                "best single": eye[int(optimum.one_hot_losses.argmin())],
                "fitted": optimum.weights,
                "unscaled": chosen.weights,
                "chosen": chosen.scale * chosen.weights,
            }
            for way, loss in zip(ways, test.row_losses(np.stack(list(ways.values())), "logits").mean(1)):
                losses.setdefault(way, []).append(loss)
            singles = test.row_losses(eye, "logits").mean(1)
            losses.setdefault("first", []).append(singles[0])
        margins[size] = {way: np.mean(own) - np.mean(losses["chosen"]) for way, own in losses.items()}
    for size, own in margins.items():
        assert min(own[way] for way in ("uniform", "own", "best single", "first", "fitted")) > 0, (size, own)
    # A scale does no harm with few rows, and helps with many.
    assert margins[200]["unscaled"] > 0.002 and margins[10]["unscaled"] > -0.003


def scaled_by_hand(answers, weights):
    """Weights times the most probable scale, by a search in one dimension."""

    def loss(log_scale):
        own = answers.row_losses(np.exp(log_scale) * weights[None], "logits").mean()
        return answers.num_rows * own + log_scale**2 / (2 * SCALE_SPREAD**2)

    found = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8})
    return np.exp(found.x) * weights


def test_losses_are_those_of_rows_left_out():
    world = World(3)
    answers = world.draw(40)
    optimum, chosen = world.fit(answers, num_folds=40)
    by_hand = {"uniform": [], "own": [], "fitted": [], "fitted, 0.25 own": []}
    for row in range(40):
        rest, left_out = answers.of_rows(np.delete(np.arange(40), row)), answers.of_rows(np.array([row]))
        found = {
            "uniform": scaled_by_hand(rest, np.full(world.members, 1 / world.members)),
            "own": scaled_by_hand(rest, np.eye(world.members)[world.own]),
            "fitted": scaled_by_hand(rest, fit_objective(rest.objective("logits"), world.members).weights),
        }
        found["fitted, 0.25 own"] = 0.75 * found["fitted"] + 0.25 * found["own"]
        for name, weights in found.items():
            by_hand[name].append(left_out.row_losses(weights[None], "logits")[0, 0])
    losses, shares = chosen.validation.losses, chosen.validation.shares
    for name, own in by_hand.items():
        assert losses[name] == pytest.approx(np.mean(own), abs=1e-4)
    assert losses["own"] == losses[f"adapter {world.names[world.own]}"]
    assert losses["fitted"] > optimum.loss
    likelihood = {name: np.exp(-40 * losses[name]) for name in shares}
    assert shares == pytest.approx({name: own / sum(likelihood.values()) for name, own in likelihood.items()})
    assert chosen.weights.sum() == pytest.approx(1) and chosen.gap >= 0


def test_an_adapter_that_is_right_and_too_sure_of_itself_is_not_taken_for_a_bad_one():
    rng = np.random.default_rng(4)
    truth = 2 * rng.normal(size=(300, 3))
    targets = (softmax(truth).cumsum(1) > rng.random((300, 1))).argmax(1)
    answers = answers_of(np.stack([5 * truth, truth + 1.5 * rng.normal(size=truth.shape)]), targets)
    optimum = fit_objective(answers.objective("logits"), 2)
    assert optimum.one_hot_losses[1] < optimum.one_hot_losses[0] and optimum.weights[1] > 0.5
    chosen = cross_validated_weights(answers, ["sure", "calm"], "logits", optimum, {"sure": 1.0}, min_weight=0.05)
    # The first adapter's logits are five times too large.
    assert chosen.weights[0] > 0.6 and chosen.scale == pytest.approx(1 / (5 * chosen.weights[0]), rel=0.5)
    assert chosen.loss < optimum.loss - 0.1


def test_a_clear_winner_takes_all_and_noise_is_averaged_over():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 60)
    right = 3 * np.eye(3)[targets] + 0.1 * rng.normal(size=(60, 3))
    wrong = 3 * np.eye(3)[(targets + 1) % 3]
    names = ["right", "wrong"]

    def weights_of(first, second, own):
        answers = answers_of(np.stack([first, second]), targets)
        optimum = fit_objective(answers.objective("logits"), 2)
        return cross_validated_weights(answers, names, "logits", optimum, own, min_weight=0.05)

    assert weights_of(right, wrong, {"wrong": 1.0}).weights == pytest.approx([1, 0])
    # Of adapters that are equally good, the task's own has the larger weight.
    noisy = [right + rng.normal(size=right.shape) for _ in range(2)]
    heavy = [weights_of(*noisy, {name: 1.0}).weights[k] for k, name in enumerate(names)]
    assert heavy[0] > weights_of(*noisy, {"wrong": 1.0}).weights[0] and heavy[1] > weights_of(*noisy, None).weights[1]


def test_a_scale_is_fitted_where_logits_are_too_sharp_or_too_flat():
    rng = np.random.default_rng(1)
    truth = 2 * rng.normal(size=(300, 4))
    targets = (softmax(truth).cumsum(1) > rng.random((300, 1))).argmax(1)
    for factor in (0.4, 1.0, 3.0):
        answers = answers_of(np.stack([truth, truth]) / factor, targets)
        for combination in ("logits", "probs"):
            optimum = fit_objective(answers.objective(combination), 2, combination=combination)
            chosen = cross_validated_weights(answers, ["a", "b"], combination, optimum)
            if combination == "probs":
                assert chosen.scale == 1.0 and "unscaled" not in chosen.validation.losses
                continue
            assert chosen.scale == pytest.approx(factor, rel=0.2)
            if factor != 1.0:
                assert chosen.validation.losses["chosen"] < chosen.validation.losses["unscaled"]


@pytest.mark.parametrize("constraint", ["simplex", "nonnegative", "unconstrained"])
def test_weights_of_any_sum_have_their_scale_in_them(constraint):
    world = World(6)
    answers = world.draw(50)
    optimum = fit_objective(answers.objective("logits"), world.members, constraint)
    chosen = cross_validated_weights(answers, world.names, "logits", optimum)
    combined = answers.row_losses(chosen.scale * chosen.weights[None], "logits").mean()
    assert chosen.loss == pytest.approx(combined) and chosen.loss <= optimum.uniform_loss
    # The sum of any other weights than shares is theirs already.
    assert (chosen.scale == 1.0) == (constraint != "simplex")


def test_answers_of_several_tokens_and_single_rows():
    rng = np.random.default_rng(2)
    logits, targets = rng.normal(size=(2, 12, 5)), rng.integers(0, 5, 12)
    answers = answers_of(logits, targets, tokens_per_row=3)
    weights = np.array([[0.3, 0.7], [1.0, 0.0]])
    losses = answers.row_losses(weights, "logits")
    assert losses.shape == (2, 4)
    assert losses[0].mean() == pytest.approx(answers.objective("logits")(weights[0])[0], abs=1e-9)
    part = answers.of_rows(np.array([1, 3]))
    assert part.row_losses(weights, "logits") == pytest.approx(losses[:, [1, 3]])
    assert part.of_rows(np.array([1])).row_losses(weights, "probs") == pytest.approx(
        answers.row_losses(weights, "probs")[:, [3]]
    )
    assert part.combined(weights[0]).row_losses(np.ones((1, 1)), "logits")[0] == pytest.approx(losses[0, [1, 3]])
    single = answers.of_rows(np.array([2]))
    optimum = fit_objective(single.objective("logits"), 2)
    assert cross_validated_weights(single, ["a", "b"], "logits", optimum, {"b": 1.0}).weights.tolist() == [0, 1]
    assert cross_validated_weights(single, ["a", "b"], "logits", optimum).weights.tolist() == [0.5, 0.5]


def test_an_adapters_name_is_no_candidates():
    world = World(5)
    answers = world.draw(20)
    for combination in ("logits", "probs"):
        optimum = fit_objective(answers.objective(combination), world.members, combination=combination)
        plain, named = (
            cross_validated_weights(answers, names, combination, optimum, {names[0]: 1.0})
            for names in (world.names, ["uniform", "own", "best", "fitted", "chosen", "unscaled"][: world.members])
        )
        assert named.weights == pytest.approx(plain.weights) and named.scale == pytest.approx(plain.scale)
        for key in ("uniform", "own", "fitted", "chosen"):
            assert named.validation.losses[key] == pytest.approx(plain.validation.losses[key])
        assert len(named.validation.losses) == len(plain.validation.losses)


def test_an_ensemble_takes_weights_and_scales(tmp_path):
    ensemble = PeftEnsembleModel(make(llama(), KINDS["ranks and scalings"], 0.4), NAMES)
    torch.manual_seed(0)
    tokens = torch.randint(3, 30, (9, 6)).tolist()
    rows = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in tokens]
    fit = ensemble.fit_weights({"x": rows}, own_adapters={"x": {"second": 1.0}})
    assert fit.tasks["x"].validation.losses.keys() >= {
        *("uniform", "own", "fitted", "chosen"),
        *(f"adapter {name}" for name in NAMES),
    }
    assert ensemble.scales == fit.scales
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    with torch.no_grad():
        ensemble.scales = {}
        plain = ensemble(**batch, task="x").logits
        ensemble.scales = {"x": 0.5}
        assert torch.allclose(ensemble(**batch, task="x").logits, plain / 2, atol=1e-5)
        ensemble.save_pretrained(tmp_path)
        ensemble.combination = "log_probs"
        assert torch.allclose(ensemble(**batch, task="x").logits, torch.log_softmax(plain / 2, -1), atol=1e-5)
        ensemble.combination = "weights"
        scaled = ensemble(**batch, task="x").logits
        ensemble.scales = {}
        assert torch.equal(ensemble(**batch, task="x").logits, scaled)
    loaded = PeftEnsembleModel.from_pretrained(tmp_path, base_model=llama())
    assert loaded.scales == {"x": 0.5}
    for bad, message in (
        ({"x": {"third": 0.5}}, "sum is 1"),
        ({"x": {"nobody": 1.0}}, "unknown adapters"),
        ({"x": {"first": 2.0, "second": -1.0}}, "shares"),
    ):
        with pytest.raises(EnsembleError, match=message):
            ensemble.fit_weights({"x": rows}, own_adapters=bad)
    for scale in (0.0, -1.0, float("nan"), "2", True):
        with pytest.raises(EnsembleError, match="scale of 'x' to be a finite number above 0"):
            PeftEnsembleModel(ensemble.model, NAMES, scales={"x": scale})
