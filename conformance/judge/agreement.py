"""Compares implementations with one another on the same item, by the rule that holds against the oracle.

Each of two conforming results is within its bound of the true value, so that they differ by at most twice the bound: a
figure above 1 says that they can't both conform. It is measured on the arrays, not added up from both errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from conformance.cases.case import Item
from conformance.judge.item import Outcome
from conformance.judge.rule import allowance, wide


@dataclass
class Pair:
    """The worst figure of two implementations, and where it was."""

    tensors: int = 0
    ratio: float = 0.0
    where: str = ""

    def add(self, ratio: float, where: str) -> None:
        self.tensors += 1
        if ratio > self.ratio or not self.where:
            self.ratio, self.where = ratio, where


def distance(item: Item, tensor: str, a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| beyond the last roundings of both, as a fraction of twice the bound; for one tensor of one item.

    Elements whose true value isn't finite have no distance.
    """
    expected = item.expected[tensor]
    judged = np.isfinite(expected)
    magnitude = item.magnitude(tensor) if tensor.startswith("d/") else None
    parts = None if magnitude is None else magnitude[judged]
    allowed = allowance(a.dtype, item.variant.contract, expected[judged], parts)
    excess = float((np.abs(wide(a)[judged] - wide(b)[judged]) - 2 * allowed).max(initial=0.0))
    bound = 2 * item.bounds[tensor].bound
    return excess / bound if bound > 0 else (np.inf if excess > 0 else 0.0)


class Agreement:
    """Takes outcomes as they come and keeps the worst figure of each pair of implementations."""

    def __init__(self, items: Iterable[Item]):
        self._items = {(item.case.id, item.stage, item.variant.name): item for item in items}
        self._seen: dict[tuple[str, str, str], dict[str, dict[str, np.ndarray]]] = {}
        self.pairs: dict[frozenset[str], Pair] = {}
        """By both names, since their order among the outcomes of an item may differ from item to item."""

    def add(self, outcome: Outcome) -> None:
        """Compares with every implementation that ran this item before; takes the arrays out of the outcome."""
        values, outcome.values = outcome.values, {}
        if not values:
            return
        key = (outcome.case, outcome.stage, outcome.variant)
        item = self._items[key]
        others = self._seen.setdefault(key, {})
        for other, theirs in others.items():
            for tensor in values.keys() & theirs.keys():
                ratio = distance(item, tensor, theirs[tensor], values[tensor])
                pair = self.pairs.setdefault(frozenset((other, outcome.implementation)), Pair())
                pair.add(ratio, f"{outcome.case}, {outcome.stage}, {outcome.variant}, {tensor}")
        others[outcome.implementation] = values

    def lines(self, names: Iterable[str]) -> list[str]:
        """A line for each pair, in the order of ``names``."""
        lines: list[str] = []
        for a, b in combinations(names, 2):
            pair = self.pairs.get(frozenset((a, b)))
            if pair:
                lines.append(
                    f"{a} against {b}: at most {pair.ratio:.2f} of both bounds apart, over {pair.tensors} tensors "
                    f"(worst: {pair.where})"
                )
        return lines
