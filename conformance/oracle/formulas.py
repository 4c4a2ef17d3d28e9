"""The layer and its vector-Jacobian product, derived by hand, in any arithmetic.

Each function returns its value and a pullback. The same text is evaluated in ball arithmetic (the
expected values) and in rounded arithmetic of several honest styles (the error bounds), so the arithmetic
``A`` is an argument: ``A.sum``, ``A.contract``, ``A.exp``, … do the sums and the elementary functions, and
``A.act``, ``A.mix``, ``A.store``, ``A.weight`` are the places where a contract rounds (mathematics.md,
"Precision"); in ball arithmetic they return their argument.

Shapes: T tokens, n streams, C dim. ``x`` is ``[T, n, C]``; projections are flat, ``[n*C, m]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conformance.stages import PROJECTIONS

Array = Any
Parameters = Mapping[str, Any]


def normalise_and_project(x: Array, scale: Array | None, phi: Mapping[str, Array], p: Parameters, A: Any):
    """RMS norm over (streams, dim), then the projections.

    Returns:
        ``h``, one ``[T, m]`` per projection, and a pullback that maps their cotangents to (the parts of
        x's gradient ``[T, n, C]``, the norm weight's, the projections').
    """
    tokens, width = x.shape[0], x.shape[1] * x.shape[2]
    flat = x.reshape(tokens, width)
    mean = A.sum(flat * flat, -1)[:, None] / A.constant(width)
    eps = A.constant(p["norm_eps"])
    if p["norm_eps_position"] == "mean":
        rms = A.sqrt(mean + eps)
        slope = rms
    else:
        root = A.sqrt(mean)
        rms = root + eps
        # At an all-zero token the norm is linear: x / eps. The root's slope does not enter.
        slope = np.where(A.is_zero(mean), A.constant(1), root)

    def divide(a):
        return a * (A.constant(1) / rms) if A.style.reciprocal else a / rms

    def norm_part(dot):
        """The gradient through the root mean square: ``dot`` is the cotangent of log(1/rms)."""
        return -(flat * dot / (A.constant(width) * rms * slope)).reshape(x.shape)

    if A.style.norm_after:
        folded = {k: m if scale is None else scale[:, None] * m for k, m in phi.items()}
        h = {k: divide(A.contract(flat, m, projection=True)) for k, m in folded.items()}

        def pullback(cotangents):
            parts, g_phi, g_scale = [], {}, None
            dot = A.constant(0) * rms
            for k, g in cotangents.items():
                g_h = divide(g)
                parts.append(A.contract(g_h, folded[k].T, projection=True).reshape(x.shape))
                g_folded = A.contract(flat.T, g_h, projection=True)
                g_phi[k] = g_folded if scale is None else g_folded * scale[:, None]
                if scale is not None:
                    term = A.sum(g_folded * phi[k], -1)
                    g_scale = term if g_scale is None else g_scale + term
                dot = dot + A.sum(g * h[k], -1)[:, None]
            parts.append(norm_part(dot))
            return parts, g_scale, g_phi

        return h, pullback

    unit = divide(flat)
    normed = A.act(unit if scale is None else unit * scale)
    h = {k: A.act(A.contract(normed, m, projection=True)) for k, m in phi.items()}

    def pullback(cotangents):
        parts, g_phi, g_normed = [], {}, None
        for k, g in cotangents.items():
            g_h = A.act(g)
            g_phi[k] = A.weight(A.contract(normed.T, g_h, projection=True))
            part = A.act(A.contract(g_h, phi[k].T, projection=True))
            g_normed = part if g_normed is None else g_normed + part
            parts.append(divide(part if scale is None else part * scale).reshape(x.shape))
        g_normed = A.act(g_normed)
        g_scale = None if scale is None else A.weight(A.sum((unit * g_normed).T, -1))
        dot = A.sum(unit * (g_normed if scale is None else g_normed * scale), -1)[:, None]
        parts.append(norm_part(dot))
        return parts, g_scale, g_phi

    return h, pullback


def gate(z: Array, slope: Any, offset: Any, A: Any):
    """``slope * sigmoid(z) + offset`` and its pullback."""
    s = A.sigmoid(z)
    return slope * s + offset, lambda g: g * slope * s * (A.constant(1) - s)


def softmax(logits: Array, axis: int, A: Any):
    """Softmax along ``axis``, shifted by the maximum; returns (value, its pullback)."""
    shifted = logits - A.maximum_along(logits, axis)
    e = A.exp(shifted)
    total = np.expand_dims(A.sum(e, axis), axis)
    q = A.exp(shifted - A.log(total)) if A.style.log_domain else e / total

    def pullback(g):
        if logits.shape[axis] == 1:  # one entry is always 1, exactly: no ball around 0
            return g * A.constant(0)
        return q * (g - np.expand_dims(A.sum(q * g, axis), axis))

    return q, pullback


def sinkhorn(logits: Array, p: Parameters, A: Any):
    """The N iterations as written (mathematics.md, "The residual matrix"), ``[T, n, n]``."""
    first, second = (-1, -2) if p["order"] == "rows-first" else (-2, -1)
    passes = [second] + [first, second] * (p["iterations"] - 1)
    eps, add, clip = A.constant(p["eps"]), p["guard"] == "add", p["guard"] == "clip"
    q, softmax_pullback = softmax(logits, first, A)
    start = q + eps if add else q

    def guarded(total):
        """The denominator and whether it depends on the sum."""
        if add:
            return total + eps, None
        if clip:
            return A.at_least(total, eps)
        return total, None

    steps: list[tuple[int, Array, Array, Array | None]] = []
    if A.style.log_domain:
        level = A.log(start) if add else A.log_softmax(logits, first)
        for axis in passes:
            denominator, active = guarded(A.sum_exp(level, axis))
            level = level - A.log(denominator)
            steps.append((axis, level, denominator, active))
        value = A.exp(level)

        def pullback(g):
            g = g * value
            for axis, after, _, active in reversed(steps):
                total = np.expand_dims(A.sum(g, axis), axis) * A.exp(after)
                g = g - (total if active is None else np.where(active, total, A.constant(0)))
            # log(q + eps) where eps is added; plain log-softmax otherwise
            return softmax_pullback(g / start) if add else g - q * np.expand_dims(A.sum(g, first), first)

        return value, pullback

    value = start
    for axis in passes:
        denominator, active = guarded(np.expand_dims(A.sum(value, axis), axis))
        value = value * (A.constant(1) / denominator) if A.style.reciprocal else value / denominator
        steps.append((axis, value, denominator, active))

    def pullback(g):
        for axis, after, denominator, active in reversed(steps):
            total = np.expand_dims(A.sum(g * after, axis), axis)
            g = (g - (total if active is None else np.where(active, total, A.constant(0)))) / denominator
        return softmax_pullback(g)

    return value, pullback


def permutations(logits: Array, streams: int, A: Any):
    """mHC-lite: a softmax over the n! permutation matrices, ``P[i, p(i)] = 1``."""
    table = list(itertools.permutations(range(streams)))
    q, softmax_pullback = softmax(logits, -1, A)
    value = np.empty((logits.shape[0], streams, streams), dtype=logits.dtype)
    for i, j in itertools.product(range(streams), repeat=2):
        value[:, i, j] = A.sum(q[:, [k for k, order in enumerate(table) if order[i] == j]], -1)

    def pullback(g):
        g_q = np.empty_like(q)
        for k, order in enumerate(table):
            g_q[:, k] = A.sum(np.stack([g[:, i, order[i]] for i in range(streams)], -1), -1)
        return softmax_pullback(g_q)

    return value, pullback


def residual_matrix(logits: Array, p: Parameters, A: Any):
    """H ``[T, n, n]`` from its logits ``[T, n, n]`` (``[T, n!]`` for permutations)."""
    return permutations(logits, p["streams"], A) if p["residual"] == "permutations" else sinkhorn(logits, p, A)


def coefficients(x: Array, weights: Mapping[str, Array], p: Parameters, A: Any):
    """pre ``[T, n]``, post ``[T, n]``, H ``[T, n, n]`` before their last rounding.

    The pullback maps cotangents ``{"pre", "post", "H"}`` (any of them absent) to (parts of x's gradient,
    gradients of the weights).
    """
    tokens, n = x.shape[:2]
    kinds = [k for k in PROJECTIONS if f"{k}_alpha" in weights]
    phi = {k: weights[f"{k}_alpha"] for k in kinds}
    h, projection_pullback = normalise_and_project(x, weights.get("mhc_norm.scale"), phi, p, A)
    values: dict[str, Array] = {}
    pullbacks: dict[str, Callable] = {}
    for k in kinds:
        shift = weights[f"{k}_beta"].reshape(-1)
        scaled = weights[f"{k}_alpha_scale"] * h[k]
        z = A.logits(A.logits(scaled) + shift)
        if k == "res":
            shape = z.shape if p["residual"] == "permutations" else (tokens, n, n)
            values["H"], matrix_pullback = residual_matrix(z.reshape(shape), p, A)
            pullbacks[k] = lambda g, f=matrix_pullback, shape=z.shape: f(g).reshape(shape)
        else:
            slope, offset = (1, p["pre_eps"]) if k == "pre" else (p["post_scale"], p["post_eps"])
            values[k], pullbacks[k] = gate(z, A.constant(slope), A.constant(offset), A)
    if "H" not in values:
        values["H"] = np.broadcast_to(A.array(np.eye(n)), (tokens, n, n))

    def pullback(cotangents):
        g_h, gradients = {}, {}
        for k in kinds:
            g = cotangents.get("H" if k == "res" else k)
            if g is None:
                continue
            g_z = A.logits(pullbacks[k](A.act(g)))
            g_h[k] = weights[f"{k}_alpha_scale"] * g_z
            gradients[f"{k}_alpha_scale"] = A.weight(A.sum(A.gate_product(g_z * h[k]).reshape(1, -1), -1))
            gradients[f"{k}_beta"] = A.weight(A.sum(g_z.T, -1).reshape(weights[f"{k}_beta"].shape))
        parts, g_scale, g_phi = projection_pullback(g_h)
        if g_scale is not None:
            gradients["mhc_norm.scale"] = g_scale
        gradients.update({f"{k}_alpha": g for k, g in g_phi.items()})
        return parts, gradients

    return values, pullback


def pre_mix(x: Array, pre: Array, A: Any):
    """u ``[T, C]``: the gated sum of the streams, before its rounding."""
    value = A.sum(pre[:, :, None] * x, 1)

    def pullback(g):
        return pre[:, :, None] * g[:, None, :], A.sum(x * g[:, None, :], -1)

    return value, pullback


def post_mix(y: Array, x: Array, post: Array, H: Array, p: Parameters, A: Any):
    """out ``[T, n, C]`` before its last rounding; the pullback gives cotangents of y (and of its parts), x, post, H."""
    by_input = {"in-out": "tij->tij", "out-in": "tij->tji"}
    post, H = A.mix(post), A.mix(H)
    identity = p["mix"] == "identity"
    weight = None if identity else np.einsum(by_input[p["mix"]], H)  # [T, input, output]
    own = post[:, :, None] * y[:, None, :]
    if A.mixes:
        mixed = x if weight is None else A.sum(weight[..., None] * x[:, :, None, :], 1)
        value = A.mix(own) + A.mix(mixed)
    elif weight is None:
        value = own + x
    else:
        terms = [own, *(weight[:, i, :, None] * x[:, i, None, :] for i in range(x.shape[1]))]
        value = A.sum(np.stack(terms, 0), 0)

    def pullback(g):
        y_parts = A.product(post[:, :, None] * g)
        g_post = A.mix(A.sum(A.product(y[:, None, :] * g), -1))
        if weight is None:
            return y_parts, g, g_post, None
        g_x = A.sum(weight[..., None] * g[:, None, :, :], 2)
        g_weight = A.mix(A.sum(x[:, :, None, :] * g[:, None, :, :], -1))
        return y_parts, g_x, g_post, np.einsum(by_input[p["mix"]], g_weight)

    return value, pullback


def layer(x: Array, weights: Mapping[str, Array], branch: Array, p: Parameters, A: Any):
    """One layer whose sub-layer multiplies by ``branch [C]`` (powers of two: no rounding of its own)."""
    values, coefficients_pullback = coefficients(x, weights, p, A)
    pre, post, H = A.act(values["pre"]), A.act(values["post"]), A.act(values["H"])
    u, pre_pullback = pre_mix(x, pre, A)
    y = A.store(u) * branch
    out, post_pullback = post_mix(y, x, post, H, p, A)

    def pullback(g):
        y_parts, mixed_part, g_post, g_H = post_pullback(g)
        g_u = A.store(A.sum(y_parts, 1)) * branch
        pre_part, g_pre = pre_pullback(g_u)
        cotangents = {"pre": g_pre, "post": g_post, **({} if g_H is None else {"H": g_H})}
        parts, gradients = coefficients_pullback(cotangents)
        return [mixed_part, pre_part, *parts], gradients

    return out, pullback


def head(x: Array, weights: Mapping[str, Array], p: Parameters, A: Any):
    """The learned reduction: gates from one projection, then the gated sum of the streams."""
    h, projection_pullback = normalise_and_project(x, None, {"head": weights["head_fn"]}, p, A)
    z = A.logits(A.logits(weights["head_scale"] * h["head"]) + weights["head_base"])
    gates, gate_pullback = gate(z, A.constant(1), A.constant(p["pre_eps"]), A)
    out, mix_pullback = pre_mix(x, A.act(gates), A)

    def pullback(g):
        direct, g_gates = mix_pullback(g)
        g_z = A.logits(gate_pullback(A.act(g_gates)))
        parts, _, g_phi = projection_pullback({"head": weights["head_scale"] * g_z})
        return [direct, *parts], {
            "head_fn": g_phi["head"],
            "head_scale": A.weight(A.sum(A.gate_product(g_z * h["head"]).reshape(1, -1), -1)),
            "head_base": A.weight(A.sum(g_z.T, -1)),
        }

    return out, pullback


def reduce(x: Array, how: str, A: Any):
    """Sum or mean over the streams."""
    n = x.shape[1]
    share = A.constant(1) / A.constant(n) if how == "mean" else A.constant(1)
    total = A.sum(x, 1)
    value = total / A.constant(n) if how == "mean" else total
    return value, lambda g: np.repeat((g * share)[:, None, :], n, axis=1)


def expand(embedding: Array, streams: int, A: Any):
    """One stream repeated; the pullback gives the parts ``[T, n, C]`` of the embedding's gradient."""
    return np.repeat(embedding[:, None, :], streams, axis=1), lambda g: g


def stack(embedding: Array, weights: Mapping[str, Array], branch: Array, p: Parameters, how: str, A: Any):
    """expand, one layer per leading index of the weights, reduce; x is stored between layers."""
    x, _ = expand(embedding, p["streams"], A)
    depth = next(iter(weights.values())).shape[0]
    pullbacks = []
    for index in range(depth):
        x, pullback = layer(x, {k: w[index] for k, w in weights.items()}, branch, p, A)
        pullbacks.append(pullback)
        if index + 1 < depth or how != "none":
            x = A.store(x)
    out, reduce_pullback = (x, lambda g: g) if how == "none" else reduce(x, how, A)

    def pullback(g):
        g = A.store(reduce_pullback(g))
        gradients = []
        for layer_pullback in reversed(pullbacks):
            parts, gradient = layer_pullback(g)
            g = A.store(A.add_parts(parts))
            gradients.append(gradient)
        stacked = {k: np.stack([gradient[k] for gradient in reversed(gradients)]) for k in gradients[0]}
        return g, stacked

    return out, pullback
