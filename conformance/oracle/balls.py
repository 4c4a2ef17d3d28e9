"""Ball arithmetic on NumPy object arrays, and the correct rounding of balls to float64.

The arrays are containers only: every operation on their elements is python-flint's ``arb``, which
carries a proved error with each value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import flint
import numpy as np

from conformance.oracle.arithmetic import Array, Parameters
from conformance.oracle.style import Style

FIRST_PRECISION, LAST_PRECISION = 256, 4096
ENCLOSING_PRECISION, SMALL_RADIUS = 160, 2.0**-60
ZERO_RADIUS = 2.0**-200
"""It is small even beside an array of zeros."""

_EXP = np.frompyfunc(lambda a: a.exp(), 1, 1)
_LOG = np.frompyfunc(lambda a: a.log(), 1, 1)
_SQRT = np.frompyfunc(lambda a: a.sqrt(), 1, 1)
_SIGMOID = np.frompyfunc(lambda a: 1 / (1 + (-a).exp()), 1, 1)
_IS_ZERO = np.frompyfunc(lambda a: a.is_zero(), 1, 1)


class PrecisionExhausted(ArithmeticError):
    """A ball did not round to one float64 at the largest working precision."""


class NotRounded(ArithmeticError):
    """A ball does not round to one float64 at the present precision."""


class BallArithmetic:
    """The arithmetic of `formulas`: exact up to a proved error, no rounding contract."""

    mixes = separates = rounds_gates = False

    def __init__(self, style: Style | None = None):
        self.style = style or Style()

    @staticmethod
    def constant(value: Any) -> flint.arb:
        return flint.arb(value)

    @staticmethod
    def array(values: np.ndarray) -> Array:
        """Exact balls of float values (any float dtype; all of them are float64 exactly); balls stay as they are."""
        if np.asarray(values).dtype == object:
            return values
        flat = np.asarray(values).astype(np.float64).reshape(-1)
        balls = np.empty(flat.shape, dtype=object)
        balls[:] = [flint.arb(float(v)) for v in flat]
        return balls.reshape(np.shape(values))

    @staticmethod
    def exp(a: Array) -> Array:
        return _EXP(a)

    @staticmethod
    def log(a: Array) -> Array:
        return _LOG(a)

    @staticmethod
    def sqrt(a: Array) -> Array:
        return _SQRT(a)

    @staticmethod
    def is_zero(a: Array) -> Array:
        return _IS_ZERO(a)

    def sum(self, a: Array, axis: int) -> Array:
        if a.shape[axis] == 0:
            return np.full(np.delete(a.shape, axis), flint.arb(0), dtype=object)
        return np.add.reduce(a, axis=axis)

    def contract(self, a: Array, b: Array, projection: bool = False) -> Array:
        del projection
        if 0 in (*a.shape, *b.shape):
            return np.full((a.shape[0], b.shape[1]), flint.arb(0), dtype=object)
        left, right = flint.arb_mat(a.tolist()), flint.arb_mat(b.tolist())
        product = np.empty((a.shape[0], b.shape[1]), dtype=object)
        product[:] = (left * right).tolist()
        return product

    @staticmethod
    def maximum_along(a: Array, axis: int) -> Array:
        """The entry with the largest midpoint. It is only a shift: every value would give the same result."""
        if a.size == 0:
            return np.expand_dims(np.empty(np.delete(a.shape, axis), dtype=object), axis)
        index = np.argmax(_midpoints(a), axis=axis)
        return np.take_along_axis(a, np.expand_dims(index, axis), axis)

    @staticmethod
    def at_least(a: Array, floor: flint.arb) -> tuple[Array, Array]:
        above = np.asarray(np.frompyfunc(lambda v: _decide(v, floor), 1, 1)(a)).astype(bool)
        return np.where(above, a, np.full(a.shape, floor, object)), above

    @staticmethod
    def clip(a: Array, limit: flint.arb) -> tuple[Array, Array]:
        side = np.asarray(np.frompyfunc(lambda v: _side(v, limit), 1, 1)(a)).astype(int)
        bounded = np.where(side > 0, np.full(a.shape, limit, object), np.full(a.shape, -limit, object))
        return np.where(side == 0, a, bounded), side == 0

    @staticmethod
    def within(a: Array, limit: float) -> bool:
        return a.size == 0 or float(np.abs(_midpoints(a)).max()) <= limit

    @staticmethod
    def first_equal(a: Array, largest: Array, axis: int) -> np.ndarray:
        """True at the entries of ``a`` that `maximum_along` chose."""
        if a.size == 0:
            return np.zeros(a.shape, bool)
        index = np.expand_dims(np.argmax(_midpoints(a), axis=axis), axis)
        chosen = np.zeros(a.shape, bool)
        np.put_along_axis(chosen, index, True, axis)
        return chosen

    def sum_exp(self, level: Array, axis: int) -> Array:
        return np.expand_dims(self.sum(self.exp(level), axis), axis)

    def log_softmax(self, logits: Array, axis: int) -> Array:
        return logits - self.log(self.sum_exp(logits, axis))

    def act(self, a: Array) -> Array:
        return a

    mix = store = weight = logits = product = gate_product = round_matrix = gate_step = act

    def sum_tokens(self, a: Array) -> Array:
        return self.sum(a, -1)

    def sum_in_activation(self, a: Array, axis: int) -> Array:
        return self.sum(a, axis)

    def of_matrix(self, p: Parameters) -> BallArithmetic:
        del p
        return self

    def wide(self) -> BallArithmetic:
        return self

    def sigmoid_and_rest(self, z: Array) -> tuple[Array, Array]:
        """sigmoid(z) and 1 - sigmoid(z)."""
        s = _SIGMOID(z)
        return s, self.constant(1) - s

    @staticmethod
    def add_parts(parts: list[Array]) -> Array:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def _is_nan(value: flint.arb) -> bool:
    return math.isnan(float(value))


def _decide(value: flint.arb, floor: flint.arb) -> bool:
    if value > floor or _is_nan(value):  # max(NaN, floor) is NaN
        return True
    if value <= floor:
        return False
    raise NotRounded("a guarded sum can't be told from its floor")


def _side(value: flint.arb, limit: flint.arb) -> int:
    """-1 below ``-limit``, 1 above ``limit``, 0 between them."""
    if value > limit:
        return 1
    if value < -limit:
        return -1
    if abs(value) <= limit or _is_nan(value):  # at the limit a logit has its gradient still
        return 0
    raise NotRounded("a logit can't be told from its limit")


def _midpoints(a: Array) -> np.ndarray:
    """The midpoints as floats; they only choose a shift and are never stored."""
    return np.asarray(np.frompyfunc(float, 1, 1)(a)).astype(np.float64)


def _rounded(ball: flint.arb, infinite: bool) -> float:
    """The one float64 that every point of the ball rounds to, ties to even; NaN for an infinity and NaN, if allowed."""
    if not ball.is_finite():
        if infinite and not ball.mid().is_finite():
            return math.nan
        raise NotRounded(f"{ball} isn't finite")
    if ball.rad().is_zero():
        return _exact_to_float(ball)
    low, high = _exact_to_float(ball.lower()), _exact_to_float(ball.upper())
    if low != high or math.isnan(low):
        raise NotRounded(f"{ball} doesn't round to one float64")
    return low


def _exact_to_float(point: flint.arb) -> float:
    mantissa, exponent = (int(v) for v in point.mid().man_exp())
    if exponent > -1000 and mantissa.bit_length() + exponent < 1000 and abs(exponent) < 900:
        # One division of integers, correctly rounded; a scaling by a power of two that stays normal is exact.
        return mantissa / (1 << -exponent) if exponent < 0 else float(mantissa << exponent)
    return float(Fraction(mantissa) * Fraction(2) ** exponent)


def to_float64(a: Array, infinite: bool = False) -> np.ndarray:
    """The correctly rounded float64 of every element; raises `NotRounded` if a ball is too wide.

    Args:
        infinite: elements may be infinite or NaN, and are NaN in the result.
    """
    flat = np.asarray(a, dtype=object).reshape(-1)
    return np.array([_rounded(v, infinite) for v in flat], dtype=np.float64).reshape(np.shape(a))


def enclosed(evaluate: Callable[[], dict[str, Array]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For every element the midpoint, rounded to float64, and how far from it the true value may be.

    It is several times faster than `certified`, since nothing need round to one float64: it is enough that balls are
    small beside the largest value of their array. The precision rises until they are.

    Raises:
        PrecisionExhausted: at `LAST_PRECISION` bits they aren't.
    """
    before, precision = flint.ctx.prec, ENCLOSING_PRECISION
    try:
        while precision <= LAST_PRECISION:
            flint.ctx.prec = precision
            found = {name: _enclosed(value) for name, value in evaluate().items()}
            if all(_small(*parts) for parts in found.values()):
                return {name: (middle, radius + np.spacing(np.abs(middle))) for name, (middle, radius) in found.items()}
            precision *= 2
    finally:
        flint.ctx.prec = before
    raise PrecisionExhausted(f"balls aren't small at {LAST_PRECISION} bits, the largest working precision")


def _enclosed(a: Array) -> tuple[np.ndarray, np.ndarray]:
    balls = np.asarray(a, dtype=object)
    radii = np.asarray(np.frompyfunc(lambda v: float(v.rad()), 1, 1)(balls)).astype(np.float64)
    return _midpoints(balls), radii


def _small(middles: np.ndarray, radii: np.ndarray) -> bool:
    largest = max(SMALL_RADIUS * float(np.max(np.abs(middles), initial=0.0)), ZERO_RADIUS)
    return bool(np.max(radii, initial=0.0) <= largest)


def certified(evaluate: Callable[[], dict[str, Array]], label: str, infinite: bool = False) -> dict[str, np.ndarray]:
    """Evaluates at rising precision until every ball rounds to one float64.

    Args:
        label: names the values in the error's message.
        infinite: elements may be infinite or NaN, and are NaN in the result. They must be so at two precisions, since
            an operation that isn't defined on all of a wide ball gives NaN too.

    Raises:
        PrecisionExhausted: at `LAST_PRECISION` bits some value is still undecided.
    """
    precision = FIRST_PRECISION
    before, coarser = flint.ctx.prec, None
    try:
        while True:
            flint.ctx.prec = precision
            try:
                rounded = {name: to_float64(value, infinite) for name, value in evaluate().items()}
                if not infinite or (coarser is not None and _agree(rounded, coarser)):
                    return rounded
                if precision >= LAST_PRECISION:
                    raise NotRounded("whether an element is finite changes with the precision")
                coarser = rounded
            except NotRounded as error:
                if precision >= LAST_PRECISION:
                    raise PrecisionExhausted(
                        f"{label}: undecided at {LAST_PRECISION} bits, the largest working precision: {error}"
                    ) from error
            precision *= 2
    finally:
        flint.ctx.prec = before


def _agree(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(value, b[name], equal_nan=True) for name, value in a.items())
