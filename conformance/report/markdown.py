"""A report short enough for a comment on a pull request."""

from __future__ import annotations

from collections import Counter
from typing import Any

from conformance.report.escaping import code, text

MOST = 10


def markdown(content: dict[str, Any]) -> str:
    """Implementation by dtype: worst fraction of a bound, or failed checks; then the first failures."""
    verdicts: Counter[str] = Counter()
    for cell in content["cells"]:
        verdicts.update(cell["verdicts"])
    dtypes = [d for d in ("float64", "float32", "bfloat16", "float16") if any(c["x"] == d for c in content["cells"])]
    counts = ", ".join(f"{count} {text(verdict)}" for verdict, count in sorted(verdicts.items())) or "nothing checked"
    lines = [f"**mHC conformance**, corpus {code(content['corpus'][:12])}: {counts}", ""]
    lines += [f"* {text(line)}" for line in content["warnings"]] + ([""] if content["warnings"] else [])
    lines += [f"| implementation | {' | '.join(dtypes)} |", "|---|" + "---|" * len(dtypes)]
    for name in dict.fromkeys(c["implementation"] for c in content["cells"]):
        row = [_cell([c for c in content["cells"] if c["implementation"] == name and c["x"] == d]) for d in dtypes]
        lines.append(f"| {text(name)} | {' | '.join(row)} |")
    lines += [""] if content["failures"] else []
    for check in content["failures"][:MOST]:
        figure = "" if not check.get("worst") else f", {_ratio(check['ratio'])} times the bound"
        mode = f" ({text(check['mode'])})" if check.get("mode") else ""
        item = ", ".join(text(check[key]) for key in ("case", "stage", "variant"))
        lines.append(
            f"* {text(check['implementation'])}: {item}, {code(check['tensor'])}: "
            f"{text(check['verdict'])}{mode}{figure} {text(check['message'])}".rstrip()
        )
        lines.append(f"  {code(check.get('reproduce', ''))}")
    more = len(content["failures"]) + content["hidden"] - MOST
    if more > 0:
        lines.append(f"* and {more} more")
    if content["selftest"]:
        problems = len(content["selftest"]["problems"])
        lines += [
            "",
            f"Self-test: {len(content['selftest']['mutants']) + len(content['selftest']['where'])} mutants, "
            f"{problems} problems. "
            f"{text(content['selftest']['honest'])}",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _cell(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return "-"
    bad = sum(n for c in cells for verdict, n in c["verdicts"].items() if verdict not in ("passed", "marginal"))
    return f"**{bad} failed**" if bad else f"{max(c['ratio'] for c in cells):.2f}"


def _ratio(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"
