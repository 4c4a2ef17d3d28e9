"""Which of our implementations an implementation has imported: what it answers then may be our answer."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

OURS = ("jax_impl", "torch_impl")
ENTITLED = {
    "conformance.adapters.jax_adapter": "jax_impl",
    "conformance.adapters.jax_mesh": "jax_impl",
    "conformance.adapters.torch_adapter": "torch_impl",
    "conformance.adapters.torch_mesh": "torch_impl",
}
"""Our own adapters, and the implementation that each is there for."""


def borrowed(adapter: str, modules: Mapping[str, Any] | None = None) -> list[str]:
    """Our implementations that are imported here, also under other names, and that the adapter isn't there for.

    Args:
        adapter: the name of the module in which the implementation was found.
        modules: by name; `sys.modules` where none are given.
    """
    present = dict(sys.modules if modules is None else modules)
    files = [str(getattr(module, "__file__", None) or "") for module in present.values()]
    return [name for name in OURS if name != ENTITLED.get(adapter) and _is_present(name, present, files)]


def _is_present(package: str, names: Collection[str], files: Collection[str]) -> bool:
    if any(name.split(".")[0] == package for name in names):
        return True
    try:
        spec = importlib.util.find_spec(package)
    except (ValueError, ImportError):
        return False
    folder = os.path.dirname(spec.origin) + os.sep if spec and spec.origin else ""
    return bool(folder) and any(file.startswith(folder) for file in files)
