"""The layer in float64 NumPy, written from mathematics.md alone: the tests of this folder compare with it.

`jax_impl` and `torch_impl` each have this file, the same to the byte, since each folder is tested and installable
without the other (architecture.md, rule 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]  # in the shapes that the modules hold


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def sinkhorn(logits: Array, config: Any) -> Array:
    """H ``[..., n, n]`` of mathematics.md, "The residual matrix"."""
    axes = {"rows": -1, "columns": -2}
    first, second = (-1, -2) if config.order == "rows-first" else (-2, -1)
    if config.logit_limit is not None:
        logits = np.clip(logits, -config.logit_limit, config.logit_limit)
    along = axes.get(config.softmax, first)
    p = np.exp(logits - logits.max(along, keepdims=True))
    passes = [first, second] * config.iterations
    if config.softmax != "none":
        p = p / p.sum(along, keepdims=True)
        passes = passes[1:] if along == first else passes
    if config.guard == "add":
        p = p + config.eps
    for axis in passes:
        total = p.sum(axis, keepdims=True)
        if config.guard == "clip":
            total = np.maximum(total, config.eps)
        elif config.guard != "none":
            total = total + config.eps
        p = p / total
    return p


def residual_matrix(logits: Array, config: Any) -> Array:
    """H ``[..., n, n]`` from the logits ``[..., m]`` of all its numbers."""
    n = config.streams
    if config.residual == "sinkhorn":
        return sinkhorn(logits.reshape(*logits.shape[:-1], n, n), config)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share = share / share.sum(-1, keepdims=True)
    matrices = np.array([np.eye(n)[list(order)] for order in itertools.permutations(range(n))])
    return np.einsum("...p,pij->...ij", share, matrices)


def projected(x: Array, weights: Weights, name: str, config: Any, eps: float) -> Array:
    """The normed streams times one projection, ``[..., m]``."""
    flat = x.reshape(*x.shape[:-2], -1)  # [..., n*C]
    mean = (flat**2).mean(-1, keepdims=True)
    normed = flat / (np.sqrt(mean + eps) if config.norm_eps_position == "mean" else np.sqrt(mean) + eps)
    if "mhc_norm.scale" in weights:
        normed = normed * weights["mhc_norm.scale"].reshape(-1)
    return normed @ weights[name].reshape(flat.shape[-1], -1)


def coefficients(x: Array, weights: Weights, config: Any) -> tuple[Array, Array, Array]:
    """pre, post and H of every token."""

    def logits(kind: str) -> Array:
        h = projected(x, weights, f"{kind}_alpha", config, config.norm_eps)
        return weights[f"{kind}_alpha_scale"] * h + weights[f"{kind}_beta"].reshape(-1)

    pre = sigmoid(logits("pre")) + config.pre_eps
    post = config.post_scale * sigmoid(logits("post")) + config.post_eps
    if config.residual == "identity":
        return pre, post, np.broadcast_to(np.eye(config.streams), (*x.shape[:-1], config.streams))
    return pre, post, residual_matrix(logits("res"), config)


def site(
    x: Array, weights: Weights, config: Any, branch: Callable[[Array], Array], carried: Array | None = None
) -> tuple[Array, Array]:
    """The streams after one site, and its own pre, which a single-pass site hands on."""
    pre, post, H = coefficients(x, weights, config)
    reads = pre if carried is None or config.pre_from == "own" else carried
    y = branch((reads[..., None] * x).sum(-2))
    weight = np.swapaxes(H, -1, -2) if config.mix == "in-out" else H  # [..., output, input]
    return post[..., None] * y[..., None, :] + weight @ x, pre


def head(x: Array, weights: Weights, config: Any) -> Array:
    """The learned reduction, whose norm has an eps of its own where the configuration says so."""
    eps = config.norm_eps if config.head_norm_eps is None else config.head_norm_eps
    z = projected(x, weights, "head_fn", config, eps) * weights["head_scale"] + weights["head_base"]
    return ((sigmoid(z) + config.pre_eps)[..., None] * x).sum(-2)


def one_hot(x: Array) -> Array:
    """What the first site of a single-pass stack reads with."""
    carried = np.zeros(x.shape[:-1])
    carried[..., 0] = 1
    return carried


def attention(u: Array) -> Array:
    """A branch that mixes tokens ``[batch, seq, dim]``, as attention does."""
    return np.tanh(u) + u.mean(1, keepdims=True)


def chain(x: Array, sites: Sequence[Weights], config: Any) -> Array:
    """A single-pass stack: attention, dense MLP and mixture of experts in turn, collapsed with the last pre."""
    branches = (attention, np.sin, lambda u: u * u)
    carried = one_hot(x)
    for index, weights in enumerate(sites):
        x, carried = site(x, weights, config, branches[index % 3], carried)
    return (carried[..., None] * x).sum(-2)
