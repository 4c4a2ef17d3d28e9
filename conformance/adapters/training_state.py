"""What a step takes and returns, as arrays under names (docs/trajectories.md, "A step"); it imports no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

KINDS = ("weight", "first", "second")
"""Before the names of weights and of AdamW's moments: ``weight/embedding``, ``first/embedding``, …"""


class State(NamedTuple):
    """Weights and AdamW's first and second moments, each under the weights' names."""

    weight: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]


def taken(inputs: Mapping[str, Any]) -> State:
    """The state in what a step is handed."""
    return State(*({n.removeprefix(f"{k}/"): v for n, v in inputs.items() if n.startswith(f"{k}/")} for k in KINDS))


def returned(state: State) -> dict[str, Any]:
    """The state as a step returns it."""
    return {f"{kind}/{name}": value for kind, part in zip(KINDS, state, strict=True) for name, value in part.items()}
