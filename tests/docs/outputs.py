"""Whether a page shows what was printed: the same text, where durations are left out and figures compared loosely."""

from __future__ import annotations

import math
import re

LEFT_OUT = "…"
"""A line of its own that stands for any number of lines."""
NUMBER = re.compile(r"(\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)")
DURATION = re.compile(r"\d+(?:\.\d+)?(?= ?(?:s|seconds|min|minutes)\b)")
RELATIVE, UNITS = 0.05, 2
"""How far a figure with a decimal point may be off, and in units of the last place that is shown: another machine, or
another version of a framework, rounds differently. A figure below 1e-4 is an error of rounding (`_near`)."""


def differences(shown: str, printed: str) -> str:
    """The first line that is shown and was not printed; empty where there is none."""
    expected = [line.rstrip() for line in shown.strip("\n").splitlines()]
    actual = [line.rstrip() for line in printed.strip("\n").splitlines()]
    position, anywhere = 0, False
    for line in expected:
        if line == LEFT_OUT:
            anywhere = True
            continue
        candidates = range(position, len(actual)) if anywhere else range(position, min(position + 1, len(actual)))
        matching = next((index for index in candidates if same(line, actual[index])), None)
        if matching is None:
            following = repr(actual[position]) if position < len(actual) else "no more lines"
            return f"expected {line!r}, got {'nothing like it' if anywhere else following}"
        position, anywhere = matching + 1, False
    if position < len(actual) and not anywhere:
        return f"expected no more lines, got {actual[position]!r}"
    return ""


def same(shown: str, printed: str) -> bool:
    """Whether two lines agree in their words, in whole numbers, and nearly in figures with a decimal point."""
    parts = [NUMBER.split(DURATION.sub("#", line)) for line in (shown, printed)]
    if len(parts[0]) != len(parts[1]):
        return False
    pairs = list(zip(*parts, strict=True))
    words = [first.split() == second.split() for first, second in pairs[::2]]
    return all(words) and all(_near(first, second) for first, second in pairs[1::2])


def _near(shown: str, printed: str) -> bool:
    first, second = float(shown), float(printed)
    small, large = sorted((abs(first), abs(second)))
    if large < 1e-4:
        return small == large or (small > 0 and large / small <= 10)
    last_place = 0.0 if "e" in shown else 10.0 ** -len(shown.partition(".")[2])
    return math.isclose(first, second, rel_tol=RELATIVE, abs_tol=UNITS * last_place)
