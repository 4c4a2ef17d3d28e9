"""The implementations that a pytest run asks for: on the command line, in the environment or in the configuration."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

from conformance.implementations.registry import EXEC, load, missing_modules

VARIABLE = "MHC_CONFORMANCE_IMPL"
OPTION, SETTING = "mhc_impl", "mhc_impl"
OURS = ("jax", "torch")
BETWEEN_NAMES = re.compile(r",(?![a-z]+=\d)")
"""A comma, but not one inside a mesh, as in ``jax@data=2,tensor=2``."""

loaded = functools.cache(load)
"""`registry.load`, once for each name in a run."""


def separated(text: str) -> list[str]:
    """The names in a text that has commas between them; a command is one name, whatever is in it."""
    if text.strip().startswith(EXEC):
        return [text.strip()]
    return [name.strip() for name in BETWEEN_NAMES.split(text) if name.strip()]


def asked(config: Any) -> list[str]:
    """Names without repetition: of ``--mhc-impl``, or of the environment, or of the setting ``mhc_impl``, or ours.

    Args:
        config: pytest's; the option and the setting may be absent from it, where the plugin isn't loaded.
    """
    try:
        setting = config.getini(SETTING)
    except (KeyError, ValueError):
        setting = []
    for texts in (config.getoption(OPTION, None) or [], [os.environ.get(VARIABLE, "")], setting):
        names = [name for text in texts for name in separated(text)]
        if names:
            return list(dict.fromkeys(names))
    return [name for name in OURS if not missing_modules(name)]
