"""Draws the loss curves that the training examples wrote with --losses, and how far they are apart.

    python examples/plot_losses.py torch.json jax.json losses.svg

The two must have learnt the same: one text, one dialect, the same sizes, from one weights file. This needs matplotlib.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import task

STYLE = {"svg.hashsalt": "mhc-conformance", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10}
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"
SAME = ("dialect", "batch", "length", "dim", "start", "text", "python")


def read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name in ("by", "losses", *SAME) if name not in record]
    except (OSError, ValueError, TypeError) as error:
        task.refuse(f"{path}: can't be read as what --losses of train_jax.py or train_torch.py writes ({error})")
    if wrong or len(record["losses"]) < 2:
        task.refuse(f"{path}: must have {', '.join(wrong) or 'two losses at least'}: write it with --losses")
    return record


def check_alike(paths: list[Path], records: list[dict[str, Any]]) -> None:
    """Refuses curves of which nobody can expect that they agree."""
    first, second = records
    for name in SAME:
        if first[name] != second[name]:
            told = " and ".join(f"{path} has {record[name]}" for path, record in zip(paths, records, strict=True))
            task.refuse(f"{name} must be the same, {told}: run both examples with the same options on one machine")
    if first["start"] == "its own":
        task.refuse("both examples must start from one file, they drew values of their own: run them with --weights")
    if len(first["losses"]) != len(second["losses"]):
        task.refuse(f"both must have as many steps, they have {len(first['losses'])} and {len(second['losses'])}")


def figure(records: list[dict[str, Any]]) -> Any:
    """Both curves on the same axes, and below them their difference."""
    from matplotlib import pyplot as plt

    drawn, (upper, lower) = plt.subplots(
        2, 1, figsize=(7.2, 4.4), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    curves = [np.array(record["losses"]) for record in records]
    upper.plot(curves[0], color=BLUE, lw=4, alpha=0.45, label=records[0]["by"])
    upper.plot(curves[1], color=VERMILION, lw=1, label=records[1]["by"])
    upper.set_ylabel("loss, nats a character")
    upper.legend(frameon=False)
    apart = np.abs(curves[0] - curves[1])
    lower.semilogy(np.maximum(apart, 1e-8), color=GREY, lw=0.8)  # 0 has no place on this axis
    lower.set_ylabel("difference")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.set_xlim(0, len(apart) - 1)
    upper.set_title(f"{records[0]['dialect']}, one weights file, one text (Python {records[0]['python']}'s topics)")
    return drawn


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture, by its ending as SVG, PNG or PDF. The same curves give the same SVG again: it has no date."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(STYLE):
        drawn, form = figure(records), path.suffix.lstrip(".") or "svg"
        metadata = {"Date": None, "Creator": None} if form == "svg" else None
        task.whole(path, lambda beside: drawn.savefig(beside, format=form, metadata=metadata, dpi=150))
    if form == "svg":
        text = re.sub(r"[ \t]+\n", "\n", path.read_text(encoding="utf-8"))
        task.whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def main(arguments: list[str]) -> None:
    if len(arguments) != 3:
        task.refuse("expected two files of losses and the picture to write: plot_losses.py torch.json jax.json PICTURE")
    if not importlib.util.find_spec("matplotlib"):
        task.refuse("matplotlib is missing: pip install matplotlib")
    paths = [Path(argument) for argument in arguments[:2]]
    records = [read(path) for path in paths]
    check_alike(paths, records)
    try:
        draw(records, Path(arguments[2]))
    except (OSError, ValueError) as error:
        task.refuse(error)
    apart = np.abs(np.subtract(records[0]["losses"], records[1]["losses"]))
    print(f"{len(apart)} steps, at most {apart.max():.1e} apart: {arguments[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
