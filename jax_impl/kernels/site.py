"""From x to u and the coefficients, with a derivative of its own: one pass over x each way.

    sums = [x phi, sum x^2]                              # [m + 1, ...], all that is kept beside x
    z = scale * sums / rms + shift                       # [m, ...]
    pre, post, H = gates and residual matrix of z        # computed again on the way back
    u = sum_i gates[i] * x[i]                            # [..., dim], gates pre's or those that are carried

Where dim is shared out over devices the gates need a sum over them before u can be made: x is read once more.

Where coefficients are rounded to x's dtype, the norm is applied and rounded before the projection (`reading`). On the
way back every rounding is passed over, so that there the projections are of x itself again, times the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from jax_impl import mixing
from jax_impl.config import MHCConfig
from jax_impl.kernels import reading as kernels
from jax_impl.kernels.blocks import Operand, check_room
from jax_impl.kernels.mixing import between, packed_matrix
from jax_impl.kernels.parts import Add, Arrays, by_token, on_parts
from jax_impl.kernels.twins import twinned
from jax_impl.projections import (
    Shards,
    Weights,
    coefficient_dtype,
    gates_and_matrix,
    kept,
    layer_names,
    over_rms,
    own_gates,
    packed,
)
from jax_impl.residual import HIGHEST, compiled, tokens_first, tokens_last

F32 = jnp.float32
Site = tuple[Array | None, Array | None, Array | None, Array | None, Array | None]
"""u, pre, post, H, and x for `mixing` alone; None in place of what isn't wanted."""


@dataclass(frozen=True)
class Reading:
    """What is computed of x.

    Attributes:
        precision: of the projections.
        u: whether u is wanted.
        coefficients: whether pre, post and H are, and x for `mixing` if u is too; without them the projections are
            those of gates alone, the head's.
        dtype: what coefficients are rounded to.
        normed: whether the sums are of the streams once they are normed and rounded, as where ``dtype`` is narrow.
    """

    config: MHCConfig
    precision: jax.lax.PrecisionLike = None
    u: bool = True
    coefficients: bool = True
    shards: Shards | None = None
    dtype: Any = F32
    normed: bool = False

    @property
    def streams(self) -> bool:
        """Whether the streams of `mixing` send their cotangent here."""
        return self.u and self.coefficients

    def logits(self, sums: Array, scale: Array, shift: Array, columns: int | None = None) -> Array:
        """The first ``columns`` logits ``[columns, ...]`` of the sums ``[m + 1, ...]``."""
        columns = len(sums) - 1 if columns is None else columns
        scale, shift = (value[:columns].reshape(-1, *(1,) * (sums.ndim - 1)) for value in (scale, shift))
        h = sums[:columns] if self.normed else over_rms(sums[:columns], self.mean(sums), self.config)
        return scale * self.rounded(h) + shift

    def mean(self, sums: Array) -> Array:
        """The mean square of all streams ``[...]``."""
        return sums[-1] / (self.config.streams * self.config.dim)

    def rounded(self, value: Array) -> Array:
        """As coefficients are rounded, in float32 still."""
        return value.astype(self.dtype).astype(F32)

    def gates(self, sums: Array, scale: Array, shift: Array) -> Array:
        """The site's own gates ``[n, ...]``."""
        return self.rounded(own_gates(self.logits(sums, scale, shift, self.config.streams), self.config))

    def small(self, sums: Array, scale: Array, shift: Array) -> tuple[Array, ...]:
        """pre, post and H; nothing for a head."""
        if not self.coefficients:
            return ()
        return gates_and_matrix(self.logits(sums, scale, shift), self.config, self.dtype)

    def of_streams(self, sums: Array) -> Array:
        """The sums ``[m + 1, ...]`` of the streams as they are, from those of the normed ones."""
        if not self.normed:
            return sums
        inverse = over_rms(jnp.ones_like(sums[-1]), self.mean(sums), self.config)
        none = inverse == 0  # where the sum of squares overflows: the normed streams are 0, or NaN where x isn't finite
        return sums.at[:-1].set(jnp.where(none, sums[:-1] * 0, sums[:-1] / jnp.where(none, 1, inverse)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def site(
    reading: Reading, x: Array, carried: Array | None, phi: Array, norm: Array | None, scale: Array, shift: Array
) -> Site:
    """Computes what ``reading`` says.

    Args:
        x: ``[..., n, dim]``.
        carried: ``[..., n]``, the gates that u is read with; None for the site's own.
        phi: ``[n, m, dim]``, all projections side by side; float32.
        norm: ``[n, 1, dim]``, the norm's weight, where the normed streams are rounded; else it is in phi, or there is
            none.
        scale, shift: ``[m]``, of the logits; float32.
    """
    return _forward(reading, x, carried, phi, norm, scale, shift)[0]


def read_layer(
    x: Array, weights: Weights, reading: Reading, carried: Array | None = None
) -> tuple[Array, Array, Array, Array, Array]:
    """u, pre, post, H, and x for `mixing` alone; one program for a caller who compiles nothing, as the next two."""
    return cast("Any", _read_site(x, weights, layer_names(reading.config), reading, carried))


def read_coefficients(x: Array, weights: Weights, reading: Reading) -> tuple[Array, Array, Array]:
    """pre, post and H."""
    return cast("Any", _read_site(x, weights, layer_names(reading.config), replace(reading, u=False))[1:4])


def read_head(x: Array, weights: Weights, names: Sequence[tuple[str, str, str]], reading: Reading) -> Array:
    """The streams weighted by the gates of a head."""
    return cast("Any", _read_site(x, weights, names, replace(reading, coefficients=False))[0])


def _read_site(
    x: Array, weights: Weights, names: Sequence[tuple[str, str, str]], reading: Reading, carried: Array | None = None
) -> Site:
    """What a site computes of x by the (phi, scale, shift) of these names."""
    dtype = coefficient_dtype(x, reading.config)
    reading = replace(reading, dtype=dtype, normed=dtype != F32)
    phi, norm, scale, shift = packed(x, weights, names, weights.get("mhc_norm.scale"), reading.config)
    phi, norm = jnp.swapaxes(phi, -1, -2), None if norm is None else norm[:, None]  # [n, m, dim], [n, 1, dim]
    if norm is not None and not reading.normed:
        phi, norm = phi * norm, None
    return _compiled_site(reading, x, carried, phi, norm, scale, shift)


def _forward(
    reading: Reading, x: Array, carried: Array | None, phi: Array, norm: Array | None, scale: Array, shift: Array
) -> tuple[Site, tuple[Array | None, ...]]:
    apart = reading.u and carried is None and reading.shards is not None and not reading.shards.whole
    u, sums = _read(replace(reading, u=False) if apart else reading, x, carried, phi, norm, scale, shift)
    sums = kept(sums)
    if apart:  # of what is kept, so that it is made again without a collective
        u = mixing.weighed(x, tokens_first(reading.gates(sums, scale, shift), 1))
    pre, post, H = reading.small(sums, scale, shift) or (None, None, None)
    return (u, pre, post, H, x if reading.streams else None), (x, carried, phi, norm, scale, shift, sums)


def _backward(reading: Reading, held: tuple[Array | None, ...], cotangents: Site) -> tuple[Array | None, ...]:
    return _pulled(reading, *held, *cotangents)


site.defvjp(_forward, _backward)
_compiled_site = compiled("reading")(site)


def _read_by_kernels(
    reading: Reading, x: Array, carried: Array | None, phi: Array, norm: Array | None, scale: Array, shift: Array
) -> tuple[Array | None, Array]:
    """u and the sums."""
    config = reading.config
    n = config.streams

    def of_part(part: Arrays, add: Add) -> dict[str, Array]:
        x, phi, lead = part["x"], part["phi"], part["x"].shape[:-2]
        flat = by_token(x, 2)  # [T, n, dim]
        check_room(_largest(reading, flat, phi.shape[1], "carried" in part, add))
        affine = gates = None
        if "carried" in part:
            gates = by_token(part["carried"], 1)
        elif reading.u:
            affine = jnp.stack([part["scale"][:n], part["shift"][:n]])
        squares = None
        if reading.normed and add is not None:  # the root comes before the projections: x is read once more
            squares = add(jnp.square(flat.astype(F32)).sum((-2, -1)))[:, None]  # [T, 1]
        sums, u = kernels.read(
            flat, phi, config, reading.precision, affine=affine, gates=gates,
            rounded=reading.normed, norm=part.get("norm"), squares=squares,
        )  # fmt: skip
        sums = tokens_last(sums.reshape(*lead, sums.shape[1]), 1)  # [m + 1, ...]
        sums = (
            sums if add is None else jnp.concatenate([add(sums[:-1]), sums[-1:]]) if squares is not None else add(sums)
        )
        return {"sums": sums} if u is None else {"sums": sums, "u": u.reshape(*lead, u.shape[1])}

    arrays = {"x": x, "carried": carried, "phi": phi, "norm": norm, "scale": scale, "shift": shift}
    found = on_parts(reading.shards, of_part, arrays, ("sums", "u") if reading.u else ("sums",))
    return found.get("u"), found["sums"]


def _read_plainly(
    reading: Reading, x: Array, carried: Array | None, phi: Array, norm: Array | None, scale: Array, shift: Array
) -> tuple[Array | None, Array]:
    wide = x.astype(F32)
    squares = jnp.square(wide).sum((-2, -1))  # [...]
    streams = wide
    if reading.normed:
        streams = over_rms(wide, reading.mean(squares[None])[..., None, None], reading.config)  # [..., n, dim]
        streams = reading.rounded(streams if norm is None else streams * norm[:, 0])
    projected = jnp.einsum("nmc,...nc->m...", phi, streams, precision=reading.precision or HIGHEST)
    sums = jnp.concatenate([projected, squares[None]])  # [m + 1, ...]
    if not reading.u:
        return None, sums
    gates = tokens_first(reading.gates(sums, scale, shift), 1) if carried is None else carried  # [..., n]
    return (gates[..., None] * wide).sum(-2).astype(x.dtype), sums


_read = twinned(_read_by_kernels, _read_plainly)


def _pulled_by_kernels(
    reading: Reading,
    x: Array,
    carried: Array | None,
    phi: Array,
    norm: Array | None,
    scale: Array,
    shift: Array,
    sums: Array,
    du: Array | None,
    dpre: Array | None,
    dpost: Array | None,
    dH: Array | None,
    g: Array | None,
) -> tuple[Array | None, ...]:
    """The cotangents of x, carried, phi, norm, scale and shift; g is that of the streams that `mixing` returns."""
    arrays = {"x": x, "carried": carried, "phi": phi, "norm": norm, "scale": scale, "shift": shift}
    arrays |= {"sums": reading.of_streams(sums), "du": du, "dpre": dpre, "dpost": dpost, "dH": dH, "g": g}
    further = {"dcarried": carried, "dnorm": norm}
    results = ["dx", "dphi", "dscale", "dshift", *(name for name, value in further.items() if value is not None)]
    of_part = partial(_pulled_of_part, replace(reading, normed=False))
    found = on_parts(reading.shards, of_part, arrays, results)
    return tuple(found.get(name) for name in ("dx", "dcarried", "dphi", "dnorm", "dscale", "dshift"))


def _pulled_of_part(reading: Reading, part: Arrays, add: Add) -> dict[str, Array]:
    config, n = reading.config, reading.config.streams
    x, phi, inputs = part["x"], part["phi"], (part["sums"], part["scale"], part["shift"])
    lead = x.shape[:-2]
    outputs, pull = jax.vjp(reading.small, *inputs)
    base, dscale, dshift = pull(tuple(part[name] for name in ("dpre", "dpost", "dH")[: len(outputs)]))
    rows: dict[str, Array] = {}  # [columns, ...] of each, for `kernels.Small`
    if reading.streams and config.residual != "identity":
        rows["W"] = packed_matrix(outputs[2], config, x.dtype)
    own, pull_gates = jax.vjp(reading.gates, *inputs)  # [n, ...]
    by_itself = reading.u and "carried" not in part
    if reading.u:
        rows["gates"] = own if by_itself else tokens_last(part["carried"], 1)
    dgates = None
    if by_itself and add is not None:
        dgates = tokens_last(add(mixing.of_gates(x, part["du"], tokens_first(own, 1))), 1)  # [n, ...]
        base = base + pull_gates(dgates)[0]
    elif by_itself:
        unit = jnp.zeros_like(part["sums"]).at[-1].set(1)
        by_squares = jax.jvp(lambda sums: reading.gates(sums, *inputs[1:]), (part["sums"],), (unit,))[1]
        rows["slopes"] = jnp.concatenate([pull_gates(jnp.ones_like(own))[0][:n], by_squares])
    small = kernels.Small(n, phi.shape[1], "W" in rows, "gates" in rows, "slopes" in rows)
    columns = [base] + [rows[name] for name in small.places if name in rows]
    packed = by_token(tokens_first(jnp.concatenate(columns), 1), 1)  # [T, small.width]
    du = by_token(part["du"], 1) if "du" in part else None
    g = by_token(part["g"], 2) if "g" in part else None
    whole = phi * part["norm"] if "norm" in part else phi
    made = kernels.pulled(by_token(x, 2), whole, packed, small, reading.precision, du, g)
    result = {"dx": made["dx"].reshape(x.shape), "dphi": made["dphi"]}
    if "norm" in part:
        result |= {"dphi": made["dphi"] * part["norm"], "dnorm": (made["dphi"] * phi).sum(1, keepdims=True)}
    if by_itself:
        if dgates is None:
            dgates = tokens_last(made["dgates"].reshape(*lead, n), 1)
        _, further_scale, further_shift = pull_gates(dgates)
        dscale, dshift = dscale + further_scale, dshift + further_shift
    elif reading.u:
        of_carried = made["dgates"].reshape(*lead, n)
        result["dcarried"] = of_carried if add is None else add(of_carried)
    return {**result, "dscale": dscale, "dshift": dshift}


def _largest(reading: Reading, flat: Array, m: int, carried: bool, add: Add) -> list[Operand]:
    """The arrays of the kernel that has most of them: that of the way back."""
    mixed = reading.streams
    slopes = reading.u and not carried and add is None
    small = kernels.Small(flat.shape[1], m, mixed and reading.config.residual != "identity", reading.u, slopes)
    inputs, outputs = kernels.pulled_operands(Operand(flat.shape, flat.dtype), m, small, mixed)
    return [*inputs.values(), *outputs.values()]


def _pulled_plainly(
    reading: Reading,
    x: Array,
    carried: Array | None,
    phi: Array,
    norm: Array | None,
    scale: Array,
    shift: Array,
    sums: Array,
    du: Array | None,
    dpre: Array | None,
    dpost: Array | None,
    dH: Array | None,
    g: Array | None,
) -> tuple[Array | None, ...]:
    del sums  # made of x again, so that what depends on x by way of them is differentiated

    def outputs(
        x: Array, carried: Array | None, phi: Array, norm: Array | None, scale: Array, shift: Array
    ) -> tuple[Array | None, tuple[Array, ...]]:
        u, sums = _read_plainly(reading, x, carried, phi, norm, scale, shift)
        return u, reading.small(sums, scale, shift)

    (_, small), pull = jax.vjp(outputs, x, carried, phi, norm, scale, shift)
    dx, *rest = pull((du, (dpre, dpost, dH)[: len(small)]))
    if g is not None:
        dx = (dx.astype(F32) + between(small[2], g, reading.config, back=True)).astype(x.dtype)
    return dx, *rest


_pulled = twinned(_pulled_by_kernels, _pulled_plainly)
