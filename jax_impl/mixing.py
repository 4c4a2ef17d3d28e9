"""The mixings of streams with gates and with H, with derivatives of their own::

    weighted_sum(x, gates) = sum_i gates[i] * x[i]      # [..., n, dim], [..., n] -> [..., dim]
    spread(y, gates)[i] = gates[i] * y                  # [..., dim], [..., n] -> [..., n, dim]
    across(H, x)[j] = sum_i H[i, j] * x[i]              # [..., n, n], [..., n, dim] -> [..., n, dim]

The transpose that JAX derives of the first two converts cotangents before it repeats them (`_repeated`): 75.8 units
with backward on a v5e at (4, 4096, 4, 7168), against 70.8 (benchmarks/tpu_aot.py). The price is forward mode: `jax.jvp`
of a layer is refused, forward over reverse (a Hessian-vector product) is not.

On a CPU each is written out stream by stream: XLA fuses that into one loop over a row of dim, where its reductions over
a middle axis and its products of small matrices are slow (`python -m benchmarks run` times a layer that has them). A
mesh in use has the other form, since what is written out has other shardings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Kept = tuple[Array, Array]


HIGHEST = jax.lax.Precision.HIGHEST


def on_mesh() -> bool:
    """Whether a mesh is in use: what is written out for a CPU has other shardings, and rules of our own add up nothing
    over the parts of an array.
    """
    return not jax.sharding.get_abstract_mesh().empty


def by_platform(on_cpu: Callable[..., Array], elsewhere: Callable[..., Array], *arrays: Array) -> Array:
    """One of two forms of a function, by the platform that it is compiled for; it is never differentiated itself."""
    if on_mesh():
        return elsewhere(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


def _wide(*arrays: Array) -> tuple[Array, ...]:
    """Arrays in float32, or wider where the last of them is."""
    return tuple(array.astype(jnp.promote_types(arrays[-1].dtype, jnp.float32)) for array in arrays)


def _weigh(x: Array, gates: Array) -> Array:
    """``sum_i gates_i x_i`` in float32 or wider."""
    return by_platform(_weigh_by_stream, _weigh_at_once, x, gates)


def _weigh_at_once(x: Array, gates: Array) -> Array:
    gates, x = _wide(gates, x)
    return (gates[..., None] * x).sum(-2)  # [..., n, 1] * [..., n, dim] -> [..., dim]


def _weigh_by_stream(x: Array, gates: Array) -> Array:
    gates, x = _wide(gates, x)
    total = gates[..., 0, None] * x[..., 0, :]  # [..., dim]
    for i in range(1, x.shape[-2]):
        total = total + gates[..., i, None] * x[..., i, :]
    return total


def of_gates(x: Array, y: Array, gates: Array) -> Array:
    """``sum_c x[i, c] y[c]`` for each stream, in float32 or wider: a cotangent of gates."""

    def at_once(x: Array, y: Array, gates: Array) -> Array:
        repeated = _repeated(y, gates)
        return (repeated * x.astype(repeated.dtype)).sum(-1)  # [..., n, dim] -> [..., n]

    def by_stream(x: Array, y: Array, gates: Array) -> Array:
        del gates
        x, y = _wide(x, y)
        return jnp.stack([(x[..., i, :] * y).sum(-1) for i in range(x.shape[-2])], -1)

    return by_platform(by_stream, at_once, x, y, gates)


def _repeated(y: Array, gates: Array) -> Array:
    """y for each stream, ``[..., n, dim]`` in float32 or wider.

    The select takes y always, since nothing is less than -inf, which XLA doesn't know. Without it XLA converts y before
    it is repeated, and writes it to memory in float32: 26.4 units for 22.4 forward, measured as above.
    """
    repeated = jnp.where(~(gates < -jnp.inf)[..., None], y[..., None, :], jnp.zeros((), y.dtype))  # [..., n, dim]
    return repeated.astype(jnp.promote_types(y.dtype, jnp.float32))


def weighed(x: Array, gates: Array) -> Array:
    """What `weighted_sum` computes, without a rule for its derivative."""
    return _weigh(x, gates).astype(x.dtype)


def _spread(y: Array, gates: Array) -> Array:
    repeated = _repeated(y, gates)
    return gates.astype(repeated.dtype)[..., None] * repeated  # [..., n, 1] * [..., n, dim]


@jax.custom_vjp
def weighted_sum(x: Float[Array, "... n dim"], gates: Float[Array, "... n"]) -> Float[Array, "... dim"]:
    """Computes ``sum_i gates_i x_i``, summed in float32 or wider and rounded once to x's dtype."""
    return weighed(x, gates)


@jax.custom_vjp
def spread(y: Float[Array, "... dim"], gates: Float[Array, "... n"]) -> Float[Array, "... n dim"]:
    """Computes ``gates_i y`` in float32 or wider."""
    return _spread(y, gates)


# The rules call functions that have no rules of their own, so that forward mode over them works.
def _weighted_sum_forward(x: Array, gates: Array) -> tuple[Array, Kept]:
    return weighed(x, gates), (x, gates)


def _weighted_sum_backward(kept: Kept, cotangent: Array) -> Kept:
    x, gates = kept
    repeated = _repeated(cotangent, gates)
    of_x = (gates.astype(repeated.dtype)[..., None] * repeated).astype(x.dtype)
    return of_x, of_gates(x, cotangent, gates).astype(gates.dtype)


def _spread_forward(y: Array, gates: Array) -> tuple[Array, Kept]:
    return _spread(y, gates), (y, gates)


def _spread_backward(kept: Kept, cotangent: Array) -> Kept:
    y, gates = kept
    return _weigh(cotangent, gates).astype(y.dtype), of_gates(cotangent, y, gates).astype(gates.dtype)


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
spread.defvjp(_spread_forward, _spread_backward)


def across(
    H: Float[Array, "... n n"], x: Float[Array, "... n dim"], transposed: bool = False
) -> Float[Array, "... n dim"]:
    """Computes ``sum_i H[i, j] x_i``, or with H transposed, in float32 or wider."""
    if on_mesh():
        return _across_at_once(H, x, transposed)
    result: Array = _ruled_across(H, x, transposed)
    return result


def _across_at_once(H: Array, x: Array, transposed: bool) -> Array:
    pattern = "...ji,...ic->...jc" if transposed else "...ij,...ic->...jc"
    return jnp.einsum(pattern, *_wide(H, x), precision=HIGHEST)  # [..., n, dim]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ruled_across(H: Array, x: Array, transposed: bool) -> Array:
    return _across(H, x, transposed)


def _across(H: Array, x: Array, transposed: bool) -> Array:
    def by_stream(H: Array, x: Array) -> Array:
        H, x = _wide(H, x)
        rows = H if transposed else jnp.swapaxes(H, -1, -2)  # [..., to, from]
        return jnp.stack([_weigh_by_stream(x, rows[..., j, :]) for j in range(x.shape[-2])], -2)

    return by_platform(by_stream, partial(_across_at_once, transposed=transposed), H, x)


def _across_forward(H: Array, x: Array, transposed: bool) -> tuple[Array, Kept]:
    return _across(H, x, transposed), (H, x)


def _across_backward(transposed: bool, kept: Kept, cotangent: Array) -> Kept:
    H, x = kept

    def at_once(cotangent: Array, x: Array) -> Array:
        return jnp.einsum("...jc,...ic->...ji", *_wide(cotangent, x), precision=HIGHEST)  # [..., to, from]

    def by_stream(cotangent: Array, x: Array) -> Array:
        g, x = _wide(cotangent, x)
        n = range(x.shape[-2])
        rows = [jnp.stack([(g[..., j, :] * x[..., i, :]).sum(-1) for i in n], -1) for j in n]
        return jnp.stack(rows, -2)

    of_matrix = by_platform(by_stream, at_once, cotangent, x)
    of_matrix = of_matrix if transposed else jnp.swapaxes(of_matrix, -1, -2)
    return of_matrix.astype(H.dtype), _across(H, cotangent, not transposed).astype(x.dtype)


_ruled_across.defvjp(_across_forward, _across_backward)
