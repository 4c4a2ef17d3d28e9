"""A stranger's value becomes JSON's whatever it is, and a message one line of a length that can be read."""

from __future__ import annotations

import json
from typing import Any

from conformance.files.line import LONGEST, cut, one_line
from conformance.files.plain import MOST, name_of, plain, text_of


class Raises:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Entries(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("no items")


def test_any_value_is_one_of_json():
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    values = [
        float("nan"),
        10**5000,
        "\ud800",
        {1: 2},
        {1, 2},
        Raises(),
        Entries(a=1),
        cyclic,
        b"x",
        object,
        None,
        True,
    ]
    found = plain({"values": values, "many": list(range(10 * MOST))})
    assert json.loads(json.dumps(found)) == found and len(found["many"]) == MOST
    assert found["values"][:1] == [None] and found["values"][2:4] == ["?", {"1": 2}]
    assert found["values"][5:7] == ["unreadable: RuntimeError"] * 2


def test_plain_values_stay_as_they_are():
    value = {"a": [1, 2.5, "x", None, True, {"b": []}]}
    assert plain(value) == value


def test_texts_are_cut_in_the_middle():
    assert cut("abc", 3) == "abc" and one_line("a" * 5000 + "end").endswith("aend")
    assert len(one_line("x" * 10_000)) == LONGEST + 2 and len(text_of("x" * 10_000)) < 2010
    assert name_of("[/red]\x1b\n") == r"[/red]\x1b\n" and len(name_of("n" * 1000)) < 210
