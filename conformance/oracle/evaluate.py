"""One stage of one case, in any arithmetic: outputs, gradients and the magnitudes of gradients' parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.oracle import formulas

Tensors = dict[str, Any]


def evaluate(
    stage: str,
    tensors: Mapping[str, np.ndarray],
    cotangents: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    options: Mapping[str, Any],
    A: Any,
) -> Tensors:
    """Evaluates ``stage`` forward and backward.

    Args:
        tensors: inputs and weights under their names, weights flat, any float dtype.
        cotangents: one per output.
        A: the arithmetic (`balls.BallArithmetic`, `floats.FloatArithmetic`).

    Returns:
        ``<output>``, ``d/<input>`` and ``m/<input>`` (sums of magnitudes of parts), before any last rounding.
    """
    if "logits" in tensors:
        lead = tensors["logits"].shape[: -1 if parameters["residual"] == "permutations" else -2]
    else:
        lead = tensors["x"].shape[:-2] if "x" in tensors else tensors["embedding"].shape[:-1]
    tokens = math.prod(lead)
    per_token = {"x", "y", "post", "H", "logits", "embedding", "carried"}
    a = {
        k: A.array(v.reshape(tokens, *v.shape[len(lead) :]) if k in per_token else v)
        for k, v in tensors.items()
        if k not in ("norm_scale", "branch_scale", "load_balance_loss", "moe_bias_updates")
    }
    g = {k: A.array(v.reshape(tokens, *v.shape[len(lead) :])) for k, v in cotangents.items() if v.ndim > 1}
    found = _STAGES[stage](a, g, parameters, options, A, tensors)
    shaped: Tensors = {}
    for name, value in found.items():
        base = name.split("/")[-1]
        is_token = base in per_token or name in ("out", "u", "pre", "post", "H")
        shaped[name] = value.reshape(*lead, *value.shape[1:]) if is_token else value
    return shaped


def magnitude(parts: list[Any], A: Any) -> Any:
    return A.add_parts([np.abs(part) for part in parts])


def _expand(a, g, p, options, A, tensors):
    out, pullback = formulas.expand(a["embedding"], p["streams"], A)
    parts = pullback(g["out"])
    return {"out": out, "d/embedding": A.sum(parts, 1), "m/embedding": A.sum(np.abs(parts), 1)}


def _reduce(a, g, p, options, A, tensors):
    if options["how"] == "carried":
        out, pullback = formulas.pre_mix(a["x"], a["carried"], A)
        g_x, g_carried = pullback(g["out"])
        return {"out": out, "d/x": g_x, "d/carried": g_carried}
    out, pullback = formulas.reduce(a["x"], options["how"], p, A)
    return {"out": out, "d/x": pullback(g["out"])}


def _head(a, g, p, options, A, tensors):
    out, pullback = formulas.head(a["x"], a, p, A)
    parts, gradients = pullback(g["out"])
    return {"out": out, **_gradients(parts, gradients, A)}


def _residual_matrix(a, g, p, options, A, tensors):
    value, pullback = formulas.residual_matrix(a["logits"], p, A)
    return {"H": value, "d/logits": pullback(g["H"])}


def _coefficients(a, g, p, options, A, tensors):
    values, pullback = formulas.coefficients(a["x"], a, p, A)
    parts, gradients = pullback({k: v for k, v in g.items() if k != "H" or p["residual"] != "identity"})
    return {**values, **_gradients(parts, gradients, A)}


def _pre(a, g, p, options, A, tensors):
    u, kept, pullback = formulas.read(a["x"], a, p, a.get("carried"), A)
    parts, gradients, g_carried = pullback(g["u"], {"pre": g["pre"]} if "pre" in g else {})
    return {"u": u, **_handed(kept["pre"], g_carried), **_gradients(parts, gradients, A)}


def _handed(pre, g_carried):
    """What a single-pass site returns and takes beside the rest."""
    return {} if g_carried is None else {"pre": pre, "d/carried": g_carried}


def _post(a, g, p, options, A, tensors):
    out, pullback = formulas.post_mix(a["y"], a["x"], a["post"], a["H"], p, A)
    y_parts, g_x, g_post, g_H = pullback(g["out"])
    found = {
        "out": out,
        "d/y": A.sum(y_parts, 1),
        "m/y": A.sum(np.abs(y_parts), 1),
        "d/x": g_x,
        "m/x": np.abs(g_x),
        "d/post": g_post,
    }
    return found if g_H is None else {**found, "d/H": g_H}


def _branch(tensors, A):
    """The test's own sub-layer: a product of powers of two, [C]."""
    return A.array(tensors["norm_scale"].astype(np.float64) * tensors["branch_scale"].astype(np.float64))


def _layer(a, g, p, options, A, tensors):
    out, handed, pullback = formulas.layer(a["x"], a, _branch(tensors, A), p, a.get("carried"), A)
    parts, gradients, g_carried = pullback(g["out"], g.get("pre"))
    return {"out": out, **_handed(handed, g_carried), **_gradients(parts, gradients, A)}


def _stack(a, g, p, options, A, tensors):
    weights = {k: v for k, v in a.items() if k != "embedding"}
    out, pullback = formulas.stack(a["embedding"], weights, _branch(tensors, A), p, options["reduce"], A)
    parts, gradients = pullback(g["out"])
    return {
        "out": out,
        "d/embedding": A.sum(parts, 1),
        "m/embedding": A.sum(np.abs(parts), 1),
        **{f"d/{k}": v for k, v in gradients.items()},
    }


def _gradients(parts, gradients, A):
    return {"d/x": A.add_parts(parts), "m/x": magnitude(parts, A), **{f"d/{k}": v for k, v in gradients.items()}}


_STAGES = {
    "expand": _expand,
    "reduce": _reduce,
    "head": _head,
    "residual_matrix": _residual_matrix,
    "coefficients": _coefficients,
    "pre": _pre,
    "post": _post,
    "layer": _layer,
    "stack": _stack,
}
