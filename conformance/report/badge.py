"""A badge: one line of a result as a picture (SVG), for a README."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from conformance.report.read import ReportError, Run
from conformance.report.whole import Result, part, results

LABEL = "mHC conformance"
HEIGHT, PADDING, BASELINE = 20, 7, 14
WIDTH = 6.3
"""Of a character of the font, on average, at 11 pixels; `textLength` makes the text as wide as its place."""
LABEL_PAPER, INK = "#40464d", "#ffffff"
PAPER = {"passed": "#1a7033", "failed": "#b3261e"}
"""White on these has a contrast of more than 4.5 to 1; the words say what the colours say."""
LONGEST = 60
"""Characters of the result; a longer name is cut."""


def badge(runs: Sequence[Run], implementation: str = "") -> str:
    """The badge of one implementation's result.

    Args:
        runs: of one corpus.
        implementation: whose; may be left out where there is one.

    Raises:
        ReportError: a run isn't whole, or there are several implementations and none is chosen.
    """
    found = {result.implementation: result for result in results(runs)}
    if not implementation and len(found) == 1:
        (implementation,) = found
    if implementation not in found:
        problem = f"{implementation!r} isn't one of them" if implementation else "a badge is of one of them"
        raise ReportError(f"the runs have checks of {', '.join(found)}; {problem}: give --implementation NAME")
    return svg(found[implementation], runs)


def svg(result: Result, runs: Sequence[Run]) -> str:
    """The picture; its title and description say what it was a run of."""
    dialects = ", ".join(result.dialects[:2]) if len(result.dialects) < 3 else f"{len(result.dialects)} dialects"
    words = f"{dialects}: {result.said}{', of a part' if part(runs) else ''}"
    said = _cut(words)
    left, right = (round(WIDTH * len(text)) + 2 * PADDING for text in (LABEL, said))
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "width": str(left + right), "height": str(HEIGHT)}
    root = ElementTree.Element("svg", {**attributes, "role": "img", "aria-labelledby": "title description"})
    _child(root, "title", f"{LABEL}: {result.implementation}, {words}", id="title")
    _child(root, "desc", _description(result, runs), id="description")
    paper = PAPER["failed" if result.failed else "passed"]
    _child(root, "rect", width=str(left), height=str(HEIGHT), fill=LABEL_PAPER)
    _child(root, "rect", x=str(left), width=str(right), height=str(HEIGHT), fill=paper)
    for start, width, text in ((0, left, LABEL), (left, right, said)):
        _child(
            root, "text", text, x=str(start + PADDING), y=str(BASELINE), textLength=str(width - 2 * PADDING), fill=INK,
            **{"font-family": "Verdana, DejaVu Sans, sans-serif", "font-size": "11"},
        )  # fmt: skip
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _description(result: Result, runs: Sequence[Run]) -> str:
    versions = sorted({run.header.versions.get("mhc-conformance", "unknown") for run in runs})
    asked = part(runs)
    return (f"A part of what there is: {asked}. " if asked else "") + (
        f"Dialects {', '.join(result.dialects)}; corpus {runs[0].header.corpus}; mhc-conformance {', '.join(versions)}."
    )


def _cut(text: str) -> str:
    """Characters that XML can have, and no more of them than there is place for."""
    text = _printable(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2 - 1]}…{text[-LONGEST // 2 :]}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _child(parent: ElementTree.Element, tag: str, text: str = "", **attributes: str) -> None:
    ElementTree.SubElement(parent, tag, attributes).text = _printable(text) or None
