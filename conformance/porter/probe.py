"""Evaluates source and target weights in float64, and measures by how much H, u and out differ.

This takes two steps, so that a checkpoint is read once and a site's projections aren't kept: `Probes.project` computes
the logits of one site from its weights, and `Probes.measure` the deviations of all sites from their logits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.oracle import formulas
from conformance.oracle.data import normal
from conformance.oracle.floats import Quick
from conformance.oracle.style import Style
from conformance.porter.convert import Converted, transposition
from conformance.porter.site import NORM, SiteKey
from conformance.porter.verdict import APPROXIMATE, Verdict
from conformance.stages import PROJECTIONS

SCALES = (1.0, 0.25, 4.0, 0.5)
ROUNDOFF = 2.0**-53
HEAD = ("head",)
Logits = dict[str, np.ndarray]


class Float64(Quick):
    """float64 with NumPy's own sums and products, Sinkhorn on logarithms: sharp logits don't make 0 / 0."""

    def __init__(self) -> None:
        super().__init__()
        self.style = Style(log_domain=True)

    def sum(self, a: np.ndarray, axis: int) -> np.ndarray:
        return np.sum(a, axis)

    def contract(self, a: np.ndarray, b: np.ndarray, projection: bool = False) -> np.ndarray:
        return a @ b


def activations(tokens: int, streams: int, dim: int, seed: int) -> np.ndarray:
    """Probe streams ``[tokens, n, C]``: normal, each stream of another scale."""
    scales = np.resize(np.array(SCALES), streams)
    return normal(f"probe {seed}", (tokens, streams, dim)) * scales[:, None]


@dataclass
class Projected:
    """One site's logits on the probes, ``[tokens, columns]`` for each projection.

    Attributes:
        source, target: the logits of the source's weights, and of the target's as its layout reads them back.
        under_source_norm: the logits of the target's weights under the source's norm, which only the port can move.
        moved: how far the roundings of the port may move a logit; 0 if no logit moved by a bit.
    """

    site: SiteKey
    source: Logits
    target: Logits
    under_source_norm: Logits
    moved: dict[str, float]


@dataclass
class Deviation:
    """The differences between a site's values before and after the port.

    Attributes:
        measured: the largest differences, as fractions of the largest value (of 1 for H).
        allowed: the differences that the verdict allows; empty if it says nothing about them (approximate).
        logits: for each projection how far its logits moved and how far they may move, under the source's norm.
    """

    measured: dict[str, float]
    allowed: dict[str, float]
    logits: dict[str, tuple[float, float]]

    def contradicts(self) -> str:
        """The first quantity that deviates more than the verdict allows, in words; empty if there is none."""
        for part, (moved, most) in self.logits.items():
            if not moved <= most:
                return f"the logits of {part} move by {moved:.3g}, and the rounding of weights allows {most:.3g}"
        for name, value in self.measured.items():
            if not value <= self.allowed.get(name, np.inf):
                return f"{name} deviates by {value:.3g}, and the verdict allows {self.allowed[name]:.3g}"
        return ""


@dataclass
class Probes:
    """Activations, and the two dialects that sites are evaluated in.

    Attributes:
        x: ``[tokens, n, C]`` float64.
        source, target: the parameters of the two dialects.
    """

    x: np.ndarray
    source: Mapping[str, Any]
    target: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._units = self._normalised([self.source, self.target])
        self._head_units = self._normalised([of_head(self.source), of_head(self.target)])
        self._spaces = threading.local()

    def _normalised(self, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """The normalised probes ``[n*C, tokens]`` of each row; both are one array if the norms are equal."""
        flat = self.x.reshape(self.x.shape[0], -1)
        units = [np.ascontiguousarray((flat / formulas.root_mean_square(flat, p, Float64())[0]).T) for p in rows]
        return [units[0]] * 2 if np.array_equal(units[0], units[1]) else units

    def project(
        self, site: SiteKey, source: Mapping[str, np.ndarray], target: Mapping[str, np.ndarray], ported: Converted
    ) -> Projected:
        """The logits of one site before and after the port.

        Args:
            source: canonical flat weights.
            target: the weights after the port, as read back; weights with the same bits are evaluated once.
            ported: the converted weights, with their rounding errors.
        """
        wide = {name: self._wide("source", name, value) for name, value in source.items()}
        same = {name for name in source if name in target and _same(source[name], target[name])}
        after = {name: wide[name] if name in same else self._wide("target", name, v) for name, v in target.items()}
        known = set[str]()
        if site.head or _like_one(source.get(NORM), target.get(NORM)):
            known = {part for part, names in _names(site).items() if {*names} <= same}
        units = self._head_units if site.head else self._units
        first = self._logits(site, wide, units[0], {})
        under_source_norm = self._logits(site, after, units[0], {part: first[part] for part in known})
        second = under_source_norm if units[0] is units[1] else self._logits(site, after, units[1], {})
        moved = {part: 0.0 for part in first}
        if not all(np.array_equal(first[part], under_source_norm[part]) for part in first):
            moved = self._reach(site, ported)
        return Projected(site, first, second, under_source_norm, moved)

    def _wide(self, which: str, name: str, value: np.ndarray) -> np.ndarray:
        """A weight in float64, in memory that the thread uses for every site: fresh pages cost more than products."""
        spaces: dict[str, np.ndarray] = self._spaces.__dict__
        space = spaces.get(f"{which} {name}")
        if space is None or space.shape != value.shape:
            space = spaces[f"{which} {name}"] = np.empty_like(value, np.float64)
        np.copyto(space, value)
        return space

    def _logits(self, site: SiteKey, weights: Mapping[str, np.ndarray], unit: np.ndarray, known: Logits) -> Logits:
        """α h + b of each projection; logits that are known already are taken over, since equal factors give them."""
        logits, normed = dict(known), None
        for part, (alpha, scale, beta) in _names(site).items():
            if alpha in weights and part not in logits:
                if normed is None:
                    normed = unit * weights[NORM][:, None] if NORM in weights and not site.head else unit
                logits[part] = weights[scale] * (weights[alpha].T @ normed).T + weights[beta].reshape(-1)
        return logits

    def _reach(self, site: SiteKey, ported: Converted) -> dict[str, float]:
        """How far the roundings of the port can move a logit ``z = α (normed w φ) + b``, each taken at its worst.

        With e for the error of a weight: ``|α| (normed |w| e_φ + normed e_w (|φ| + e_φ)) + e_α normed (|w| + e_w)
        (|φ| + e_φ) + e_b``, and to that the error of evaluating in float64.
        """
        weights = {name: np.abs(value.astype(np.float64)) for name, value in ported.weights.items()}
        normed = np.abs((self._head_units if site.head else self._units)[0].T)
        e_w = ported.errors.get(NORM, 0.0)
        scaled = normed * weights[NORM] if NORM in weights and not site.head else normed
        evaluation_error = 64 * ROUNDOFF * np.sqrt(normed.shape[1])
        reached: dict[str, float] = {}
        for part, (alpha, scale, beta) in _names(site).items():
            if alpha not in weights:
                continue
            e_phi = ported.errors.get(alpha, np.zeros((1, 1)))
            largest = weights[alpha] + e_phi
            reach = scaled @ np.broadcast_to(e_phi, largest.shape) + (normed * e_w) @ largest
            whole = (scaled + normed * e_w) @ largest
            moved = weights[scale] * reach + ported.errors.get(scale, 0.0) * whole
            moved = moved + np.reshape(ported.errors.get(beta, 0.0), -1)
            moved = moved + evaluation_error * (weights[scale] * whole + weights[beta].reshape(-1))
            reached[part] = float(np.max(moved, initial=0.0))
        return reached

    def measure(self, rows: Sequence[Projected], verdict: Verdict) -> list[Deviation]:
        """The deviations of each site's H, u and out (y = u: the branch is the identity), or of a head's output.

        Args:
            verdict: if it is approximate, the functions differ, and only the logits have bounds.

        The bounds: a gate's slope is at most 1/4 of its scale; after N iterations log H has moved by at most 8N times
        its logits, since each log-sum-exp is 1-Lipschitz in the largest norm and row and column potentials take turns
        (4N; an eps added before the first of them doubles it).
        """
        approximate = verdict.kind == APPROXIMATE
        bodies = [row for row in rows if not row.site.head]
        before, after = self._matrices(bodies, "source"), self._matrices(bodies, "target")
        index = {id(row): k for k, row in enumerate(bodies)}
        deviations: list[Deviation] = []
        for row in rows:
            if row.site.head:
                deviations.append(self._compare_heads(row, approximate))
            else:
                k = index[id(row)]
                deviations.append(self._compare(row, before[k], after[k], approximate))
            deviations[-1].logits = self._logits_moved(row, "transpose" in verdict.steps)
        return deviations

    def _logits_moved(self, row: Projected, transposed: bool) -> dict[str, tuple[float, float]]:
        moves: dict[str, tuple[float, float]] = {}
        for part, logits in row.source.items():
            if part == "res" and transposed:
                logits = logits[:, transposition(self.x.shape[1], self.source["residual"])]
            moves[part] = float(np.max(np.abs(row.under_source_norm[part] - logits), initial=0.0)), row.moved[part]
        return moves

    def _matrices(self, rows: Sequence[Projected], which: str) -> np.ndarray:
        """H of all sites, ``[sites, tokens, n, n]``, mixing input (first) into output streams."""
        p, (tokens, n, _) = getattr(self, which), self.x.shape
        if not rows:
            return np.empty((0, tokens, n, n))
        if p["residual"] == "identity":
            return np.broadcast_to(np.eye(n), (len(rows), tokens, n, n))
        logits = np.concatenate([getattr(row, which)["res"] for row in rows])
        if p["residual"] == "sinkhorn":
            logits = logits.reshape(-1, n, n)
        with np.errstate(invalid="ignore"):  # 0 / 0 without a guard: the source isn't finite there either
            matrices, _ = formulas.residual_matrix(logits, {**p, "streams": n}, Float64())
        H = matrices.reshape(len(rows), tokens, n, n)
        return H.swapaxes(-1, -2) if p["mix"] == "out-in" else H

    def _gate(self, logits: np.ndarray, slope: float, offset: float) -> np.ndarray:
        return formulas.gate(logits, np.float64(slope), np.float64(offset), Float64())[0]

    def _compare(self, row: Projected, H: np.ndarray, H_target: np.ndarray, approximate: bool) -> Deviation:
        """The deviation of one site; if one dialect alone reads with a carried pre, it reads stream 0 here."""
        values, first_site = list[tuple[np.ndarray, ...]](), np.eye(self.x.shape[1])[:1]
        read_alike = self.source["pre_from"] == self.target["pre_from"]
        for logits, p, matrix in ((row.source, self.source, H), (row.target, self.target, H_target)):
            reads_own = read_alike or p["pre_from"] == "own"
            pre = self._gate(logits["pre"], 1, p["pre_eps"]) if reads_own else first_site
            post = self._gate(logits["post"], p["post_scale"], p["post_eps"])
            values.append((pre, post, matrix))
        if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*values, strict=True)):
            return Deviation(dict.fromkeys(("H", "u", "out"), 0.0), {}, {})
        evaluated: list[dict[str, np.ndarray]] = []
        for pre, post, matrix in values:
            u = (pre[:, None, :] @ self.x)[:, 0]
            evaluated.append(
                {"H": matrix, "u": u, "out": post[:, :, None] * u[:, None, :] + matrix.swapaxes(-1, -2) @ self.x}
            )
        first, second = evaluated
        measured = {k: _apart(first[k], second[k], 1.0 if k == "H" else 0.0) for k in first}
        if approximate:
            return Deviation(measured, {}, {})
        streams = np.abs(self.x).sum(1).max(initial=0.0)
        iterations = self.source["iterations"] or 1
        H_moved = float(np.expm1(min(8 * iterations * row.moved.get("res", 0.0), 700.0))) + 8 * iterations * ROUNDOFF
        u_moved = (row.moved["pre"] / 4 + 8 * ROUNDOFF) * streams
        slope = self.source["post_scale"] + self.source["post_eps"]
        out_moved = slope * ((row.moved["post"] / 4 + 8 * ROUNDOFF) * _size(first["u"]) + u_moved) + H_moved * streams
        allowed = {"H": H_moved, "u": u_moved / _size(first["u"]), "out": out_moved / _size(first["out"])}
        return Deviation(measured, allowed, {})

    def _compare_heads(self, row: Projected, approximate: bool) -> Deviation:
        first, second = (
            (self._gate(logits["head"], 1, p["pre_eps"])[:, None, :] @ self.x)[:, 0]
            for logits, p in ((row.source, self.source), (row.target, self.target))
        )
        measured = {"head": _apart(first, second, 0.0)}
        streams = np.abs(self.x).sum(1).max(initial=0.0)
        allowed = {"head": (row.moved["head"] / 4 + 8 * ROUNDOFF) * streams / _size(first)}
        return Deviation(measured, {} if approximate else allowed, {})


def of_head(p: Mapping[str, Any]) -> dict[str, Any]:
    """A row's parameters as they hold for its head, which may have a norm eps of its own."""
    return {**p, "norm_eps": p["norm_eps"] if p["head_norm_eps"] is None else p["head_norm_eps"]}


def _names(site: SiteKey) -> dict[str, tuple[str, str, str]]:
    """For each projection its φ, α and b."""
    if site.head:
        return {"head": ("head_fn", "head_scale", "head_base")}
    return {part: (f"{part}_alpha", f"{part}_alpha_scale", f"{part}_beta") for part in PROJECTIONS}


def _like_one(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Whether two norm weights are the same factor; a missing one is a factor of 1."""
    if a is None or b is None:
        present = b if a is None else a
        return present is None or bool(np.all(present == 1))
    return _same(a, b)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same bits; arrays in the same memory aren't compared."""
    if a.dtype == b.dtype and a.shape == b.shape and a.strides == b.strides and a.ctypes.data == b.ctypes.data:
        return True
    return a.dtype == b.dtype and np.array_equal(a, b)


def _size(value: np.ndarray) -> float:
    return float(np.max(np.abs(value), initial=0.0, where=np.isfinite(value))) or 1.0


def _apart(a: np.ndarray, b: np.ndarray, size: float) -> float:
    """The largest difference, as a fraction of ``size`` or of the largest value.

    Tokens for which the source itself isn't finite don't count; if only the target isn't, the difference is infinite.
    """
    finite = np.isfinite(a)
    if not np.isfinite(b[finite]).all():
        return np.inf
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0.0)) / (size or _size(a))
