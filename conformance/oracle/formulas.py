"""The layer and its vector-Jacobian product, derived by hand, in any arithmetic.

Each function returns its value and a pullback. The same text is evaluated in ball arithmetic (the
expected values) and in rounded arithmetic of several honest styles (the error bounds), so the arithmetic
``A`` (`arithmetic.Arithmetic`) is an argument: ``A.sum``, ``A.contract``, ``A.exp``, … do the sums and the
elementary functions, and ``A.act``, ``A.mix``, ``A.store``, ``A.weight`` are the places where a contract rounds
(docs/mathematics.md, "Precision"); in ball arithmetic they return their argument.

Shapes: T tokens, n streams, C dim. ``x`` is ``[T, n, C]``; projections are flat, ``[n*C, m]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from conformance.oracle.arithmetic import Arithmetic, Array, Parameters, Pullback, Scalar
from conformance.oracle.residual import residual_matrix
from conformance.stages import PROJECTIONS

Weights = Mapping[str, Array]
Cotangents = Mapping[str, Array]
Gradients = dict[str, Array]
Parts = list[Array]
"""The parts of x's gradient, ``[T, n, C]`` each, before they are added."""
LayerPullback = Callable[[Array, Array | None], tuple[Parts, Gradients, Array | None]]


def root_mean_square(flat: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Array]:
    """The norm's divisor for tokens ``[T, n*C]``, ``[T, 1]``, and the divisor in its own derivative."""
    mean = A.sum(flat * flat, -1)[:, None] / A.constant(flat.shape[1])
    eps = A.constant(p["norm_eps"])
    if p["norm_eps_position"] == "mean":
        rms = A.sqrt(mean + eps)
        return rms, rms
    root = A.sqrt(mean)
    # At an all-zero token the norm is linear: x / eps. The root's slope does not enter.
    return root + eps, np.where(A.is_zero(mean), A.constant(1), root)


def normalise_and_project(
    x: Array, scale: Array | None, phi: Weights, p: Parameters, A: Arithmetic
) -> tuple[dict[str, Array], Callable[[Cotangents], tuple[Parts, Array | None, Gradients]]]:
    """RMS norm over (streams, dim), then the projections.

    Returns:
        ``h``, one ``[T, m]`` per projection, and a pullback that maps their cotangents to (the parts of
        x's gradient ``[T, n, C]``, the norm weight's, the projections').
    """
    tokens, width = x.shape[0], x.shape[1] * x.shape[2]
    flat = x.reshape(tokens, width)
    rms, slope = root_mean_square(flat, p, A)

    def divide(a: Array) -> Array:
        return a * (A.constant(1) / rms) if A.style.reciprocal else a / rms

    def norm_part(dot: Array) -> Array:
        """The gradient through the root mean square: ``dot`` is the cotangent of log(1/rms)."""
        return -(flat * dot / (A.constant(width) * rms * slope)).reshape(x.shape)

    if A.style.norm_after:
        folded = {k: m if scale is None else scale[:, None] * m for k, m in phi.items()}
        h = {k: divide(A.contract(flat, m, projection=True)) for k, m in folded.items()}

        def pullback_after(cotangents: Cotangents) -> tuple[Parts, Array | None, Gradients]:
            parts, g_phi, g_scale = Parts(), Gradients(), None
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

        return h, pullback_after

    unit = divide(flat)
    normed = A.act(unit if scale is None else unit * scale)
    h = {k: A.act(A.contract(normed, m, projection=True)) for k, m in phi.items()}

    def pullback(cotangents: Cotangents) -> tuple[Parts, Array | None, Gradients]:
        parts, g_phi, g_normed = Parts(), Gradients(), None
        for k, g in cotangents.items():
            g_h = A.act(g)
            g_phi[k] = A.weight(A.contract(normed.T, g_h, projection=True))
            part = A.act(A.contract(g_h, phi[k].T, projection=True))
            g_normed = part if g_normed is None else g_normed + part
            parts.append(divide(part if scale is None else part * scale).reshape(x.shape))
        if g_normed is None:
            raise ValueError("a pullback needs the cotangent of at least one projection")
        g_normed = A.act(g_normed)
        g_scale = None if scale is None else A.weight(A.sum((unit * g_normed).T, -1))
        dot = A.sum(unit * (g_normed if scale is None else g_normed * scale), -1)[:, None]
        parts.append(norm_part(dot))
        return parts, g_scale, g_phi

    return h, pullback


def gate(z: Array, slope: Scalar, offset: Scalar, A: Arithmetic) -> tuple[Array, Pullback]:
    """``slope * sigmoid(z) + offset`` and its pullback."""
    s, rest = A.sigmoid_and_rest(z)
    value = A.gate_step(A.gate_step(slope * s) + A.gate_step(offset))
    if A.rounds_gates:
        return value, lambda g: A.gate_step(A.gate_step(g * slope) * A.gate_step(s * rest))
    return value, lambda g: g * slope * s * rest


def coefficients(
    x: Array, weights: Weights, p: Parameters, A: Arithmetic
) -> tuple[dict[str, Array], Callable[[Cotangents], tuple[Parts, Gradients]]]:
    """pre ``[T, n]``, post ``[T, n]``, H ``[T, n, n]`` before their last rounding.

    The pullback maps cotangents ``{"pre", "post", "H"}`` (any of them absent) to (parts of x's gradient,
    gradients of the weights).
    """
    tokens, n = x.shape[:2]
    kinds = [k for k in PROJECTIONS if f"{k}_alpha" in weights]
    phi = {k: weights[f"{k}_alpha"] for k in kinds}
    h, projection_pullback = normalise_and_project(x, weights.get("mhc_norm.scale"), phi, p, A)
    values: dict[str, Array] = {}
    pullbacks: dict[str, Pullback] = {}
    for k in kinds:
        shift = weights[f"{k}_beta"].reshape(-1)
        scaled = weights[f"{k}_alpha_scale"] * h[k]
        z = A.logits(A.logits(scaled) + shift)
        if k == "res":
            shape = z.shape if p["residual"] == "permutations" else (tokens, n, n)
            values["H"], matrix_pullback = residual_matrix(z.reshape(shape), p, A)
            pullbacks[k] = _flat(matrix_pullback, z.shape)
        else:
            slope, offset = (1, p["pre_eps"]) if k == "pre" else (p["post_scale"], p["post_eps"])
            values[k], pullbacks[k] = gate(z, A.constant(slope), A.constant(offset), A)
    if "H" not in values:
        values["H"] = np.broadcast_to(A.array(np.eye(n)), (tokens, n, n))

    def pullback(cotangents: Cotangents) -> tuple[Parts, Gradients]:
        g_h, gradients = Gradients(), Gradients()
        for k in kinds:
            g = cotangents.get("H" if k == "res" else k)
            if g is None:
                continue
            g_z = A.logits(pullbacks[k](A.act(g)))
            g_h[k] = weights[f"{k}_alpha_scale"] * g_z
            gradients[f"{k}_alpha_scale"] = A.weight(A.sum_tokens(A.gate_product(g_z * h[k]).reshape(1, -1)))
            gradients[f"{k}_beta"] = A.weight(A.sum_tokens(g_z.T).reshape(weights[f"{k}_beta"].shape))
        parts, g_scale, g_phi = projection_pullback(g_h)
        if g_scale is not None:
            gradients["mhc_norm.scale"] = g_scale
        gradients.update({f"{k}_alpha": g for k, g in g_phi.items()})
        return parts, gradients

    return values, pullback


def _flat(pullback: Pullback, shape: tuple[int, ...]) -> Pullback:
    """The pullback of a matrix that was reshaped from logits of this shape."""
    return lambda g: pullback(g).reshape(shape)


def pre_mix(x: Array, pre: Array, A: Arithmetic) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """u ``[T, C]``: the gated sum of the streams, before its rounding."""
    value = A.sum(pre[:, :, None] * x, 1)

    def pullback(g: Array) -> tuple[Array, Array]:
        return pre[:, :, None] * g[:, None, :], A.sum(x * g[:, None, :], -1)

    return value, pullback


def post_mix(
    y: Array, x: Array, post: Array, H: Array, p: Parameters, A: Arithmetic
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array, Array | None]]]:
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

    def pullback(g: Array) -> tuple[Array, Array, Array, Array | None]:
        y_parts = A.product(post[:, :, None] * g)
        g_post = A.mix(A.sum(A.product(y[:, None, :] * g), -1))
        if weight is None:
            return y_parts, g, g_post, None
        g_x = A.sum(weight[..., None] * g[:, None, :, :], 2)
        g_weight = A.mix(A.sum(x[:, :, None, :] * g[:, None, :, :], -1))
        return y_parts, g_x, g_post, np.einsum(by_input[p["mix"]], g_weight)

    return value, pullback


def read(
    x: Array, weights: Weights, p: Parameters, carried: Array | None, A: Arithmetic
) -> tuple[Array, dict[str, Array], Callable[[Array, Cotangents], tuple[Parts, Gradients, Array | None]]]:
    """The first half of a layer: u ``[T, C]`` before its rounding, and the coefficients as they are kept.

    A single-pass layer reads with ``carried [T, n]`` and hands its own pre on. The pullback maps the cotangents of u
    and of ``{"pre", "post", "H"}`` (for a single-pass layer pre among them) to (parts of x's gradient, gradients of
    the weights, carried's gradient or None).
    """
    values, coefficients_pullback = coefficients(x, weights, p, A)
    kept = {k: A.act(v) for k, v in values.items()}
    u, pre_pullback = pre_mix(x, kept["pre"] if carried is None else carried, A)

    def pullback(g_u: Array, cotangents: Cotangents) -> tuple[Parts, Gradients, Array | None]:
        direct, g_gates = pre_pullback(g_u)
        cotangents = cotangents if carried is not None else {**cotangents, "pre": g_gates}
        parts, gradients = coefficients_pullback(cotangents)
        return [direct, *parts], gradients, None if carried is None else g_gates

    return u, kept, pullback


def layer(
    x: Array, weights: Weights, branch: Array, p: Parameters, carried: Array | None, A: Arithmetic
) -> tuple[Array, Array | None, LayerPullback]:
    """One layer whose sub-layer multiplies by ``branch [C]`` (powers of two: no rounding of its own).

    Returns:
        out, the pre that a single-pass layer hands on (None for others), and a pullback that maps the cotangents of
        both to (parts of x's gradient, gradients of the weights, carried's gradient or None).
    """
    u, kept, read_pullback = read(x, weights, p, carried, A)
    y = A.store(u) * branch
    out, post_pullback = post_mix(y, x, kept["post"], kept["H"], p, A)

    def pullback(g: Array, g_handed: Array | None) -> tuple[Parts, Gradients, Array | None]:
        y_parts, mixed_part, g_post, g_H = post_pullback(g)
        g_u = A.store(A.sum(y_parts, 1)) * branch
        cotangents = {"post": g_post, **({} if g_H is None else {"H": g_H})}
        if carried is not None and g_handed is not None:
            cotangents["pre"] = g_handed
        parts, gradients, g_carried = read_pullback(g_u, cotangents)
        return [mixed_part, *parts], gradients, g_carried

    return out, None if carried is None else kept["pre"], pullback


def head(
    x: Array, weights: Weights, p: Parameters, A: Arithmetic
) -> tuple[Array, Callable[[Array], tuple[Parts, Gradients]]]:
    """The learned reduction: gates from one projection, then the gated sum of the streams; float32 in every dialect."""
    A = A.wide()
    p = p if p["head_norm_eps"] is None else {**p, "norm_eps": p["head_norm_eps"]}
    h, projection_pullback = normalise_and_project(x, None, {"head": weights["head_fn"]}, p, A)
    z = weights["head_scale"] * h["head"] + weights["head_base"]
    gates, gate_pullback = gate(z, A.constant(1), A.constant(p["pre_eps"]), A)
    out, mix_pullback = pre_mix(x, gates, A)

    def pullback(g: Array) -> tuple[Parts, Gradients]:
        direct, g_gates = mix_pullback(g)
        g_z = gate_pullback(g_gates)
        parts, _, g_phi = projection_pullback({"head": weights["head_scale"] * g_z})
        return [direct, *parts], {
            "head_fn": g_phi["head"],
            "head_scale": A.sum((g_z * h["head"]).reshape(1, -1), -1),
            "head_base": A.sum(g_z.T, -1),
        }

    return out, pullback


def reduce(x: Array, how: str, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    """Sum or mean over the streams."""
    n = x.shape[1]
    share = A.product(A.constant(1) / A.constant(n)) if how == "mean" else A.constant(1)
    total = A.sum_in_activation(x, 1) if p["reduction"] == "activation" else A.sum(x, 1)
    value = total / A.constant(n) if how == "mean" else total
    return value, lambda g: np.repeat((g * share)[:, None, :], n, axis=1)


def expand(embedding: Array, streams: int) -> tuple[Array, Pullback]:
    """One stream is repeated; the pullback gives the parts ``[T, n, C]`` of the embedding's gradient."""
    return np.repeat(embedding[:, None, :], streams, axis=1), lambda g: g


def stack(
    embedding: Array, weights: Weights, branch: Array, p: Parameters, how: str, A: Arithmetic
) -> tuple[Array, Callable[[Array], tuple[Array, Gradients]]]:
    """Expands, applies one layer per leading index of the weights, and reduces.

    x is stored between layers; the pre that is carried is kept as it is.
    """
    x, _ = expand(embedding, p["streams"])
    carried = one_hot(x, A) if p["pre_from"] == "previous" else None
    depth = next(iter(weights.values())).shape[0]
    pullbacks = []
    for index in range(depth):
        x, carried, of_layer = layer(x, {k: w[index] for k, w in weights.items()}, branch, p, carried, A)
        pullbacks.append(of_layer)
        if index + 1 < depth or how != "none":
            x = A.store(x)
    out, reduce_pullback = _reduced(x, how, carried, p, A)

    def pullback(g: Array) -> tuple[Array, Gradients]:
        g, g_carried = reduce_pullback(g)
        g, gradients = A.store(g), list[Gradients]()
        for layer_pullback in reversed(pullbacks):
            parts, gradient, g_carried = layer_pullback(g, g_carried)
            g = A.store(A.add_parts(parts))
            gradients.append(gradient)
        stacked = {k: np.stack([gradient[k] for gradient in reversed(gradients)]) for k in gradients[0]}
        return g, stacked

    return out, pullback


def _reduced(
    x: Array, how: str, carried: Array | None, p: Parameters, A: Arithmetic
) -> tuple[Array, Callable[[Array], tuple[Array, Array | None]]]:
    """The reduction of a stack; its pullback gives the cotangents of x and of the pre that the last layer handed on."""
    if how == "carried":
        if carried is None:
            raise ValueError("only a single-pass stack has a carried pre to reduce by")
        return pre_mix(x, carried, A)
    if how == "none":
        return x, lambda g: (g, None)
    out, spread = reduce(x, how, p, A)
    return out, lambda g: (spread(g), None)


def one_hot(x: Array, A: Arithmetic) -> Array:
    """``[T, n]``: 1 for stream 0, which the first site of a single-pass stack reads."""
    return np.broadcast_to(A.array(np.eye(x.shape[1])[:1]), x.shape[:2])
