"""Draws the pictures of the documents: `python docs/pictures/draw.py` writes them, `--check` compares them.

The numbers come from the formulas of the oracle (`conformance.oracle.residual`) in float64, with NumPy alone. The files
carry no date and no random names, so that the same code draws the same picture.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import dialect_rows
from conformance.oracle import data, residual
from conformance.oracle.floats import Quick

FOLDER = Path(__file__).parent
STYLE = {
    "svg.hashsalt": "mhc-conformance",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
"""Okabe and Ito's colours, which people with any kind of colour blindness can tell apart."""
STREAMS = (BLUE, VERMILION, GREEN, PURPLE)

CASE = "slowest-n4-deepseek-v4"
"""The golden case whose logits are drawn: the n = 4 matrix that the corpus' search found to converge slowest."""
SITES, TOKENS, DEVIATION = 60, 1024, 4.0


def matrices(logits: np.ndarray, dialect: str) -> np.ndarray:
    """H ``[T, n, n]`` of logits ``[T, n, n]`` under a row of the dialects."""
    return residual.sinkhorn(logits, dialect_rows()[dialect], Quick())[0]


# The layer


def layer() -> Figure:
    """The streams, the coefficients, the branch and the mixing, as they are connected."""
    figure, axes = plt.subplots(figsize=(9.6, 4.9))
    axes.set_xlim(0, 12.0)
    axes.set_ylim(-0.35, 5.75)
    axes.set_aspect("equal")
    axes.axis("off")
    heights = (1.65, 1.15, 0.65, 0.15)
    for height, colour, label in zip(heights, STREAMS, ("x_1", "x_2", "x_3", "x_4"), strict=True):
        axes.text(0.55, height, f"${label}$", ha="right", va="center", color=colour, fontsize=12)
        axes.plot([0.65, 6.0], [height, height], color=colour, lw=2, solid_capstyle="butt", zorder=1)
        axes.plot([7.4, 8.98], [height, height], color=colour, lw=2, solid_capstyle="butt", zorder=1)
        _arrow(axes, (9.22, height), (10.9, height), colour, 2)
        axes.add_patch(Circle((9.1, height), 0.13, facecolor="white", edgecolor=colour, lw=1.4, zorder=4))
        axes.text(9.1, height, "+", ha="center", va="center", fontsize=10, zorder=5)
        axes.text(11.0, height, f"${label.replace('x', 'out')}$".replace("out", r"\mathrm{out}"), ha="left",
                  va="center", color=colour, fontsize=12)  # fmt: skip
    _box(axes, (6.7, 0.9), (1.4, 2.1), "mixing\n\n" + r"$\sum_i H_{ij}\, x_i$", "#E8F1F8")
    _box(axes, (5.0, 5.1), (8.4, 0.95), "coefficients, for every token: norm of all n·C numbers, one projection, then\n"
         "pre and post by a sigmoid, H by Sinkhorn iterations", "#F3F3F3")  # fmt: skip
    _box(axes, (2.7, 3.1), (1.7, 0.95), r"$u = \sum_i \mathrm{pre}_i\, x_i$", "#E8F1F8")
    _box(axes, (5.0, 3.1), (1.7, 0.95), "norm, then the\nbranch $F$\n(attention, MLP)", "#FBEEE4")
    _box(axes, (8.3, 3.1), (1.2, 0.95), r"$\mathrm{post}_j\, y$", "#E8F1F8")
    # The streams go up to the coefficients and to pre; what is grey and dashed are numbers, not streams.
    axes.plot([1.1] * 4, heights, "o", color=GREY, ms=3.5, zorder=3)
    axes.plot([1.1, 1.1], [heights[-1], heights[0]], color=GREY, lw=1.2, zorder=2)
    _arrow(axes, (1.1, heights[0]), (1.1, 4.62), GREY, 1.2)
    axes.plot([2.7] * 4, heights, "o", color=GREY, ms=3.5, zorder=3)
    axes.plot([2.7, 2.7], [heights[-1], heights[0]], color=GREY, lw=1.2, zorder=2)
    _arrow(axes, (2.7, heights[0]), (2.7, 2.62), GREY, 1.2)
    for x, low, label in ((2.7, 3.58, "pre  [n]"), (6.7, 1.95, "H  [n, n]"), (8.3, 3.58, "post  [n]")):
        _arrow(axes, (x, 4.62), (x, low), GREY, 1.2, "--")
        axes.text(x + 0.12, 4.1, label, ha="left", va="center", color=GREY, fontsize=9)
    _arrow(axes, (3.55, 3.1), (4.15, 3.1), "black", 1.4)
    axes.text(3.85, 3.27, "$u$", ha="center", va="center")
    _arrow(axes, (5.85, 3.1), (7.7, 3.1), "black", 1.4)
    axes.text(6.25, 3.27, "$y$", ha="center", va="center")
    axes.plot([8.9, 9.1], [3.1, 3.1], color="black", lw=1.4)
    axes.plot([9.1, 9.1], [3.1, heights[-1] + 0.13], color="black", lw=1.4, zorder=2)
    _arrow(axes, (9.1, 2.4), (9.1, heights[0] + 0.13), "black", 1.4)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    return figure


def _box(axes: Axes, centre: tuple[float, float], size: tuple[float, float], text: str, colour: str) -> None:
    (x, y), (width, height) = centre, size
    corner, rounded = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, height, rounded, facecolor=colour, edgecolor="black", zorder=3))
    axes.text(x, y, text, ha="center", va="center", fontsize=9.5, zorder=4)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float,
           line: str = "-") -> None:  # fmt: skip
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=width,
                                   linestyle=line, shrinkA=0, shrinkB=0, zorder=3))  # fmt: skip


# The dialects' matrices


def families() -> list[list[str]]:
    """The dialects with Sinkhorn iterations, those with the same H in one list, DeepSeek-V4's first."""
    same: dict[tuple[Any, ...], list[str]] = {}
    for name, row in dialect_rows().items():
        if row["residual"] == "sinkhorn":
            keys = ("softmax", "order", "guard", "eps", "iterations", "logit_limit", "matrix")
            same.setdefault(tuple(row[key] for key in keys), []).append(name)
    for names in same.values():
        names.sort(key=lambda name: name != "deepseek-v4")
    return sorted(same.values(), key=lambda names: "deepseek-v4" not in names)


def sharp_logits() -> np.ndarray:
    """``[1, n, n]``: the first token's logits of `CASE`."""
    (case,) = [case for case in load_corpus() if case.id == CASE]
    return case.tensors["input/logits"].astype(np.float64).reshape(-1, 4, 4)[:1]


def dialects() -> Figure:
    """H of the same sharp logits under each distinct Sinkhorn, and what separates it from DeepSeek-V4's."""
    groups, logits = families(), sharp_logits()
    figure, axes = plt.subplots(2, len(groups), figsize=(2.0 * len(groups) + 0.9, 5.2))
    reference = matrices(logits, "deepseek-v4")[0]
    for (upper, lower), names in zip(axes.T, groups, strict=True):
        H = matrices(logits, names[0])[0]
        more = f"and {len(names) - 1} more" if len(names) > 1 else ""
        upper.set_title(f"{names[0]}\n{more}", fontweight="bold")
        upper.set_xlabel(_described(dialect_rows()[names[0]]), fontsize=8.5, labelpad=17)
        shown = upper.imshow(H, cmap="Blues", vmin=0, vmax=1)
        _write(upper, H, "{:.2f}", lambda value: value > 0.6)
        _sums(upper, H)
        if "deepseek-v4" not in names:
            apart = lower.imshow(H - reference, cmap="PuOr_r", vmin=-0.17, vmax=0.17)
            _write(lower, H - reference, "{:+.2f}", lambda value: abs(value) > 0.11)
    legend = axes[1, 0]
    legend.axis("off")
    for height, colour, text in ((0.86, VERMILION, "right of H: sums of its rows"),
                                 (0.72, BLUE, "below H: sums of its columns"),
                                 (0.4, "black", "lower matrices: the H above\nminus deepseek-v4's H")):  # fmt: skip
        legend.text(-0.05, height, text, ha="left", va="center", color=colour, fontsize=8.5, transform=legend.transAxes)
    figure.subplots_adjust(0.02, 0.03, 0.925, 0.9, wspace=0.42, hspace=0.52)
    for image, beside in ((shown, axes[0, -1]), (apart, axes[1, -1])):
        place = beside.get_position()
        bar = figure.colorbar(image, cax=figure.add_axes((0.95, place.y0, 0.011, place.height)))
        bar.ax.tick_params(labelsize=8)
    return figure


def _described(row: dict[str, Any]) -> str:
    """The parameters that tell the matrices apart, in three lines."""
    start = {"rows": "softmax of rows", "columns": "softmax of columns", "none": "exp, no softmax"}[row["softmax"]]
    guard = "no eps" if row["guard"] == "none" else f"{row['guard']} {row['eps']:g}"
    return f"{start}\n{row['order']}\n{guard}"


def _write(axes: Axes, values: np.ndarray, form: str, light: Callable[[float], bool]) -> None:
    for (i, j), value in np.ndenumerate(values):
        text = form.format(value) if abs(value) >= 5e-3 else "0"
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if light(value) else "black")
    axes.set_xticks([])
    axes.set_yticks([])


def _sums(axes: Axes, H: np.ndarray) -> None:
    """The sums of the rows at the right, those of the columns below."""
    for index, total in enumerate(H.sum(-1)):
        axes.text(3.6, index, f"{total:.2f}", ha="left", va="center", fontsize=7.5, color=VERMILION)
    for index, total in enumerate(H.sum(-2)):
        axes.text(index, 3.65, f"{total:.2f}", ha="center", va="top", fontsize=7.5, color=BLUE)


# What depth does


def composites(dialect: str, repeated: bool) -> np.ndarray:
    """``[sites, T, n, n]``: H_1 H_2 ... H_l, by which "in-out" leads x of the first site to x after l sites.

    Args:
        dialect: whose Sinkhorn makes each H.
        repeated: a token has the same logits at every site; otherwise logits of different sites are independent.
    """
    logits = DEVIATION * data.normal("depth", (1 if repeated else SITES, TOKENS, 4, 4))
    product = np.broadcast_to(np.eye(4), (TOKENS, 4, 4))
    found = []
    for site in range(SITES):
        product = np.einsum("tij,tjk->tik", product, matrices(logits[0 if repeated else site], dialect))
        found.append(product)
    return np.stack(found)


def depth() -> Figure:
    """The sums of the composite H over the sites, for an order that ends on columns and one that ends on rows."""
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 6.0), sharex=True, sharey="row")
    orders = (("deepseek-v4", "rows first, columns last (deepseek-v4)"),
              ("paper", "columns first, rows last (paper's Sinkhorn)"))  # fmt: skip
    for row, repeated in enumerate((False, True)):
        for column, (dialect, title) in enumerate(orders):
            place, products = axes[row, column], composites(dialect, repeated)
            for axis, colour, label in ((-1, VERMILION, "row sums"), (-2, BLUE, "column sums")):
                _band(place, products.sum(axis), colour, label)
            place.axhline(1, color=GREY, lw=0.6, zorder=0)
            place.set_xlim(1, SITES)
            place.grid(alpha=0.25)
            kind = "the same logits at every site" if repeated else "independent logits at every site"
            place.set_title(f"{title if not row else ''}\n{kind}".strip(), loc="left")
    axes[0, 0].set_ylabel("sums of the composite H")
    axes[1, 0].set_ylabel("sums of the composite H")
    for place in axes[1]:
        place.set_xlabel("sites")
    axes[0, 0].legend(loc="upper left", fontsize=9, framealpha=1)
    figure.subplots_adjust(0.075, 0.085, 0.985, 0.92, wspace=0.06, hspace=0.22)
    return figure


def _band(axes: Axes, sums: np.ndarray, colour: str, label: str) -> None:
    """Largest and smallest sum of each token: their means over tokens as lines, 98 in 100 tokens as an area."""
    sites = np.arange(1, SITES + 1)
    high, low = sums.max(-1), sums.min(-1)
    outer = np.quantile(low, 0.01, axis=-1), np.quantile(high, 0.99, axis=-1)
    axes.fill_between(sites, *outer, color=colour, alpha=0.18, lw=0)
    for edge, name in ((high, label), (low, None)):
        axes.plot(sites, edge.mean(-1), color=colour, lw=1.6, label=name)


# The training examples


def losses() -> Figure:
    """The curves that the training examples wrote (docs/layer.md, "A whole model"), as plot_losses.py draws them."""
    sys.path.append(str(FOLDER.parents[1] / "examples"))
    import plot_losses

    return plot_losses.figure([plot_losses.read(FOLDER / "losses" / f"{name}.json") for name in ("torch", "jax")])


PICTURES: dict[str, Callable[[], Figure]] = {"layer": layer, "dialects": dialects, "depth": depth, "losses": losses}
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-\d+)?(?![\w.])")


def drawn(name: str) -> str:
    """The picture as the text of an SVG file."""
    with matplotlib.rc_context(STYLE):
        figure, file = PICTURES[name](), io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return re.sub(r"[ \t]+\n", "\n", file.getvalue())


def same(a: str, b: str) -> bool:
    """Whether two files show the same: equal text, and numbers that differ by less than a hundredth of a point."""
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    numbers = ([float(text) for text in NUMBER.findall(text)] for text in (a, b))
    return all(abs(x - y) < 0.01 for x, y in zip(*numbers, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a picture is another one")
    check = parser.parse_args().check
    stale = []
    for name in PICTURES:
        path, text = FOLDER / f"{name}.svg", drawn(name)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or not same(path.read_text(encoding="utf-8"), text):
            stale.append(path.name)
    if stale:
        print(f"{', '.join(stale)}: not what draw.py draws; run python docs/pictures/draw.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
