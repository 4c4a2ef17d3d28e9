"""The report as one self-contained HTML page: template, style, scripts, figures and plotly's script in one file."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

WEB = Path(__file__).with_name("web")
SCRIPTS = ("elements.js", "data.js", "matrix.js", "charts.js", "failures.js", "rest.js", "start.js")
"""The page's scripts in the order in which they run."""
DTYPES = ("float64", "float32", "bfloat16", "float16")


def page(content: dict[str, Any]) -> str:
    """The page for a merged report (`summary.summary`)."""
    return assembled("page.html", f"mHC conformance {content['corpus'][:12]}", figures(content), SCRIPTS)


def assembled(template: str, title: str, data: str, scripts: Sequence[str]) -> str:
    """A page in one file.

    Args:
        template: its file in `WEB`.
        data: JSON that can stand in HTML (`embedded`).
        scripts: files in `WEB`, in the order in which they run.
    """
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": (WEB / "page.css").read_text(encoding="utf-8"),
        "@DATA@": data,
        "@PLOTLY@": get_plotlyjs().replace("</script", "<\\/script"),
        "@SCRIPT@": "\n".join((WEB / name).read_text(encoding="utf-8") for name in scripts),
    }
    text, result = (WEB / template).read_text(encoding="utf-8"), ""
    for mark, value in parts.items():  # in the template's order, so that no mark is looked for in what was put in
        head, _, text = text.partition(mark)
        result += head + value
    return result + text


def figures(content: dict[str, Any]) -> str:
    """What the page shows as JSON that can stand in HTML; cells name their row and column by number."""
    cells = content["cells"]
    dtypes = [cell["x"] for cell in cells]
    names = {
        "implementation": list(dict.fromkeys(cell["implementation"] for cell in cells)),
        "stage": content["stages"],
        "dtype": list(dict.fromkeys([*(d for d in DTYPES if d in dtypes), *dtypes])),
        "dialect": list(dict.fromkeys(cell["dialect"] for cell in cells)),
        "verdict": list(dict.fromkeys(verdict for cell in cells for verdict in cell["verdicts"])),
    }
    number = {axis: {name: k for k, name in enumerate(values)} for axis, values in names.items()}
    rows = [
        [
            number["implementation"][cell["implementation"]], number["stage"][cell["stage"]],
            number["dtype"][cell["x"]], number["dialect"][cell["dialect"]],
            float(f"{cell['ratio']:.3g}"), cell["where"],
            *(part for verdict, count in cell["verdicts"].items() for part in (number["verdict"][verdict], count)),
        ]
        for cell in cells
    ]  # fmt: skip
    shown = {key: value for key, value in content.items() if key != "stages"} | {"names": names, "cells": rows}
    return embedded(shown)


def embedded(content: dict[str, Any]) -> str:
    """JSON that can stand in HTML; a figure that isn't finite is null."""
    text = json.dumps(_finite(content), ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
