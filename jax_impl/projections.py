"""From the streams to the coefficients of a site: norm, projections, gates and residual matrix. In short::

    z = scale * (rms_norm(x) @ phi) + shift                     # [..., m], m = n + n + n*n: pre, post and H together
    pre = sigmoid(z[:n]) + pre_eps                              # [..., n]
    post = post_scale * sigmoid(z[n : 2 * n]) + post_eps        # [..., n]
    H = residual_matrix(z[2 * n :])                             # [..., n, n]

Shapes at line ends are those of `functional`. Tokens come last, ``[m, ...]`` and ``[n, n, ...]``, until coefficients
are done, since a TPU pads the last axis to 128.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jax_impl import mixing
from jax_impl.config import MHCConfig
from jax_impl.residual import HIGHEST, compiled, residual_matrix, tokens_first, tokens_last, wide_dtype

Weights = Mapping[str, Array]
COEFFICIENTS = "mhc_coefficients"
"""The name, for policies of `jax.checkpoint`, of small values that cost a pass over x or a collective to make again:
projections, sum of squares, pre, post and H, 49 numbers a token at n = 4."""
INPUTS = "mhc_inputs"
"""The name of u, the sub-layer's input, which costs a pass over x to make again."""


@runtime_checkable
class Shards(Protocol):
    """How arrays lie on many devices: whole to the functions here, and in parts in `over_parts` alone.

    x, u, y, φ and the norm weight are split along dim, x, u and y along tokens too; all the rest is whole over dim.
    """

    @property
    def whole(self) -> bool:
        """Whether each device has all of dim."""
        ...

    def activation(self, value: Array, *, streams: bool = True) -> Array:
        """x ``[..., streams, dim]``, or one stream ``[..., dim]``, laid out in its parts."""
        ...

    def gates(self, value: Array) -> Array:
        """Gates ``[..., streams]`` laid out in their parts, each whole over dim."""
        ...

    def over_parts(self, function: Callable[..., Array], x: Array, held: list[Array], shared: list[Array]) -> Array:
        """``function`` on each device's part of x and of the weights.

        Args:
            function: takes a part of x, of ``held`` and of ``shared``, and ``add``, which sums a value over the parts
                of dim; returns ``[m, *leading axes of x]``.
            x: ``[..., streams, dim]``.
            held: weights ``[streams, dim, ...]``, split along dim.
            shared: weights that every device has.

        Raises:
            ValueError: an axis can't be shared out evenly.
        """
        ...

    def by_layout(
        self,
        function: Callable[[Mapping[str, Array], Callable[[Array], Array] | None], dict[str, Array]],
        arrays: Mapping[str, Array],
        layouts: Mapping[str, str],
        results: Collection[str],
    ) -> dict[str, Array]:
        """``function`` on each device's part of arrays by name; it isn't differentiated.

        Args:
            function: takes parts by name, and ``add``, which sums a value over the parts of dim, None where dim is
                whole; returns the ``results`` by name. Those that are a projection or whole are of its own tokens
                alone, and are added up over all of them.
            arrays: x among them.
            layouts: of arrays and results: ``"streams"`` ``[..., streams, dim]``, ``"stream"`` ``[..., dim]``,
                ``"gates"`` ``[..., streams]``, ``"matrix"`` ``[..., streams, streams]``, ``"sums"`` ``[m, ...]``,
                ``"projection"`` ``[streams, m, dim]``, ``"whole"``.

        Raises:
            ValueError: an axis can't be shared out evenly.
        """
        ...


def coefficient_dtype(x: Array, config: MHCConfig) -> jnp.dtype:
    """The dtype that the norm's output, the projections, pre, post and H are rounded to."""
    return x.dtype if config.coefficients == "activation" else wide_dtype(x.dtype)


def check_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that these weights are there, in these shapes.

    Raises:
        ValueError: one is missing or has another shape; it names it.
    """
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"weights must have {name} {list(shape)}, got {sorted(weights)}")
        if weights[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(weights[name].shape)}")


def weight_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the layer."""
    n, dim, columns = config.streams, config.dim, config.residual_columns
    shapes: dict[str, tuple[int, ...]] = {}
    if config.norm_weight:
        shapes["mhc_norm.scale"] = (n, dim)
    for kind in ("pre", "post"):
        shapes |= {f"{kind}_alpha": (n, dim, n), f"{kind}_alpha_scale": (1,), f"{kind}_beta": (n,)}
    if columns:
        beta = (n, n) if config.residual == "sinkhorn" else (columns,)
        shapes |= {"res_alpha": (n, dim, columns), "res_alpha_scale": (1,), "res_beta": beta}
    return shapes


def head_shapes(config: MHCConfig) -> dict[str, tuple[int, ...]]:
    """Name and in-memory shape of each weight of the head."""
    n = config.streams
    return {"head_fn": (n, config.dim, n), "head_base": (n,), "head_scale": (1,)}


@compiled("config")
def rms_norm(
    x: Float[Array, "... streams dim"], scale: Float[Array, "streams dim"] | None, config: MHCConfig
) -> Float[Array, "... streams dim"]:
    """Divides x by its root mean square across streams and dim together, times ``scale`` (docs/mathematics.md,
    "Forward").

    Args:
        x: ``[..., streams, dim]``.
        scale: ``[streams, dim]``, the norm weight, or None for a dialect without one.

    Returns:
        float32 (float64 for float64), rounded to x's dtype where the coefficients are kept in it.
    """
    squares = jnp.square(x.astype(wide_dtype(x.dtype)))  # [..., n, dim]
    return _normed(x, jnp.mean(squares, axis=(-2, -1), keepdims=True), scale, config)  # mean [..., 1, 1]


def _normed(x: Array, mean: Array, scale: Array | None, config: MHCConfig) -> Array:
    """x over the root of its mean square, times ``scale``, in the dtype of the coefficients."""
    dtype, wide = coefficient_dtype(x, config), wide_dtype(x.dtype)
    normed = over_rms(x.astype(wide), mean, config)
    if scale is not None:
        normed = normed * scale.astype(dtype).astype(wide)
    return normed.astype(dtype)


def over_rms(value: Array, mean: Array, config: MHCConfig) -> Array:
    """``value`` over the root of the mean square, with eps where the configuration has it."""
    if config.norm_eps_position == "mean":
        return value * jax.lax.rsqrt(mean + config.norm_eps)
    empty = mean == 0  # the root's slope is infinite there; the norm's is 1 / eps
    root = jnp.where(empty, 0, jnp.sqrt(jnp.where(empty, 1, mean)))
    return value / (root + config.norm_eps)


def kept(value: Array) -> Array:
    """A value by the name that policies of `jax.checkpoint` know it by."""
    return checkpoint_name(value, COEFFICIENTS)


def _contract(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> Array:
    """``[m, ...]``: (streams, dim) contracted at once, accumulated in float32 or wider.

    Never by way of ``[..., n*C]``: a flattened axis can't be sharded as dim is, and x would be gathered.
    """
    precision = HIGHEST if precision is None else precision
    if mixing.on_mesh():
        return _contracted_at_once(phi, x, precision)
    result: Array = _contracted(phi, x, precision)
    return result


def _contracted_at_once(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> Array:
    wide = wide_dtype(x.dtype)
    return _einsum("ncm,...nc->m...", phi.astype(wide), x.astype(wide), precision)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contracted(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> Array:
    return _product(phi, x, precision)


def _product(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> Array:
    """On a CPU it is a product of two matrices, which takes a tenth of the einsum's time."""
    wide = wide_dtype(x.dtype)

    def flat(phi: Array, x: Array) -> Array:
        return tokens_last(jnp.matmul(_rows(x.astype(wide)), _matrix(phi.astype(wide)), precision=precision), 1)

    return mixing.by_platform(flat, partial(_contracted_at_once, precision=precision), phi, x)


def _einsum(pattern: str, one: Array, other: Array, precision: jax.lax.PrecisionLike) -> Array:
    return jnp.einsum(pattern, one, other, precision=precision, preferred_element_type=one.dtype)


def _rows(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])  # [..., n, dim] -> [..., n*dim]


def _matrix(phi: Array) -> Array:
    return phi.reshape(-1, phi.shape[-1])  # [n, dim, m] -> [n*dim, m]


def _contracted_forward(phi: Array, x: Array, precision: jax.lax.PrecisionLike) -> tuple[Array, tuple[Array, Array]]:
    return _product(phi, x, precision), (phi, x)  # no function with a rule: forward mode goes through it


def _contracted_backward(
    precision: jax.lax.PrecisionLike, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    phi, x = kept
    wide = cotangent.dtype

    def of_phi(cotangent: Array, x: Array) -> Array:
        return _einsum("m...,...nc->ncm", cotangent, x.astype(wide), precision)

    def of_phi_flat(cotangent: Array, x: Array) -> Array:
        m, tokens = cotangent.shape[0], cotangent.reshape(cotangent.shape[0], -1)
        rows = x.astype(wide).reshape(tokens.shape[1], x.shape[-2] * x.shape[-1])
        return jnp.matmul(tokens, rows, precision=precision).T.reshape(*x.shape[-2:], m)

    def of_x(cotangent: Array, phi: Array) -> Array:
        return _einsum("m...,ncm->...nc", cotangent, phi.astype(wide), precision)

    def of_x_flat(cotangent: Array, phi: Array) -> Array:
        rows = jnp.matmul(tokens_first(cotangent, 1), _matrix(phi.astype(wide)).T, precision=precision)
        return rows.reshape(*rows.shape[:-1], *phi.shape[:2])

    dphi = mixing.by_platform(of_phi_flat, of_phi, cotangent, x)
    dx = mixing.by_platform(of_x_flat, of_x, cotangent, phi)
    return dphi.astype(phi.dtype), dx.astype(x.dtype)


_contracted.defvjp(_contracted_forward, _contracted_backward)


class Packed(NamedTuple):
    """The weights of several projections side by side, m columns in all, rounded as the coefficients are.

    They are held wide, so that gradients are added up before they are rounded.

    Attributes:
        phi: ``[streams, dim, m]``.
        norm: ``[streams, dim]``, or None where the norm has no weight.
        scale, shift: ``[m]``.
    """

    phi: Array
    norm: Array | None
    scale: Array
    shift: Array


def packed(
    x: Array, weights: Weights, names: Sequence[tuple[str, str, str]], norm: Array | None, config: MHCConfig
) -> Packed:
    """The weights of every ``(phi, scale, shift)``."""
    dtype, wide = coefficient_dtype(x, config), wide_dtype(x.dtype)

    def rounded(value: Array) -> Array:
        return value.astype(dtype).astype(wide)

    phis, scales, shifts = ([rounded(weights[name]) for name in part] for part in zip(*names, strict=True))
    widths = [phi.shape[-1] for phi in phis]
    scale = jnp.concatenate([jnp.broadcast_to(value, width) for value, width in zip(scales, widths, strict=True)])
    phi = jnp.concatenate(phis, axis=-1)  # [n, dim, m]
    shift = jnp.concatenate([value.reshape(-1) for value in shifts])  # [m], as scale
    return Packed(phi, None if norm is None else rounded(norm), scale, shift)


def logits(
    x: Array, weights: Packed, config: MHCConfig, precision: jax.lax.PrecisionLike, shards: Shards | None
) -> Array:
    """``scale * (normed x @ phi) + shift``, tokens last ``[m, ...]``, in float32 or wider."""

    def of_part(x: Array, held: list[Array], shared: list[Array], add: Callable[[Array], Array]) -> Array:
        phi, *norms = held
        h = _projected(x, phi, norms[0] if norms else None, config, precision, add)  # [m, ...]
        scale, shift = (value.reshape(-1, *(1,) * (h.ndim - 1)) for value in shared)  # [m] -> [m, 1, ...]
        return scale * h + shift

    held = [weights.phi] if weights.norm is None else [weights.phi, weights.norm]
    shared = [weights.scale, weights.shift]
    return shards.over_parts(of_part, x, held, shared) if shards else of_part(x, held, shared, lambda value: value)


def _projected(
    x: Array,
    phi: Array,
    norm: Array | None,
    config: MHCConfig,
    precision: jax.lax.PrecisionLike,
    add: Callable[[Array], Array],
) -> Array:
    """The normed streams times phi, ``[m, ...]``, from this device's part of dim; ``add`` sums over the parts.

    The norm's division comes after the product, so that partial sums of both are added up at once, m + 1 numbers a
    token. Where the norm's output is rounded to a narrow dtype (``coefficients="activation"``) the division has to
    come first, and the norm's sum and the projections are added up one after the other.
    """
    dtype, wide = coefficient_dtype(x, config), wide_dtype(x.dtype)
    squares = jnp.square(x.astype(wide)).sum((-2, -1))  # [..., n, dim] -> [...]
    count = config.streams * config.dim
    if dtype == wide:
        phi = phi if norm is None else phi * norm[..., None]  # [n, dim, m] * [n, dim, 1]
        sums = kept(add(jnp.concatenate([_contract(phi, x, precision), squares[None]])))  # [m + 1, ...]
        return over_rms(sums[:-1], sums[-1] / count, config)
    mean = kept(add(squares)) / count
    normed = _normed(x, mean[..., None, None], norm, config)  # [..., n, dim]
    return kept(add(_contract(phi, normed, precision)).astype(dtype)).astype(wide)


def layer_names(config: MHCConfig) -> list[tuple[str, str, str]]:
    """The names of (phi, scale, shift) of the layer's projections."""
    kinds = ("pre", "post", "res") if config.residual_columns else ("pre", "post")
    return [(f"{kind}_alpha", f"{kind}_alpha_scale", f"{kind}_beta") for kind in kinds]


def own_gates(z: Array, config: MHCConfig) -> Array:
    """The gates that the streams are read with, of their logits; of the layer and of the head."""
    return jax.nn.sigmoid(z) + config.pre_eps


def gates_and_matrix(z: Array, config: MHCConfig, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """pre, post and H from the logits of all three, tokens last ``[m, ...]``, rounded to ``dtype``."""
    n = config.streams
    z_pre, z_post, z_res = jnp.split(z, [n, 2 * n])
    pre = own_gates(z_pre, config).astype(dtype)  # [n, ...]
    post = (config.post_scale * jax.nn.sigmoid(z_post) + config.post_eps).astype(dtype)  # [n, ...]
    pre, post = tokens_first(kept(pre), 1), tokens_first(kept(post), 1)  # [..., n]
    if config.residual == "identity":
        return pre, post, jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*pre.shape, n))
    res = z_res.astype(dtype) if config.matrix == "activation" else z_res  # [n*n or n!, ...]
    res = tokens_first(res.reshape(n, n, *res.shape[1:]), 2) if config.residual == "sinkhorn" else tokens_first(res, 1)
    H = tokens_last(residual_matrix(res, config).astype(dtype), 2)  # [..., n, n] -> [n, n, ...]
    return pre, post, tokens_first(kept(H), 2)  # [..., n, n]
