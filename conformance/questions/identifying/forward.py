"""The forward layer in float64, with the mistakes that people make in it.

Every step obeys the parameters of a dialect and those of `STRUCTURE`, whose defaults are the layer as it should be.
The oracle's formulas have no place for a mistake, and evaluate the gradients with every value; this is the value alone,
in plain NumPy. A test holds it to the true values of the corpus.

Arrays may be complex: an imaginary part of 1e-30 is a tangent, which each step carries along exactly (`derivatives`).
What a mistaken backward pass takes for a constant loses its imaginary part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conformance.oracle.residual import AXES, axes, passes
from conformance.stages import PROJECTIONS

Array = np.ndarray
Arrays = Mapping[str, np.ndarray]
Parameters = Mapping[str, Any]

STRUCTURE: dict[str, Any] = {
    "norm_over": "token",  # or "stream", "nothing"
    "norm_scale": "w",  # or "1 + w"
    "flattening": "streams, dim",  # or "dim, streams"
    "alpha": "once",  # or "on the bias too", "on the layer's bias too", "never"
    "bias": "added",  # or "never", "transposed"
    "slices": "pre, post",  # or "post, pre" of h, or of "all weights"
    "post_gate": "sigmoid",  # or "1"
    "start": "softmax",  # or "other axis": along the other axis, with the passes of the right one
    "passes": "as written",  # or "one more", "one less"
    "logits": "[i, j]",  # or "[j, i]"
    "H": "[i, j]",  # or "[j, i]", "identity"
    "mixed_by": "H",  # or "identity", "identity in a layer"
    "gated_by": "post",  # or "1", "1 in a layer"
    "reads": "pre",  # or "sum", "mean" of the streams
    "reads_alone": "own",  # or "stream 0": what a single pass reads with where nothing was carried to it
    "first_carried": "stream 0",  # or "all streams"
    "reduces": "as told",  # or "sum", "mean", "other", "carried"
    "head_eps": None,  # or what is added to the head's gates, where it isn't pre_eps
    "backward": "whole",  # or one of `derivatives.MISTAKES`, which leave the values as they are
}
"""What a layer does beside the parameters of its dialect."""


def kept(value: Array, p: Parameters, mistake: str) -> Array:
    """The value, as a constant where the backward pass has this mistake."""
    return np.real(value) if p["backward"] == mistake else value


def evaluate(stage: str, values: Arrays, p: Parameters, options: Mapping[str, Any]) -> dict[str, Array]:
    """The outputs of one stage.

    Args:
        given: inputs and weights in float64, under their names, weights flat.
        p: the parameters of a dialect with streams and dim, and all of `STRUCTURE`.
        options: the stage's.
    """
    with np.errstate(all="ignore"):
        return _STAGES[stage](values, p, options)


# Norm and projection


def normalise(x: Array, w: Array | None, p: Parameters) -> Array:
    """``[..., n, C]`` to ``[..., n*C]``."""
    if p["norm_over"] != "nothing":
        over = (-1,) if p["norm_over"] == "stream" else (-2, -1)
        mean = np.mean(x * x, axis=over, keepdims=True)
        inside = p["norm_eps_position"] == "mean"
        rms = np.sqrt(mean + p["norm_eps"]) if inside else np.sqrt(mean) + p["norm_eps"]
        x = x / kept(rms, p, "constant norm")
    if p["flattening"] == "dim, streams":
        x = np.swapaxes(x, -1, -2)  # [..., C, n]
    flat = x.reshape(*x.shape[:-2], -1)  # [..., n*C]
    if w is None or not p["norm_weight"]:
        return flat
    return flat * (1 + w if p["norm_scale"] == "1 + w" else w)


def sigmoid(z: Array) -> Array:
    open_, e = np.real(z) >= 0, np.exp(np.where(np.real(z) >= 0, -z, z))
    return np.where(open_, 1, e) / (1 + e)


def logits(kind: str, normed: Array, weights: Arrays, p: Parameters) -> Array:
    """``α h + b`` of one projection, ``[..., m]``."""
    other = {"pre": "post", "post": "pre", "res": "res"}[kind]
    own = other if p["slices"] == "all weights" else kind
    phi = weights[f"{kind if p['slices'] == 'pre, post' else other}_alpha"]
    h = normed @ phi
    if p["backward"] == "folded w" and "mhc_norm.scale" in weights:
        h = normed @ np.real(phi) + 1j * (np.real(normed) / np.real(weights["mhc_norm.scale"]) @ np.imag(phi))
    scale, bias = weights[f"{own}_alpha_scale"], weights[f"{own}_beta"]
    bias = (bias.T if p["bias"] == "transposed" else bias).reshape(-1)
    bias = scale * bias if p["alpha"] in ("on the bias too", "on the layer's bias too") else bias
    return (h if p["alpha"] == "never" else scale * h) + (0 if p["bias"] == "never" else bias)


def coefficients(x: Array, weights: Arrays, p: Parameters) -> dict[str, Array]:
    """pre ``[..., n]``, post ``[..., n]`` and H ``[..., n, n]``."""
    n = x.shape[-2]
    normed = normalise(kept(x, p, "x constant in the gates"), weights.get("mhc_norm.scale"), p)
    z = {k: logits(k, normed, weights, p) for k in PROJECTIONS if f"{k}_alpha" in weights}
    post = np.ones_like(z["post"]) if p["post_gate"] == "1" else p["post_scale"] * sigmoid(z["post"]) + p["post_eps"]
    pre = sigmoid(z["pre"]) + p["pre_eps"]
    gates = {"pre": kept(pre, p, "constant pre"), "post": kept(post, p, "constant post")}
    if "res" not in z:
        return {**gates, "H": np.broadcast_to(np.eye(n), (*x.shape[:-2], n, n))}
    shape = z["res"].shape if p["residual"] == "permutations" else (*x.shape[:-2], n, n)
    return {**gates, "H": matrix(z["res"].reshape(shape), p)}


# The residual matrix


def matrix(z: Array, p: Parameters) -> Array:
    """H ``[..., n, n]`` of its logits ``[..., n, n]`` (``[..., n!]`` for permutations)."""
    if p["H"] == "identity":
        n = p["streams"]
        lead = z.shape[: -1 if p["residual"] == "permutations" else -2]
        return np.broadcast_to(np.eye(n), (*lead, n, n))
    if p["residual"] == "permutations":
        H = _permutations(z, p["streams"])
    else:
        H = _sinkhorn(np.swapaxes(z, -1, -2) if p["logits"] == "[j, i]" else z, p)
    H = kept(H, p, "constant H")
    return np.swapaxes(H, -1, -2) if p["H"] == "[j, i]" else H


def _shifted(z: Array, axis: int) -> Array:
    return z - np.take_along_axis(z, np.argmax(np.real(z), axis, keepdims=True), axis)


def _softmax(z: Array, axis: int) -> Array:
    e = np.exp(_shifted(z, axis))
    return e / e.sum(axis, keepdims=True)


def _permutations(z: Array, n: int) -> Array:
    tables = np.eye(n)[list(itertools.permutations(range(n)))]  # [n!, n, n]
    return np.tensordot(_softmax(z, -1), tables, 1)


def _sinkhorn(z: Array, p: Parameters) -> Array:
    guard, eps = p["guard"], p["eps"]
    if p["logit_limit"] is not None:
        z = np.where(np.abs(np.real(z)) < p["logit_limit"], z, np.clip(np.real(z), -p["logit_limit"], p["logit_limit"]))
    if p["softmax"] == "none":
        P = np.exp(_shifted(z, axes(p)[0]))
    else:
        axis = AXES[p["softmax"]]
        P = _softmax(z, -3 - axis if p["start"] == "other axis" else axis)
        P = P + eps if guard in ("add", "softmax alone") else P
    start, every = P, _passes(p)
    for number, axis in enumerate(every):
        if p["backward"] == "last iteration" and number == len(every) - 2:
            P = np.real(P) + 1j * np.imag(start)
        total = P.sum(axis, keepdims=True)
        if guard in ("add", "denominator"):
            total = total + eps
        P = P / (np.where(np.real(total) > eps, total, eps) if guard == "clip" else total)
    return _converged(P, z) if p["backward"] == "limit" else P


def _converged(P: Array, z: Array) -> Array:
    """P with the tangent that the limit of infinitely many iterations has (the implicit function theorem)."""
    H, tangent = np.real(P), np.real(P) * np.imag(z)
    rows, columns = (np.eye(H.shape[-1]) * H.sum(axis)[..., None] for axis in (-1, -2))
    system = np.block([[rows, H], [np.swapaxes(H, -1, -2), columns]])  # [..., 2n, 2n]
    sums = np.concatenate([tangent.sum(-1), tangent.sum(-2)], -1)[..., None]
    u, v = np.split((np.linalg.pinv(system, hermitian=True) @ sums)[..., 0], 2, -1)
    return H + 1j * (tangent - H * (u[..., :, None] + v[..., None, :]))


def _passes(p: Parameters) -> list[int]:
    """The axes of the passes after the start."""
    written, first = passes(p), axes(p)[0]
    return {
        "as written": written,
        "one more": [*written, first],
        "one less": written[:-1],
    }[p["passes"]]


# The layer


def read(x: Array, own: Array, carried: Array | None, p: Parameters) -> Array:
    """u ``[..., C]``: the streams, weighed by the site's own pre or by the one that was carried to it."""
    if p["reads"] != "pre":
        return np.mean(x, -2) if p["reads"] == "mean" else np.sum(x, -2)
    gates = own
    if p["pre_from"] == "previous":
        gates = carried if carried is not None else one_hot(x) if p["reads_alone"] == "stream 0" else own
        gates = kept(gates, p, "constant carried")
    return np.sum(gates[..., None] * kept(x, p, "x constant in the reading"), -2)


def one_hot(x: Array) -> Array:
    """``[..., n]``: 1 for stream 0."""
    return np.broadcast_to(np.eye(x.shape[-2])[0], x.shape[:-1])


def mix(y: Array, x: Array, post: Array, H: Array, p: Parameters) -> Array:
    """out ``[..., n, C]``."""
    gated = kept(y, p, "constant y")[..., None, :] * (1 if p["gated_by"] == "1" else post[..., None])
    x = kept(x, p, "x constant in the mixing")
    if p["mix"] == "identity" or p["mixed_by"] == "identity":
        return gated + x
    by_output = np.swapaxes(H, -1, -2) if p["mix"] == "in-out" else H  # [..., output, input]
    if p["backward"] == "H untransposed":
        return gated + by_output @ np.real(x) + 1j * (np.real(np.swapaxes(by_output, -1, -2)) @ np.imag(x))
    return gated + by_output @ x


def layer(x: Array, weights: Arrays, carried: Array | None, p: Parameters) -> tuple[Array, Array]:
    """out ``[..., n, C]`` of the test's own sub-layer, and the site's pre ``[..., n]``."""
    made = coefficients(x, weights, p)
    y = read(x, made["pre"], carried, p) * (weights["norm_scale"] * weights["branch_scale"])
    whole = {k: p[k].removesuffix(" in a layer") for k in ("mixed_by", "gated_by")}
    return mix(y, x, made["post"], made["H"], {**p, **whole}), made["pre"]


def reduce(x: Array, how: str, carried: Array | None, p: Parameters) -> Array:
    """``[..., C]`` of ``[..., n, C]``; x itself for how = "none"."""
    if how == "none":
        return x
    wanted = {"as told": how, "other": {"sum": "mean", "mean": "sum"}.get(how, how)}.get(p["reduces"], p["reduces"])
    if wanted == "carried" and carried is not None:
        return np.sum(carried[..., None] * x, -2)
    return np.mean(x, -2) if wanted == "mean" else np.sum(x, -2)


def _layer(values: Arrays, p: Parameters, options: Mapping[str, Any]) -> dict[str, Array]:
    out, own = layer(values["x"], values, values.get("carried"), p)
    return {"out": out, "pre": own}


def _stack(values: Arrays, p: Parameters, options: Mapping[str, Any]) -> dict[str, Array]:
    embedding, shared = values["embedding"], ("embedding", "norm_scale", "branch_scale")
    x = np.repeat(embedding[..., None, :], p["streams"], -2)  # [..., n, C]
    carried = np.ones(x.shape[:-1]) if p["first_carried"] == "all streams" else one_hot(x)
    for index in range(options["layers"]):
        weights = {k: v if k in shared else v[index] for k, v in values.items()}
        x, carried = layer(x, weights, carried, p)
    return {"out": reduce(x, options["reduce"], carried, p)}


def _head(values: Arrays, p: Parameters, options: Mapping[str, Any]) -> dict[str, Array]:
    x = values["x"]
    eps = p["norm_eps"] if p["head_norm_eps"] is None else p["head_norm_eps"]
    normed = normalise(x, None, {**p, "norm_eps": eps})
    scale, bias = values["head_scale"], values["head_base"]
    bias = scale * bias if p["alpha"] == "on the bias too" else bias
    gates = sigmoid(scale * (normed @ values["head_fn"]) + bias) + (
        p["pre_eps"] if p["head_eps"] is None else p["head_eps"]
    )
    return {"out": np.sum(gates[..., None] * x, -2)}


def _pre(values: Arrays, p: Parameters, options: Mapping[str, Any]) -> dict[str, Array]:
    own = coefficients(values["x"], {k: v for k, v in values.items() if not k.startswith("res_")}, p)["pre"]
    return {"u": read(values["x"], own, values.get("carried"), p), "pre": own}


_STAGES: dict[str, Callable[[Arrays, Parameters, Mapping[str, Any]], dict[str, Array]]] = {
    "residual_matrix": lambda values, p, _: {"H": matrix(values["logits"], p)},
    "coefficients": lambda values, p, _: coefficients(values["x"], values, p),
    "pre": _pre,
    "post": lambda values, p, _: {"out": mix(values["y"], values["x"], values["post"], values["H"], p)},
    "layer": _layer,
    "stack": _stack,
    "reduce": lambda values, p, options: {"out": reduce(values["x"], options["how"], values.get("carried"), p)},
    "head": _head,
}
STAGES = tuple(_STAGES)
