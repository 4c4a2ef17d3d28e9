"""The mHC layer on one page of NumPy: every dialect, forward only, no rounding but that of the arrays' own dtype.

    u, context = pre(x, weights, p)     x [..., n, C] -> u [..., C]
    y = branch(norm(u))                 the sub-layer that is wrapped
    x = post(y, x, context, p)          [..., n, C]

``p`` is a row of fixtures/dialects.json with ``streams`` (n) and ``dim`` (C), weights are flat as in fixtures/README.md
(points 11 and 24 to 33), and docs/mathematics.md explains both.
"""

import itertools

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z, axis):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def residual_matrix(logits, p):  # [..., n, n]; permutations: [..., n!]
    if p["residual"] == "permutations":
        order = list(itertools.permutations(range(p["streams"])))
        matrices = np.eye(p["streams"])[order]  # [n!, n, n], P[i, p(i)] = 1
        return np.einsum("...p,pij->...ij", softmax(logits, -1), matrices)  # [..., n, n]
    axes = {"rows": -1, "columns": -2, "none": None}
    first, second = (-1, -2) if p["order"] == "rows-first" else (-2, -1)
    if p["logit_limit"] is not None:
        logits = np.clip(logits, -p["logit_limit"], p["logit_limit"])
    start = axes[p["softmax"]]
    H = np.exp(logits - logits.max(first, keepdims=True)) if start is None else softmax(logits, start)
    H = H + p["eps"] if p["guard"] == "add" else H
    passes = [first, second] * p["iterations"]
    for axis in passes[1:] if start == first else passes:
        total = H.sum(axis, keepdims=True)  # [..., n, 1] or [..., 1, n]
        H = H / (np.maximum(total, p["eps"]) if p["guard"] == "clip" else total + p["eps"])
    return H


def normed(x, eps, position):  # [..., n, C] -> [..., n*C]
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    mean = (flat**2).mean(-1, keepdims=True)  # [..., 1]
    return flat / (np.sqrt(mean + eps) if position == "mean" else np.sqrt(mean) + eps)


def coefficients(x, weights, p):  # -> pre [..., n], post [..., n], H [..., n, n]
    n = p["streams"]
    flat = normed(x, p["norm_eps"], p["norm_eps_position"]) * weights.get("mhc_norm.scale", 1)
    z = {
        k: weights[f"{k}_alpha_scale"] * (flat @ weights[f"{k}_alpha"]) + weights[f"{k}_beta"].reshape(-1)  # [..., m]
        for k in ("pre", "post", "res")
        if f"{k}_alpha" in weights
    }
    gates = sigmoid(z["pre"]) + p["pre_eps"], p["post_scale"] * sigmoid(z["post"]) + p["post_eps"]
    if p["residual"] == "identity":
        return *gates, np.broadcast_to(np.eye(n), (*x.shape[:-2], n, n))
    shape = z["res"].shape if p["residual"] == "permutations" else (*x.shape[:-2], n, n)
    return *gates, residual_matrix(z["res"].reshape(shape), p)


def mix(gates, x):  # [..., n], [..., n, C] -> [..., C]
    return np.einsum("...i,...ic->...c", gates, x)


def pre(x, weights, p, carried=None):  # a single-pass site reads with the pre of the site before
    context = coefficients(x, weights, p)
    return mix(context[0] if p["pre_from"] == "own" else carried, x), context


def post(y, x, context, p):  # y [..., C], x [..., n, C] -> [..., n, C]
    _, gates, H = context
    pattern = "...ji,...ic->...jc" if p["mix"] == "out-in" else "...ij,...ic->...jc"
    mixed = x if p["mix"] == "identity" else np.einsum(pattern, H, x)  # [..., n, C]
    return gates[..., None] * y[..., None, :] + mixed


def head(x, weights, p):  # the learned reduction: [..., n, C] -> [..., C]
    eps = p["norm_eps"] if p["head_norm_eps"] is None else p["head_norm_eps"]
    h = normed(x, eps, p["norm_eps_position"]) @ weights["head_fn"]  # [..., n]
    return mix(sigmoid(weights["head_scale"] * h + weights["head_base"]) + p["pre_eps"], x)


def expand(embedding, streams):  # [..., C] -> [..., n, C]
    return np.repeat(embedding[..., None, :], streams, axis=-2)


def reduce(x, how, carried=None):  # [..., n, C] -> [..., C]
    return mix(carried, x) if how == "carried" else x.mean(-2) if how == "mean" else x.sum(-2)
