"""The operations that the formulas ask of an arithmetic.

`formulas` and `residual` are written once and evaluated in several arithmetics: `balls.BallArithmetic` gives the true
values, `floats.FloatArithmetic` the honest errors, and `floats.Quick` fast float64. The formulas do sums of products
and elementary functions by the methods below; they add, subtract, multiply and divide arrays by NumPy's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from conformance.oracle.style import Style

Array = np.ndarray
"""float32 or float64 in rounded arithmetic; ``object`` in ball arithmetic, where each element is an ``arb``."""
Scalar = Any
"""One element of such an array. NumPy's types don't know ``arb`` as an operand, so this can't be narrower."""
Parameters = Mapping[str, Any]
"""A dialect's parameters, with ``streams`` (docs/mathematics.md, "Dialects")."""
Pullback = Callable[[Array], Array]
"""Maps the cotangent of a value to the cotangent of its argument."""


class Arithmetic(Protocol):
    """Numbers, the elementary functions, sums, and the places where a contract rounds.

    The methods of the last group round their argument to the dtype of the activations if the contract and the style
    say so, and return it unchanged otherwise; in ball arithmetic all of them return their argument.
    """

    @property
    def style(self) -> Style:
        """The honest choices that this evaluation makes."""
        ...

    @property
    def mixes(self) -> bool:
        """Whether mixing is done in the dtype of the activations, so that the two terms of the output are rounded."""
        ...

    @property
    def separates(self) -> bool:
        """Whether the gradient of a division is made of two rounded parts."""
        ...

    @property
    def rounds_gates(self) -> bool:
        """Whether every step of a gate is rounded to the dtype of the activations."""
        ...

    # Numbers

    def constant(self, value: float) -> Scalar:
        """The number ``value``, which every arithmetic holds as its float64 or float32."""
        ...

    def array(self, values: np.ndarray) -> Array:
        """The elements of ``values`` as numbers of this arithmetic."""
        ...

    # Elementary functions of every element

    def exp(self, a: Array) -> Array: ...

    def log(self, a: Array) -> Array: ...

    def sqrt(self, a: Array) -> Array: ...

    def is_zero(self, a: Array) -> Array:
        """True where an element is exactly 0."""
        ...

    def sigmoid_and_rest(self, z: Array) -> tuple[Array, Array]:
        """sigmoid(z) and 1 - sigmoid(z)."""
        ...

    # Comparisons

    def maximum_along(self, a: Array, axis: int) -> Array:
        """The maximum along ``axis``, which keeps length 1; the formulas subtract it before an exponential."""
        ...

    def first_equal(self, a: Array, largest: Array, axis: int) -> np.ndarray:
        """True at the one entry along ``axis`` that `maximum_along` chose."""
        ...

    def at_least(self, a: Array, floor: Scalar) -> tuple[Array, np.ndarray]:
        """max(a, floor), and where ``a`` is above ``floor``."""
        ...

    def clip(self, a: Array, limit: Scalar) -> tuple[Array, np.ndarray]:
        """``a`` clipped to [-limit, limit], and where it was within."""
        ...

    def within(self, a: Array, limit: float) -> bool:
        """Whether all of |a| is at most ``limit``."""
        ...

    # Sums

    def sum(self, a: Array, axis: int) -> Array: ...

    def sum_exp(self, level: Array, axis: int) -> Array:
        """The sum of exp(level) along ``axis``, which keeps length 1."""
        ...

    def log_softmax(self, logits: Array, axis: int) -> Array: ...

    def contract(self, a: Array, b: Array, projection: bool = False) -> Array:
        """The matrix product ``[t, k] @ [k, m]``; ``projection`` marks those that the contract ``tf32`` rounds."""
        ...

    def sum_tokens(self, a: Array) -> Array:
        """The sum along the last axis, which runs over tokens."""
        ...

    def sum_in_activation(self, a: Array, axis: int) -> Array:
        """A sum whose every addition is rounded to the dtype of the activations."""
        ...

    def add_parts(self, parts: list[Array]) -> Array:
        """The sum of the parts of a gradient."""
        ...

    # The same arithmetic for one part of the layer

    def of_matrix(self, p: Parameters) -> Arithmetic:
        """The arithmetic of Sinkhorn's passes."""
        ...

    def wide(self) -> Arithmetic:
        """The arithmetic with coefficients and mixing in the working precision."""
        ...

    # Roundings (docs/mathematics.md, "Precision")

    def act(self, a: Array) -> Array:
        """Rounds a value of the coefficients."""
        ...

    def mix(self, a: Array) -> Array:
        """Rounds a value of the mixing."""
        ...

    def store(self, a: Array) -> Array:
        """Rounds what a layer hands on."""
        ...

    def weight(self, a: Array) -> Array:
        """Rounds a weight, or its gradient."""
        ...

    def logits(self, a: Array) -> Array:
        """Rounds the logits of a gate or of the matrix, and their gradient."""
        ...

    def product(self, a: Array) -> Array:
        """Rounds the products of the mixing before they are summed in a gradient."""
        ...

    def gate_product(self, a: Array) -> Array:
        """Rounds the products of the coefficients before they are summed in a gradient."""
        ...

    def gate_step(self, a: Array) -> Array:
        """Rounds one step of a gate or of its derivative."""
        ...

    def round_matrix(self, a: Array) -> Array:
        """Rounds one step of Sinkhorn's passes."""
        ...
