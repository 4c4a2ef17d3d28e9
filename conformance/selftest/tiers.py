"""The ways in which the suite looks at an implementation, each with its items and what is said of a failure.

A mistake of *where* is measured in one tier after the other, the cheapest first, until one kills it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from conformance.cases.case import Item
from conformance.cases.dialects import published
from conformance.interface import Capabilities, Implementation
from conformance.judge.item import Outcome, order, run_item
from conformance.judge.modes import fail_differences
from conformance.judge.modes_plan import Plan, key_of
from conformance.judge.rule import Check
from conformance.questions.sizes.design import largest_here, sizes
from conformance.questions.sizes.item import SizeItem, sized
from conformance.questions.sizes.judging import judged
from conformance.questions.sizes.tensors import STAGES_OF_SIZES
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


DETAILS = re.compile(r"layout: [^+]*[^+ ]")
"""What a mode says of its layout: the arrays to blame, and how each lies in memory."""


class Modes:
    """The same items in modes (`judge.modes_plan`); other bits in a repeated call are a failure."""

    name = "modes"

    def __init__(self, quick: bool):
        self._quick = quick
        self._plan = Plan(items_of_mutants(quick))

    def items(self, dtype: str, claimed: Capabilities) -> Iterable[Item]:
        return Golden(self._quick).items(dtype, claimed)

    def judge(self, implementation: Implementation, item: Item) -> Outcome:
        outcome = run_item(implementation, item, plan=self._plan)
        fail_differences(outcome)
        return outcome

    def place(self, item: Item, check: Check) -> str:
        return DETAILS.sub("layout", check.mode)


REPEATS = 2000
"""Enough, over the stages, for what goes wrong in one call of 5,000."""


class Repeats:
    """The items that modes repeat, with more repeats: ``run --repeats 2000``."""

    name = "repeats"

    def __init__(self, quick: bool):
        self._quick = quick
        self._plan = Plan(items_of_mutants(quick), repeats=REPEATS)

    def items(self, dtype: str, claimed: Capabilities) -> Iterable[Item]:
        repeated = self._plan.schedule(claimed).repeated
        return [item for item in Golden(self._quick).items(dtype, claimed) if key_of(item) in repeated]

    def judge(self, implementation: Implementation, item: Item) -> Outcome:
        outcome = run_item(implementation, item, plan=self._plan)
        fail_differences(outcome)
        return outcome

    def place(self, item: Item, check: Check) -> str:
        return f"{REPEATS} calls"


ROWS = ("paper", "deepseek-v4", "liger", "transformer-engine")
"""Rows in which float32 is kept, with an eps in the sums and without, and columns first."""
NORM_WEIGHT = ("maxtext-v1", "mhc-lite")
"""Rows with a norm weight."""


@dataclass(frozen=True)
class Sizes:
    """Production sizes, those of ``run --sizes quick``, each stage of each in one row."""

    quick: bool
    folder: str
    """Where true values are kept, so that all mutants share them."""
    name: str = "sizes"

    def items(self, dtype: str, claimed: Capabilities) -> Iterable[SizeItem]:
        form = "short" if self.quick else "quick"
        for number, size in enumerate(sizes(form, largest_here(2))):
            rows = [published(ROWS[number % len(ROWS)]), published(NORM_WEIGHT[number % len(NORM_WEIGHT)])]
            for stage in STAGES_OF_SIZES:
                items = (sized(size, row, stage, dtype, claimed) for row in rows)
                yield from [item for item in items if item is not None][:1]

    def judge(self, implementation: Implementation, item: SizeItem) -> Outcome:
        return judged(implementation, item, self.folder)

    def place(self, item: SizeItem, check: Check) -> str:
        return ", ".join(filter(None, (item.size.id.removeprefix("size-"), check.mode)))


def tiers(quick: bool, folder: str) -> list[Tier]:
    """The tiers, the cheapest first.

    Args:
        quick: leave out most golden cases and sizes.
        folder: for true values that are made on the way.
    """
    return [Golden(quick), Modes(quick), Sizes(quick, folder), Repeats(quick)]
