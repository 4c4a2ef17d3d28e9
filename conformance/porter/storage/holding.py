"""Finds the names of hyper-connections in a checkpoint before its layout is known."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.site import ALONE


def hyper_connections(names: Collection[str]) -> list[str]:
    """The names that only hyper-connections have, and names that show that a site of some layout is there."""
    holding = dict.fromkeys(naming.plainly_ours(names))
    few = _ending_as(frozenset[str]().union(*(layout.endings_of_anchors for layout in layouts().values())), names)
    holding |= {name: None for name in few if any(layout.locator.locate([name]) for layout in layouts().values())}
    return list(holding)


def placed(names: Collection[str], kind: str) -> tuple[int, frozenset[str]]:
    """The largest number of names that a layout has a place for, and the layouts that have a place for so many.

    A module on its own doesn't count, because any prefix may be its name.

    Args:
        kind: the kind of checkpoint; layouts that aren't kept in such files don't count.
    """
    considered = [layout for layout in layouts().values() if kind in layout.containers]
    few = _ending_as(frozenset[str]().union(*(layout.endings for layout in considered)), names)
    counts = {layout.name: _count(layout, few) for layout in considered}
    most = max(counts.values(), default=0)
    return most, frozenset(name for name, count in counts.items() if count == most)


def _count(layout: Layout, names: Iterable[str]) -> int:
    try:
        return sum(len(rows) for site, rows in layout.locator.locate(names).items() if site != ALONE)
    except PortError:  # a site under two names
        return 0


def _ending_as(endings: Collection[str], names: Collection[str]) -> list[str]:
    """The names with one of these ends, with and without wrappers; in a large checkpoint they are few."""
    ends = tuple({*endings, *(end.replace("/", ".") for end in endings)})
    matching = dict.fromkeys(name for name in names if name.endswith(ends))
    matching |= {name: None for name in naming.wrapped(names) if naming.plain(name).endswith(ends)}
    return list(matching)
