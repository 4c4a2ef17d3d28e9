"""A stranger's value as JSON can have it: whatever it is, nothing is raised."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

from conformance.files.line import cut, one_line

DEEPEST = 8
"""Objects and lists in one another; what lies deeper is a text."""
MOST = 1000
"""Entries of one object or list."""
LONGEST = 2000
"""Characters of one text."""
LONGEST_NAME = 200


def plain(value: Any, levels: int = DEEPEST) -> Any:
    """The value in dicts, lists, texts and finite numbers of Python's own classes.

    What is infinite is None, since JSON has no infinity; halves of characters, which it hasn't either, are question
    marks; what is too deep or of another class is its text; what raises says so.
    """
    try:
        return _plain(value, levels)
    except Exception as error:
        return f"unreadable: {type(error).__name__}"


def text_of(value: Any) -> str:
    """A text of Python's own class, of a length that can be read, which every file can have."""
    try:
        text = str.__str__(value if isinstance(value, str) else str(value))
    except Exception as error:
        return f"unreadable: {type(error).__name__}"
    return cut(text if text.isascii() else text.encode(errors="replace").decode(), LONGEST)


def name_of(value: Any) -> str:
    """A stranger's name in one line."""
    return one_line(text_of(value), LONGEST_NAME)


def _plain(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text_of(value)
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < 1 << 63 else text_of(hex(number))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if levels and isinstance(value, dict):
        entries = list(cast("dict[Any, Any]", value).items())[:MOST]
        return {text_of(key): plain(entry, levels - 1) for key, entry in entries}
    if levels and isinstance(value, list | tuple | set | frozenset):
        return [plain(entry, levels - 1) for entry in list(cast("Iterable[Any]", value))[:MOST]]
    return text_of(value)
