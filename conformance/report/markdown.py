"""A report short enough for a comment on a pull request."""

from __future__ import annotations

from collections import Counter
from typing import Any

from conformance.judge.rule import GOOD
from conformance.report.escaping import code, text

MOST = 10
"""Groups that are named."""
MOST_LINES = 3
"""Lines under a diagnosis."""


def markdown(content: dict[str, Any]) -> str:
    """The diagnoses; implementation by dtype, with the worst fraction of a bound or the failed checks; the groups."""
    verdicts: Counter[str] = Counter()
    for cell in content["cells"]:
        verdicts.update(cell["verdicts"])
    counts = ", ".join(f"{count} {text(verdict)}" for verdict, count in sorted(verdicts.items())) or "nothing checked"
    lines = [f"**mHC conformance**, corpus {code(content['corpus'][:12])}: {counts}", ""]
    lines += [f"* {text(line)}" for line in content["warnings"]] + ([""] if content["warnings"] else [])
    lines += _diagnoses(content["diagnoses"])
    lines += _table(content["cells"])
    lines += _groups(content["groups"])
    if content["selftest"]:
        problems = len(content["selftest"]["problems"])
        lines += [
            "",
            f"Self-test: {len(content['selftest']['mutants']) + len(content['selftest']['where'])} mutants, "
            f"{problems} problems. "
            f"{text(content['selftest']['honest'])}",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _diagnoses(diagnoses: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for diagnosis in diagnoses[:MOST]:
        lines.append(f"* **{text(diagnosis['implementation'])}**: {text(diagnosis['cause'])}")
        lines += [f"  * {text(line)}" for line in diagnosis["lines"][:MOST_LINES]]
    if len(diagnoses) > MOST:
        lines.append(f"* and {len(diagnoses) - MOST} more diagnoses")
    return [*lines, ""] if lines else []


def _table(cells: list[dict[str, Any]]) -> list[str]:
    dtypes = [d for d in ("float64", "float32", "bfloat16", "float16") if any(c["x"] == d for c in cells)]
    lines = [f"| implementation | {' | '.join(dtypes)} |", "|---|" + "---|" * len(dtypes)]
    for name in dict.fromkeys(c["implementation"] for c in cells):
        row = [_cell([c for c in cells if c["implementation"] == name and c["x"] == d]) for d in dtypes]
        lines.append(f"| {text(name)} | {' | '.join(row)} |")
    return lines


def _cell(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return "-"
    bad = sum(n for c in cells for verdict, n in c["verdicts"].items() if verdict not in GOOD)
    return f"**{bad} failed**" if bad else f"{max(c['ratio'] for c in cells):.2f}"


def _groups(groups: list[dict[str, Any]]) -> list[str]:
    """The groups that lead, each with a line that repeats its smallest item; those that follow are counted."""
    leaders = [group for group in groups if not group["follows"]]
    lines: list[str] = [""] if groups else []
    for group in _first(leaders):
        figure = f", up to {_ratio(group['ratio'])} times the bound" if "failed" in group["verdicts"] else ""
        modes = f" ({text(', '.join(group['modes']))})" if group["modes"] else ""
        where = text(f"{', '.join(group['dtypes'])}; {_few(group['dialects'])}")
        count = f"{group['items']} {'item' if group['items'] == 1 else 'items'}"
        name = f"{text(group['implementation'])}: {text(group['stage'])}, {code(group['tensor'])}"
        said = f"{text(', '.join(group['verdicts']))}{modes} in {count} ({where}){figure}"
        lines.append(f"* {name}: {said} {text(group['message'])}".rstrip())
        lines.append(f"  {code(group['reproduce'])}")
    if len(leaders) > MOST:
        lines.append(f"* and {len(leaders) - MOST} more groups")
    if len(groups) > len(leaders):
        count = sum(group["checks"] for group in groups if group["follows"])
        lines.append(f"* {count} {'failure' if count == 1 else 'failures'} of other stages only follow from these")
    return lines


def _first(leaders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each implementation, then the second of each and so on, as many as are named; in their order."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for number, group in enumerate(leaders):
        turns.append((seen[group["implementation"]], number))
        seen[group["implementation"]] += 1
    return [leaders[number] for number in sorted(number for _, number in sorted(turns)[:MOST])]


def _few(names: list[str]) -> str:
    """The first names, and the number of the others."""
    rest = len(names) - MOST_LINES
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:MOST_LINES])} and {rest} more"


def _ratio(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:.3g}"
