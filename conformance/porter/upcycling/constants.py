"""Weights with which a stack of sites computes the plain residual network (docs/upcycling.md, "Derivation").

Each site is given, in the order of the stack, the biases with which the mean of the streams stays ``scale`` times the
plain network's stream z:

    pre_i  = 1 / (n scale)                   so that u = z, since the gates of all streams are alike
    H      with both sums equal to ``kept``  so that mixing multiplies the mean by it and by nothing else
    post_j = scale kept (1 + noise_j)        with noise_j of mean 0, so that the branch joins at the mean's new scale

The gating scalars are 0, and the projections are drawn as for a new layer: they learn as soon as the scalars move.
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
        noise: the deviation of the post gates from their mean, and of the residual logits; 0 for equal streams.
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
        share = np.full(self.streams, 1 / (self.streams * read))
        weights["pre_beta"] = self._bias("pre", share, 1.0, p["pre_eps"])
        apart = self._noise(f"{site} post", (self.streams,))
        post = self.scale * (1 + apart - apart.mean())
        weights["post_beta"] = self._bias("post", post, p["post_scale"], p["post_eps"])
        return weights

    def head(self, site: SiteKey) -> Weights:
        """The canonical weights of the head, whose gates divide by the scale."""
        share = np.full(self.streams, 1 / (self.streams * self.scale))
        base = self._bias("the head's gate", share, 1.0, self.parameters["pre_eps"])
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
                    label = f"upcycle/{self.seed}/{site}/{name}/{stream}"
                    value[stream * self.dim : (stream + 1) * self.dim] = deviation * normal(label, (self.dim, shape[1]))
            weights[name] = value
        return weights

    def _noise(self, label: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.noise * normal(f"upcycle/{self.seed}/{label}", shape)

    def _residual(self, site: SiteKey, shape: tuple[int, ...]) -> np.ndarray:
        """Logits that leave three quarters of a stream where they are, and whose H has equal sums with noise too.

        A softmax over permutations has such sums whatever its logits are. Logits that depend on j - i (mod n) alone
        make rows and columns with the same sum, and each pass of Sinkhorn's then multiplies all of H by one number.
        """
        n, label = self.streams, f"{site} res"
        if len(shape) == 1:
            logits = self._noise(label, shape)
            still = list(itertools.permutations(range(n))).index(tuple(range(n)))
            logits[still] += math.log(3 * max(shape[0] - 1, 1))
            return logits.astype(self.dtype)
        by_distance = self._noise(label, (n,))
        by_distance[0] += math.log(3 * max(n - 1, 1))
        rows, columns = np.indices(shape)
        return by_distance[(columns - rows) % n].astype(self.dtype)

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
    if gate == "post":
        return "lower --noise" if constants.noise else "take a dialect whose post gates reach beyond 1 (post_scale=2)"
    return "take two streams or more" if constants.streams == 1 else "take a smaller pre_eps, or fewer streams"
