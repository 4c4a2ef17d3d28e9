"""The kernels of a site's first half, from x to u and the sums of the coefficients, and back. Of one token::

    sums = [x phi, sum x^2]                                          # [m + 1]
    gates = sigmoid(scale * sums / rms + shift) + pre_eps            # [n]; or they are handed in
    u = sum_i gates[i] * x[i]                                        # [dim]

Where the coefficients are rounded to x's dtype, so is the norm, before it is projected::

    sums = [round(x / rms * norm) phi, sum x^2]                      # [m + 1]
    gates = round(sigmoid(scale * round(sums) + shift) + pre_eps)    # [n]

Back, in both cases with the sums before the division::

    dgates[i] = sum_c du[c] * x[i, c]                                # [n]
    dsums = base + slope * dgates                                    # [m + 1], see `Small`
    dx[i] = gates[i] * du + sum_j W[i, j] * g[j] + dsums phi[i] + 2 * dsums[m] * x[i]
    dphi = sum over tokens of dsums x                                # [n, m, dim]

g is the cotangent of the streams that the site returns, W its residual matrix from stream i to stream j.

Shapes at line ends: ``T`` tokens, ``B`` of them in a block, ``K`` numbers along dim in a chunk.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jax_impl.config import MHCConfig
from jax_impl.kernels.blocks import Operand, along, run
from jax_impl.projections import over_rms, own_gates
from jax_impl.residual import HIGHEST

F32 = jnp.float32
Refs = Mapping[str, Any]


def read(
    x: Array,
    phi: Array,
    config: MHCConfig,
    precision: jax.lax.PrecisionLike,
    *,
    affine: Array | None = None,
    gates: Array | None = None,
    rounded: bool = False,
    norm: Array | None = None,
    squares: Array | None = None,
) -> tuple[Array, Array | None]:
    """Computes the sums, and u where it is told what to read with.

    Args:
        x: ``[T, n, dim]``.
        phi: ``[n, m, dim]`` in float32.
        affine: ``[2, n]``, scale and shift of the site's own gates, where u is read with these.
        gates: ``[T, n]``, those of the site before, where u is read with these.
        rounded: whether the coefficients, and the norm before them, are rounded to x's dtype.
        norm: ``[n, 1, dim]``, the norm's weight, with ``rounded``; else phi has it.
        squares: ``[T, 1]``, the sum of squares where x has a part of dim alone, with ``rounded``.

    Returns:
        The sums ``[T, m + 1]`` in float32, and u ``[T, dim]`` or None.
    """
    tokens, _, dim = x.shape
    outputs = {"sums": Operand((tokens, phi.shape[1] + 1), F32)}
    inputs = {"x": x, "phi": phi}
    if affine is not None:
        inputs["affine"] = affine
    if gates is not None:
        inputs["gates"] = gates
    if len(inputs) > 2:
        outputs["u"] = Operand((tokens, dim), x.dtype)
    inputs |= {name: value for name, value in (("norm", norm), ("squares", squares)) if value is not None}
    kernel = partial(_read, config=config, precision=precision, rounded=rounded)
    found = run(kernel, "mhc_read", inputs, outputs, shared=("phi", "affine", "norm"))
    return found["sums"], found.get("u")


def _read(refs: Refs, config: MHCConfig, precision: jax.lax.PrecisionLike, rounded: bool) -> None:
    x = refs["x"]
    (_, n, dim), m = x.shape, refs["phi"].shape[1]
    total, squares = (_rounded_sums if rounded else _sums)(refs, config, precision)
    refs["sums"][:, :m] = total
    refs["sums"][:, m:] = squares
    if "u" not in refs:
        return
    if "affine" in refs:
        scale, shift = refs["affine"][:1], refs["affine"][1:]  # [1, n]
        h = _round(total[:, :n], x) if rounded else over_rms(total[:, :n], squares / (n * config.dim), config)  # [B, n]
        gates = own_gates(scale * h + shift, config)
        gates = _round(gates, x) if rounded else gates
    else:
        gates = refs["gates"][...]  # [B, n]

    def weigh(at: Any, state: Any) -> Any:
        parts = [gates[:, i : i + 1] * x[:, i, at].astype(F32) for i in range(n)]  # [B, K] each
        refs["u"][:, at] = added(parts).astype(x.dtype)
        return state

    along(dim, weigh, 0)


def _sums(refs: Refs, config: MHCConfig, precision: jax.lax.PrecisionLike) -> tuple[Array, Array]:
    """The projections ``[B, m]`` of the streams, and their sum of squares ``[B, 1]``."""
    x, phi = refs["x"], refs["phi"]
    (tokens, n, dim), m = x.shape, phi.shape[1]

    def project(at: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, squares = state
        for i in range(n):
            stream = x[:, i, at].astype(F32)  # [B, K]
            total = total + product(stream, phi[i, :, at], (1, 1), precision)  # [B, m]
            squares = squares + jnp.sum(stream * stream, axis=1, keepdims=True)  # [B, 1]
        return total, squares

    return along(dim, project, (jnp.zeros((tokens, m), F32), jnp.zeros((tokens, 1), F32)))


def _rounded_sums(refs: Refs, config: MHCConfig, precision: jax.lax.PrecisionLike) -> tuple[Array, Array]:
    """The same of the streams once they are normed and rounded to x's dtype; the block is here for both sums."""
    del precision  # a product of two numbers of x's dtype is exact in float32
    x, phi = refs["x"], refs["phi"]
    (tokens, n, dim), m = x.shape, phi.shape[1]

    def square(at: Any, squares: Array) -> Array:
        for i in range(n):
            stream = x[:, i, at].astype(F32)  # [B, K]
            squares = squares + jnp.sum(stream * stream, axis=1, keepdims=True)
        return squares

    squares = refs["squares"][...] if "squares" in refs else along(dim, square, jnp.zeros((tokens, 1), F32))
    mean = squares / (n * config.dim)

    def project(at: Any, total: Array) -> Array:
        for i in range(n):
            normed = over_rms(x[:, i, at].astype(F32), mean, config)  # [B, K]
            normed = normed * refs["norm"][i, :, at] if "norm" in refs else normed
            weights = phi[i, :, at].astype(x.dtype)  # [m, K]
            total = total + product(normed.astype(x.dtype), weights, (1, 1), jax.lax.Precision.DEFAULT)
        return total

    return along(dim, project, jnp.zeros((tokens, m), F32)), squares


def _round(value: Array, x: Any) -> Array:
    """Rounded to x's dtype, in float32 still."""
    return value.astype(x.dtype).astype(F32)


@dataclass(frozen=True)
class Small:
    """What the way back is told of each token, side by side in one array: alone each would fill 128 lanes.

    ``base`` ``[m + 1]``, the cotangent of the sums as far as it is known; ``W`` ``[n * n]``, where streams are mixed by
    a matrix; ``gates`` ``[n]``, where u has a cotangent; ``slopes`` ``[2 * n]``, where these are the site's own: how
    each depends on its own sum, and on the sum of squares.
    """

    n: int
    m: int
    W: bool
    gates: bool
    slopes: bool

    @property
    def places(self) -> dict[str, slice]:
        """Where each begins and ends."""
        sizes = {"base": self.m + 1, "W": self.n**2 * self.W, "gates": self.n * self.gates}
        sizes["slopes"] = 2 * self.n * self.slopes
        found, start = {}, 0
        for name, size in sizes.items():
            found[name] = slice(start, start + size)
            start += size
        return found

    @property
    def width(self) -> int:
        return self.places["slopes"].stop


def pulled_operands(x: Operand, m: int, small: Small, mixed: bool) -> tuple[dict[str, Operand], dict[str, Operand]]:
    """The arrays that `pulled` takes and makes, by name.

    Args:
        x: ``[T, n, dim]``.
        mixed: whether the site returns streams, of which g is the cotangent.
    """
    tokens, n, dim = x.shape
    phi, stream = Operand((n, m, dim), F32, False), Operand((tokens, dim), x.dtype)
    inputs = {"x": x, "phi": phi, "small": Operand((tokens, small.width), F32)}
    inputs |= {"du": stream} if small.gates else {}
    inputs |= {"g": x} if mixed else {}
    outputs = {"dx": x, "dphi": phi} | ({"dgates": Operand((tokens, n), F32)} if small.gates else {})
    return inputs, outputs


def pulled(
    x: Array,
    phi: Array,
    packed: Array,
    small: Small,
    precision: jax.lax.PrecisionLike,
    du: Array | None,
    g: Array | None,
) -> dict[str, Array]:
    """Computes the cotangents of x and phi.

    Args:
        x: ``[T, n, dim]``.
        phi: ``[n, m, dim]`` in float32.
        packed: ``[T, small.width]`` in float32.
        du: ``[T, dim]``, or None where no u was made.
        g: ``[T, n, dim]``, or None where the site returns no streams.

    Returns:
        dx ``[T, n, dim]``, dphi ``[n, m, dim]``, and with u dgates ``[T, n]``, the last two in float32.
    """
    inputs = {"x": x, "phi": phi, "small": packed}
    inputs |= {} if du is None else {"du": du}
    inputs |= {} if g is None else {"g": g}
    _, outputs = pulled_operands(Operand(x.shape, x.dtype), phi.shape[1], small, g is not None)
    kernel = partial(_pulled, small=small, precision=precision, total=len(x))
    return run(kernel, "mhc_read_back", inputs, outputs, shared=("phi",))


def _pulled(refs: Refs, small: Small, precision: jax.lax.PrecisionLike, total: int) -> None:
    x, phi = refs["x"], refs["phi"]
    (tokens, n, dim), m = x.shape, small.m
    part = {name: refs["small"][:, place] for name, place in small.places.items() if place.stop > place.start}
    dsums, dsquares = part["base"][:, :m], part["base"][:, m:]  # [B, m], [B, 1]

    if small.gates:

        def reach(at: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
            du = refs["du"][:, at].astype(F32)  # [B, K]
            return tuple(
                known + jnp.sum(du * x[:, i, at].astype(F32), axis=1, keepdims=True) for i, known in enumerate(state)
            )

        dgates = along(dim, reach, (jnp.zeros((tokens, 1), F32),) * n)  # n of [B, 1]
        column = jax.lax.broadcasted_iota(jnp.int32, (tokens, m), 1)
        for i, one in enumerate(dgates):
            refs["dgates"][:, i : i + 1] = one
            if small.slopes:
                dsums = dsums + jnp.where(column == i, part["slopes"][:, i : i + 1] * one, 0)
                dsquares = dsquares + part["slopes"][:, n + i : n + i + 1] * one

    ragged = total % tokens
    row = pl.program_id(0) * tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    inside = row < total  # [B, 1]; past the last token there is anything, NaN too
    summed = jnp.where(inside, dsums, 0) if ragged else dsums  # [B, m]

    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        refs["dphi"][...] = jnp.zeros(refs["dphi"].shape, F32)

    def back(at: Any, state: Any) -> Any:
        du = refs["du"][:, at].astype(F32) if small.gates else None  # [B, K]
        g = [refs["g"][:, j, at].astype(F32) for j in range(n)] if "g" in refs else []  # n of [B, K]
        for i in range(n):
            stream = x[:, i, at].astype(F32)  # [B, K]
            dx = 2 * dsquares * stream + product(dsums, phi[i, :, at], (1, 0), precision)  # [B, K]
            if du is not None:
                dx = dx + part["gates"][:, i : i + 1] * du
            if g and not small.W:
                dx = dx + g[i]
            elif g:
                for j in range(n):
                    dx = dx + part["W"][:, i * n + j : i * n + j + 1] * g[j]
            refs["dx"][:, i, at] = dx.astype(x.dtype)
            known = jnp.where(inside, stream, 0) if ragged else stream
            refs["dphi"][i, :, at] += product(summed, known, (0, 0), precision)  # [m, K]
        return state

    along(dim, back, 0)


def product(one: Array, other: Array, axes: tuple[int, int], precision: jax.lax.PrecisionLike) -> Array:
    """A product of matrices over these axes, accumulated in float32."""
    precision = HIGHEST if precision is None else precision
    over = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(one, other, over, precision=precision, preferred_element_type=F32)


def added(terms: Sequence[Array]) -> Array:
    """The sum of one array or more."""
    return functools.reduce(operator.add, terms)
