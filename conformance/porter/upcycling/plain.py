"""Runs the plain residual network and the one with hyper-connections side by side on probe tokens, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.oracle import formulas
from conformance.oracle.data import normal
from conformance.porter.probe import Float64

SCALES = (1.0, 0.25, 4.0, 0.5)
"""The sizes of the probe tokens."""


class PlainProbe:
    """The two networks, site by site.

    The model's own sub-layers aren't loaded: a made-up one stands for each, a norm with the model's eps and then a
    shifted, weighted tanh, which is another at every site. A site whose u, post or H is wrong shows in either kind.

    Args:
        parameters: the dialect.
        norm_eps: the eps of the model's own norms.

    Attributes:
        plain: the stream of the plain network, ``[tokens, C]``.
        x: the streams, ``[tokens, n, C]``.
    """

    def __init__(self, parameters: Mapping[str, Any], streams: int, dim: int, norm_eps: float, tokens: int, seed: int):
        self.parameters, self.norm_eps, self.sites = {**parameters, "streams": streams}, norm_eps, 0
        self.plain = normal(f"upcycle/{seed}/probe", (tokens, dim)) * np.resize(np.array(SCALES), tokens)[:, None]
        self.x = np.repeat(self.plain[:, None, :], streams, 1)  # [tokens, n, C]
        single_pass = parameters["pre_from"] == "previous"
        self.carried = np.repeat(np.eye(streams)[:1], tokens, 0) if single_pass else None

    def step(self, weights: Mapping[str, np.ndarray]) -> None:
        """Runs both networks through one sub-layer, the second with these weights of a site."""
        wide = {name: value.astype(np.float64) for name, value in weights.items()}
        u, kept, _ = formulas.read(self.x, wide, self.parameters, self.carried, Float64())
        out, _ = formulas.post_mix(self._branch(u), self.x, kept["post"], kept["H"], self.parameters, Float64())
        self.plain = self.plain + self._branch(self.plain)
        self.x, self.sites = out, self.sites + 1
        if self.carried is not None:
            self.carried = kept["pre"]

    def change(self, head: Mapping[str, np.ndarray] | None) -> float:
        """The largest change of what the model's last norm returns, as a fraction of the largest value."""
        before, after = self._normed(self.plain), self._normed(self._reduced(head))
        return float(np.max(np.abs(after - before), initial=0.0) / np.max(np.abs(before), initial=1e-300))

    def spread(self) -> float:
        """How far the streams lie apart: their deviation from their mean, as a fraction of it (root mean squares)."""
        mean: np.ndarray = np.mean(self.x, 1, keepdims=True)  # [tokens, 1, C]
        return float(np.sqrt(np.mean((self.x - mean) ** 2) / np.mean(mean**2)))

    def _reduced(self, head: Mapping[str, np.ndarray] | None) -> np.ndarray:
        how, A = self.parameters["reduce"], Float64()
        if how == "head" and head is not None:
            wide = {name: value.astype(np.float64) for name, value in head.items()}
            return formulas.head(self.x, wide, self.parameters, A)[0]
        if how == "carried" and self.carried is not None:
            return formulas.pre_mix(self.x, self.carried, A)[0]
        return self.x.sum(1) if how == "sum" else self.x.mean(1)

    def _normed(self, z: np.ndarray) -> np.ndarray:
        eps = {"norm_eps": self.norm_eps, "norm_eps_position": "mean"}
        root: np.ndarray = formulas.root_mean_square(z, eps, Float64())[0]  # [tokens, 1]
        return z / root

    def _branch(self, u: np.ndarray) -> np.ndarray:
        shifted: np.ndarray = np.roll(self._normed(u), 7 * self.sites + 1, -1)
        channel: np.ndarray = np.arange(u.shape[-1], dtype=np.float64)
        return (1 + 0.5 * np.cos(channel * (self.sites + 1))) * np.tanh(shifted)
