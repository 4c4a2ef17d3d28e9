"""Weights with which a stack of sites computes the plain residual network (docs/upcycling.md, "Derivation").

Each site is given, in the order of the stack, the biases with which the mean of the streams stays ``scale`` times the
plain network's stream z:

    pre_i  = (1 + e_i) / (n scale)      u = z: the gates add up to 1 / scale
    H      with the sums ``kept``       mixing multiplies the mean by it and by nothing else
    post_j = scale kept (1 + d_j)       the branch joins at the mean's new scale

d and e are noise of mean 0. They lie in two spaces that are orthogonal to each other and that H maps into themselves:
what d puts between the streams, no later e reads. The gating scalars are 0, and the projections are drawn as for a
new layer: they learn as soon as the scalars move.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.cases.rules import most_permuted
from conformance.oracle import formulas
from conformance.oracle.data import normal
from conformance.porter.errors import CANNOT, PortError
from conformance.porter.probe import Float64
from conformance.porter.site import NORM, SiteKey, Weights, canonical_shapes
from conformance.porter.verdict import IMPOSSIBLE

OPEN = 1e-3
"""The least that a gate's sigmoid and 1 less it may be: a gate nearer to its end has no slope and learns nothing."""
UNEVEN = 1e-12
"""By how much the sums of H may differ from each other."""


@dataclass
class Constants:
    """Makes the weights of one site after the other, and of the head.

    Args:
        parameters: the dialect.
        dtype: that the weights are stored in.
        noise: the deviation of d, of e and of the residual logits; 0 for equal streams.
        seed: of the projections and of the noise.

    Attributes:
        scale: what the mean of the streams is after the sites so far, as a multiple of the plain stream.
        kept: the sums of the last site's H.
    """

    parameters: Mapping[str, Any]
    streams: int
    dim: int
    dtype: np.dtype[Any]
    noise: float = 0.0
    seed: int = 0
    scale: float = 1.0
    kept: float = 1.0

    def __post_init__(self) -> None:
        self._of_post, self._of_pre = _spaces(self.streams, self._label("phases"))
        residual, limit = self.parameters["residual"], most_permuted()
        if residual == "permutations" and self.streams > limit:
            raise PortError(f"--streams: the permutations of more than {limit} streams are too many", CANNOT)

    @property
    def factor(self) -> float:
        """What the model's own last norm is handed, as a multiple of what the plain network hands it."""
        reduce = self.parameters["reduce"]
        return {"sum": self.streams * self.scale, "head": 1.0, "carried": 1.0}.get(reduce, self.scale)

    def site(self, site: SiteKey) -> Weights:
        """The canonical flat weights of the next site.

        Raises:
            PortError: no open gate has the value that this dialect needs.
        """
        p, weights = self.parameters, self._drawn(site)
        if "res_beta" in weights:
            weights["res_beta"] = self._residual(site, weights["res_beta"].shape)
            self.kept = self._sum_kept(weights["res_beta"])
        before, self.scale = self.scale, self.scale * self.kept
        read = self.scale if p["pre_from"] == "previous" else before  # the next site reads with this one's pre
        pre = (1 + self._within(self._of_pre, f"{site} pre")) / (self.streams * read)
        post = (1 + self._within(self._of_post, f"{site} post")) * self.scale
        weights["pre_beta"] = self._bias("pre", pre, 1.0, p["pre_eps"])
        weights["post_beta"] = self._bias("post", post, p["post_scale"], p["post_eps"])
        return weights

    def head(self, site: SiteKey) -> Weights:
        """The canonical weights of the head, whose gates divide by the scale."""
        gates = (1 + self._within(self._of_pre, "head")) / (self.streams * self.scale)
        base = self._bias("the head's gate", gates, 1.0, self.parameters["pre_eps"])
        return {**self._drawn(site), "head_base": base}

    def _drawn(self, site: SiteKey) -> Weights:
        """Projections normal with variance 1/(n*C), norm weights 1, everything else 0."""
        p = self.parameters
        shapes = canonical_shapes(site, self.streams, self.dim, p["residual"], p["norm_weight"])
        weights: Weights = {}
        for name, shape in shapes.items():
            value = np.full(shape, float(name == NORM)).astype(self.dtype)
            if len(shape) == 2 and shape[0] == self.streams * self.dim:  # a projection
                deviation = shape[0] ** -0.5
                for stream in range(self.streams):  # a stream at a time: the numbers are made of many more bytes
                    label = self._label(f"{site}/{name}/{stream}")
                    value[stream * self.dim : (stream + 1) * self.dim] = deviation * normal(label, (self.dim, shape[1]))
            weights[name] = value
        return weights

    def _label(self, of: str) -> str:
        return f"upcycle/{self.seed}/{of}"

    def _within(self, space: np.ndarray, label: str) -> np.ndarray:
        """A vector of a space ``[n, directions]``, with the root mean square ``noise``; zeros if the space is empty."""
        drawn: np.ndarray = space @ normal(self._label(label), (space.shape[1],))
        size = math.sqrt(float(drawn @ drawn) / self.streams)
        return drawn * (self.noise / size) if size else drawn

    def _residual(self, site: SiteKey, shape: tuple[int, ...]) -> np.ndarray:
        """Logits that leave three quarters of a stream where they are, and that depend on the distance of i and j.

        The distance is that on a circle, |i - j| or n - |i - j|. Such an H is symmetric and has one sum in all rows and
        columns, so that each pass of Sinkhorn's multiplies it by one number. Of the permutations only those that turn
        the circle have logits other than 0.
        """
        n, turns = self.streams, np.arange(self.streams)
        by_distance = self.noise * normal(self._label(f"{site} res"), (n,))
        by_turn = by_distance[np.minimum(turns, n - turns)]
        by_turn[0] += math.log(3 * max(math.prod(shape) // (n if len(shape) == 2 else 1) - 1, 1))
        if len(shape) == 2:
            rows, columns = np.indices(shape)
            return by_turn[(columns - rows) % n].astype(self.dtype)
        logits, table = np.zeros(shape), list(itertools.permutations(range(n)))
        for turn in range(n):
            logits[table.index(tuple((k + turn) % n for k in range(n)))] = by_turn[turn]
        return logits.astype(self.dtype)

    def _sum_kept(self, logits: np.ndarray) -> float:
        """The sum of each row and column of the H that the stored logits give, with this dialect's guards.

        Raises:
            PortError: they differ, so that the streams' mean would depend on the streams.
        """
        p = {**self.parameters, "streams": self.streams}
        H = formulas.residual_matrix(logits.astype(np.float64)[None], p, Float64())[0][0]
        sums = np.concatenate([H.sum(0), H.sum(1)])
        if not np.ptp(sums) <= UNEVEN:
            raise PortError(
                f"{IMPOSSIBLE}: the sums of the residual matrix differ by {np.ptp(sums):.3g} in this dialect, so that "
                f"the mean of the streams can't follow the plain network", CANNOT,
            )  # fmt: skip
        return float(sums.mean())

    def _bias(self, gate: str, value: np.ndarray, slope: float, offset: float) -> np.ndarray:
        """The biases with which ``slope * sigmoid(bias) + offset`` is this value.

        Raises:
            PortError: the gate can't have the value, or is all but closed there.
        """
        sigmoid = (value - offset) / slope
        if not (sigmoid.min() >= OPEN and sigmoid.max() <= 1 - OPEN):
            lowest, highest = offset + OPEN * slope, offset + (1 - OPEN) * slope
            raise PortError(
                f"{IMPOSSIBLE}: {gate} would have to be {value.min():.4g} to {value.max():.4g}, and an open gate of "
                f"this dialect has {lowest:.4g} to {highest:.4g}: {_way_out(gate, self)}",
                CANNOT,
            )
        return np.log(sigmoid / (1 - sigmoid)).astype(self.dtype)


def _way_out(gate: str, constants: Constants) -> str:
    if constants.noise:
        return "lower --noise, or leave it out to see whether it is the reason"
    if gate == "post":
        return "take a dialect whose post gates reach beyond 1 (post_scale=2)"
    return "take two streams or more" if constants.streams == 1 else "take a smaller pre_eps, or fewer streams"


def _spaces(streams: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal spaces of vectors of mean 0 for the noise of post and of pre, ``[n, directions]`` each.

    They are made of the waves on a circle of n streams, which a matrix of `Constants._residual` only scales: of each
    wavelength one wave for post, and the one that is a quarter of a wave further on for pre. The shortest wave of an
    even n has no such partner, so that two streams have none for pre.
    """
    waves, positions = range(1, (streams + 1) // 2), np.arange(streams)
    phases = np.pi * normal(label, (len(waves),))
    angles = np.array([2 * np.pi * wave * positions / streams + phases[wave - 1] for wave in waves])
    angles = angles.reshape(len(waves), streams).T  # [n, wavelengths]
    of_post, of_pre = np.cos(angles), np.sin(angles)
    if streams % 2 == 0:
        of_post = np.concatenate([of_post, np.cos(np.pi * positions)[:, None]], 1)
    return of_post, of_pre
