"""What doesn't fit a record, in words: where it stands, what was expected and what came.

The types of `msgspec` are walked beside plain values (lists, dicts and scalars), since msgspec's own message doesn't
say in which entry of an object it stopped, nor what stood there.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

from msgspec import inspect

_SHOWN = 60
"""Characters of a text from outside in a message."""


def shown(value: Any) -> str:
    """A value from outside as a message shows it, as JSON has it, of any length and depth."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value[:_SHOWN]) + ("…" if len(value) > _SHOWN else "")
    return reprlib.repr(value)


def unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    """The message about a name that isn't among the known ones, with the one that was probably meant.

    Args:
        kind: what is named: a stage, a dialect, ….
    """
    known = list(known)
    return f"unknown {kind} {shown(name)}, expected one of {', '.join(known)}{meant(name, known)}"


def meant(name: Any, known: Iterable[str]) -> str:
    """``; did you mean …?`` for the known name that is nearest, if one is near."""
    import difflib  # 4 ms, which only a slip needs

    names = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), names, 1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def slip(name: str, known: Collection[str]) -> bool:
    """Whether an unknown name is one of the known ones in another spelling, and not a name of its own.

    Names that differ in a digit are versions: ``deepseek-v4.2`` is no slip of ``deepseek-v4.1``.
    """
    import difflib

    def bare(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    def digits(text: str) -> str:
        return "".join(c for c in text if c.isdigit())

    alike = {bare(other) for other in known if digits(other) == digits(name)}
    return name not in known and bool(difflib.get_close_matches(bare(name), alike, 1, 0.85))


def problems(kind: inspect.Type, value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every place where a plain value isn't of a type, and what is wrong there; the first is enough for a message."""
    if isinstance(kind, inspect.UnionType):
        yield from _problems_of_union(kind, value, place)
    elif not fits(kind, value):
        yield place, f"expected {_named(kind)}, got {shown(value)}"
    elif isinstance(kind, inspect.StructType | inspect.DataclassType):
        yield from _problems_of_record(kind, value, place)
    elif isinstance(kind, inspect.DictType):
        for key, part in value.items():
            yield from problems(kind.value_type, part, _inside(place, key))
    elif isinstance(kind, inspect.ListType | inspect.VarTupleType):
        for number, part in enumerate(value):
            yield from problems(kind.item_type, part, f"{place}[{number}]")


def _problems_of_union(kind: inspect.UnionType, value: Any, place: str) -> Iterator[tuple[str, str]]:
    fitting = [one for one in kind.types if fits(one, value)]
    if not fitting:
        number = any(isinstance(one, inspect.FloatType) for one in kind.types)
        *names, last = [_named(one) for one in kind.types if not (number and isinstance(one, inspect.IntType))]
        yield place, f"expected {', '.join(names)} or {last}, got {shown(value)}"
    tagged = [one for one in fitting if isinstance(one, inspect.StructType) and one.tag_field]
    if tagged:
        field, tags = str(tagged[0].tag_field), {str(one.tag): one for one in tagged}
        if not isinstance(value.get(field), str) or value[field] not in tags:
            yield _inside(place, field), f"expected one of {', '.join(tags)}, got {shown(value.get(field))}"
            return
        fitting = [tags[value[field]]]
    if len(fitting) == 1:
        yield from problems(fitting[0], value, place)


def _problems_of_record(
    kind: inspect.StructType | inspect.DataclassType, value: dict[str, Any], place: str
) -> Iterator[tuple[str, str]]:
    known = [field.encode_name for field in kind.fields]
    if isinstance(kind, inspect.StructType) and kind.tag_field and value.get(kind.tag_field, kind.tag) != kind.tag:
        tag = kind.tag_field
        yield _inside(place, tag), f"expected {kind.tag!r}, got {shown(value[tag])}"
    if isinstance(kind, inspect.StructType) and kind.forbid_unknown_fields:
        for key in value:
            if key not in (*known, kind.tag_field):
                yield place, f"unknown key {shown(key)}, expected some of {', '.join(known)}"
    for field in kind.fields:
        if field.encode_name in value:
            yield from problems(field.type, value[field.encode_name], _inside(place, field.encode_name))
        elif field.required:
            yield place, f"expected the key {field.encode_name!r}, which isn't there"


def _inside(place: str, key: str) -> str:
    step = key if re.fullmatch(r"[\w./ -]{1,100}", key) else f"[{shown(key)}]"
    return f"{place}.{step}" if place and not step.startswith("[") else place + step


def fits(kind: inspect.Type, value: Any) -> bool:
    """Whether a value is of a type on the outside; a part of it may still be wrong."""
    if isinstance(kind, inspect.AnyType):
        return True
    if isinstance(kind, inspect.UnionType):
        return any(fits(one, value) for one in kind.types)
    if isinstance(kind, inspect.NoneType):
        return value is None
    if isinstance(kind, inspect.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, inspect.LiteralType):
        return isinstance(value, str | int | None) and value in kind.values
    if isinstance(kind, inspect.StrType):
        return isinstance(value, str) and len(value) >= (kind.min_length or 0)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        whole = isinstance(kind, inspect.IntType)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            return False
        return (whole or _finite(value)) and value >= (-math.inf if kind.ge is None else kind.ge)
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        return isinstance(value, list) and len(cast("list[Any]", value)) >= (kind.min_length or 0)
    return isinstance(value, dict)


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _named(kind: inspect.Type) -> str:
    """What a type is called after "expected"."""
    if isinstance(kind, inspect.LiteralType):
        return f"one of {', '.join(map(str, kind.values))}"
    if isinstance(kind, inspect.StrType):
        return "a text that isn't empty" if kind.min_length else "a text"
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        name = "an integer" if isinstance(kind, inspect.IntType) else "a finite number"
        return name if kind.ge is None else f"{name} of at least {kind.ge}"
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        return "a list that isn't empty" if kind.min_length else "a list"
    if isinstance(kind, inspect.NoneType):
        return "null"
    return "true or false" if isinstance(kind, inspect.BoolType) else "an object"
