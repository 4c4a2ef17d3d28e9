"""The layer and the head as Flax NNX modules."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from jax_impl import ends, functional, shards, weights
from jax_impl.config import MHCConfig

ALPHA_SCALE = 0.01  # MaxText's initial gating scalars


class HyperConnectionType(enum.Enum):
    """The kind of the wrapped sub-layer, which decides how it is called and what it returns."""

    ATTENTION = "attention"
    MLP_DENSE = "mlp_dense"
    MLP_MOE = "mlp_moe"


def _attribute(name: str) -> str:
    """A parameter's attribute: canonical names have a dot, attributes can't."""
    return name.replace(".", "_")


class Site(nnx.Module):
    """The base of layer and head: named parameters, MaxText's initial values, canonical files in and out."""

    def __init__(
        self,
        config: MHCConfig,
        shapes: dict[str, tuple[int, ...]],
        rngs: nnx.Rngs,
        param_dtype: Any,
        precision: jax.lax.PrecisionLike,
        backend: str,
    ):
        self.config = config
        self.precision = precision
        self.backend = backend
        self._shapes = shapes
        deviation = (config.streams * config.dim) ** -0.5
        for name, shape in shapes.items():
            axes = shards.logical_axes(name, shape)
            if name.endswith("_alpha") or name == "head_fn":
                value = jax.random.normal(rngs.params(), shape, param_dtype, out_sharding=shards.random_sharding(axes))
                value = value * jnp.asarray(deviation, param_dtype)
            else:
                constant = 1.0 if name == "mhc_norm.scale" else ALPHA_SCALE if name.endswith("_scale") else 0.0
                value = jnp.full(shape, constant, param_dtype)
            value = shards.constrain(value, axes)
            setattr(self, _attribute(name), nnx.Param(value, out_sharding=axes, eager_sharding=False))

    def parameters(self) -> dict[str, nnx.Param]:
        """The parameters under their canonical names."""
        return {name: getattr(self, _attribute(name)) for name in self._shapes}

    def weights(self) -> dict[str, Array]:
        """The parameters' values under their canonical names."""
        return {name: parameter[...] for name, parameter in self.parameters().items()}

    def load_weights(
        self, path: str | Path, prefix: weights.Prefix = "", *, insist: bool = False, round: bool = False
    ) -> None:
        """Fills the parameters from a canonical safetensors file (`weights.load_weights`), each shard by its own part.

        Args:
            prefix: of this site; for layers that are stacked (`flax.nnx.scan`) one for each.
            insist: take weights whose file states another dialect than this site's, or another format.
            round: take weights that the parameters' dtype rounds, for instance float32 ones for a layer in bfloat16.

        Raises:
            ValueError: as `weights.load_weights`, or the parameters are those of `flax.nnx.eval_shape`, or not a prefix
                for each layer; on every process if on one.
        """
        from jax_impl import models  # here, since it needs this module

        models.load_sites(path, [(prefix, self)], insist, round, whole=False)

    def save_weights(self, path: str | Path, prefix: weights.Prefix = "", *, replace: bool = False) -> None:
        """Writes the parameters as a canonical safetensors file (`weights.save_weights`); of several processes the
        first writes.

        Args:
            prefix: of this site; for layers that are stacked one for each.
            replace: replace a file whatever it holds, also other sites.

        Raises:
            ValueError: as `weights.save_weights`, or not a prefix for each layer; on every process.
            OSError: as `weights.save_weights`; on every process.
        """
        from jax_impl import models

        models.save_sites(path, [(prefix, self)], replace)

    def check_prefix(self, prefix: weights.Prefix) -> None:
        """Checks that there is one prefix for a site, and one for each of a stack's layers.

        Raises:
            ValueError: another number.
        """
        name, shape = next(iter(self._shapes.items()))
        held = self.weights()[name].shape
        layers = held[: len(held) - len(shape)]
        named = () if isinstance(prefix, str) else (len(prefix),)
        if named != layers:
            expected = f"a prefix for each of {layers[0]} stacked layers" if layers else "one prefix, a string"
            raise ValueError(f"prefix must be {expected}, got {prefix!r}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes under their canonical names, of one site also where several are stacked."""
        return dict(self._shapes)

    def assign(self, values: Mapping[str, Array]) -> None:
        """Takes new values of the parameters, cast to the dtypes that they have."""
        parameters = self.parameters()
        for name, value in values.items():
            parameters[name][...] = value.astype(parameters[name][...].dtype)


class ManifoldConstrainedHyperConnections(Site):
    """The residual connection of n streams around one sub-layer (docs/mathematics.md, "Forward").

    Args:
        config: the layer's parameters.
        rngs: its ``params`` stream makes the initial values.
        param_dtype: of the parameters; the coefficients are computed in float32 or wider whatever it is.
        precision: of the projections (`functional`).
        backend: of its calls (`functional.pre`).
    """

    def __init__(
        self,
        config: MHCConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        backend: str = "auto",
    ):
        super().__init__(config, functional.weight_shapes(config), rngs, param_dtype, precision, backend)

    def pre(
        self, x: Float[Array, "... streams dim"], carried: Float[Array, "... streams"] | None = None
    ) -> tuple[Float[Array, "... dim"], functional.Context, Float[Array, "... streams"] | None]:
        """Returns u for the sub-layer, the context for `post`, and the pre for the next site (`functional.pre`)."""
        options = {"precision": self.precision, "shards": shards.current(), "backend": self.backend}
        return functional.pre(x, self.weights(), self.config, carried, **options)

    def one_hot(self, x: Float[Array, "... streams dim"]) -> Float[Array, "... streams"]:
        """Returns the gates that the first site of a single-pass stack reads with (`ends.one_hot`)."""
        return ends.one_hot(x, shards=shards.current())

    def reduce(
        self, x: Float[Array, "... streams dim"], carried: Float[Array, "... streams"] | None = None
    ) -> Float[Array, "... dim"]:
        """Reduces the streams after the last site as the configuration says (`ends.reduce`).

        Args:
            carried: for ``reduce="carried"`` the last site's pre, else None.

        Raises:
            ValueError: the configuration reduces by a head (`HyperHead`) or not at all, or ``carried`` isn't for it.
        """
        options = {"reduction": self.config.reduction, "shards": shards.current()}
        return ends.reduce(x, str(self.config.reduce), carried, **options)

    def post(self, y: Float[Array, "... dim"], context: functional.Context) -> Float[Array, "... streams dim"]:
        """Spreads the sub-layer's output over the mixed streams (`functional.post`)."""
        return functional.post(y, context)

    def __call__(
        self,
        norm_fn: Callable[[Array], Array],
        branch_fn: Callable[..., Any],
        x: Float[Array, "batch seq streams dim"],
        mhc_type: HyperConnectionType,
        *,
        carried: Float[Array, "batch seq streams"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Array, "batch seq streams dim"], dict[str, Any]]:
        """Computes the whole layer around ``branch_fn`` (docs/mathematics.md, "Forward").

        Args:
            norm_fn: the sub-layer's own pre-norm, of ``[batch, seq, dim]``.
            branch_fn: ATTENTION: called with ``inputs_q`` and ``inputs_kv``, returns ``(y, _)``; MLP_DENSE: with
                ``inputs``, returns y; MLP_MOE: with ``inputs``, returns ``(y, load_balance_loss, moe_bias_updates)``.
            carried: for ``pre_from="previous"`` the pre of the site before, whatever its kind: ``one_hot(x)`` for the
                first site, then each site's ``metadata["carried"]`` for the next, the last for ``reduce``.
            kwargs: handed to ``branch_fn``.

        Returns:
            The streams, and metadata: for MLP_MOE ``load_balance_loss`` and ``moe_bias_updates``; for
            ``pre_from="previous"`` ``carried``, this site's own pre; else empty.

        Raises:
            ValueError: x isn't ``[batch, seq, streams, dim]``, or ``carried`` isn't what the configuration needs.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be [batch, seq, streams, dim], got {list(x.shape)}")
        mhc_type = HyperConnectionType(mhc_type)
        u, context, handed = self.pre(x, carried)
        inputs = norm_fn(u)
        metadata: dict[str, Any] = {} if handed is None else {"carried": handed}
        if mhc_type is HyperConnectionType.ATTENTION:
            y, _ = branch_fn(inputs_q=inputs, inputs_kv=inputs, **kwargs)
        elif mhc_type is HyperConnectionType.MLP_DENSE:
            y = branch_fn(inputs=inputs, **kwargs)
        else:
            y, metadata["load_balance_loss"], metadata["moe_bias_updates"] = branch_fn(inputs=inputs, **kwargs)
        return self.post(y, context), metadata


class HyperHead(Site):
    """The learned reduction of the streams to one (docs/mathematics.md, "Forward")."""

    def __init__(
        self,
        config: MHCConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        backend: str = "auto",
    ):
        super().__init__(config, functional.head_shapes(config), rngs, param_dtype, precision, backend)

    def __call__(self, x: Float[Array, "... streams dim"]) -> Float[Array, "... dim"]:
        options = {"precision": self.precision, "shards": shards.current(), "backend": self.backend}
        return functional.head(x, self.weights(), self.config, **options)
