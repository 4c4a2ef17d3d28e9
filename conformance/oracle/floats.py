"""Rounded arithmetic for the honest ensemble, with the same results on every machine.

It uses only elementwise IEEE operations, sums in an explicit order and correctly rounded exp and log: no BLAS, no
unchecked result of libm, no framework.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from conformance.oracle.arithmetic import Parameters
from conformance.oracle.style import Style

NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
WHOLE = 64
"""Numbers that are added at once rather than one by one."""


def correctly_rounded(name: str, a: np.ndarray) -> np.ndarray:
    """exp or log of ``a``, correctly rounded to its dtype (float32 or float64)."""
    flat = a.reshape(-1)
    if a.dtype == np.float32:
        # float64 libm is right to a few units of 2^-52. Where a slack of 2^-44 can't change the rounding to
        # float32 the result is certain, on any libm; elsewhere ball arithmetic decides.
        with np.errstate(all="ignore"):
            wide = getattr(np, name)(flat.astype(np.float64))
            slack = np.abs(wide) * 2.0**-44
            low, high = (wide - slack).astype(np.float32), (wide + slack).astype(np.float32)
        result, doubtful = wide.astype(np.float32), np.flatnonzero(~(low == high))
    else:
        result, doubtful = np.empty_like(flat), np.arange(flat.size)
    for index in doubtful:
        result[index] = _by_balls(name, float(flat[index]), a.dtype)
    return result.reshape(a.shape)


def _by_balls(name: str, value: float, dtype: np.dtype) -> float:
    import flint  # of the extra "regenerate": everything else here works without it

    if not np.isfinite(value):
        with np.errstate(invalid="ignore"):
            return float(getattr(np, name)(value))
    if value == 0.0:
        return 1.0 if name == "exp" else -np.inf
    if name == "log" and value == 1.0:
        return 0.0
    precision, before = 96, flint.ctx.prec
    try:
        while True:
            flint.ctx.prec = precision
            ball = getattr(flint.arb(value), name)()
            low, high = dtype.type(float(ball.lower())), dtype.type(float(ball.upper()))
            if low == high:
                return low
            if precision > 4096:
                raise ArithmeticError(f"{name}({value!r}) is undecided at {precision} bits")
            precision *= 2
    finally:
        flint.ctx.prec = before


class FloatArithmetic:
    """The arithmetic of `formulas` in ``working`` precision with the roundings of a contract.

    Args:
        style: the honest choices.
        contract: ``float32``, ``float64``, ``tf32``, ``mixing`` or ``activation``.
        narrow: dtype name of x when it is ``bfloat16`` or ``float16``, else None.
    """

    def __init__(self, style: Style, contract: str, narrow: str | None):
        self.style = style
        self.dtype = np.dtype(np.float64 if contract == "float64" else np.float32)
        self.narrow = NARROW[narrow] if narrow else None
        self.acts = self.narrow is not None and contract == "activation"
        self.mixes = self.narrow is not None and contract in ("activation", "mixing")
        self.tf32 = contract == "tf32"
        self.rounded = self.passes = self.separates = False
        if self.acts:  # the norm's output is rounded, so it comes before the projection
            self.style = dataclasses.replace(style, norm_after=False)

    def constant(self, value: Any) -> Any:
        return self.dtype.type(value)

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values).astype(self.dtype)

    def exp(self, a: np.ndarray) -> np.ndarray:
        return correctly_rounded("exp", a)

    def log(self, a: np.ndarray) -> np.ndarray:
        return correctly_rounded("log", a)

    def sqrt(self, a: np.ndarray) -> np.ndarray:
        return np.sqrt(a)

    def sigmoid(self, a: np.ndarray) -> np.ndarray:
        one = self.constant(1)
        e = self.exp(-np.abs(a))
        return np.where(a >= 0, one, e) / (one + e)

    @staticmethod
    def is_zero(a: np.ndarray) -> np.ndarray:
        return a == 0

    def sum(self, a: np.ndarray, axis: int) -> np.ndarray:
        return ordered_sum(a, axis, self.style.order)

    def contract(self, a: np.ndarray, b: np.ndarray, projection: bool = False) -> np.ndarray:
        if projection and self.tf32:
            a, b = to_tf32(a), to_tf32(b)
        return self.sum(a[:, :, None] * b[None, :, :], 1)

    def maximum_along(self, a: np.ndarray, axis: int) -> np.ndarray:
        return np.max(a, axis=axis, keepdims=True)

    def at_least(self, a: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.maximum(a, floor), a > floor

    def clip(self, a: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.clip(a, -limit, limit), np.abs(a) <= limit

    @staticmethod
    def within(a: np.ndarray, limit: float) -> bool:
        return bool(np.all(np.abs(a[np.isfinite(a)]) <= limit))

    @staticmethod
    def first_equal(a: np.ndarray, largest: np.ndarray, axis: int) -> np.ndarray:
        """Where ``a`` is the maximum along ``axis``; of equal entries the first."""
        equal = a == largest
        return equal & (np.cumsum(equal, axis=axis) == 1)

    def sum_exp(self, level: np.ndarray, axis: int) -> np.ndarray:
        return np.expand_dims(self.sum(self.exp(level), axis), axis)

    def log_softmax(self, logits: np.ndarray, axis: int) -> np.ndarray:
        shifted = logits - self.maximum_along(logits, axis)
        return shifted - self.log(self.sum_exp(shifted, axis))

    def _narrowed(self, a: np.ndarray, when: bool) -> np.ndarray:
        if not when:
            return a
        self.rounded = True
        with np.errstate(over="ignore"):
            return a.astype(self.narrow).astype(self.dtype)

    def act(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.acts)

    def mix(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.mixes)

    def store(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.narrow is not None)

    def weight(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.acts and self.style.round_weights)

    def logits(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.acts and self.style.round_logits)

    def product(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.mixes and self.style.round_products)

    def gate_product(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.acts and self.style.round_products)

    @property
    def rounds_gates(self) -> bool:
        return self.acts and self.style.round_gates

    def gate_step(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.rounds_gates)

    def sigmoid_and_rest(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """sigmoid(z) and 1 - sigmoid(z)."""
        one = self.constant(1)
        if not self.rounds_gates:
            s = self.sigmoid(z)
            return s, one - s
        r = self.gate_step
        e = r(self.exp(-np.abs(z)))
        s = r(np.where(z >= 0, one, e) / r(one + e))
        return s, r(one - s)

    def sum_tokens(self, a: np.ndarray) -> np.ndarray:
        """Sum along the last axis, which runs over tokens; JAX's transpose of a narrow broadcast rounds every step."""
        if not (self.acts and self.style.round_sums):
            return self.sum(a, -1)
        return self._narrow_sum(a, -1)

    def sum_in_activation(self, a: np.ndarray, axis: int) -> np.ndarray:
        """Sum in the dtype of the activations, each addition rounded to it."""
        return self.sum(a, axis) if self.narrow is None else self._narrow_sum(a, axis)

    def _narrow_sum(self, a: np.ndarray, axis: int) -> np.ndarray:
        self.rounded = True
        with np.errstate(over="ignore"):
            return ordered_sum(a.astype(self.narrow), axis, self.style.order).astype(self.dtype)

    def of_matrix(self, p: Parameters) -> FloatArithmetic:
        """The arithmetic of Sinkhorn's passes: rounded throughout where they are made in the activations' dtype."""
        if self.narrow is None or p["matrix"] == "float32":
            return self
        changed = copy.copy(self)
        changed.passes, changed.separates = True, self.style.round_products
        changed.style = dataclasses.replace(self.style, log_domain=False, potentials=False)
        self.rounded = True
        return changed

    def round_matrix(self, a: np.ndarray) -> np.ndarray:
        return self._narrowed(a, self.passes)

    def wide(self) -> FloatArithmetic:
        """This arithmetic with coefficients and mixing in the working precision."""
        changed = copy.copy(self)
        changed.acts = changed.mixes = False
        return changed

    def add_parts(self, parts: list[np.ndarray]) -> np.ndarray:
        total = np.zeros_like(parts[0])
        for part in parts if self.style.order != "backward" else reversed(parts):
            total = total + self._narrowed(part, self.narrow is not None and self.style.round_parts)
        return total


class Quick(FloatArithmetic):
    """float64 with NumPy's own elementary functions, fast and exact enough to tell dialects from each other."""

    def __init__(self) -> None:
        super().__init__(Style(), "float64", None)

    def exp(self, a: np.ndarray) -> np.ndarray:
        return np.exp(a)

    def log(self, a: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(a)


def to_tf32(a: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 stored bits of mantissa, ties to even, as tensor cores read it."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    return ((bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)).view(np.float32)


def ordered_sum(a: np.ndarray, axis: int, order: str) -> np.ndarray:
    """Sum along ``axis`` in a stated order, each addition rounded to the dtype of ``a``."""
    a = np.moveaxis(a, axis, 0)  # [count, ...]
    count = len(a)
    if count == 0:
        return np.zeros(a.shape[1:], a.dtype)
    if order == "pairwise":
        while len(a) > 1:
            a = _padded(a, 2)
            a = a[0::2] + a[1::2]
        return a[0, ...]
    if order.startswith("lanes"):
        lanes = int(order[5:])
        if count > lanes:
            rows = _padded(a, lanes)
            rows = rows.reshape(len(rows) // lanes, lanes, *a.shape[1:])
            return ordered_sum(_running(rows, range(len(rows))), 0, "pairwise")
    if order == "scattered":
        return _running(a, np.argsort([(7919 * (k + 1)) % 10007 for k in range(count)], kind="stable").tolist())
    return _running(a[::-1] if order == "backward" else a, range(count))


def _padded(a: np.ndarray, multiple: int) -> np.ndarray:
    """Zeros after a, so that its length is a multiple."""
    missing = -len(a) % multiple
    return np.concatenate([a, np.zeros((missing, *a.shape[1:]), a.dtype)]) if missing else a


def _running(a: np.ndarray, turn: Sequence[int]) -> np.ndarray:
    """A sequential sum along the first axis, in this turn: one addition after the other.

    Where a term is many numbers that lie together, whole terms are added, up to a hundred times as fast; elsewhere
    ``accumulate``, which is defined as the same.
    """
    if a[0].size >= WHOLE and abs(a.strides[0]) > min(map(abs, a.strides[1:])):
        total = a[turn[0]].copy()
        for k in turn[1:]:
            np.add(total, a[k], out=total)
        return total
    ordered = a if turn == range(len(a)) else a[turn]
    return np.add.accumulate(ordered, axis=0, dtype=a.dtype)[-1, ...]
