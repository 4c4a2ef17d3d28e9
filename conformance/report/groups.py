"""Failures in groups: what belongs together, the first in the order of the computation, and what only follows from it.

A run may fail in hundreds of checks for one reason. Those of one stage and one tensor are a group, which names its
families and dtypes and repeats its smallest item. Where a stage that another one is made of fails already, in the same
dtypes and dialects, the other's failures follow from it and say nothing new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from conformance.judge.item import Outcome
from conformance.judge.rule import GOOD
from conformance.report.read import CheckLine

ORDER = ("expand", "residual_matrix", "coefficients", "pre", "post", "layer", "head", "reduce", "stack")
"""The stages in the order of the computation."""
PART_OF = {
    "residual_matrix": ("coefficients", "layer", "stack"),
    "coefficients": ("pre", "layer", "stack"),
    "pre": ("layer", "stack"),
    "post": ("layer", "stack"),
    "layer": ("stack",),
    "expand": ("stack",),
    "reduce": ("stack",),
}
"""The stages that compute a stage too. The stage ``post`` is handed its coefficients, so it doesn't compute them."""


@dataclass(frozen=True)
class Failure:
    """One check that failed, and the item that it is of.

    Attributes:
        family: of the case; empty where a report doesn't say.
        elements: numbers that the item hands over; the least of a group is the easiest to look at.
        ratio: the error as a fraction of the bound, infinite where there is no figure.
    """

    implementation: str
    case: str
    family: str
    stage: str
    x: str
    dialect: str
    tensor: str
    verdict: str
    mode: str
    ratio: float
    elements: int
    message: str
    reproduce: str

    @property
    def gradient(self) -> bool:
        return self.tensor.startswith("d/")


@dataclass
class Group:
    """The failures of one tensor of one stage, and of an implementation.

    Attributes:
        follows: the stage whose failures these follow from; empty where they stand for themselves.
    """

    implementation: str
    stage: str
    tensor: str
    failures: list[Failure] = field(default_factory=list[Failure])
    follows: str = ""

    @property
    def smallest(self) -> Failure:
        """Of the item with the fewest numbers; called plainly, where that fails too."""
        return min(self.failures, key=lambda f: (bool(f.mode), f.elements, f.case))

    @property
    def worst(self) -> Failure:
        return max(self.failures, key=lambda f: f.ratio)

    @property
    def items(self) -> int:
        return len({(f.case, f.x, f.reproduce) for f in self.failures})

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f.x for f in self.failures))

    @property
    def dialects(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f.dialect for f in self.failures))

    @property
    def families(self) -> tuple[str, ...]:
        """Those with most failures first."""
        return tuple(name for name, _ in Counter(f.family for f in self.failures if f.family).most_common())

    @property
    def verdicts(self) -> tuple[str, ...]:
        return tuple(name for name, _ in Counter(f.verdict for f in self.failures).most_common())

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that it fails in; empty where the plain call fails."""
        plain = any(not f.mode for f in self.failures)
        return () if plain else tuple(dict.fromkeys(f.mode for f in self.failures))


def of_outcomes(outcomes: Iterable[Outcome]) -> list[Failure]:
    """The failing checks of a run."""
    return [
        Failure(
            o.implementation, o.case, o.family, o.stage, o.x, o.dialect, check.tensor, check.verdict, check.mode,
            check.ratio, o.elements, check.message, o.reproduce,
        )
        for o in outcomes
        for check in o.failed
    ]  # fmt: skip


def of_lines(checks: Iterable[CheckLine]) -> list[Failure]:
    """The failing checks of a report."""
    return [
        Failure(
            c.implementation, c.case, c.family, c.stage, c.x, c.dialect, c.tensor, c.verdict, c.mode,
            float("inf") if c.ratio is None else c.ratio, c.elements, c.message, c.reproduce,
        )
        for c in checks
        if c.verdict not in GOOD
    ]  # fmt: skip


def grouped(failures: Sequence[Failure]) -> list[Group]:
    """The groups of each implementation, in the order of the computation; what follows comes after what it is from."""
    groups: dict[tuple[str, str, str], Group] = {}
    for f in failures:
        groups.setdefault(
            (f.implementation, f.stage, f.tensor), Group(f.implementation, f.stage, f.tensor)
        ).failures += [f]
    names = list(dict.fromkeys(f.implementation for f in failures))
    ordered = sorted(groups.values(), key=lambda g: (names.index(g.implementation), *_place(g)))
    leaders: list[Group] = []
    for group in ordered:
        group.follows = next((leader.stage for leader in leaders if _follows(group, leader)), "")
        if not group.follows:
            leaders.append(group)
    return sorted(ordered, key=lambda g: (names.index(g.implementation), bool(g.follows)))


def _place(group: Group) -> tuple[int, bool]:
    known = ORDER.index(group.stage) if group.stage in ORDER else len(ORDER)
    return known, group.tensor.startswith("d/")


def _follows(group: Group, leader: Group) -> bool:
    """Whether the stage of a group computes what fails in an earlier one, and fails no wider than that."""
    return (
        group.implementation == leader.implementation
        and group.stage in PART_OF.get(leader.stage, ())
        and set(group.dtypes) <= set(leader.dtypes)
        and set(group.dialects) <= set(leader.dialects)
        and (group.tensor.startswith("d/") or not leader.tensor.startswith("d/"))
        and bool(leader.modes) <= bool(group.modes)
    )
