"""Tells the types of values that come from files, such as JSON, YAML, pickles and trees, whose contents have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether the value is a mapping, of whatever keys and values."""
    return isinstance(value, Mapping)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether the value is a list or a tuple, of whatever elements; a text is none."""
    return isinstance(value, list | tuple)


def is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Whether the value is a tuple, of whatever elements."""
    return isinstance(value, tuple)
