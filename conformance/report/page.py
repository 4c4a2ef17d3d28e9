"""The report as one self-contained HTML page: template, data and plotly's script in one file."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

TEMPLATE = Path(__file__).with_name("page.html")


def page(content: dict[str, Any]) -> str:
    """The page for a merged report (`summary.summary`)."""
    data = json.dumps(_finite(content), ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")
    text = TEMPLATE.read_text(encoding="utf-8")
    script = get_plotlyjs().replace("</script", "<\\/script")
    parts = {"@TITLE@": html.escape(f"mHC conformance {content['corpus'][:12]}"), "@DATA@": data, "@PLOTLY@": script}
    for mark, value in parts.items():
        head, _, tail = text.partition(mark)
        text = head + value + tail
    return text


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
