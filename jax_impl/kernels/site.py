"""From x to u and the coefficients, with a derivative of its own: one pass over x each way.

    sums = [x phi, sum x^2]                              # [m + 1, ...], all that is kept beside x
    z = scale * sums / rms + shift                       # [m, ...]
    pre, post, H = gates and residual matrix of z        # computed again on the way back
    u = sum_i gates[i] * x[i]                            # [..., dim], gates pre's or those that are carried

Where dim is shared out over devices the gates need a sum over them before u can be made: x is read once more.
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
from jax_impl.projections import Shards, Weights, gates_and_matrix, kept, layer_names, over_rms, own_gates, packed
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
    """

    config: MHCConfig
    precision: jax.lax.PrecisionLike = None
    u: bool = True
    coefficients: bool = True
    shards: Shards | None = None

    @property
    def streams(self) -> bool:
        """Whether the streams of `mixing` send their cotangent here."""
        return self.u and self.coefficients

    def logits(self, sums: Array, scale: Array, shift: Array, columns: int | None = None) -> Array:
        """The first ``columns`` logits ``[columns, ...]`` of the sums ``[m + 1, ...]``."""
        columns = len(sums) - 1 if columns is None else columns
        scale, shift = (value[:columns].reshape(-1, *(1,) * (sums.ndim - 1)) for value in (scale, shift))
        return scale * over_rms(sums[:columns], sums[-1] / (self.config.streams * self.config.dim), self.config) + shift

    def gates(self, sums: Array, scale: Array, shift: Array) -> Array:
        """The site's own gates ``[n, ...]``."""
        return own_gates(self.logits(sums, scale, shift, self.config.streams), self.config)

    def small(self, sums: Array, scale: Array, shift: Array) -> tuple[Array, ...]:
        """pre, post and H; nothing for a head."""
        if not self.coefficients:
            return ()
        return gates_and_matrix(self.logits(sums, scale, shift), self.config, sums.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def site(reading: Reading, x: Array, carried: Array | None, phi: Array, scale: Array, shift: Array) -> Site:
    """Computes what ``reading`` says.

    Args:
        x: ``[..., n, dim]``.
        carried: ``[..., n]``, the gates that u is read with; None for the site's own.
        phi: ``[n, m, dim]``, all projections side by side, times the norm's weight; float32.
        scale, shift: ``[m]``, of the logits; float32.
    """
    return _forward(reading, x, carried, phi, scale, shift)[0]


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
    phi, norm, scale, shift = packed(x, weights, names, weights.get("mhc_norm.scale"), reading.config)
    phi = phi if norm is None else phi * norm[..., None]  # [n, dim, m]
    return _compiled_site(reading, x, carried, jnp.swapaxes(phi, -1, -2), scale, shift)


def _forward(
    reading: Reading, x: Array, carried: Array | None, phi: Array, scale: Array, shift: Array
) -> tuple[Site, tuple[Array | None, ...]]:
    apart = reading.u and carried is None and reading.shards is not None and not reading.shards.whole
    u, sums = _read(replace(reading, u=False) if apart else reading, x, carried, phi, scale, shift)
    sums = kept(sums)
    if apart:  # of what is kept, so that it is made again without a collective
        u = mixing.weighed(x, tokens_first(reading.gates(sums, scale, shift), 1))
    pre, post, H = reading.small(sums, scale, shift) or (None, None, None)
    return (u, pre, post, H, x if reading.streams else None), (x, carried, phi, scale, shift, sums)


def _backward(reading: Reading, held: tuple[Array | None, ...], cotangents: Site) -> tuple[Array | None, ...]:
    return _pulled(reading, *held, *cotangents)


site.defvjp(_forward, _backward)
_compiled_site = compiled("reading")(site)


def _read_by_kernels(
    reading: Reading, x: Array, carried: Array | None, phi: Array, scale: Array, shift: Array
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
        sums, u = kernels.read(flat, phi, config, reading.precision, affine=affine, gates=gates)
        sums = tokens_last(sums.reshape(*lead, sums.shape[1]), 1)  # [m + 1, ...]
        sums = sums if add is None else add(sums)
        return {"sums": sums} if u is None else {"sums": sums, "u": u.reshape(*lead, u.shape[1])}

    arrays = {"x": x, "carried": carried, "phi": phi, "scale": scale, "shift": shift}
    found = on_parts(reading.shards, of_part, arrays, ("sums", "u") if reading.u else ("sums",))
    return found.get("u"), found["sums"]


def _read_plainly(
    reading: Reading, x: Array, carried: Array | None, phi: Array, scale: Array, shift: Array
) -> tuple[Array | None, Array]:
    wide = x.astype(F32)
    squares = jnp.square(wide).sum((-2, -1))  # [...]
    projected = jnp.einsum("nmc,...nc->m...", phi, wide, precision=reading.precision or HIGHEST)
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
    scale: Array,
    shift: Array,
    sums: Array,
    du: Array | None,
    dpre: Array | None,
    dpost: Array | None,
    dH: Array | None,
    g: Array | None,
) -> tuple[Array | None, ...]:
    """The cotangents of x, carried, phi, scale and shift; g is that of the streams that `mixing` returns."""
    arrays = {"x": x, "carried": carried, "phi": phi, "scale": scale, "shift": shift, "sums": sums}
    arrays |= {"du": du, "dpre": dpre, "dpost": dpost, "dH": dH, "g": g}
    results = ("dx", "dphi", "dscale", "dshift", *(() if carried is None else ("dcarried",)))
    found = on_parts(reading.shards, partial(_pulled_of_part, reading), arrays, results)
    return found["dx"], found.get("dcarried"), found["dphi"], found["dscale"], found["dshift"]


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
    made = kernels.pulled(by_token(x, 2), phi, packed, small, reading.precision, du, g)
    result = {"dx": made["dx"].reshape(x.shape), "dphi": made["dphi"]}
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
        x: Array, carried: Array | None, phi: Array, scale: Array, shift: Array
    ) -> tuple[Array | None, tuple[Array, ...]]:
        u, sums = _read_plainly(reading, x, carried, phi, scale, shift)
        return u, reading.small(sums, scale, shift)

    (_, small), pull = jax.vjp(outputs, x, carried, phi, scale, shift)
    dx, *rest = pull((du, (dpre, dpost, dH)[: len(small)]))
    if g is not None:
        dx = (dx.astype(F32) + between(small[2], g, reading.config, back=True)).astype(x.dtype)
    return dx, *rest


_pulled = twinned(_pulled_by_kernels, _pulled_plainly)
