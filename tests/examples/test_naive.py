"""The layer on one page of NumPy gives the true values of every golden case, in float64."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from conformance.cases.case import Case
from conformance.cases.corpus import load_corpus

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-12
"""The largest error in cases without a float64 variant, as a fraction of the output's largest value."""


def _module():
    spec = importlib.util.spec_from_file_location("naive", ROOT / "examples" / "naive.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


naive = _module()


def _layer(x, weights, a, p, carried=None):
    u, context = naive.pre(x, weights, p, carried)
    return naive.post(u * a["norm_scale"] * a["branch_scale"], x, context, p), context[0]


def _stack(a, weights, p, options):
    x = naive.expand(a["embedding"], p["streams"])
    carried = np.broadcast_to(np.eye(p["streams"])[0], x.shape[:-1])  # [batch, seq, n]: stream 0
    for index in range(options["layers"]):
        x, carried = _layer(x, {name: value[index] for name, value in weights.items()}, a, p, carried)
    return x if options["reduce"] == "none" else naive.reduce(x, options["reduce"], carried)


def outputs(case: Case, stage: str) -> dict[str, np.ndarray]:
    """What the page computes for a stage, under the outputs' names."""
    entry, p = case.stages[stage], case.parameters
    a = {name: case.tensors[f"input/{name}"].astype(np.float64) for name in entry.inputs}
    weights = {name: case.tensors[f"weight/{name}"].astype(np.float64) for name in entry.weights}
    if stage == "expand":
        return {"out": naive.expand(a["embedding"], p["streams"])}
    if stage == "reduce":
        return {"out": naive.reduce(a["x"], entry.options["how"], a.get("carried"))}
    if stage == "head":
        return {"out": naive.head(a["x"], weights, p)}
    if stage == "residual_matrix":
        return {"H": naive.residual_matrix(a["logits"], p)}
    if stage == "coefficients":
        return dict(zip(("pre", "post", "H"), naive.coefficients(a["x"], weights, p), strict=True))
    if stage == "pre":
        u, context = naive.pre(a["x"], weights, p, a.get("carried"))
        return {"u": u, "pre": context[0]}
    if stage == "post":
        return {"out": naive.post(a["y"], a["x"], (None, a["post"], a["H"]), p)}
    if stage == "layer":
        out, handed = _layer(a["x"], weights, a, p, a.get("carried"))
        routed = {name: a[name] for name in ("load_balance_loss", "moe_bias_updates") if name in a}
        return {"out": out, "pre": handed, **routed}
    return {"out": _stack(a, weights, p, entry.options)}


def _bound(case: Case, stage: str, output: str, expected: np.ndarray) -> float:
    wide = [v.name for v in case.variants if v.name == "float64-float64" and stage in v.stages]
    if wide:
        return case.bounds[stage][wide[0]][output].bound
    return TOLERANCE * float(np.abs(expected).max(initial=0.0, where=np.isfinite(expected)))


@pytest.mark.parametrize("case", load_corpus(), ids=lambda case: case.id)
def test_the_page_computes_every_output_of_a_golden_case(case: Case):
    for stage, entry in case.stages.items():
        with np.errstate(all="ignore" if case.infinite else None):
            computed = outputs(case, stage)
        for output in entry.outputs:
            expected = case.tensors[f"expected/{stage}/{output}"]
            bound = _bound(case, stage, output, expected)
            assert computed[output].shape == expected.shape, f"{case.id}, {stage}, {output}"
            assert not np.isfinite(computed[output][np.isnan(expected)]).any(), f"{case.id}, {stage}, {output}: hidden"
            finite = np.isfinite(expected)
            error = float(np.abs(computed[output][finite] - expected[finite]).max(initial=0.0))
            assert error <= bound, f"{case.id}, {stage}, {output}: off by {error:.3g}, allowed {bound:.3g}"
