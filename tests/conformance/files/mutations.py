"""Seeded mutations of a JSON document: what stands in files by mistake, by a cut, or by somebody's intent."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2.5, 1e308, 10**30, 10**400, "", "x", "\0", "a\nb", "\U0001f600", [], {}, [[]],
    {"a": {}}, ["x", "x"], "float32", "layer", "x" * 500, "../x",
]  # fmt: skip
TEXTS = [
    "NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 3000 + "]" * 3000, '{"a":' * 400 + "1" + "}" * 400,
    "01", "'a'", "", "tru", '"\t"', "[1,]", "{}{}",
]  # fmt: skip
"""What is no JSON, or more than a program takes."""
MARK = "@here@"


def mutations(document: Any, count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` texts that are nearly the document's."""
    random_ = random.Random(seed)
    for _ in range(count):
        yield _spoilt(_text(copy.deepcopy(document), random_), random_)


def _text(document: Any, random_: random.Random) -> str:
    places = list(_places(document))
    if not places:
        return random_.choice(TEXTS)
    inserted, repeated = "", ""
    for parent, key in random_.sample(places, min(len(places), random_.choice([1, 1, 2]))):
        if (isinstance(parent, dict) and key not in parent) or (isinstance(parent, list) and key >= len(parent)):
            continue  # gone with another change
        value, how = parent[key], random_.randrange(6)
        if how == 0:
            del parent[key]
        elif how == 1:
            parent[key] = random_.choice(VALUES)
        elif how == 2:
            parent[key] = random_.choice([[value], {"a": value}, str(value)[:100]])
        elif how == 3 and isinstance(parent, dict):
            parent[random_.choice(["color", "a\nb", "", "x" * 300])] = parent.pop(key)
        elif how == 4 and isinstance(parent, dict):
            repeated = json.dumps(key)
        else:
            parent[key], inserted = MARK, random_.choice(TEXTS)
    text = json.dumps(document).replace(json.dumps(MARK), inserted or "1")
    return text.replace(f"{repeated}:", f"{repeated}: 1, {repeated}:", 1) if repeated else text


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (object or list, key or index)."""
    entries: Any = document.items() if isinstance(document, dict) else ()
    for key, value in enumerate(document) if isinstance(document, list) else entries:
        yield document, key
        yield from _places(value)


def _spoilt(text: str, random_: random.Random) -> bytes:
    """The text as bytes, once in ten times cut, or in another encoding."""
    content = text.encode()
    at = random_.randrange(len(content) + 1)
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at], lambda: b"\xef\xbb\xbf" + content, lambda: text.encode("utf-16"),
        lambda: content[:at] + bytes([random_.randrange(256)]) + content[at + 1 :],
        lambda: content.replace(b'"', b'"\xff', 1),
    ]  # fmt: skip
    return random_.choice(ways)() if random_.random() < 0.1 else content


def refused(action: Callable[[], object], expected: type[Exception], named: str = "") -> bool:
    """Whether an action raises the expected exception, with a message of one line that names the file.

    Any other exception is the test's failure.
    """
    try:
        action()
    except expected as error:
        message = str(error)
        if not message.isprintable() or named not in message or len(message) > 2500:
            pytest.fail(f"expected one line about {named!r}, got {message[:300]!r}")
        return True
    return False
