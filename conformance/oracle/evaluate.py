"""Evaluates one stage of one case in any arithmetic: outputs, gradients and the magnitudes of gradients' parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conformance.oracle import formulas
from conformance.oracle.arithmetic import Arithmetic, Array, Parameters

Arrays = Mapping[str, Array]
Tensors = dict[str, Array]
Options = Mapping[str, Any]


def evaluate(
    stage: str,
    tensors: Mapping[str, np.ndarray],
    cotangents: Mapping[str, np.ndarray],
    parameters: Parameters,
    options: Options,
    A: Arithmetic,
) -> Tensors:
    """Evaluates ``stage`` forward and backward.

    Args:
        tensors: inputs and weights under their names, weights flat, any float dtype.
        cotangents: one per output.
        A: `balls.BallArithmetic` or a `floats.FloatArithmetic`.

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
    values = _STAGES[stage](a, g, parameters, options, A, tensors)
    shaped: Tensors = {}
    for name, value in values.items():
        base = name.split("/")[-1]
        is_token = base in per_token or name in ("out", "u", "pre", "post", "H")
        shaped[name] = value.reshape(*lead, *value.shape[1:]) if is_token else value
    return shaped


def magnitude(parts: list[Array], A: Arithmetic) -> Array:
    return A.add_parts([np.abs(part) for part in parts])


def _expand(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    out, pullback = formulas.expand(a["embedding"], p["streams"])
    parts = pullback(g["out"])
    return {"out": out, "d/embedding": A.sum(parts, 1), "m/embedding": A.sum(np.abs(parts), 1)}


def _reduce(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    if options["how"] == "carried":
        out, pullback = formulas.pre_mix(a["x"], a["carried"], A)
        g_x, g_carried = pullback(g["out"])
        return {"out": out, "d/x": g_x, "d/carried": g_carried}
    out, pullback = formulas.reduce(a["x"], options["how"], p, A)
    return {"out": out, "d/x": pullback(g["out"])}


def _head(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    out, pullback = formulas.head(a["x"], a, p, A)
    parts, gradients = pullback(g["out"])
    return {"out": out, **_gradients(parts, gradients, A)}


def _residual_matrix(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    value, pullback = formulas.residual_matrix(a["logits"], p, A)
    return {"H": value, "d/logits": pullback(g["H"])}


def _coefficients(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    values, pullback = formulas.coefficients(a["x"], a, p, A)
    parts, gradients = pullback({k: v for k, v in g.items() if k != "H" or p["residual"] != "identity"})
    return {**values, **_gradients(parts, gradients, A)}


def _pre(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    u, kept, pullback = formulas.read(a["x"], a, p, a.get("carried"), A)
    parts, gradients, g_carried = pullback(g["u"], {"pre": g["pre"]} if "pre" in g else {})
    return {"u": u, **_handed(kept["pre"], g_carried), **_gradients(parts, gradients, A)}


def _handed(pre: Array | None, g_carried: Array | None) -> Tensors:
    """The pre that a single-pass site hands on and the gradient of the one it takes; empty for other sites."""
    return {} if g_carried is None or pre is None else {"pre": pre, "d/carried": g_carried}


def _post(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    out, pullback = formulas.post_mix(a["y"], a["x"], a["post"], a["H"], p, A)
    y_parts, g_x, g_post, g_H = pullback(g["out"])
    values = {
        "out": out,
        "d/y": A.sum(y_parts, 1),
        "m/y": A.sum(np.abs(y_parts), 1),
        "d/x": g_x,
        "m/x": np.abs(g_x),
        "d/post": g_post,
    }
    return values if g_H is None else {**values, "d/H": g_H}


def _branch(tensors: Arrays, A: Arithmetic) -> Array:
    """The factors ``[C]`` of the test's own sub-layer, which are powers of two."""
    return A.array(tensors["norm_scale"].astype(np.float64) * tensors["branch_scale"].astype(np.float64))


def _layer(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    out, handed, pullback = formulas.layer(a["x"], a, _branch(tensors, A), p, a.get("carried"), A)
    parts, gradients, g_carried = pullback(g["out"], g.get("pre"))
    return {"out": out, **_handed(handed, g_carried), **_gradients(parts, gradients, A)}


def _stack(a: Arrays, g: Arrays, p: Parameters, options: Options, A: Arithmetic, tensors: Arrays) -> Tensors:
    weights = {k: v for k, v in a.items() if k != "embedding"}
    out, pullback = formulas.stack(a["embedding"], weights, _branch(tensors, A), p, options["reduce"], A)
    parts, gradients = pullback(g["out"])
    return {
        "out": out,
        "d/embedding": A.sum(parts, 1),
        "m/embedding": A.sum(np.abs(parts), 1),
        **{f"d/{k}": v for k, v in gradients.items()},
    }


def _gradients(parts: list[Array], gradients: Arrays, A: Arithmetic) -> Tensors:
    return {"d/x": A.add_parts(parts), "m/x": magnitude(parts, A), **{f"d/{k}": v for k, v in gradients.items()}}


_STAGES: dict[str, Callable[[Arrays, Arrays, Parameters, Options, Arithmetic, Arrays], Tensors]] = {
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
