"""Tables of the verdicts between all dialects, with a measurement on one made-up site, in Markdown."""

from __future__ import annotations

import numpy as np

from conformance.cases.dialects import Parameters, dialect_rows
from conformance.oracle.data import normal
from conformance.porter.convert import convert
from conformance.porter.layouts import layouts
from conformance.porter.probe import Probes, activations
from conformance.porter.site import NORM, SiteKey, Weights, canonical_shapes
from conformance.porter.verdict import EXACT, IMPOSSIBLE, ROUNDING, Verdict, derive

STREAMS, DIM, TOKENS = 4, 64, 64
SITE = SiteKey("layers", 0, "attention")
ALPHAS = {"pre": 0.9, "post": -1.3, "res": 1.7}
LEGEND = {
    EXACT: "exact",
    ROUNDING: "rounding",
    IMPOSSIBLE: "—",
}


def made_up(residual: str, norm: bool) -> Weights:
    """Weights of one site: α of order 1, biases of order 1, logits with a deviation of about 2."""
    weights: Weights = {}
    for name, shape in canonical_shapes(SITE, STREAMS, DIM, residual, norm).items():
        if name == NORM:
            weights[name] = 1 + 0.25 * normal(name, shape)
        elif name.endswith("_alpha_scale"):
            weights[name] = np.array([ALPHAS[name.partition("_")[0]]])
        else:
            weights[name] = normal(name, shape) * (shape[0] ** -0.5 if name.endswith("_alpha") else 1.0)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def verdict(before: Parameters, after: Parameters) -> tuple[Verdict, float]:
    """The verdict between two rows, and the largest deviation of out that a port of `made_up` weights has."""
    derived = derive(before, after, STREAMS)
    if derived.kind == IMPOSSIBLE:
        return derived, 0.0
    weights = made_up(before["residual"], before["norm_weight"])
    ported = convert(SITE, weights, derived.steps, STREAMS, before["residual"], None)
    probes = Probes(activations(TOKENS, STREAMS, DIM, 0), before, after)
    row = probes.project(SITE, weights, ported.weights, ported)
    (deviation,) = probes.measure([row], derived)
    wrong = deviation.contradicts()
    if wrong:
        raise ArithmeticError(f"{before} to {after}: {wrong}")
    return derived, deviation.measured["out"]


def markdown() -> str:
    """The table: a row for each source, a column for each target."""
    rows = dialect_rows()
    lines = ["| from \\ to | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name, before in rows.items():
        cells: list[str] = []
        for after in rows.values():
            derived, out = verdict(before, after)
            cells.append(LEGEND.get(derived.kind) or f"≈ {out:.0e}")
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""]) + "\n"


def layout_table() -> str:
    """The layouts, as a Markdown table."""
    rows: list[str] = []
    for name, layout in layouts().items():
        dialects = ", ".join(f"`{dialect}`" for dialect in dict.fromkeys([layout.dialect, *layout.models.values()]))
        rows.append(f"| `{name}` | {layout.summary} | {'as the source' if layout.keeps_dialect else dialects} |")
    return "\n".join(["| layout | what it is | its own dialect, or dialects |", "|---|---|---|", *rows, ""])


def reasons(before: Parameters, after: Parameters) -> list[str]:
    """A line for each difference between two rows."""
    derived, out = verdict(before, after)
    lines = [f"{reason.kind}: {reason.text}" for reason in derived.reasons] or [EXACT]
    if derived.kind != IMPOSSIBLE:
        lines.append(
            f"measured on {TOKENS} tokens of a made-up site (n = {STREAMS}, C = {DIM}): out deviates by {out:.2g}"
        )
    return lines
