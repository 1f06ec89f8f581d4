"""Slow and plain: one backward pass per example, one solver call per subset."""

import numpy as np
import torch
from scipy.optimize import minimize


def margins(logits, labels, kind="geometric_mean"):
    """Margins by a loop over examples, logits (B, T, V) not shifted or (B, C)."""
    out = []
    for row, label in zip(logits, labels):
        if row.dim() == 1:
            log_probs = torch.log_softmax(row.double(), -1)[label].reshape(1)
        else:
            kept = (label[1:] != -100).nonzero().squeeze(1)
            log_probs = torch.log_softmax(row[:-1].double(), -1)[kept, label[1:][kept]]
        if kind == "geometric_mean":
            log_probs = log_probs.mean().reshape(1)
        p = log_probs.exp()
        out.append((torch.log(p) - torch.log1p(-p)).mean())
    return torch.stack(out)


def other_entropies(logits, labels):
    """Entropy of all answers but the right one by a loop over examples and tokens, mean over each example's tokens."""
    out = []
    for row, label in zip(logits, labels):
        kept = [] if row.dim() == 1 else (label[1:] != -100).nonzero().squeeze(1).tolist()
        tokens = [(row[at], int(label[at + 1])) for at in kept] or [(row, int(label))]
        entropies = []
        for scores, right in tokens:
            others = torch.cat([scores[:right], scores[right + 1 :]]).double()
            entropies.append(torch.distributions.Categorical(logits=others[others.isfinite()]).entropy())
        out.append(torch.stack(entropies).mean())
    return torch.stack(out)


def per_example_gradients(model, margin_of_example, count):
    """(count, P): one forward and backward pass per example, alone in its batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(count):
        gradients = torch.autograd.grad(margin_of_example(i), parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def fit(features, margin, weights, l2):
    """Minimiser of sum_i weights_i log(1 + exp(-(m_i + x_i.w))) / sum(weights) + l2 |w|^2 in float64."""
    x, m = np.asarray(features, np.float64), np.asarray(margin, np.float64)
    a = np.asarray(weights, np.float64) / np.sum(weights)

    def objective(w):
        z = m + x @ w
        gradient = -x.T @ (a / (1 + np.exp(z))) + 2 * l2 * w
        return a @ np.logaddexp(0, -z) + l2 * w @ w, gradient

    options = {"maxiter": 20000, "maxcor": 50, "ftol": 1e-18, "gtol": 1e-11}
    return minimize(objective, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options).x
