"""An object with one method for each stage becomes an `Implementation`, whose one method is ``call``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.implementations.claims import misnamed
from conformance.interface import Arrays, Capabilities, Implementation, Result, SetupError


class StageMethods:
    """An `Implementation` that hands each call to the method of the stage's name.

    Args:
        implementation: an object with ``name``, ``capabilities`` and the methods.
    """

    def __init__(self, implementation: Any):
        self.name: str = implementation.name
        self.capabilities: Capabilities = implementation.capabilities
        self._methods = {stage: getattr(implementation, stage) for stage in self.capabilities.stages}

    def call(self, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        return self._methods[stage](inputs, config, cotangents)


def wrap(implementation: Any, reference: str = "") -> Implementation:
    """The implementation itself where it has a method ``call``, and `StageMethods` of it otherwise.

    Args:
        reference: what the user wrote for it, for the message.

    Raises:
        SetupError: it has no name, no capabilities, claims a name that nothing has, or has no method for a stage that
            it claims.
    """
    claimed = getattr(implementation, "capabilities", None)
    name = getattr(implementation, "name", None)
    reference = reference or str(name)
    if not isinstance(claimed, Capabilities) or not name or not isinstance(name, str):
        got = type(claimed).__name__ if not isinstance(claimed, Capabilities) else f"{name!r:.60} as its name"
        raise SetupError(f"{reference}: expected a name and capabilities of type Capabilities, got {got}")
    if problem := misnamed(claimed):
        raise SetupError(f"{reference}: {problem}")
    if callable(getattr(implementation, "call", None)):
        return implementation
    absent = sorted(stage for stage in claimed.stages if not callable(getattr(implementation, stage, None)))
    if absent:
        names = ", ".join(absent)
        raise SetupError(f"{reference}: claims {names}, but has neither a method of that name nor a method 'call'")
    return StageMethods(implementation)
