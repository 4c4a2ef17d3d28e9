"""The ways in which the suite looks at an implementation, each with its items and what is said of a failure.

A mistake of *where* is measured in one tier after the other, the cheapest first, until one kills it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from conformance.cases.case import Item
from conformance.interface import Capabilities, Implementation
from conformance.judge.item import Outcome, order, run_item
from conformance.judge.rule import Check
from conformance.selftest.measure import items_of_mutants


class Tier(Protocol):
    """One way to look."""

    @property
    def name(self) -> str:
        """Its word in the table."""
        ...

    def items(self, dtype: str, claimed: Capabilities) -> Iterable[Any]:
        """Everything that is handed to an implementation with x in this dtype, in the order of a run."""
        ...

    def judge(self, implementation: Implementation, item: Any) -> Outcome:
        """The verdict on one of them."""
        ...

    def place(self, item: Any, check: Check) -> str:
        """The mode or the size in which a check failed; empty where there is neither."""
        ...


@dataclass(frozen=True)
class Golden:
    """The golden cases, each called once, with gradients."""

    quick: bool
    name: str = "golden"

    def items(self, dtype: str, claimed: Capabilities) -> Iterable[Item]:
        return order(item for item in items_of_mutants(self.quick) if item.variant.x == dtype)

    def judge(self, implementation: Implementation, item: Item) -> Outcome:
        return run_item(implementation, item)

    def place(self, item: Item, check: Check) -> str:
        return ""


def tiers(quick: bool) -> list[Tier]:
    """The tiers, the cheapest first; ``quick`` leaves out most golden cases."""
    return [Golden(quick)]
