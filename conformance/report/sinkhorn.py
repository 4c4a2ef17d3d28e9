"""What Sinkhorn does on a case: how far row and column sums are from 1 after each normalisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from conformance.cases.case import Case
from conformance.oracle import formulas, residual
from conformance.oracle.floats import Quick


def logits_of(case: Case) -> np.ndarray | None:
    """``[tokens, n, n]`` of a case: residual_matrix's own input, or what the weights make of x; None without any."""
    n = case.parameters["streams"]
    if case.parameters["residual"] != "sinkhorn":
        return None
    tensors = {k: v.astype(np.float64) for k, v in case.tensors.items() if k.startswith(("input/", "weight/"))}
    if "input/logits" in tensors:
        return tensors["input/logits"].reshape(-1, n, n)
    if "input/x" not in tensors or "weight/res_alpha" not in tensors or tensors["weight/res_alpha"].ndim != 2:
        return None
    x, scale = tensors["input/x"].reshape(-1, n, case.parameters["dim"]), tensors.get("weight/mhc_norm.scale")
    phi = {"res": tensors["weight/res_alpha"]}
    h, _ = formulas.normalise_and_project(x, scale, phi, case.parameters, Quick())
    return (tensors["weight/res_alpha_scale"] * h["res"]).reshape(-1, n, n) + tensors["weight/res_beta"]


def convergence(case: Case) -> dict[str, Any] | None:
    """``{"rows", "columns"}``: for each iteration the largest distance of a sum from 1, over all finite tokens."""
    with np.errstate(all="ignore"):  # inputs may be NaN or infinite
        logits = logits_of(case)
    logits = None if logits is None else logits[np.isfinite(logits).all((-2, -1))]
    if logits is None or not logits.size:
        return None
    distances: dict[str, Any] = {"rows": [], "columns": [], "iterations": []}
    for count in range(1, case.parameters["iterations"] + 1):
        H, _ = residual.sinkhorn(logits, {**case.parameters, "iterations": count}, Quick())
        distances["rows"].append(_short(np.abs(H.sum(-1) - 1).max()))
        distances["columns"].append(_short(np.abs(H.sum(-2) - 1).max()))
        distances["iterations"].append(count)
    return distances


def _short(distance: float) -> float:
    """A picture needs no more digits."""
    return float(f"{distance:.3g}")
