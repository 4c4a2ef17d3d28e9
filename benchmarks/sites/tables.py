"""The tables of docs/performance.md, and what became slower, from results of `python -m benchmarks run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.sites.contenders import CONTENDERS, OURS
from benchmarks.sites.numbers import FLOOR_UNITS, STREAMS
from conformance.files import document

MARKER = "site benchmarks"
NOT_MEASURED = "not measured"
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
KINDS = {"forward": "forward", "both": "forward and gradients"}
SLOWER = 1.1
"""A median that is so many times the earlier one, and outside of its quartiles, is slower."""


def show(folder: Path, write: Path | None) -> int:
    """Prints the tables, or puts them between a page's markers."""
    parts: list[str] = []
    for device in ("cpu", "cuda"):
        path = folder / f"site-{device}.json"
        parts.append(_of_device(device, json.loads(path.read_text()) if path.is_file() else None))
    text = "\n\n".join(parts)
    if write:
        document.rewrite(write, MARKER, text + "\n")
    else:
        print(text)
    return 0


def _of_device(device: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"**{device}**: {NOT_MEASURED} (`python -m benchmarks run --device {device}`)."
    e = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version != "absent")
    head = f"**{device}**: {e['device']}, {e['threads']} threads, Python {e['python']}, {versions}."
    rows = result["rows"]
    return "\n\n".join([head, *(_times(rows, kind) for kind in KINDS), _memory(rows), _in_jax(rows)])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def _shape(row: dict[str, Any]) -> str:
    return f"{row['tokens']:,} x {row['dim']:,}, {row['dtype']}"


def _times(rows: list[dict[str, Any]], kind: str) -> str:
    """Our milliseconds, its share of a copy's bandwidth, and everybody's time as a multiple of ours."""
    others = [c.name for c in CONTENDERS if c.name != OURS]
    lines: list[list[str]] = []
    for row in rows:
        cells = row["cells"]
        ours = cells[OURS]["seconds"][kind]
        unit = row["tokens"] * row["dim"] * SIZES[row["dtype"]]
        floor = row["copy"] * FLOOR_UNITS[kind] * unit / (2 * STREAMS * unit)
        own = f"{ours[0] * 1e3:.2f} ({ours[1] * 1e3:.2f} to {ours[2] * 1e3:.2f})"
        lines.append(
            [_shape(row), own, f"{floor / ours[0]:.0%}", *(_ratio(cells, name, kind, ours[0]) for name in others)]
        )
    return _table([f"{KINDS[kind]}: tokens x dim", "ms (quartiles)", "of a copy", *others], lines)


def _ratio(cells: dict[str, Any], name: str, kind: str, ours: float) -> str:
    cell = cells.get(name)
    return f"{cell['seconds'][kind][0] / ours:.2f}" if isinstance(cell, dict) else NOT_MEASURED


def _memory(rows: list[dict[str, Any]]) -> str:
    """Bytes kept beside x as a part of x, the most held in a call likewise, and operators."""
    names = [c.name for c in CONTENDERS if any(isinstance(row["cells"].get(c.name), dict) for row in rows)]
    lines: list[list[str]] = []
    for row in rows:
        x = row["tokens"] * row["dim"] * STREAMS * SIZES[row["dtype"]]
        line = [_shape(row)]
        for name in names:
            cell = row["cells"].get(name)
            line.append(
                f"{cell['saved'] / x:.2f}, {cell['peak'] / x:.1f}, "
                f"{cell['operators']['forward']} + {cell['operators']['both'] - cell['operators']['forward']}"
                if isinstance(cell, dict)
                else NOT_MEASURED
            )
        lines.append(line)
    return _table(["kept beside x, most held (of x), operators: tokens x dim", *names], lines)


def _in_jax(rows: list[dict[str, Any]]) -> str:
    """`jax_impl` under jit beside the layer written plainly: its milliseconds, and the other's time as a multiple."""
    lines: list[list[str]] = []
    for row in rows:
        line = [_shape(row)]
        for kind in KINDS:
            ours, other = (row.get("jax", {}).get(name) for name in ("jax_impl", "written plainly"))
            if not isinstance(ours, dict) or not isinstance(other, dict):
                line += [NOT_MEASURED, NOT_MEASURED]
                continue
            seconds = ours["seconds"][kind][0]
            line += [f"{seconds * 1e3:.2f}", f"{other['seconds'][kind][0] / seconds:.2f}"]
        lines.append(line)
    header = [
        "`jax.jit`: tokens x dim",
        "forward, ms",
        "written plainly",
        "forward and gradients, ms",
        "written plainly",
    ]
    return _table(header, lines)


def compare(before: Path, after: Path) -> int:
    """Prints what is slower in the second file; 1 where anything is."""
    one, other = (json.loads(path.read_text()) for path in (before, after))
    known = {_shape(row): row["cells"] for row in one["rows"]}
    slower = 0
    for row in other["rows"]:
        for name, cell in row["cells"].items():
            was = known.get(_shape(row), {}).get(name)
            if not isinstance(cell, dict) or not isinstance(was, dict):
                continue
            for kind in KINDS:
                ratio = cell["seconds"][kind][0] / was["seconds"][kind][0]
                if ratio > SLOWER and cell["seconds"][kind][1] > was["seconds"][kind][2]:
                    slower += 1
                    print(f"{name}, {_shape(row)}, {KINDS[kind]}: {ratio:.2f} times as long")
    if one["environment"]["device"] != other["environment"]["device"]:
        print("the two were measured on different devices", file=sys.stderr)
    print(f"{slower} slower" if slower else "nothing is slower")
    return 1 if slower else 0
