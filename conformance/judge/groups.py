"""Failures in groups: what belongs together, the first in the order of the computation, and what only follows from it.

A run may fail in hundreds of checks for one reason. Those of one stage and one tensor are a group, which names its
families and dtypes and repeats its smallest item. Where a stage that another one is made of fails already, and is right
in no dtype and dialect in which the other fails, the other's failures follow from it and say nothing new. A stage's
gradients follow from its outputs in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.judge.item import Outcome

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

MOST_NAMED = 5
"""Families, dialects and modes that a line names."""


@dataclass(frozen=True)
class Diagnosis:
    """What an implementation's failures come from.

    Attributes:
        cause: one sentence; empty where none was found.
        lines: what supports it, and what else was found.
    """

    implementation: str
    cause: str
    lines: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Failure:
    """One check that failed, and the item that it is of.

    Attributes:
        family: of the case; empty where a report doesn't say.
        elements: numbers that the item hands over; the least of a group is the easiest to look at.
        ratio: the error as a fraction of the bound, infinite where there is no figure.
        example: the element that is furthest off, in words; empty where there is none.
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
    example: str = ""

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
    def gradient(self) -> bool:
        return self.tensor.startswith("d/")

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
            check.ratio, o.elements, check.message, o.reproduce, example(check.worst),
        )
        for o in outcomes
        for check in o.failed
    ]  # fmt: skip


def example(worst: Sequence[Mapping[str, Any]]) -> str:
    """The first of the elements that are furthest off, in words."""
    for element in worst[:1]:
        got, due, error = (_number(element[name]) for name in ("actual", "expected", "error"))
        return f"{element['index']}: got {got}, expected {due}, off by {error}"
    return ""


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.9g}"


Where = tuple[str, str, str, str]
"""Implementation, stage, dtype of x and dialect."""


def clean(outcomes: Iterable[Outcome]) -> set[Where]:
    """Where something ran and nothing failed."""
    ran = [((o.implementation, o.stage, o.x, o.dialect), bool(o.failed)) for o in outcomes if not o.skipped]
    return {where for where, _ in ran} - {where for where, failed in ran if failed}


def grouped(failures: Sequence[Failure], right: Collection[Where] = ()) -> list[Group]:
    """The groups of each implementation, in the order of the computation; what follows comes after what it is from.

    Args:
        right: where something ran and nothing failed (`clean`).
    """
    groups: dict[tuple[str, str, str], Group] = {}
    for f in failures:
        groups.setdefault(
            (f.implementation, f.stage, f.tensor), Group(f.implementation, f.stage, f.tensor)
        ).failures += [f]
    names = list(dict.fromkeys(f.implementation for f in failures))
    ordered = sorted(groups.values(), key=lambda g: (names.index(g.implementation), *_place(g)))
    leaders: list[Group] = []
    for group in ordered:
        group.follows = next((leader.stage for leader in leaders if _follows(group, leader, right)), "")
        if not group.follows:
            leaders.append(group)
    return sorted(ordered, key=lambda g: (names.index(g.implementation), bool(g.follows)))


def _place(group: Group) -> tuple[int, bool, bool]:
    known = ORDER.index(group.stage) if group.stage in ORDER else len(ORDER)
    return known, group.gradient, " " in group.tensor


def _follows(group: Group, leader: Group, right: Collection[Where]) -> bool:
    """Whether the stage of a group computes what fails in an earlier one, and fails nowhere where that one is right."""
    same_stage = group.stage == leader.stage and (
        group.tensor.startswith(f"{leader.tensor} ")  # what H is checked for as a whole
        or (group.gradient and not leader.gradient)
    )
    return (
        group.implementation == leader.implementation
        and (same_stage or group.stage in PART_OF.get(leader.stage, ()))
        and not any((f.implementation, leader.stage, f.x, f.dialect) in right for f in group.failures)
        and (group.gradient or not leader.gradient)
        and bool(leader.modes) <= bool(group.modes)
    )


def group_lines(group: Group) -> list[str]:
    """A group in words: how much fails and where, the worst of it, and the line that repeats the smallest item."""
    worst, smallest = group.worst, group.smallest
    figure = f", up to {worst.ratio:.3g} x the bound" if 1 < worst.ratio < float("inf") else ""
    modes = f" in modes alone ({', '.join(group.modes[:MOST_NAMED])})" if group.modes else ""
    count = f"{group.items} item{'' if group.items == 1 else 's'}"
    head = (
        f"{group.implementation}: {group.stage}, {group.tensor}: {', '.join(group.verdicts)}{modes} in {count}{figure}"
    )
    families = f"families {_some(group.families)}" if group.families else ""
    where = "; ".join(filter(None, (families, ", ".join(group.dtypes), _some(group.dialects))))
    message = "; ".join(filter(None, (smallest.message, smallest.example)))
    return [
        head,
        f"  {where}",
        *([f"  smallest, {smallest.case}: {message}"] if message else []),
        f"  {smallest.reproduce}",
    ]


def following(groups: Sequence[Group]) -> list[str]:
    """A line for each stage whose failures others follow from."""
    folded: dict[tuple[str, str], dict[str, set[str]]] = {}
    for group in groups:
        if group.follows:
            name = group.stage if group.stage != group.follows else f"other tensors of {group.stage}"
            of_stage = folded.setdefault((group.implementation, group.follows), {}).setdefault(name, set())
            of_stage.update(f.reproduce + f.case for f in group.failures)
    said: list[str] = []
    for (name, leader), stages in folded.items():
        counts = ", ".join(f"{stage} in {len(items)} items" for stage, items in stages.items())
        said.append(f"{name}: {counts} fail too, which follows from {leader}")
    return said


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
