"""The layouts: each module of this folder holds one as ``LAYOUT``."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from conformance.files.problems import unknown
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout


@functools.cache
def layouts() -> dict[str, Layout]:
    """Every layout under its name, in alphabetical order."""
    by_name: dict[str, Layout] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        layout = importlib.import_module(f"{__name__}.{module}").LAYOUT
        by_name[layout.name] = layout
    return by_name


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        PortError: there is no layout of that name.
    """
    known = layouts()
    if name not in known:
        raise PortError(unknown("layout", name, known))
    return known[name]
