"""Finds implementations: registered under an entry point, named as ``module:attribute``, or ``exec:COMMAND``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from conformance.interface import Capabilities, SetupError, describe
from conformance.stages import STAGES

EXEC = "exec:"
GROUP = "mhc_conformance.implementations"
MODULES = {
    "jax": ("jax", "flax"),
    "torch": ("torch",),
    "transformers": ("torch", "transformers"),
    "liger-kernel": ("torch", "triton", "liger_kernel"),
    "hyper-connections": ("torch", "hyper_connections"),
    "mlx-mhc": ("mlx.core", "mlx_mhc"),
    "mhc-mlx": ("mlx.core", "mhc_mlx"),
}
"""What a registered implementation imports, by the beginning of its name."""
ON_REQUEST = ("torch-inductor",)


def registered() -> dict[str, str]:
    """Registered names and where they point; of two installations of one package, the first on the path counts."""
    found: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point.value)
    return found


def missing_modules(name: str) -> list[str]:
    """What would have to be installed for a registered implementation."""
    wanted = next((modules for prefix, modules in MODULES.items() if f"{name}-".startswith(f"{prefix}-")), ())
    return [module for module in wanted if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def version_of(package: str) -> str:
    """The installed version of a distribution, ``"?"`` where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def defaults() -> tuple[list[str], dict[str, str]]:
    """(the implementations that run without being named, the others with the reason)."""
    chosen, left = [], {}
    for name in registered():
        missing = missing_modules(name)
        if name in ON_REQUEST:
            left[name] = "runs only when named by --impl"
        elif missing:
            left[name] = f"not installed: {', '.join(missing)}"
        else:
            chosen.append(name)
    return chosen, left


def load(reference: str, limit: float = 60.0) -> Any:
    """The implementation behind a registered name, a ``module:attribute`` or an ``exec:COMMAND``.

    The attribute may be an instance, a class, or a function without arguments that returns an instance.

    Args:
        limit: seconds that a command has for one answer.

    Raises:
        SetupError: it can't be found, imported or made, or lacks a method for a stage it claims.
    """
    if reference.startswith(EXEC):
        from conformance.adapters.program import ProgramImplementation

        return ProgramImplementation(reference.removeprefix(EXEC), limit)
    target = registered().get(reference, reference)
    module, separator, attribute = target.partition(":")
    if not separator:
        known = ", ".join(registered()) or "none"
        raise SetupError(f"{reference}: expected a registered name ({known}), module:attribute or {EXEC}COMMAND")
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
