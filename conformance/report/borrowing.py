"""What is said of implementations that have imported one of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from conformance.judge.guard import BORROWED
from conformance.judge.item import Outcome


def settings(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """The settings of each implementation, by its name; what one of its workers has imported stays."""
    merged: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        if outcome.about:
            merged.setdefault(outcome.implementation, {}).update(outcome.about)
    return merged


def lines(implementations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each implementation, by its name, whose settings say that it has imported one of ours."""
    taken = {name: about.get(BORROWED) for name, about in implementations.items()}
    return [
        f"{name} imported {', '.join(map(str, cast('list[Any]', modules)))}: its answers may be ours"
        for name, modules in taken.items()
        if isinstance(modules, list)
    ]
