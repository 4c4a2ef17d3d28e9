"""The residual matrix and its vector-Jacobian product, in any arithmetic (docs/mathematics.md, "The residual matrix").

`passes` lists the axes in the order in which they are normalised. They run on P itself, on its logarithm, or on the
logarithms of the scalings of rows and columns (the dual potentials): the same values in exact arithmetic.
"""

from __future__ import annotations

import itertools

import numpy as np

from conformance.oracle.arithmetic import Arithmetic, Array, Parameters, Pullback

ROWS, COLUMNS = -1, -2
"""The axes of a pass over rows and over columns of ``[T, n, n]``."""
AXES = {"rows": ROWS, "columns": COLUMNS}
POTENTIALS_UP_TO = 32.0
"""The largest logit for which dual potentials count as honest: they keep an absolute error of |logit| u in log H."""


def axes(p: Parameters) -> tuple[int, int]:
    """The axis that an iteration normalises first, and the one it normalises last."""
    return (ROWS, COLUMNS) if p["order"] == "rows-first" else (COLUMNS, ROWS)


def passes(p: Parameters) -> list[int]:
    """The axes of all passes after the start; a softmax over the axis normalised first takes the first one's place."""
    normalised = list(axes(p)) * p["iterations"]
    return normalised[1:] if AXES.get(p["softmax"]) == normalised[0] else normalised


def residual_matrix(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    """H ``[T, n, n]`` from its logits ``[T, n, n]`` (``[T, n!]`` for permutations)."""
    return permutations(logits, p["streams"], A) if p["residual"] == "permutations" else sinkhorn(logits, p, A)


def softmax(logits: Array, axis: int, A: Arithmetic) -> tuple[Array, Pullback]:
    """Softmax along ``axis``, shifted by the maximum; returns (value, its pullback)."""
    shifted = logits - A.maximum_along(logits, axis)
    e = A.exp(shifted)
    total = np.expand_dims(A.sum(e, axis), axis)
    q = A.round_matrix(A.exp(shifted - A.log(total)) if A.style.log_domain else e / total)

    def pullback(g: Array) -> Array:
        if logits.shape[axis] == 1:  # one entry is always 1, exactly: no ball around 0
            return g * A.constant(0)
        return q * (g - np.expand_dims(A.sum(q * g, axis), axis))

    return q, pullback


def permutations(logits: Array, streams: int, A: Arithmetic) -> tuple[Array, Pullback]:
    """mHC-lite: a softmax over the n! permutation matrices, ``P[i, p(i)] = 1``."""
    table = list(itertools.permutations(range(streams)))
    q, softmax_pullback = softmax(logits, -1, A)
    q = A.act(q)  # kept in the activations' dtype before the matrices are summed
    value = np.empty((logits.shape[0], streams, streams), dtype=logits.dtype)
    for i, j in itertools.product(range(streams), repeat=2):
        value[:, i, j] = A.sum(q[:, [k for k, order in enumerate(table) if order[i] == j]], -1)

    def pullback(g: Array) -> Array:
        g_q = np.empty_like(q)
        for k, order in enumerate(table):
            g_q[:, k] = A.sum(np.stack([g[:, i, order[i]] for i in range(streams)], -1), -1)
        return softmax_pullback(A.act(g_q))

    return value, pullback


def sinkhorn(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    """The N iterations as written; returns H ``[T, n, n]`` and its pullback."""
    A = A.of_matrix(p)
    logits, limit_pullback = _limited(logits, p, A)
    if A.style.potentials and p["guard"] == "none" and A.within(logits, POTENTIALS_UP_TO):
        value, pullback = _on_potentials(logits, p, A)
    elif A.style.log_domain:
        value, pullback = _on_logarithms(logits, p, A)
    else:
        value, pullback = _on_values(logits, p, A)
    return value, lambda g: limit_pullback(pullback(g))


def _limited(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    """The logits, clipped if the row has a limit."""
    if p["logit_limit"] is None:
        return logits, lambda g: g
    value, inside = A.clip(logits, A.constant(p["logit_limit"]))
    return value, lambda g: np.where(inside, g, A.constant(0))


def _shifted(logits: Array, axis: int, A: Arithmetic) -> tuple[Array, Pullback]:
    """``logits - maximum``, and the pullback: the maximum's share goes to the entry that it is."""
    largest = A.maximum_along(logits, axis)

    def pullback(g: Array) -> Array:
        if logits.shape[axis] == 1:  # one entry is its own maximum: exactly 0, no ball around it
            return g * A.constant(0)
        total = np.expand_dims(A.sum(g, axis), axis)
        return g - np.where(A.first_equal(logits, largest, axis), total, A.constant(0))

    return logits - largest, pullback


def _start(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Array | None, Pullback]:
    """P before the first pass, its logarithm, and the pullback from P's cotangent."""
    if p["softmax"] == "none":
        level, shift_pullback = _shifted(logits, axes(p)[0], A)
        value = A.round_matrix(A.exp(level))
        return value, level, lambda g: shift_pullback(A.round_matrix(g * value))
    axis = AXES[p["softmax"]]
    q, softmax_pullback = softmax(logits, axis, A)
    value = A.round_matrix(q + A.constant(p["eps"])) if p["guard"] == "add" else q
    return value, None, lambda g: A.round_matrix(softmax_pullback(g))


def _guarded(total: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Array | None]:
    """The denominator, and a mask of the entries that depend on the sum (None: all do)."""
    if p["guard"] in ("add", "denominator"):
        return A.round_matrix(total + A.constant(p["eps"])), None
    if p["guard"] == "clip":
        return A.at_least(total, A.constant(p["eps"]))
    return total, None


def _on_values(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    value, _, start_pullback = _start(logits, p, A)
    steps: list[tuple[int, Array, Array, Array | None]] = []
    for axis in passes(p):
        denominator, active = _guarded(A.round_matrix(np.expand_dims(A.sum(value, axis), axis)), p, A)
        value = value * (A.constant(1) / denominator) if A.style.reciprocal else value / denominator
        value = A.round_matrix(value)
        steps.append((axis, value, denominator, active))

    def pullback(g: Array) -> Array:
        for axis, after, denominator, active in reversed(steps):
            if A.separates:  # as differentiating a division makes them: two rounded parts, added
                part = A.round_matrix(g / denominator)
                terms = g * A.round_matrix(after / denominator) if A.style.round_parts else part * after
                total = A.round_matrix(np.expand_dims(A.sum(A.round_matrix(terms), axis), axis))
                g = A.round_matrix(part - (total if active is None else np.where(active, total, A.constant(0))))
                continue
            total = A.round_matrix(np.expand_dims(A.sum(A.round_matrix(g * after), axis), axis))
            total = total if active is None else np.where(active, total, A.constant(0))
            g = A.round_matrix((g - total) / denominator)
        return start_pullback(g)

    return value, pullback


def _on_logarithms(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    start, level, start_pullback = _start(logits, p, A)
    log_softmax_axis = None if p["guard"] == "add" else AXES.get(p["softmax"])
    if level is None:
        level = A.log(start) if log_softmax_axis is None else A.log_softmax(logits, log_softmax_axis)
    steps: list[tuple[int, Array, Array | None]] = []
    for axis in passes(p):
        denominator, active = _guarded(A.sum_exp(level, axis), p, A)
        level = level - A.log(denominator)
        steps.append((axis, level, active))
    value = A.exp(level)

    def pullback(g: Array) -> Array:
        g = g * value
        for axis, after, active in reversed(steps):
            total = np.expand_dims(A.sum(g, axis), axis) * A.exp(after)
            g = g - (total if active is None else np.where(active, total, A.constant(0)))
        if log_softmax_axis is not None:
            return g - start * np.expand_dims(A.sum(g, log_softmax_axis), log_softmax_axis)
        if p["softmax"] == "none":
            return _shifted(logits, axes(p)[0], A)[1](g)
        return start_pullback(g / start)

    return value, pullback


def _on_potentials(logits: Array, p: Parameters, A: Arithmetic) -> tuple[Array, Pullback]:
    """``H = exp(L + f + g)``; a pass over an axis sets its potential to ``-log sum exp(L + the other)`` there."""
    softmax_axis, normalised = AXES.get(p["softmax"]), passes(p)
    normalised = normalised if softmax_axis is None else [softmax_axis, *normalised]
    potential = {ROWS: A.constant(0), COLUMNS: A.constant(0)}
    steps: list[tuple[int, Array]] = []
    for axis in normalised:
        level = logits + potential[COLUMNS + ROWS - axis]
        largest = A.maximum_along(level, axis)
        total = A.sum_exp(level - largest, axis)
        potential[axis] = -(largest + A.log(total))
        steps.append((axis, A.exp(level - largest) / total))
    value = A.exp(logits + potential[ROWS] + potential[COLUMNS])

    def pullback(g: Array) -> Array:
        g_level = g * value
        g_logits = g_level
        pending = {axis: np.expand_dims(A.sum(g_level, axis), axis) for axis in (ROWS, COLUMNS)}
        for axis, share in reversed(steps):
            part = -pending[axis] * share
            g_logits = g_logits + part
            other = COLUMNS + ROWS - axis
            pending[axis] = A.constant(0) * pending[axis]
            pending[other] = pending[other] + np.expand_dims(A.sum(part, other), other)
        return g_logits

    return value, pullback
