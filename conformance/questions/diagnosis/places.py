"""From which size on an implementation is wrong, or at which sizes: measured by asking it more of them.

A failing size is made smaller, one number after the other, as long as it fails. What can't be made smaller matters. A
bisection finds where it begins, and sizes around that say whether it is a threshold, a multiple or one number alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from conformance.cases.dialects import Dialect
from conformance.implementations.calling import called
from conformance.interface import Implementation
from conformance.judge.rule import is_of_numbers, wide
from conformance.questions.sizes.design import Size
from conformance.questions.sizes.item import SizeItem, sized
from conformance.questions.sizes.judging import judged
from conformance.questions.sizes.truth import truth

SMALL = {"tokens": 2, "batch": 1, "seq": 2, "dim": 12, "streams": 4}
"""Numbers that the golden cases have too, so that nothing about them is special."""
WORDS = {
    "tokens": "tokens",
    "batch": "rows of a batch",
    "seq": "positions in a sequence",
    "dim": "C",
    "streams": "streams",
}
ONE = {
    "tokens": "only for one token alone",
    "seq": "only for sequences of one token",
    "batch": "only for one row of a batch",
    "streams": "only with one stream",
}
NOT_ALONE = "where a token isn't alone: its result depends on the other tokens"
MOST_STEPS = 40


LOOSE = {"float64": 2.0**-20, "float32": 2.0**-15, "bfloat16": 2.0**-4, "float16": 2.0**-7}
"""Errors beyond this fraction of a tensor's largest value are no roundings, whatever the order of its sums."""


class Over(Exception):
    """The time is over."""


@dataclass
class Asked:
    """Asks sizes of one stage, row and dtype; each once, until the time is over.

    The bound of a size takes sixteen honest evaluations. Where a mistake is larger than any rounding, the truth alone
    is enough to see it.

    Attributes:
        gradient: whether a gradient fails, and not an output.
        said: the best answer so far, for where the time ends too early.
    """

    implementation: Implementation
    row: Dialect
    stage: str
    x: str
    gradient: bool
    ends: float
    coarse: bool = True
    said: str = ""
    known: dict[Size, bool] = field(default_factory=dict[Size, bool])

    def fails(self, size: Size) -> bool:
        """Whether a size fails when it is called plainly; one that isn't claimed passes.

        Raises:
            Over: the time is over.
        """
        if size not in self.known:
            if time.monotonic() > self.ends:
                raise Over
            item = sized(size, self.row, self.stage, self.x, self.implementation.capabilities)
            if item is None:
                return False
            self.known[size] = self._coarsely(item) if self.coarse else self._exactly(item)
        return self.known[size]

    def _coarsely(self, item: SizeItem) -> bool:
        cotangents = item.cotangents() if self.implementation.capabilities.gradients else None
        try:
            outputs, gradients = called(self.implementation, item.stage, item.inputs(), item.config, cotangents)
        except Exception:
            return True
        true = truth(item.tensors)
        returned = {f"d/{k}": v for k, v in gradients.items()} if self.gradient else outputs
        return any(self._off(value, {**true.tokens, **true.sums}.get(name)) for name, value in returned.items())

    def _off(self, value: Any, true: np.ndarray | None) -> bool:
        if true is None:
            return False
        if not is_of_numbers(value) or value.size != true.size:
            return True
        error = np.abs(wide(value).reshape(true.shape) - true)
        return not float(np.max(error, initial=0.0)) <= LOOSE[self.x] * float(np.max(np.abs(true), initial=0.0))

    def _exactly(self, item: SizeItem) -> bool:
        try:
            outcome = judged(self.implementation, item, proof=0.0)
        except ArithmeticError:  # an honest evaluation isn't finite
            return False
        return any(not check.mode for check in outcome.failed)


def place(asked: Asked, size: Size) -> str:
    """Where it fails, in words: ``only from 13 tokens on``; empty where the size doesn't fail, or all do."""
    if not asked.fails(size):
        asked.coarse, asked.known = False, {}
        if not asked.fails(size):
            return ""
    said: list[str] = []
    size = _without_iterations(asked, size, said)
    size, axis = _one_row(asked, size)
    needed = []
    for name in ("streams", "dim", axis):
        smaller = _with(size, name, SMALL[name])
        if _of(size, name) != SMALL[name] and asked.fails(smaller):
            size = smaller
        elif _of(size, name) != SMALL[name]:
            needed.append(name)
    if not needed and not said:
        return "" if asked.fails(_with(size, "tokens", 1)) else NOT_ALONE
    product = _elements(asked, size, needed)
    said += [product] if product else [_words(asked, size, name) for name in needed]
    return " and ".join(said)


def _without_iterations(asked: Asked, size: Size, said: list[str]) -> Size:
    """The size with the row's own number of iterations, where it fails with these too; else it is said."""
    if size.iterations is None:
        return size
    own = replace(size, iterations=None)
    if asked.fails(own):
        return own
    said.append(f"only with {size.iterations} iterations, not with {asked.row.parameters['iterations']}")
    return size


def _one_row(asked: Asked, size: Size) -> tuple[Size, str]:
    """The tokens in one row or in one column, and which number of them matters."""
    row, column = replace(size, batch=1, seq=size.tokens), replace(size, batch=size.tokens, seq=1)
    in_row, in_column = asked.fails(row), asked.fails(column)
    if in_row and in_column:
        return row, "tokens"
    if in_row:
        return row, "seq"
    return (column, "batch") if in_column else (size, "seq")


def _of(size: Size, name: str) -> int:
    return size.tokens if name == "tokens" else int(getattr(size, name))


def _with(size: Size, name: str, value: int) -> Size:
    if name == "tokens":
        return replace(size, batch=1, seq=value)
    return replace(size, **{name: value})


def _elements(asked: Asked, size: Size, needed: list[str]) -> str:
    """Whether the number of elements of x is what matters, where C and another factor of it can't be made smaller.

    It is where the smallest C that fails and the smallest other factor come to the same number of elements.
    """
    if len(needed) != 2 or "dim" not in needed or any(_of(size, name) < SMALL[name] for name in needed):
        return ""
    most_passing, least_failing = 0, size.elements
    for name in needed:
        value = _of(size, name)
        first = _threshold(lambda number, name=name: asked.fails(_with(size, name, number)), SMALL[name], value)
        each = size.elements // value
        most_passing, least_failing = max(most_passing, (first - 1) * each), min(least_failing, first * each)
    if most_passing >= least_failing:
        return ""
    if least_failing - most_passing == 1:
        return f"only where x has more than {most_passing:,} elements"
    return f"only where x has more than some {most_passing:,} to {least_failing - 1:,} elements"


def _words(asked: Asked, size: Size, name: str) -> str:
    """How a number that matters matters."""

    def fails(value: int) -> bool:
        return asked.fails(_with(size, name, value))

    word, value = "C" if name == "dim" else WORDS[name], _of(size, name)
    if value < SMALL[name]:
        return _exactly(value, name)
    asked.said = f"only from more than {SMALL[name]} and at most {value:,} {word} on"
    first = _threshold(fails, SMALL[name], value)
    asked.said = _from(first, name)
    if fails(first + 1) or (name == "streams" and not fails(2 * first)):
        return _from(first, name) if fails(first + 1) else _exactly(first, name)
    if fails(2 * first):
        divisor = _divisor(fails, first)
        return f"only where {_subject(name)} is divisible by {divisor}"
    return _exactly(first, name)


def _threshold(fails: Callable[[int], bool], passing: int, failing: int) -> int:
    """A number that fails and whose predecessor passes, between one that passes and one that fails."""
    for _ in range(MOST_STEPS):
        if failing - passing <= 1:
            break
        middle = _rounder(passing, failing)
        if fails(middle):
            failing = middle
        else:
            passing = middle
    return failing


def _rounder(low: int, high: int) -> int:
    """The roundest number between two, so that multiples of blocks are met: the one that most powers of two divide."""
    step = 1
    while high - low > 2 * step and (low // (2 * step) + 1) * 2 * step < high:
        step *= 2
    return (low // step + 1) * step


def _divisor(fails: Callable[[int], bool], first: int) -> int:
    """The largest number that divides all that fails, from a failing multiple downwards."""
    for candidate in _divisors(first):
        if fails(3 * candidate) and not fails(3 * candidate + 1):
            return candidate
    return first


def _divisors(number: int) -> Iterator[int]:
    """Its halves, smallest first, from 2 on."""
    found = [number >> k for k in range(number.bit_length()) if number % (1 << k) == 0 and number >> k > 1]
    yield from reversed(found)


def _subject(name: str) -> str:
    return {"dim": "C", "tokens": "the number of tokens", "streams": "the number of streams"}.get(
        name, f"the number of {WORDS[name]}"
    )


def _from(first: int, name: str) -> str:
    return f"only from C = {first:,} on" if name == "dim" else f"only from {first:,} {WORDS[name]} on"


def _exactly(value: int, name: str) -> str:
    if value == 1 and name in ONE:
        return ONE[name]
    return f"only at C = {value}" if name == "dim" else f"only with {value} {WORDS[name]}"
