"""The tensors of one size in one stage and one row, whole or for some of its tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.questions.sizes.data import Source, on_grid, projection
from conformance.questions.sizes.design import Size
from conformance.stages import HEAD_WEIGHTS, STAGES, residual_columns

PER_STREAM = (1.0, 0.25, 4.0, 0.5, 2.0, 1.0, 0.125, 1.0)
"""Streams differ in scale, so that one in the place of another shows."""
ALPHAS = {"pre": 0.9, "post": -1.3, "res": 1.7}
MILD = 0.25
"""The share of them where Sinkhorn runs in x's dtype: among 65,536 tokens of sharper logits are some for which every
honest evaluation in float16 overflows on the way back."""
LOGITS = 1.4
"""Deviation of a logit before its gating scalar."""
OPTIONS: dict[str, dict[str, Any]] = {"layer": {"branch": "mlp_dense"}}
TILE = 1 << 19
"""Elements of x in a tile: its temporary arrays stay in the memory of a core or near it."""
STAGES_OF_SIZES = ("coefficients", "pre", "post", "layer", "head")
TAILS = {"out": ("n", "C"), "u": ("C",), "pre": ("n",), "post": ("n",), "H": ("n", "n")}


@dataclass(frozen=True)
class Tensors:
    """Inputs, weights and cotangents.

    Args:
        size: tokens, width, streams.
        stage: one of `STAGES_OF_SIZES`.
        parameters: of the row, with ``streams`` and ``dim``.
    """

    size: Size
    stage: str
    parameters: Mapping[str, Any]

    @property
    def source(self) -> Source:
        return Source(self.size.seed, f"{self.size.id}/{self.stage}")

    @property
    def single_pass(self) -> bool:
        """Whether a site reads with the pre of the site before it."""
        return self.parameters["pre_from"] == "previous" and self.stage in ("pre", "layer")

    @property
    def inputs(self) -> list[str]:
        """Names of the stage's inputs, without those that only other rows and branches have."""
        absent = {"load_balance_loss", "moe_bias_updates"} | (set() if self.single_pass else {"carried"})
        return [name for name in STAGES[self.stage].inputs if name not in absent]

    @property
    def outputs(self) -> list[str]:
        absent = {"load_balance_loss", "moe_bias_updates"}
        if self.stage != "coefficients" and not self.single_pass:
            absent.add("pre")
        return [name for name in STAGES[self.stage].outputs if name not in absent]

    @functools.cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """Weights, flat as in a file, and the factors of the test's own branch: all that has no tokens."""
        p, source = self.parameters, self.source
        n, dim = self.size.streams, self.size.dim
        width = n * dim
        tensors: dict[str, np.ndarray] = {}
        if self.stage == "layer":
            tensors["norm_scale"] = np.exp2(source.uniform("norm_scale", 0, dim, -1, 1))
            signs = np.where(np.arange(dim) % 2, np.float32(-1), np.float32(1))
            tensors["branch_scale"] = np.exp2(source.uniform("branch_scale", 0, dim, -1, 1)) * signs
        if self.stage == "head":
            tensors["head_fn"] = projection(source, "head_fn", width, n, LOGITS)
            tensors["head_base"] = on_grid(source.normal("head_base", 0, n))
            tensors["head_scale"] = on_grid(np.array([1.3], np.float32))
        if not set(STAGES[self.stage].weights) - set(HEAD_WEIGHTS):
            return tensors
        for kind, columns in (("pre", n), ("post", n), ("res", residual_columns(n, p["residual"]))):
            if not columns:
                continue
            tensors[f"{kind}_alpha"] = projection(source, f"{kind}_alpha", width, columns, LOGITS)
            mild = MILD if kind == "res" and p["matrix"] == "activation" else 1.0
            tensors[f"{kind}_alpha_scale"] = on_grid(np.array([ALPHAS[kind] * mild], np.float32))
            shape = (n, n) if kind == "res" and p["residual"] == "sinkhorn" else (columns,)
            tensors[f"{kind}_beta"] = on_grid(source.normal(f"{kind}_beta", 0, columns) * np.float32(mild)).reshape(
                shape
            )
        if p["norm_weight"]:
            tensors["mhc_norm.scale"] = np.exp2(source.uniform("norm", 0, width, -1, 1))
        return tensors

    @property
    def weights(self) -> list[str]:
        return [name for name in self.constants if name in STAGES[self.stage].weights]

    def inputs_at(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """float32 inputs ``[tokens, …]`` of a range of tokens."""
        n, dim, source, count = self.size.streams, self.size.dim, self.source, stop - start
        tensors: dict[str, np.ndarray] = {}
        for name in self.inputs:
            if name == "x":
                values = source.normal("x", start * n * dim, count * n * dim).reshape(count, n, dim)
                scales = np.resize(np.array(PER_STREAM, np.float32), n)
                per_token = source.uniform("token", start, count, 181, 362) * np.float32(2.0**-8)  # [t], 0.7 to 1.4
                tensors["x"] = on_grid(values * (per_token[:, None] * scales)[:, :, None])
            elif name == "y":
                tensors["y"] = on_grid(source.normal("y", start * dim, count * dim)).reshape(count, dim)
            elif name in ("post", "carried"):
                grid = source.uniform(name, start * n, count * n, 1, 255) * np.float32(2.0**-8)
                tensors[name] = grid.reshape(count, n)
            elif name == "H":
                tensors["H"] = self._matrices(start, count)
        return tensors

    def _matrices(self, start: int, count: int) -> np.ndarray:
        """``[tokens, n, n]``: entries between 2^-12 and 1, or the identity where a row has no other."""
        n = self.size.streams
        if self.parameters["residual"] == "identity":
            return np.broadcast_to(np.eye(n, dtype=np.float32), (count, n, n)).copy()
        many = count * n * n
        exponents = self.source.uniform("H exponents", start * n * n, many, -11, 0)
        mantissas = self.source.uniform("H mantissas", start * n * n, many, 64, 128)
        return (np.exp2(exponents) * mantissas * np.float32(2.0**-7)).reshape(count, n, n)

    def cotangents_at(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """float32 cotangents ``[tokens, …]`` of a range of tokens."""
        tensors, count = {}, stop - start
        for name in self.outputs:
            shape = self.tail(name)
            many = math.prod(shape)
            values = self.source.normal(f"cotangent/{name}", start * many, count * many)
            tensors[name] = on_grid(values).reshape(count, *shape)
        return tensors

    def tail(self, output: str) -> tuple[int, ...]:
        """The shape of an output without its tokens."""
        if self.stage == "head":
            return (self.size.dim,)
        return tuple({"n": self.size.streams, "C": self.size.dim}[axis] for axis in TAILS[output])


def tiles(tensors: Tensors) -> Iterator[tuple[int, int]]:
    """Ranges of tokens, each with at most `TILE` elements of x, or with one token."""
    size = tensors.size
    step = max(1, TILE // (size.streams * size.dim))
    for start in range(0, size.tokens, step):
        yield start, min(start + step, size.tokens)
