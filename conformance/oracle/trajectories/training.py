"""Steps of AdamW in any arithmetic (fixtures/trajectories/README.md, "One step").

AdamW is Algorithm 2 of arXiv:1711.05101 as PyTorch and optax have it: the decay is multiplied by the learning rate::

    m, v = b1 m + (1 - b1) g, b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from conformance.cases.trajectories.model import OPTIMIZER, decays
from conformance.oracle.arithmetic import Arithmetic, Array, Parameters, Scalar
from conformance.oracle.balls import BallArithmetic
from conformance.oracle.trajectories.transformer import loss_and_gradients


@dataclass(frozen=True)
class State:
    """What a step takes from the step before it: the weights and both moments, each under the weights' names."""

    weights: Mapping[str, Array]
    first: Mapping[str, Array]
    second: Mapping[str, Array]


@dataclass(frozen=True)
class Step:
    """What a step gives: the loss before it, the norms of each weight's gradient and of all, and the state after it."""

    loss: Scalar
    norms: Mapping[str, Scalar]
    norm: Scalar
    state: State


class Balls(BallArithmetic):
    """Ball arithmetic in which a ball under a root may reach below 0, as that of a square around 0 does."""

    @staticmethod
    def sqrt(a: Array) -> Array:
        return np.frompyfunc(lambda ball: ball.nonnegative_part().sqrt(), 1, 1)(a)


def start(weights: Mapping[str, np.ndarray], A: Arithmetic) -> State:
    """The state before the first step: both moments are zero."""
    held = {name: A.array(value) for name, value in weights.items()}
    zeros = {name: A.array(np.zeros(value.shape)) for name, value in weights.items()}
    return State(held, zeros, zeros)


def adamw_step(state: State, batch: np.ndarray, number: int, p: Parameters, A: Arithmetic) -> Step:
    """One step.

    Args:
        batch: integers ``[batch, seq + 1]``: each position's target is the token after it.
        number: of the step, the first being 1.
        p: a dialect's parameters, with streams.
    """
    loss, gradients = loss_and_gradients(state.weights, batch[:, :-1], batch[:, 1:], p, A)
    squares = [_square(value, A) for value in gradients.values()]
    norms = {name: A.sqrt(square)[0] for name, square in zip(gradients, squares, strict=True)}
    total = A.sqrt(A.sum(np.stack(squares), 0))[0]
    return Step(loss, norms, total, adamw(state, gradients, number, A))


def train(
    weights: Mapping[str, np.ndarray], tokens: np.ndarray, steps: int, p: Parameters, A: Arithmetic
) -> Iterator[Step]:
    """Some steps, from weights and batches ``[steps, batch, seq + 1]``."""
    state = start(weights, A)
    for number, batch in enumerate(tokens[:steps], 1):
        step = adamw_step(state, batch, number, p, A)
        state = step.state
        yield step


def _square(gradient: Array, A: Arithmetic) -> Array:
    """The sum of the squares of all elements, ``[1]``."""
    flat = gradient.reshape(1, -1)
    return A.sum(flat * flat, -1)


def _power(base: float, exponent: int, A: Arithmetic) -> Scalar:
    """By products, which every arithmetic rounds in the same way on every machine."""
    value = A.constant(1)
    for _ in range(exponent):
        value = value * A.constant(base)
    return value


def adamw(state: State, gradients: Mapping[str, Array], number: int, A: Arithmetic) -> State:
    """The update of step ``number``."""
    rests = tuple(A.constant(1) - _power(OPTIMIZER[beta], number, A) for beta in ("beta1", "beta2"))
    b1, b2, one = A.constant(OPTIMIZER["beta1"]), A.constant(OPTIMIZER["beta2"]), A.constant(1)
    weights, first, second = dict[str, Array](), dict[str, Array](), dict[str, Array]()
    for name, g in gradients.items():
        first[name] = state.first[name] * b1 + g * (one - b1)
        second[name] = state.second[name] * b2 + g * g * (one - b2)
        weights[name] = _updated(name, state.weights[name], first[name], second[name], rests, A)
    return State(weights, first, second)


def _updated(name: str, w: Array, m: Array, v: Array, rests: tuple[Scalar, ...], A: Arithmetic) -> Array:
    """The weight after the update, in one of two orders that implementations have."""
    one, rate, eps = A.constant(1), A.constant(OPTIMIZER["learning_rate"]), A.constant(OPTIMIZER["adam_eps"])
    decay = A.constant(OPTIMIZER["weight_decay"] if decays(name) else 0.0)
    rest1, rest2 = rests
    if A.style.reciprocal:  # as PyTorch does it
        root = A.sqrt(np.full((1,), rest2, dtype=w.dtype))[0]
        return w * (one - rate * decay) - (rate / rest1) * (m / (A.sqrt(v) / root + eps))
    return w - rate * (m / rest1 / (A.sqrt(v / rest2) + eps) + decay * w)
