"""Converts the weights of a site in float64, and measures how much the storage dtype rounds away."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from conformance.porter.errors import CANNOT, PortError
from conformance.porter.site import NORM, SiteKey, Weights
from conformance.porter.verdict import IMPOSSIBLE
from conformance.stages import PROJECTIONS

ALPHAS = tuple(f"{part}_alpha" for part in PROJECTIONS)


@dataclass
class Converted:
    """A site's weights after the steps of a verdict.

    Attributes:
        weights: canonical, flat, as they are stored.
        rounding: the largest relative rounding of a weight.
        underflows: weights that the dtype's normal numbers are too large for; their relative rounding isn't in
            ``rounding``.
        errors: for each weight that was rounded, by how much each element was.
    """

    weights: Weights
    rounding: float = 0.0
    underflows: int = 0
    errors: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])


def convert(
    site: SiteKey,
    weights: Mapping[str, np.ndarray],
    steps: tuple[str, ...],
    streams: int,
    residual: str,
    dtype: np.dtype[Any] | None,
    norm: np.ndarray | None = None,
) -> Converted:
    """The weights after the verdict's steps.

    Args:
        weights: canonical, flat.
        steps: ``fold``, ``unfold``, ``ones``, ``transpose``; ``cast`` follows from ``dtype``.
        dtype: that all weights are stored in; None keeps each one's own.
        norm: the norm weight that ``unfold`` divides by.

    Raises:
        PortError: a value doesn't fit into the dtype.
    """
    kept = {name: value.dtype if dtype is None else dtype for name, value in weights.items()}
    changed = dict(weights)
    if not site.head:
        if "fold" in steps:
            scale = changed.pop(NORM).astype(np.float64)[:, None]
            with np.errstate(over="ignore"):  # said below, with its place
                changed |= {k: changed[k].astype(np.float64) * scale for k in ALPHAS if k in changed}
        if "unfold" in steps and norm is not None:
            changed |= {
                k: changed[k].astype(np.float64) / norm.astype(np.float64)[:, None] for k in ALPHAS if k in changed
            }
            changed, kept[NORM] = {NORM: norm, **changed}, kept["pre_alpha"] if dtype is None else dtype
        if "ones" in steps:
            kept[NORM] = kept["pre_alpha"]
            changed = {NORM: np.ones(changed["pre_alpha"].shape[0], kept[NORM]), **changed}
        if "transpose" in steps and "res_alpha" in changed:
            order = transposition(streams, residual)
            changed["res_alpha"] = changed["res_alpha"][:, order]
            beta = changed["res_beta"]
            changed["res_beta"] = beta.T if residual == "sinkhorn" else beta[order]
    result = Converted({})
    for name, value in changed.items():
        with np.errstate(over="ignore"):
            stored = value.astype(kept[name], copy=False)
        if stored is not weights.get(name):
            _account(site, name, value, stored, result)
            result.rounding = max(result.rounding, _unseen(name, weights, steps, stored, norm))
        result.weights[name] = stored
    return result


def _unseen(
    name: str,
    weights: Mapping[str, np.ndarray],
    steps: tuple[str, ...],
    stored: np.ndarray,
    norm: np.ndarray | None,
) -> float:
    """The rounding of a product or quotient in float64 itself, which nothing wider is there to measure.

    A product of two narrower numbers is exact in float64, and so is one by a power of two.
    """
    factor = weights.get(NORM) if "fold" in steps else norm if "unfold" in steps else None
    if name not in ALPHAS or factor is None or stored.dtype != np.float64:
        return 0.0
    if "fold" in steps and weights[name].dtype != np.float64 and factor.dtype != np.float64:
        return 0.0
    mantissas = np.abs(np.frexp(factor.astype(np.float64))[0])
    return 0.0 if np.isin(mantissas, (0.0, 0.5)).all() else 2.0**-53


def smallest_normal(dtype: np.dtype[Any]) -> float:
    """The smallest positive normal number of a dtype."""
    finfo: Any = ml_dtypes.finfo  # its attributes have no types
    return float(finfo(dtype).smallest_normal)


def transposition(streams: int, residual: str) -> list[int]:
    """Columns of the residual projection in the order that transposes H.

    Entry (i, j) moves to (j, i); a permutation to its inverse.
    """
    if residual == "permutations":
        table = list(itertools.permutations(range(streams)))
        return [table.index(tuple(p.index(i) for i in range(streams))) for p in table]
    return [j * streams + i for i in range(streams) for j in range(streams)]


def _account(site: SiteKey, name: str, exact: np.ndarray, stored: np.ndarray, result: Converted) -> None:
    """Takes one weight's rounding into the result.

    Raises:
        PortError: a value doesn't fit into the dtype.
    """
    wide, narrow = exact.astype(np.float64), stored.astype(np.float64)
    if not np.isfinite(narrow).all():
        where = np.argwhere(~np.isfinite(narrow))[0].tolist()
        raise PortError(
            f"{site}, {name} {where}: {wide[tuple(where)]:g} doesn't fit into {stored.dtype} ({IMPOSSIBLE})", CANNOT
        )
    error, size = np.abs(narrow - wide), np.abs(wide)
    if not error.any():
        return
    result.errors[name] = error
    normal = size >= smallest_normal(stored.dtype)
    result.underflows += int(np.count_nonzero(error[~normal]))
    result.rounding = max(result.rounding, float(np.max(error[normal] / size[normal], initial=0.0)))
