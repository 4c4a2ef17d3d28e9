"""What the stages that an implementation claims can't show: mistakes that only other stages of the same layer see.

`seen.json` is measured: ``mhc-conformance selftest --quick --kind what --variants 0 --seen FILE`` plants each mistake
and notes in which stages the golden cases kill it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from conformance.judge.groups import PART_OF
from conformance.judge.item import Outcome

SEEN = Path(__file__).with_name("seen.json")
MOST = 3
"""Mistakes that a line names."""


@cache
def seen() -> Mapping[str, Sequence[str]]:
    """The stages that show each mistake."""
    return json.loads(SEEN.read_text(encoding="utf-8"))


def inside(stages: Iterable[str]) -> set[str]:
    """The stages, and those that they compute on their way."""
    stages = set(stages)
    return stages | {part for part, wholes in PART_OF.items() if stages & set(wholes)}


def unseen(stages: Iterable[str]) -> dict[str, Sequence[str]]:
    """The mistakes that these stages make as well as others but don't show, and the stages that show them."""
    stages = set(stages)
    computed = inside(stages)
    return {
        mistake: [stage for stage in where if stage in computed]
        for mistake, where in seen().items()
        if not stages & set(where) and computed & set(where)
    }


def lines(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for each implementation whose claimed stages leave something unseen."""
    stages: dict[str, set[str]] = {}
    for outcome in outcomes:
        if not outcome.skipped:
            stages.setdefault(outcome.implementation, set()).add(outcome.stage)
    said = []
    for name, ran in stages.items():
        hidden = unseen(ran - {"-"})
        if hidden:
            named = "; ".join(mistake for mistake in list(hidden)[:MOST])
            more = f" and {len(hidden) - MOST} more" if len(hidden) > MOST else ""
            claim = sorted({stage for where in hidden.values() for stage in where})
            said.append(
                f"not seen: {name} claims {', '.join(sorted(ran))}, which can't show: {named}{more}; claim "
                f"{' or '.join(claim)} too"
            )
    return said
