"""Finds implementations: registered under an entry point, named as ``module:attribute``, or ``exec:COMMAND``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from conformance.files.problems import meant
from conformance.implementations.calling import Interrupts
from conformance.implementations.wrapping import wrap
from conformance.interface import Implementation, SetupError, describe
from conformance.mesh import MARK, Member, parse_mesh
from conformance.witnesses.fetch import WitnessError, folder

EXEC = "exec:"
GROUP = "mhc_conformance.implementations"
SHARDED = "mhc_conformance.sharded"
"""Entry points that are called with a `mesh.Member`, and run on a mesh."""
MODULES = {
    "jax": ("jax", "flax"),
    "torch-triton": ("torch", "triton"),
    "torch": ("torch",),
    "transformers": ("torch", "transformers"),
    "liger-kernel": ("torch", "triton", "liger_kernel"),
    "hyper-connections": ("torch", "hyper_connections"),
    "mlx-mhc": ("mlx.core", "mlx_mhc"),
    "mhc-mlx": ("mlx.core", "mhc_mlx"),
    "tile-kernels": ("torch",),
    "vllm-mhc": ("torch",),
    "nemo-automodel": ("torch", "transformers"),
    "mlx-lm": ("mlx.core",),
    "mlx-vlm": ("mlx.core",),
    "fla-core": ("torch",),
    "maxtext": ("jax", "flax"),
}
"""What a registered implementation imports, by the beginning of its name."""
FETCHED = {
    "maxtext-0.2.2": "maxtext==0.2.2",
    "maxtext-0.2.5": "maxtext==0.2.5",
    "tile-kernels": "tile-kernels==2.1.0",
    "vllm-mhc": "vllm-tpu==0.32.0",
    "nemo-automodel": "nemo-automodel==0.7.0",
    "mlx-lm": "mlx-lm==0.32.2",
    "mlx-vlm": "mlx-vlm==0.7.10",
    "fla-core": "fla-core==0.6.0",
}
"""The package of `witnesses.fetch` that a registered implementation runs, by the beginning of its name."""
ON_REQUEST = ("torch-inductor", "torch-triton", "jax-explicit", "jax-pallas")
TOGETHER = (
    ("jax", "jax-jit"),
    ("torch", "torch-compile"),
    ("transformers-deepseek-v4", "transformers-glm-5", "transformers-hunyuan-v4"),
)
"""Implementations of ours that may run one after the other in one process, which imports their framework once."""
MANY_DEVICES = ("jax", "jax-explicit")
"""What has all devices of a mesh in one process unless told otherwise; others have one process a device."""


def registered(group: str = GROUP) -> dict[str, str]:
    """Registered names and where they point; of two installations of one package, the first on the path counts."""
    found: dict[str, str] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, point.value)
    return found


def missing_modules(name: str) -> list[str]:
    """What would have to be installed for a registered implementation."""
    return [module for module in _of_prefix(MODULES, name) or () if not installed(module)]


def package_of(module: str) -> str:
    """The package that brings a module, as pip takes it."""
    name = module.partition(".")[0].replace("_", "-")
    return "'mlx[cpu]'" if name == "mlx" and sys.platform == "linux" else name


def unavailable(name: str) -> str:
    """Why a registered implementation can't run here; empty where it can."""
    missing, package = missing_modules(name), _of_prefix(FETCHED, name)
    if missing:
        packages = dict.fromkeys(map(package_of, missing))
        return f"not installed: {', '.join(missing)} (pip install {' '.join(packages)})"
    try:
        if package:
            folder(package)
    except WitnessError:
        return f"not fetched: {package} (python -m conformance.witnesses.fetch)"
    return ""


def _of_prefix(table: Mapping[str, Any], name: str) -> Any:
    """The entry whose key is the name or its beginning, up to a hyphen."""
    return next((value for prefix, value in table.items() if f"{name}-".startswith(f"{prefix}-")), None)


def installed(module: str) -> bool:
    """Whether a module is here; it isn't imported, but the package that it is in may be."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def defaults(group: str = GROUP) -> tuple[list[str], dict[str, str]]:
    """(the implementations that run without being named, the others with the reason)."""
    chosen, left = [], {}
    for name in registered(group):
        reason = unavailable(name)
        if name in ON_REQUEST:
            left[name] = "runs only when named by --impl"
        elif reason:
            left[name] = reason
        else:
            chosen.append(name)
    return chosen, left


def together(first: str, second: str) -> bool:
    """Whether a process that has run the first implementation may go on with the second."""
    return any(first in group and second in group for group in TOGETHER)


def processes_of(reference: str) -> int:
    """How many processes a sharded implementation runs in, each of which is handed whole arrays; 0 for others.

    Raises:
        SetupError: its mesh isn't one.
    """
    name, mark, text = reference.partition(MARK)
    if not mark or reference.startswith(EXEC):
        return 0
    mesh = parse_mesh(text)
    return mesh.processes or (1 if name in MANY_DEVICES else mesh.devices)


def load(reference: str, limit: float = 60.0) -> Implementation:
    """The implementation behind a registered name, a ``module:attribute`` or an ``exec:COMMAND``.

    The attribute may be an instance, a class, or a function without arguments that returns an instance. With a mesh
    behind it (``jax@data=2,tensor=2``) it is what takes a `mesh.Member`, and runs in processes of its own.

    Args:
        limit: seconds that a command or a group of processes has for one answer.

    Raises:
        SetupError: it can't be found, imported or made, or lacks a method for a stage it claims.
    """
    if reference.startswith(EXEC):
        from conformance.implementations.program import ProgramImplementation

        return ProgramImplementation(reference.removeprefix(EXEC), limit)
    if MARK in reference:
        from conformance.implementations.group import GroupImplementation

        name, _, text = reference.partition(MARK)
        _target(name, SHARDED)
        return GroupImplementation(name, parse_mesh(text), processes_of(reference), limit)
    module, attribute = _target(reference, GROUP)
    with Interrupts() as interrupts:
        try:
            found = _found(reference, module, attribute)
            return wrap(found if hasattr(found, "capabilities") and not isinstance(found, type) else found(), reference)
        except SetupError:
            raise
        except BaseException as error:  # SystemExit too: it would end the command as if all were well
            if interrupts.excuse(error):
                raise
            raise SetupError(f"{reference}: could not be set up: {describe(error)}") from error


def module_of(reference: str, group: str = GROUP) -> str:
    """The module that a name or ``module:attribute`` points to; empty for a command, and for what runs on a mesh.

    Raises:
        SetupError: it is neither.
    """
    return "" if reference.startswith(EXEC) or MARK in reference else _target(reference, group)[0]


def load_sharded(reference: str, member: Member) -> Implementation:
    """The implementation behind a name or ``module:attribute``, for one process of a mesh.

    Raises:
        SetupError: it can't be found, imported or made, or lacks a method for a stage it claims.
        NotImplementedError: it can't run on such a mesh.
    """
    return wrap(_found(reference, *_target(reference, SHARDED))(member), reference)


def _target(reference: str, group: str) -> tuple[str, str]:
    """Module and attribute of a registered name or of ``module:attribute``."""
    module, separator, attribute = registered(group).get(reference, reference).partition(":")
    if not separator:
        known = ", ".join(registered(group)) or "none"
        near = meant(reference, registered(group))
        kind = "registered name" if group == GROUP else "name registered to run on a mesh"
        command = f" or {EXEC}COMMAND" if group == GROUP else ""
        example = f"{Path(reference).stem}:Mine for a class of {Path(reference).stem}.py"
        raise SetupError(f"{reference}: expected module:attribute ({example}){command}, or a {kind}: {known}{near}")
    return module, attribute


def _found(reference: str, module: str, attribute: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise SetupError(f"{reference}: could not be set up: {describe(error)}") from error
