"""The layer and the head as `torch.nn.Module`."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl import ends, functional, weights
from torch_impl.config import MHCConfig

if TYPE_CHECKING:
    from torch_impl.sharding import Sharding

Mixing = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""u, post, H, and the pre that a single-pass site hands on."""
ALPHA_SCALE = 0.01  # MaxText's initial gating scalars


class HyperConnectionType(enum.Enum):
    """The kind of the wrapped sub-layer, which decides how it is called and what it returns."""

    ATTENTION = "attention"
    MLP_DENSE = "mlp_dense"
    MLP_MOE = "mlp_moe"


def _attribute(name: str) -> str:
    """A parameter's attribute: canonical names have a dot, attributes can't."""
    return name.replace(".", "_")


class Site(nn.Module):
    """The base of layer and head: named parameters, MaxText's initial values, canonical files in and out."""

    sharding: Sharding | None = None  # set by `sharding.parallelize`

    def __init__(
        self,
        config: MHCConfig,
        shapes: dict[str, tuple[int, ...]],
        device: torch.device | str | None,
        dtype: torch.dtype,
        backend: str,
    ):
        super().__init__()
        self.config, self.backend = config, backend
        self._shapes = shapes
        for name, shape in shapes.items():
            self.register_parameter(_attribute(name), nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gating scalars 0.01, biases 0, norm weight 1, projections normal with variance 1/(n*C).

        The projections are drawn stream by stream from one number of the default generator (rank 0's where the
        parameters are sharded), each process keeping its part: the values are the same on every mesh of one kind of
        device, and no process holds more than its part and one stream.
        """
        n, dim = self.config.streams, self.config.dim
        if any(value.is_meta for value in self.parameters()):
            return
        seed, device = torch.randint(2**63 - 1, ()), next(self.parameters()).device
        if type(seed) is not Tensor:  # in a FakeTensorMode there are no values
            return
        if self.is_sharded():
            from torch_impl import shards  # here, since it needs torch.distributed

            seed = shards.agreed_seed(self, seed)
        generator = torch.Generator(device).manual_seed(int(seed))
        for name, value in self.weights().items():
            local, part = weights.local_part(value.detach())
            if name.endswith("_alpha") or name == "head_fn":
                for stream in range(n):
                    drawn = torch.empty(dim, value.shape[2], device=device, dtype=value.dtype)
                    drawn.normal_(std=(n * dim) ** -0.5, generator=generator)
                    if part[0].start <= stream < part[0].stop:
                        local[stream - part[0].start].copy_(drawn[part[1:]])
            else:
                local.fill_(1.0 if name == "mhc_norm.scale" else ALPHA_SCALE if name.endswith("_scale") else 0.0)

    def weights(self) -> dict[str, Tensor]:
        """The parameters under their canonical names."""
        return {name: getattr(self, _attribute(name)) for name in self._shapes}

    def is_sharded(self) -> bool:
        """Whether the parameters are DTensors, after FSDP has let go of what the last forward gathered."""
        if isinstance(reshard := getattr(self, "reshard", None), Callable):
            reshard()
        return any(hasattr(value, "device_mesh") for value in self.parameters())

    def load_weights(self, path: str | Path, prefix: str = "", *, insist: bool = False, round: bool = False) -> None:
        """Fills the parameters from a canonical safetensors file (`weights.load_weights`), each shard by its own part.

        Args:
            insist: take weights whose file states another dialect than this site's, or another format.
            round: take weights that the parameters' dtype rounds, for instance float32 ones for a layer in bfloat16.

        Raises:
            ValueError: as `weights.load_weights`, or the parameters are on the device meta; on every process if on one.
        """
        from torch_impl import models  # here, since it needs this module

        models.load_sites(path, {prefix: self}, insist, round, whole=False)

    def save_weights(self, path: str | Path, prefix: str = "", *, replace: bool = False) -> None:
        """Writes the parameters as a canonical safetensors file (`weights.save_weights`); of several processes the
        first writes.

        Args:
            replace: replace a file whatever it holds, also other sites.

        Raises:
            ValueError: as `weights.save_weights`; on every process.
            OSError: as `weights.save_weights`; on every process.
        """
        from torch_impl import models

        models.save_sites(path, {prefix: self}, replace)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.parameters().items())


class ManifoldConstrainedHyperConnections(Site):
    """The residual connection of n streams around one sub-layer (docs/mathematics.md, "Forward").

    Args:
        config: the layer's parameters.
        device: where the parameters are made; ``"meta"`` makes none until ``to_empty`` and `reset_parameters`.
        dtype: of the parameters; the coefficients are computed in float32 or wider whatever it is.
        backend: of its calls (`functional.pre`).
    """

    def __init__(
        self,
        config: MHCConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ):
        super().__init__(config, functional.weight_shapes(config), device, dtype, backend)

    def pre(
        self, x: Float[Tensor, "... streams dim"], carried: Float[Tensor, "... streams"] | None = None
    ) -> tuple[Float[Tensor, "... dim"], functional.Context, Float[Tensor, "... streams"] | None]:
        """Returns u for the sub-layer, the context for `post`, and the pre for the next site (`functional.pre`)."""
        if self.sharding is None:
            return functional.pre(x, self.weights(), self.config, carried, backend=self.backend)
        return self._with_context(self.sharding, x, self._pre(x, carried))

    def _pre(self, x: Tensor, carried: Tensor | None) -> Mixing:
        """The part that needs the parameters, and that FSDP gathers them for."""
        assert self.sharding is not None
        return self.sharding.pre(x, self.weights(), self.config, carried, self.backend)

    def _with_context(
        self, sharding: Sharding, x: Tensor, mixing: Mixing
    ) -> tuple[Tensor, functional.Context, Tensor | None]:
        u, post, H, handed = mixing
        return u, functional.Context(x, post, H, self.config, sharding.shards, self.backend), handed

    def one_hot(self, x: Float[Tensor, "... streams dim"]) -> Float[Tensor, "... streams"]:
        """Returns the gates that the first site of a single-pass stack reads with (`ends.one_hot`)."""
        return ends.one_hot(x) if self.sharding is None else self.sharding.one_hot(x)

    def reduce(
        self, x: Float[Tensor, "... streams dim"], carried: Float[Tensor, "... streams"] | None = None
    ) -> Float[Tensor, "... dim"]:
        """Reduces the streams after the last site as the configuration says (`ends.reduce`).

        Args:
            carried: for ``reduce="carried"`` the last site's pre, else None.

        Raises:
            ValueError: the configuration reduces by a head (`HyperHead`) or not at all, or ``carried`` isn't for it.
        """
        if self.sharding is not None:
            return self.sharding.reduce(x, self.config, carried)
        return ends.reduce(x, str(self.config.reduce), carried, reduction=self.config.reduction)

    def post(self, y: Float[Tensor, "... dim"], context: functional.Context) -> Float[Tensor, "... streams dim"]:
        """Spreads the sub-layer's output over the mixed streams (`functional.post`)."""
        if self.sharding is not None:
            return self.sharding.post(y, context)
        return functional.post(y, context)

    def forward(
        self,
        norm_fn: Callable[[Tensor], Tensor],
        branch_fn: Callable[..., Any],
        x: Float[Tensor, "batch seq streams dim"],
        mhc_type: HyperConnectionType,
        *,
        carried: Float[Tensor, "batch seq streams"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch seq streams dim"], dict[str, Any]]:
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
        if self.sharding is None:
            u, context, handed = self.pre(x, carried)
        else:  # not self._pre: here FSDP has gathered the parameters already
            mixing = ManifoldConstrainedHyperConnections._pre(self, x, carried)
            u, context, handed = self._with_context(self.sharding, x, mixing)
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
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ):
        super().__init__(config, functional.head_shapes(config), device, dtype, backend)

    def forward(self, x: Float[Tensor, "... streams dim"]) -> Float[Tensor, "... dim"]:
        if self.sharding is not None:
            return self.sharding.head(x, self.weights(), self.config, self.backend)
        return functional.head(x, self.weights(), self.config, backend=self.backend)
