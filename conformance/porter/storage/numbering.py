"""Shards that count themselves: ``model-00003-of-00009.safetensors`` is one of nine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from conformance.porter.errors import Incomplete, PortError

NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>[0-9]+)-of-(?P<total>[0-9]+)(?P<ending>\.[A-Za-z]+)")


def split(name: str) -> tuple[str, int, int] | None:
    """The text before a shard's number, the number and the total; None for a file that isn't numbered."""
    match = NUMBERED.fullmatch(name)
    return (match["stem"] + match["ending"], int(match["number"]), int(match["total"])) if match else None


def check_numbers(directory: Path, names: Iterable[str]) -> None:
    """Refuses a directory that lacks some of the shards that its files' names count, from 1 or from 0.

    Args:
        names: the names of its files.

    Raises:
        Incomplete: its message says which shards are missing, or that the totals differ.
    """
    totals: dict[str, dict[int, set[int]]] = {}
    for name in names:
        if numbered := split(name):
            stem, number, total = numbered
            totals.setdefault(stem, {}).setdefault(total, set()).add(number)
    for stem, shards in totals.items():
        if len(shards) > 1:
            first, second = sorted(shards)[:2]
            raise Incomplete(
                f"{directory}: has shards {stem!r} of {first} and of {second}: keep those of one checkpoint"
            )
        ((total, present),) = shards.items()
        first = 0 if 0 in present else 1
        missing = [n for n in range(first, first + min(total, 10**6)) if n not in present]
        surplus = sorted(n for n in present if n >= first + total)
        if missing or surplus:
            which, problem = (missing, "missing") if missing else (surplus, "too many")
            plural = "s" if len(which) > 1 else ""
            raise Incomplete(
                f"{directory}: shard{plural} {listed(which)} of {total} {'are' if plural else 'is'} {problem}, as the "
                f"names of the files count them: fetch the whole checkpoint"
            )


def of_one_model(directory: Path, holding: Iterable[str], way_out: str) -> None:
    """Refuses hyper-connections in several files whose names don't count each other as shards of one model.

    Args:
        holding: the names of the files with hyper-connections.
        way_out: a file that would say that they are of one model.

    Raises:
        PortError: its message names the files.
    """
    models: dict[str, str] = {}
    for name in holding:
        models.setdefault(numbered[0] if (numbered := split(name)) else name, name)
    if len(models) > 1:
        examples = " and ".join(sorted(models.values())[:2]) + (
            f" and {len(models) - 2} more" if len(models) > 2 else ""
        )
        raise PortError(
            f"{directory}: has hyper-connections in {examples}, and nothing says that they are of one model: name the "
            f"file that counts{f', or add {way_out}' if way_out else ''}"
        )


def check_whole(path: Path) -> None:
    """Refuses a file whose name says that it is one shard of several.

    Raises:
        Incomplete: its message says what to name instead.
    """
    numbered = split(path.name)
    if numbered and numbered[2] > 1:
        raise Incomplete(
            f"{path}: is shard {numbered[1]} of {numbered[2]} by its name, so only a part of a checkpoint: name the "
            f"directory, or rename a file that is a whole checkpoint"
        )


def listed(numbers: Iterable[int]) -> str:
    """Writes 1, 2, 3, 6, 7 as ``1-3, 6 and 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [part for r in runs for part in ([f"{r[0]}-{r[-1]}"] if len(r) > 2 else map(str, r))]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
