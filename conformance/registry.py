"""Finds implementations: registered under an entry point, or named as ``module:attribute``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from conformance.interface import Capabilities, SetupError, describe
from conformance.stages import STAGES

GROUP = "mhc_conformance.implementations"
FRAMEWORKS = {"jax": ("jax", "flax"), "torch": ("torch",), "transformers": ("torch", "transformers")}
ON_REQUEST = ("torch-inductor",)


def registered() -> dict[str, str]:
    """Registered names and where they point; of two installations of one package, the first on the path counts."""
    found: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point.value)
    return found


def missing_frameworks(name: str) -> list[str]:
    """What would have to be installed for a registered implementation, by its name's first word."""
    wanted = FRAMEWORKS.get(name.split("-")[0], ())
    return [module for module in wanted if importlib.util.find_spec(module) is None]


def defaults() -> tuple[list[str], dict[str, str]]:
    """(the implementations that run without being named, the others with the reason)."""
    chosen, left = [], {}
    for name in registered():
        missing = missing_frameworks(name)
        if name in ON_REQUEST:
            left[name] = "runs only when named by --impl"
        elif missing:
            left[name] = f"not installed: {', '.join(missing)}"
        else:
            chosen.append(name)
    return chosen, left


def load(reference: str) -> Any:
    """The implementation behind a registered name or a ``module:attribute``.

    The attribute may be an instance, a class, or a function without arguments that returns an instance.

    Raises:
        SetupError: it can't be found, imported or made, or lacks a method for a stage it claims.
    """
    target = registered().get(reference, reference)
    module, separator, attribute = target.partition(":")
    if not separator:
        known = ", ".join(registered()) or "none"
        raise SetupError(f"{reference}: expected a registered name ({known}) or module:attribute")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
        implementation = found if hasattr(found, "capabilities") and not isinstance(found, type) else found()
    except Exception as error:
        raise SetupError(f"{reference}: could not be set up: {describe(error)}") from error
    claimed = getattr(implementation, "capabilities", None)
    if not isinstance(claimed, Capabilities) or not getattr(implementation, "name", None):
        raise SetupError(
            f"{reference}: expected a name and capabilities of type Capabilities, got {type(claimed).__name__}"
        )
    unknown = sorted(set(claimed.stages) - set(STAGES))
    absent = [stage for stage in claimed.stages if not callable(getattr(implementation, stage, None))]
    if unknown or absent:
        raise SetupError(f"{reference}: claims unknown stages {unknown} or has no method for {sorted(absent)}")
    return implementation
