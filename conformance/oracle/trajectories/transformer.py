"""The model of fixtures/trajectories/README.md and its gradient, derived by hand, in any arithmetic.

Each function returns its value and a pullback, as those of `oracle.formulas` do, which compute the sites. T tokens are
``batch * seq``, row by row; activations are ``[T, C]`` and streams ``[T, n, C]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from conformance.cases.trajectories.model import HEADS, LAYERS, MODEL_NORM_EPS, SITES, site_weights
from conformance.oracle import formulas
from conformance.oracle.arithmetic import Arithmetic, Array, Parameters, Pullback

Weights = Mapping[str, Array]
Gradients = dict[str, Array]
Sublayer = Callable[[Array], tuple[Array, Callable[[Array], tuple[Array, Gradients]]]]
"""Maps u ``[T, C]`` to y, and to the pullback from y's cotangent to (u's, gradients of the sub-layer's weights)."""
Site = tuple[Array, Array | None, Callable[[Array, Array | None], tuple[Array, Gradients, Array | None]]]


def one_hot_rows(indices: np.ndarray, count: int, A: Arithmetic) -> Array:
    """``[T, count]``: row t is 1 at ``indices[t]``."""
    return A.array(np.eye(count)[indices])


def rms_norm(x: Array, weight: Array, A: Arithmetic) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis; the pullback gives x's and the weight's gradients."""
    count = A.constant(x.shape[1])
    mean = A.sum(x * x, -1)[:, None] / count
    rms = A.sqrt(mean + A.constant(MODEL_NORM_EPS))
    unit = x / rms  # [T, C]

    def pullback(g: Array) -> tuple[Array, Array]:
        scaled = g * weight
        dot = A.sum(scaled * unit, -1)[:, None] / count
        return (scaled - unit * dot) / rms, A.sum((g * unit).T, -1)

    return unit * weight, pullback


def product(x: Array, weight: Array, A: Arithmetic) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """``x @ weight``; the pullback gives the gradients of both."""

    def pullback(g: Array) -> tuple[Array, Array]:
        return A.contract(g, weight.T), A.contract(x.T, g)

    return A.contract(x, weight), pullback


def softmax(scores: Array, A: Arithmetic) -> tuple[Array, Pullback]:
    """Softmax along the last axis of ``[T, k]``."""
    e = A.exp(scores - A.maximum_along(scores, -1))
    q = e / A.sum(e, -1)[:, None]
    return q, lambda g: q * (g - A.sum(q * g, -1)[:, None])


def attend(q: Array, k: Array, v: Array, A: Arithmetic) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Causal attention of one head and one row of the batch; q, k and v are ``[seq, d]``.

    Each token's softmax runs over the tokens up to it, so that nothing stands for an infinity.
    """
    scale = A.constant(q.shape[1] ** -0.5)
    scores = A.contract(q, k.T) * scale
    weights = np.full(scores.shape, A.constant(0), dtype=q.dtype)
    pullbacks: list[Pullback] = []
    for t in range(q.shape[0]):
        value, softmax_pullback = softmax(scores[t : t + 1, : t + 1], A)
        weights[t, : t + 1] = value[0]
        pullbacks.append(softmax_pullback)

    def pullback(g: Array) -> tuple[Array, Array, Array]:
        g_weights = A.contract(g, v.T)
        g_scores = np.full(scores.shape, A.constant(0), dtype=q.dtype)
        for t, softmax_pullback in enumerate(pullbacks):
            g_scores[t, : t + 1] = softmax_pullback(g_weights[t : t + 1, : t + 1])[0]
        g_scores = g_scores * scale
        return A.contract(g_scores, k), A.contract(g_scores.T, q), A.contract(weights.T, g)

    return A.contract(weights, v), pullback


def attention(u: Array, weights: Weights, batch: int, A: Arithmetic) -> tuple[Array, Callable]:
    """Multi-head causal self-attention of the normalised u ``[T, C]``."""
    names = ("query", "key", "value")
    q, q_pullback = product(u, weights["query"], A)
    k, k_pullback = product(u, weights["key"], A)
    v, v_pullback = product(u, weights["value"], A)
    mixed, parts = np.empty_like(u), []
    seq, d = u.shape[0] // batch, u.shape[1] // HEADS
    for row in range(batch):
        for head in range(HEADS):
            where = slice(row * seq, (row + 1) * seq), slice(head * d, (head + 1) * d)
            mixed[where], head_pullback = attend(q[where], k[where], v[where], A)
            parts.append((where, head_pullback))
    out, out_pullback = product(mixed, weights["out"], A)

    def pullback(g: Array) -> tuple[Array, Gradients]:
        g_mixed, g_out = out_pullback(g)
        cotangents = {name: np.empty_like(u) for name in names}
        for where, head_pullback in parts:
            for name, value in zip(names, head_pullback(g_mixed[where]), strict=True):
                cotangents[name][where] = value
        found = [f(cotangents[n]) for f, n in zip((q_pullback, k_pullback, v_pullback), names, strict=True)]
        gradients = {name: g_weight for name, (_, g_weight) in zip(names, found, strict=True)}
        return A.add_parts([g_u for g_u, _ in found]), {**gradients, "out": g_out}

    return out, pullback


def mlp(u: Array, weights: Weights, A: Arithmetic) -> tuple[Array, Callable[[Array], tuple[Array, Gradients]]]:
    """``silu(u @ up + up_bias) @ down + down_bias``."""
    h, up_pullback = product(u, weights["up"], A)
    h = h + weights["up_bias"]
    s, rest = A.sigmoid_and_rest(h)
    activated = h * s
    y, down_pullback = product(activated, weights["down"], A)

    def pullback(g: Array) -> tuple[Array, Gradients]:
        g_activated, g_down = down_pullback(g)
        g_h = g_activated * (s + activated * rest)
        g_u, g_up = up_pullback(g_h)
        biases = {"up_bias": A.sum(g_h.T, -1), "down_bias": A.sum(g.T, -1)}
        return g_u, {"up": g_up, "down": g_down, **biases}

    return y + weights["down_bias"], pullback


def site(x: Array, weights: Weights, sublayer: Sublayer, p: Parameters, carried: Array | None, A: Arithmetic) -> Site:
    """One hyper-connection around a sub-layer: the streams, the pre that is handed on, and the pullback of both."""
    u, kept, read_pullback = formulas.read(x, weights, p, carried, A)
    y, sublayer_pullback = sublayer(u)
    out, post_pullback = formulas.post_mix(y, x, kept["post"], kept["H"], p, A)

    def pullback(g: Array, g_handed: Array | None) -> tuple[Array, Gradients, Array | None]:
        y_parts, mixed_part, g_post, g_H = post_pullback(g)
        g_u, gradients = sublayer_pullback(A.sum(y_parts, 1))
        cotangents = {"post": g_post, **({} if g_H is None else {"H": g_H})}
        if carried is not None and g_handed is not None:
            cotangents["pre"] = g_handed
        parts, site_gradients, g_carried = read_pullback(g_u, cotangents)
        return A.add_parts([mixed_part, *parts]), {**gradients, **site_gradients}, g_carried

    return out, None if carried is None else kept["pre"], pullback


def sublayer_of(kind: str, before: str, weights: Weights, batch: int, A: Arithmetic) -> Sublayer:
    """The pre-norm and the attention or MLP of one site; its gradients are named from ``before`` on."""

    def run(u: Array) -> tuple[Array, Callable[[Array], tuple[Array, Gradients]]]:
        normed, norm_pullback = rms_norm(u, weights[f"{before}{kind}_norm"], A)
        own = site_weights(weights, before)
        y, body = attention(normed, own, batch, A) if kind == "attention" else mlp(normed, own, A)

        def pullback(g: Array) -> tuple[Array, Gradients]:
            g_normed, gradients = body(g)
            g_u, g_norm = norm_pullback(g_normed)
            return g_u, {f"{kind}_norm": g_norm, **gradients}

        return y, pullback

    return run


def ending(
    x: Array, weights: Weights, carried: Array | None, p: Parameters, A: Arithmetic
) -> tuple[Array, Callable[[Array], tuple[Array, Gradients, Array | None]]]:
    """The streams reduced to one as the dialect does it; the pullback gives x's, the head's and carried's gradients."""
    if p["reduce"] == "head":
        out, head_pullback = formulas.head(x, site_weights(weights, "head."), p, A)

        def pullback(g: Array) -> tuple[Array, Gradients, Array | None]:
            parts, gradients = head_pullback(g)
            return A.add_parts(parts), {f"head.{k}": v for k, v in gradients.items()}, None

        return out, pullback
    if carried is not None:
        out, mix_pullback = formulas.pre_mix(x, carried, A)

        def carried_pullback(g: Array) -> tuple[Array, Gradients, Array | None]:
            g_x, g_carried = mix_pullback(g)
            return g_x, {}, g_carried

        return out, carried_pullback
    out, spread = formulas.reduce(x, p["reduce"], p, A)
    return out, lambda g: (spread(g), {}, None)


def cross_entropy(logits: Array, targets: np.ndarray, A: Arithmetic) -> tuple[Array, Array]:
    """The mean over tokens of ``log sum exp(logits) - logits[target]``, and its gradient of the logits."""
    tokens = A.constant(logits.shape[0])
    wanted = one_hot_rows(targets, logits.shape[1], A)
    log_share = A.log_softmax(logits, -1)
    loss = -A.sum(A.sum(log_share * wanted, -1), 0) / tokens
    return loss, (A.exp(log_share) - wanted) / tokens


RunSite = Callable[[Array, Weights, Sublayer, Parameters, Array | None, Arithmetic], Site]


def loss_and_gradients(
    weights: Weights, tokens: np.ndarray, targets: np.ndarray, p: Parameters, A: Arithmetic, run_site: RunSite = site
) -> tuple[Array, Gradients]:
    """The loss of one batch, and the gradient of every weight.

    Args:
        tokens, targets: integers ``[batch, seq]``.
        run_site: computes one hyper-connection; another than `site` is a planted mistake.
    """
    batch, seq = tokens.shape
    chosen = one_hot_rows(tokens.reshape(-1), weights["embedding"].shape[0], A)  # [T, vocabulary]
    places = one_hot_rows(np.tile(np.arange(seq), batch), seq, A)  # [T, seq]
    x, _ = formulas.expand(
        A.contract(chosen, weights["embedding"]) + A.contract(places, weights["positions"]), p["streams"]
    )
    carried = formulas.one_hot(x, A) if p["pre_from"] == "previous" else None
    pullbacks = []
    for layer in range(LAYERS):
        before = f"layers.{layer}."
        for kind in SITES:
            sublayer = sublayer_of(kind, before, weights, batch, A)
            x, carried, pullback = run_site(x, site_weights(weights, f"{before}{kind}."), sublayer, p, carried, A)
            pullbacks.append((before, kind, pullback))
    reduced, ending_pullback = ending(x, weights, carried, p, A)
    normed, norm_pullback = rms_norm(reduced, weights["final_norm"], A)
    logits, output_pullback = product(normed, weights["output"], A)
    loss, g_logits = cross_entropy(logits, targets.reshape(-1), A)

    g_normed, g_output = output_pullback(g_logits)
    g_reduced, g_norm = norm_pullback(g_normed)
    g, gradients, g_carried = ending_pullback(g_reduced)
    gradients |= {"output": g_output, "final_norm": g_norm}
    for before, kind, pullback in reversed(pullbacks):
        g, found, g_carried = pullback(g, g_carried)
        gradients |= {_named(before, kind, name): value for name, value in found.items()}
    g_embedded = A.sum(g, 1)  # [T, C]
    gradients["embedding"] = A.contract(chosen.T, g_embedded)
    gradients["positions"] = A.contract(places.T, g_embedded)
    return loss, {name: gradients[name].reshape(weights[name].shape) for name in sorted(weights)}


def _named(before: str, kind: str, name: str) -> str:
    """The whole name of a weight: those of a site stand below it, those of the sub-layer beside it."""
    own = name == "mhc_norm.scale" or name.partition("_")[0] in ("pre", "post", "res")
    return f"{before}{kind}.{name}" if own else f"{before}{name}"
