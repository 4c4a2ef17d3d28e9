"""The true values of a size: float64, a tile of tokens at a time.

Tokens depend on each other only in the gradients of the weights, which are sums over them. So a tile is evaluated by
itself, by the formulas of the oracle in an arithmetic of its own (`Wide`: float64 with the sums of BLAS), and the
weights' gradients of all tiles are added with compensation (Neumaier).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from conformance.oracle.evaluate import evaluate
from conformance.oracle.floats import Quick
from conformance.questions.sizes.tensors import OPTIONS, Tensors, tiles


class Wide(Quick):
    """float64 whose sums are the library's."""

    def sum(self, a: np.ndarray, axis: int) -> np.ndarray:
        return np.sum(a, axis)

    def contract(self, a: np.ndarray, b: np.ndarray, projection: bool = False) -> np.ndarray:
        del projection
        return a @ b


class Compensated:
    """A sum of arrays whose error doesn't grow with their number (Neumaier's variant of Kahan's summation)."""

    def __init__(self, first: np.ndarray):
        self._total, self._lost = first.copy(), np.zeros_like(first)

    def add(self, term: np.ndarray) -> None:
        total = self._total + term
        larger = np.abs(self._total) >= np.abs(term)
        self._lost += np.where(larger, (self._total - total) + term, (term - total) + self._total)
        self._total = total

    @property
    def value(self) -> np.ndarray:
        return self._total + self._lost


@dataclass
class Truth:
    """What a size comes to.

    Attributes:
        tokens: ``<output>``, ``d/<input>`` and ``m/<input>`` ``[T, …]`` of everything that has tokens.
        sums: ``d/<weight>``.
        scales: the largest magnitude of each output and gradient.
    """

    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def scales(self) -> dict[str, float]:
        tensors = {**{k: v for k, v in self.tokens.items() if not k.startswith("m/")}, **self.sums}
        return {name: float(np.max(np.abs(value), initial=0.0)) for name, value in tensors.items()}


def evaluated(
    tensors: Tensors, inputs: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray], arithmetic: object
) -> dict[str, np.ndarray]:
    """Outputs, gradients and magnitudes of some tokens in any arithmetic of the oracle."""
    given = {**inputs, **tensors.constants}
    options = OPTIONS.get(tensors.stage, {})
    return evaluate(tensors.stage, given, cotangents, tensors.parameters, options, arithmetic)  # type: ignore[arg-type]


def of_weights(tensors: Tensors, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients that are sums over tokens."""
    names = [f"d/{name}" for name in tensors.weights]
    return {name: values[name] for name in names if name in values}  # u doesn't depend on the weights of post and H


def per_token(tensors: Tensors, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Everything that has a value for each token."""
    return {k: v for k, v in values.items() if k.removeprefix("d/") not in tensors.weights}


Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]
"""Makes an empty array for a name, a shape and a dtype."""


def in_memory(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    del name
    return np.empty(shape, dtype)


def truth(tensors: Tensors, threads: int = 1, allocate: Allocate = in_memory) -> Truth:
    """The true values of all tokens.

    Args:
        threads: tiles that are evaluated at a time.
        allocate: where the values of tokens are put. Magnitudes are float32: they are an allowance.
    """
    result, sums = Truth(), dict[str, Compensated]()

    def tile(bounds: tuple[int, int]) -> Tile:
        start, stop = bounds
        values = evaluated(tensors, tensors.inputs_at(start, stop), tensors.cotangents_at(start, stop), Wide())
        return start, stop, values

    with ThreadPoolExecutor(threads) as pool:
        for start, stop, values in _ahead(pool, tile, list(tiles(tensors)), threads):
            for name, value in per_token(tensors, values).items():
                if name not in result.tokens:
                    dtype = np.dtype(np.float32 if name.startswith("m/") else np.float64)
                    result.tokens[name] = allocate(name, (tensors.size.tokens, *value.shape[1:]), dtype)
                result.tokens[name][start:stop] = value
            for name, value in of_weights(tensors, values).items():
                if name in sums:
                    sums[name].add(value)
                else:
                    sums[name] = Compensated(value)
    result.sums = {name: total.value for name, total in sums.items()}
    return result


Tile = tuple[int, int, dict[str, np.ndarray]]


def _ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[tuple[int, int]], Tile],
    ranges: Sequence[tuple[int, int]],
    threads: int,
) -> Iterator[Tile]:
    """Results in their order, no more of them at a time than there are threads, so that memory stays bounded."""
    waiting = []
    for bounds in ranges:
        waiting.append(pool.submit(function, bounds))
        if len(waiting) > threads:
            yield waiting.pop(0).result()
    for result in waiting:
        yield result.result()
