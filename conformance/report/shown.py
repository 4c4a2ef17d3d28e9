"""What of a run's failures is shown in full, and how: there may be thousands, and a page is opened on a phone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from conformance.judge import heat
from conformance.judge.groups import Failure, Group, grouped
from conformance.judge.rule import GOOD
from conformance.report.groups import clean_lines, of_lines
from conformance.report.read import CheckLine, Map

MOST = 400
"""Failures shown in full."""
LARGEST = 1 << 20
"""Bytes that these may have together, as JSON."""


class Shown:
    """The groups of a run's failing checks, and those failures that are shown in full.

    Attributes:
        groups: in the order of `groups.grouped`, ready for JSON. The entry ``shown`` of each has the places of its
            failures in ``failures``.
        failures: as they came from the file, with a sentence on where the tensor is wrong.
        hidden: the number of those that are left out.
    """

    def __init__(self, checks: Iterable[CheckLine]):
        every = list(checks)
        bad = [check for check in every if check.verdict not in GOOD]
        found = of_lines(bad)
        lines = {id(failure): check for failure, check in zip(found, bad, strict=True)}
        ordered = grouped(found, clean_lines(every))
        self.failures: list[dict[str, Any]] = []
        places: dict[int, list[int]] = {id(group): [] for group in ordered}
        size = 0
        for group, failure in _in_turns(ordered):
            entry = _entry(lines[id(failure)])
            size += len(msgspec.json.encode(entry))
            if len(self.failures) == MOST or size > LARGEST:
                break
            places[id(group)].append(len(self.failures))
            self.failures.append(entry)
        self.groups = [_group(group, places[id(group)]) for group in ordered]
        self.hidden = len(bad) - len(self.failures)


def _in_turns(groups: Sequence[Group]) -> Iterable[tuple[Group, Failure]]:
    """The smallest of each group that leads, then of each that follows; then the worst of each, then all others."""
    ordered = [(group, _ordered(group)) for group in sorted(groups, key=lambda group: bool(group.follows))]
    for turn in range(max((len(failures) for _, failures in ordered), default=0)):
        yield from ((group, failures[turn]) for group, failures in ordered if turn < len(failures))


def _ordered(group: Group) -> list[Failure]:
    first = list({id(f): f for f in (group.smallest, group.worst)}.values())
    rest = [f for f in group.failures if all(f is not other for other in first)]
    return [*first, *sorted(rest, key=lambda f: (bool(f.mode), f.elements, f.case))]


def _entry(check: CheckLine) -> dict[str, Any]:
    entry = {k: v for k, v in msgspec.to_builtins(check).items() if k not in ("kind", "seconds")}
    return {**entry, "place": place(check.map) if check.map else ""}


def _group(group: Group, shown: list[int]) -> dict[str, Any]:
    counts = Counter((f.dialect, f.x, f.verdict) for f in group.failures)
    return {
        "implementation": group.implementation,
        "stage": group.stage,
        "tensor": group.tensor,
        "follows": group.follows,
        "items": group.items,
        "checks": len(group.failures),
        "dtypes": group.dtypes,
        "dialects": group.dialects,
        "families": group.families,
        "verdicts": group.verdicts,
        "modes": group.modes,
        "ratio": group.worst.ratio,
        "message": group.smallest.message,
        "reproduce": group.smallest.reproduce,
        "counts": [(*key, count) for key, count in counts.items()],
        "shown": shown,
    }


def place(where: Map) -> str:
    """Where a map is beyond the bound: ``tokens 12 to 15 of 16, all 64 channels``; empty where it nowhere is."""
    beyond = [[cell is None or cell > 1 for cell in row] for row in where.cells]
    rows = [k for k, row in enumerate(beyond) if any(row)]
    columns = [k for k in range(len(beyond[0])) if any(row[k] for row in beyond)] if beyond else []
    if not rows:
        return ""
    names = ("tokens", "channels") if where.tokens else ("rows", "columns")
    return ", ".join((_range(names[0], rows, where.rows), _range(names[1], columns, where.columns)))


def _range(name: str, cells: Sequence[int], total: int) -> str:
    """The indices that some cells of an axis have, from the first to the last."""
    count = min(total, heat.MOST)
    first, last = cells[0] * total // count, (cells[-1] + 1) * total // count - 1
    if last - first + 1 == total:
        return f"all {total} {name}" if total > 1 else f"the only {name.removesuffix('s')}"
    return f"{name} {first} to {last} of {total}" if first < last else f"{name.removesuffix('s')} {first} of {total}"
