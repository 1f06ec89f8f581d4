"""The weight of a member that is added to an ensemble, and whether it gains."""

import numpy as np
import pytest
import torch

from hf_ensemble.ensemble.weighting.added_member import AddedAnswers, added_member


def answers(strength, rows=60, labels=4, seed=0, noise=1.0):
    """Logits at two answer tokens a row, and a change towards the right ones."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, labels - 1, (2 * rows,), generator=generator)
    logits = torch.randn(2 * rows, labels, generator=generator)
    change = noise * torch.randn(2 * rows, labels, generator=generator)
    change[torch.arange(2 * rows), targets] += strength
    # A label that no row may answer with.
    logits[:, -1] = float("-inf")
    return AddedAnswers(logits, change, targets, torch.arange(rows).repeat_interleave(2))


def test_the_weight_has_the_least_loss_and_the_loss_never_rises():
    for strength in (2.0, 0.3, 0.0, -1.0):
        own = [answers(strength), answers(strength, 30, seed=1)]
        found = added_member(own)
        losses = {w: np.mean([one.row_losses(w).mean() for one in own]) for w in np.linspace(0, 10, 201)}
        assert found.loss <= min(losses.values()) + 1e-6
        assert found.loss <= found.loss_before == pytest.approx(losses[0.0])


def test_row_losses_are_plain_cross_entropies():
    own = answers(1.0, rows=3)
    combined = own.logits + 0.7 * own.change
    expected = torch.nn.functional.cross_entropy(combined, own.targets, reduction="none").view(3, 2).mean(1)
    assert own.row_losses(0.7) == pytest.approx(expected.numpy(), abs=1e-6)


def test_what_helps_is_kept_and_noise_is_not():
    assert added_member([answers(1.0)]).is_gain
    assert not added_member([answers(-1.0)]).is_gain
    # A search on the same rows would find a weight above 0 for half of all random changes, and count it as a gain.
    kept = [added_member([answers(0.0, seed=seed)]).is_gain for seed in range(40)]
    searched = [added_member([answers(0.0, seed=seed)]).weight > 0 for seed in range(40)]
    assert sum(kept) <= 6 < sum(searched)


def test_single_rows_have_no_standard_error():
    found = added_member([answers(2.0, rows=1)])
    assert found.standard_error is None and not found.is_gain
