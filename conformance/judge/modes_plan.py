"""Which further calls each item of a run has: some modes on every item, others on a subset that covers them.

A subset is made of what the run has and the implementation claims, so that in a run of one item that item has all the
calls that it has in any larger run: the line that repeats a failure repeats its modes too.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conformance.cases.case import DTYPES, Item, load_case
from conformance.interface import Capabilities, Implementation
from conformance.judge.item import Answer, Outcome, refusal
from conformance.judge.modes import AGAIN, REPEATED, REPEATS, UNASKED, Call, Culprits, Further
from conformance.judge.modes_items import array_names, unasked
from conformance.judge.modes_layouts import EXPANDED, ROUNDS, layouts_of

TYPICAL = 32
"""Streams x dim of the items that are repeated: small, but more than one vector register."""
EQUAL_STREAMS = "expanded"
"""The family whose streams are equal, so that ``expand`` may have made them."""
UNUSUAL = ("shape", EQUAL_STREAMS)
Key = tuple[str, str, str]
"""The id of the case, stage and variant."""


@dataclass
class Schedule:
    """The further calls of each item, in their order, and the items that are repeated."""

    calls: dict[Key, list[Call]] = field(default_factory=lambda: defaultdict[Key, list[Call]](list))
    repeated: set[Key] = field(default_factory=set[Key])
    culprits: dict[tuple[str, str], Culprits] = field(default_factory=dict[tuple[str, str], Culprits])


class Plan:
    """The modes of a run. It is handed to its workers, each of which works out what its implementation claims.

    Args:
        items: those of the run.
        limit: seconds that an item may take.
        repeats: calls with the same content of each item that is repeated.
    """

    def __init__(self, items: Iterable[Item], limit: float = 300.0, repeats: int = REPEATS):
        self._limit, self._repeats = limit, repeats
        self._names: dict[Path, list[tuple[str, str]]] = defaultdict(list)
        """The stages and variants by the file of their case: all that a worker is sent."""
        for item in items:
            self._names[item.case.path].append((item.stage, item.variant.name))
        self._schedules: list[tuple[Capabilities, Schedule]] = []
        self.announce: Callable[[str], object] | None = None
        """Is told the modes of each call before it is made."""

    @staticmethod
    def fewer(claimed: Capabilities) -> list[str]:
        """Why some modes are met on a subset of the items alone, or by none."""
        reasons: list[str] = []
        if claimed.compiled:
            reasons.append("other gradients and layouts on a subset, since each is compiled anew")
        if claimed.copies:
            reasons.append("layouts on a subset, since it copies its inputs")
        return reasons

    def judge(self, implementation: Implementation, item: Item, outcome: Outcome, plain: Answer) -> None:
        """Makes the further calls of an item; the outcome has its plain one already."""
        schedule = self.schedule(implementation.capabilities)
        further = Further(implementation, item, outcome, plain, self._limit, schedule.culprits, self._repeats)
        for call in schedule.calls.get(key_of(item), []):
            if self.announce:
                self.announce(" + ".join(call.modes) or AGAIN)
            further.judge(call)
        if key_of(item) in schedule.repeated:
            if self.announce:
                self.announce(REPEATED)
            further.repeat()

    def schedule(self, claimed: Capabilities) -> Schedule:
        """The calls of every item that an implementation claims; worked out once.

        Raises:
            CaseError: a file doesn't keep the format.
        """
        for known, schedule in self._schedules:
            if known is claimed:
                return schedule
        schedule = scheduled([item for item in self._items() if not refusal(item, claimed)], claimed)
        self._schedules.append((claimed, schedule))
        return schedule

    def _items(self) -> list[Item]:
        items: list[Item] = []
        for path, names in self._names.items():
            by_name = {(item.stage, item.variant.name): item for item in load_case(path).items()}
            items += [by_name[name] for name in names]
        return items


def scheduled(items: Sequence[Item], claimed: Capabilities) -> Schedule:
    """The calls of these items.

    Every item has one in which the values differ and freed memory is full of NaN, in the first place. It asks for no
    gradients and has the layouts of the item's own round, unless the implementation is compiled, and would be anew for
    each of them, or copies its inputs: then that is so on a subset.
    """
    schedule = Schedule()
    everywhere = not claimed.compiled
    for item in items:
        schedule.calls[key_of(item)].append(
            Call(
                forward=claimed.gradients and everywhere,
                round=own_round(item) if everywhere and not claimed.copies else None,
                values=True,
                memory=True,
            )
        )
    for call, item in _first_calls(items, claimed):
        if call not in schedule.calls[key_of(item)]:
            schedule.calls[key_of(item)].append(call)
    if claimed.gradients:
        for call, item in _gradient_calls(items, claimed):
            schedule.calls[key_of(item)].append(call)
    for group in _groups(items, _kind):
        item = group[0]
        schedule.calls[key_of(item)].append(Call(after=_sibling(item, claimed)))
        if claimed.gradients and everywhere:
            schedule.calls[key_of(item)].append(Call(forward=True, values=True))
    for group in _groups(items, _dtype):
        schedule.calls[key_of(group[0])].append(Call(same=True))
        schedule.repeated.add(key_of(min(group, key=_untypical)))
    return schedule


def _first_calls(items: Sequence[Item], claimed: Capabilities) -> Iterable[tuple[Call, Item]]:
    """Further calls without gradients, in the layouts that a stage, dtype and kind of weights hasn't met.

    Of a compiled implementation each is another graph: it has one for each kind and for each stage of a dialect, and
    one call is both where it can be.
    """
    called: set[tuple[str, ...]] = set()
    for group in _groups(items, _kind):
        if claimed.compiled:
            group = sorted(group, key=lambda item: _row(item) in called)
        called.add(_row(group[0]))
        rounds: Iterable[int] = [own_round(group[0])]
        if not claimed.copies and not claimed.compiled:
            rounds = sorted(set(range(ROUNDS)) - {own_round(item) for item in group})
        for number, round in enumerate(rounds):
            item = group[number % len(group)]
            yield Call(forward=claimed.gradients, round=round, values=True, memory=True), item
    if claimed.compiled:
        for group in _groups([item for item in items if _row(item) not in called], _row):
            yield Call(forward=claimed.gradients, values=True, memory=True), min(group, key=_number)


def _gradient_calls(items: Sequence[Item], claimed: Capabilities) -> Iterable[tuple[Call, Item]]:
    """Calls with gradients: every layout of inputs and cotangents for a stage and dtype, or one where that is dear."""
    ways = ["", *UNASKED]
    for group in _groups(items, _dtype):
        for number in range(1 if claimed.copies or claimed.compiled else ROUNDS):
            item = group[number % len(group)]
            round = own_round(item) if claimed.copies or claimed.compiled else number
            turn = zlib.crc32(item.stage.encode()) + list(DTYPES).index(item.variant.x)  # in a stage's dtypes every way
            way = ways[(number + turn) % len(ways)]
            yield Call(unasked=way if unasked(item, way) else "", round=round, values=True, memory=True), item
    for item in items:
        if item.case.family == EQUAL_STREAMS and not claimed.copies and not claimed.compiled:
            yield Call(round=own_round(item), values=True), item


def key_of(item: Item) -> Key:
    """The name of an item in a schedule."""
    return item.case.id, item.stage, item.variant.name


def _dtype(item: Item) -> tuple[str, ...]:
    return item.stage, item.variant.x


def _row(item: Item) -> tuple[str, ...]:
    return item.stage, item.case.dialect


def _kind(item: Item) -> tuple[str, ...]:
    return item.stage, item.variant.x, item.variant.weights


def _groups(items: Iterable[Item], kind: Callable[[Item], tuple[str, ...]]) -> list[list[Item]]:
    """The items of each kind, the widest first; those of unusual shapes, some of one token, or streams last."""
    groups: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        groups[kind(item)].append(item)
    return [sorted(group, key=_rank) for _, group in sorted(groups.items())]


def _rank(item: Item) -> tuple[bool, int, int]:
    return item.case.family in UNUSUAL, -width(item), _number(item)


def width(item: Item) -> int:
    """Elements of a token."""
    return int(item.case.parameters["streams"]) * int(item.case.parameters["dim"])


def _untypical(item: Item) -> tuple[bool, int, int]:
    return item.case.family in UNUSUAL, abs(width(item) - TYPICAL), _number(item)


def _number(item: Item) -> int:
    """A number that depends on nothing but the item's name."""
    return zlib.crc32(item.id.encode())


def own_round(item: Item) -> int:
    """The layouts that an item has in every run; streams that are equal have the stride 0 in one of them."""
    if item.case.family == EQUAL_STREAMS:
        return next(round for round in range(ROUNDS) if layouts_of(array_names(item), round)["x"] == EXPANDED)
    return _number(item) % ROUNDS


def _sibling(item: Item, claimed: Capabilities) -> str:
    """The variant of the same stage and case in another dtype that comes before; empty where none is claimed.

    One that every run has, also a quick one, where there is any: its graph is then made once.
    """
    others = [
        variant
        for variant in item.case.variants
        if item.stage in variant.stages
        and variant.x != item.variant.x
        and not refusal(Item(item.case, item.stage, variant), claimed)
    ]
    names = [variant.name for variant in others if not variant.secondary] or [variant.name for variant in others]
    return names[_number(item) % len(names)] if names else ""
