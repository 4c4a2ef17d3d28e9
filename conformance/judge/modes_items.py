"""An item with other values whose truth the file still has: its tokens stand in other places.

Every stage computes each token by itself, so that outputs and the gradients of activations move with the tokens. Those
of weights are sums over all tokens: they stay as they are while each token is there once, and are unknown otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from conformance.cases.case import Item
from conformance.stages import STAGES


@dataclass(frozen=True)
class Varied(Item):
    """An item with tokens in other places, or with fewer gradients asked for.

    Attributes:
        places: for each place, batch x seq flattened, the place in the file whose token stands there; none: its own.
        unasked: inputs and weights whose gradients aren't asked for.
        forward: no gradient is.
    """

    places: tuple[int, ...] = ()
    unasked: frozenset[str] = frozenset()
    forward: bool = False

    def inputs(self) -> dict[str, np.ndarray]:
        return {name: self._moved(name, value) for name, value in super().inputs().items()}

    def cotangents(self) -> dict[str, np.ndarray]:
        return {name: self._moved(name, value) for name, value in super().cotangents().items()}

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = len(set(self.places)) == len(self.places)
        known: dict[str, np.ndarray] = {}
        for tensor, value in super().expected.items():
            name = tensor.removeprefix("d/")
            asked = not self.forward and name not in self.unasked
            if name == tensor or (asked and (whole or self._has_tokens(name))):
                known[tensor] = self._moved(name, value)
        return known

    def magnitude(self, tensor: str) -> np.ndarray | None:
        value = super().magnitude(tensor)
        return None if value is None else self._moved(tensor.removeprefix("d/"), value)

    def _has_tokens(self, name: str) -> bool:
        return name not in STAGES[self.stage].weights and name in token_arrays(self)

    def _moved(self, name: str, value: np.ndarray) -> np.ndarray:
        if not self.places or value.ndim < 3 or name in STAGES[self.stage].weights:
            return value
        flat = value.reshape(-1, *value.shape[2:])  # [batch * seq, ...]
        return flat[list(self.places)].reshape(value.shape)


COTANGENT = "cotangent of "
"""Stands before an output's name where it names the output's cotangent."""


def array_names(item: Item) -> list[str]:
    """All arrays that a call hands over: inputs, weights and cotangents, in an order of their own."""
    entry = item.case.stages[item.stage]
    return [*entry.inputs, *entry.weights, *(COTANGENT + name for name in entry.outputs)]


def token_arrays(item: Item) -> frozenset[str]:
    """The inputs that have tokens: axes of batch and seq, and another one."""
    inputs = item.case.stages[item.stage].inputs
    return frozenset(name for name in inputs if item.case.tensors[f"input/{name}"].ndim >= 3)


def batch_and_seq(item: Item) -> tuple[int, int]:
    """How many rows and positions an item has; (0, 0) without an array of tokens."""
    shapes = [item.case.tensors[f"input/{name}"].shape for name in sorted(token_arrays(item))]
    return (shapes[0][0], shapes[0][1]) if shapes else (0, 0)


def rolled(item: Item, places: int, kept: int = 0) -> tuple[int, ...]:
    """Every token so many places further on, across the rows of the batch; none where there aren't two to move.

    Args:
        kept: the first so many stay in their place.
    """
    batch, seq = batch_and_seq(item)
    moved = batch * seq - kept
    if moved < 2:
        return ()
    places = places if places % moved else 1
    return (*range(kept), *(kept + (place - places) % moved for place in range(moved)))


def one_row(item: Item) -> tuple[int, ...]:
    """The last row of the batch in every row; of a batch of one, the last token in every place."""
    batch, seq = batch_and_seq(item)
    if batch > 1:
        return tuple((batch - 1) * seq + place % seq for place in range(batch * seq))
    return (seq - 1,) * seq if seq > 1 else ()


def streams_equal(item: Item, name: str) -> bool:
    """Whether an input ``[batch, seq, streams, dim]`` has the same streams at each token, so that one is enough."""
    value = item.case.tensors[f"input/{name}"]
    return value.ndim == 4 and value.shape[2] > 1 and bool((value == value[:, :, :1]).all())


def differentiated(item: Item) -> list[str]:
    """The inputs and weights whose gradients a call asks for."""
    entry = item.case.stages[item.stage]
    return [name for name in (*entry.inputs, *entry.weights) if name not in STAGES[item.stage].constants]


def unasked(item: Item, how: str) -> frozenset[str]:
    """The names without a gradient where ``how`` is ``x``: the streams; where it is ``rest``: all but the streams.

    None where nothing would be left to ask for, or nothing to leave out.
    """
    names = differentiated(item)
    streams = {name for name in names if name in ("x", "embedding")}
    rest = set(names) - streams
    if not streams or not rest:
        return frozenset()
    return frozenset({"x": streams, "rest": rest}.get(how, set[str]()))
