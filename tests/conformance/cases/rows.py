"""Rows of parameters as hypothesis draws them: sound ones by construction, and ones that are nearly so."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from conformance.cases.rules import Domain, domains, rules

NUMBERS = (0, 0.0, 1e-20, 1e-6, 0.5, 2, 30.0, 1e300, 5e-324)
WILD = (
    None, True, False, 0, 1, -1, 2.0, 0.0, -0.0, -1e-6, 1.5, 10_001, math.nan, math.inf, -math.inf, 10**400, -(10**400),
    "", "0", "1e-6", "none", "None", "Rows", "rows ", "activation", "identity", [], ["rows"], {}, {"value": 1}, [1e-6],
)  # fmt: skip
"""What stands in files by mistake: other types, null, what JSON hasn't, and other parameters' values."""
ABSENT = object()


def value_of(domain: Domain) -> st.SearchStrategy[Any]:
    """Any value of a parameter's domain, null where it may be."""
    own: Any
    if domain.kind == "boolean":
        own = st.booleans()
    elif domain.kind == "choice":
        own = st.sampled_from(domain.choices)
    elif domain.kind == "integer":
        own = st.sampled_from([1, 2, 3, 20])
    else:
        own = st.sampled_from([number for number in NUMBERS if domain.holds(number)])
    return st.one_of(st.none(), own) if domain.nullable else own


@st.composite
def sound(draw: st.DrawFn, residual: str | None = None, norm: bool | None = None) -> dict[str, Any]:
    """A row that keeps every rule, each parameter free as far as the others leave it so.

    Args:
        residual, norm: those of weights that exist, for ``residual`` and ``norm_weight``.
    """
    row = {name: draw(value_of(domain), label=name) for name, domain in domains().items()}
    row["residual"] = residual or row["residual"]
    row["norm_weight"] = row["norm_weight"] if norm is None else norm
    if row["residual"] == "sinkhorn":
        for name in ("order", "guard", "iterations"):
            if row[name] is None:
                row[name] = draw(st.sampled_from(domains()[name].choices or (1, 20)))
        starts = [start for start in domains()["softmax"].choices if (start, row["guard"]) != ("none", "add")]
        if row["softmax"] not in starts:
            row["softmax"] = draw(st.sampled_from(starts))
        if row["guard"] == "none":
            row["eps"] = draw(st.sampled_from([0, 0.0]))
        elif not row["eps"]:
            row["eps"] = draw(st.sampled_from([1e-12, 1e-6, 1]))
    else:
        row.update(dict.fromkeys(("softmax", "order", "guard", "eps", "iterations", "logit_limit")))
    if row["residual"] == "identity" or row["mix"] == "identity":
        row["mix"] = "identity" if row["residual"] == "identity" else draw(st.sampled_from(["in-out", "out-in"]))
    if row["pre_from"] == "previous":
        row.update(reduce="carried", coefficients="float32")
    elif row["reduce"] == "carried":
        row["reduce"] = draw(st.sampled_from(["sum", "mean", "head", "none"]))
    if row["coefficients"] == "activation":
        row["mixing"] = "activation"
    if row["coefficients"] != "activation" or row["residual"] != "sinkhorn":
        row["matrix"] = "float32"
    return row


@st.composite
def changed(draw: st.DrawFn, wild: bool) -> dict[str, Any]:
    """A sound row of which a few parameters have other values.

    Args:
        wild: the values are any, and parameters may be missing or surplus; else each is of its domain.
    """
    rule = draw(st.sampled_from(rules()), label="rule")  # to be broken alone: by chance few rows do that
    row: dict[str, Any] = draw(sound(draw(st.sampled_from(["sinkhorn", "sinkhorn", None]))))
    near = st.sampled_from(sorted({*rule.when, *rule.then, *rule.otherwise}))
    parameters = st.one_of(near, st.sampled_from(list(domains())))
    for name in draw(st.lists(parameters, min_size=1, max_size=2, unique=True)):
        any_value = st.one_of(st.sampled_from([*WILD, ABSENT]), value_of(domains()[name]))
        value = draw(any_value if wild else value_of(domains()[name]), label=name)
        if value is ABSENT:
            row.pop(name)
        else:
            row[name] = value
    if wild and draw(st.integers(0, 9)) == 0:
        row[draw(st.sampled_from(["gard", "streams_", "value", "Mix"]))] = draw(st.sampled_from(WILD))
    return row
