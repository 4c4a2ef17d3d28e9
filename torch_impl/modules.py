"""The layer and the head as `torch.nn.Module`."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_impl import functional, weights
from torch_impl.config import MHCConfig

ALPHA_SCALE = 0.01  # MaxText's initial gating scalars


class HyperConnectionType(enum.Enum):
    """What the wrapped sub-layer is: decides what it is handed and what it returns."""

    ATTENTION = "attention"
    MLP_DENSE = "mlp_dense"
    MLP_MOE = "mlp_moe"


def _attribute(name: str) -> str:
    """A parameter's attribute: canonical names have a dot, attributes can't."""
    return name.replace(".", "_")


class _Weighted(nn.Module):
    """Parameters of given names and shapes, MaxText's initial values, canonical files in and out."""

    def __init__(
        self,
        config: MHCConfig,
        shapes: dict[str, tuple[int, ...]],
        device: torch.device | str | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.config = config
        self._shapes = shapes
        for name, shape in shapes.items():
            self.register_parameter(_attribute(name), nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gating scalars 0.01, biases 0, norm weight 1, projections normal with variance 1/(n*C)."""
        deviation = (self.config.streams * self.config.dim) ** -0.5
        for name, value in self.weights().items():
            if name.endswith("_alpha") or name == "head_fn":
                nn.init.normal_(value, std=deviation)
            else:
                constant = 1.0 if name == "mhc_norm.scale" else ALPHA_SCALE if name.endswith("_scale") else 0.0
                nn.init.constant_(value, constant)

    def weights(self) -> dict[str, Tensor]:
        """The parameters under their canonical names."""
        return {name: getattr(self, _attribute(name)) for name in self._shapes}

    def load_weights(self, path: str | Path, prefix: str = "") -> None:
        """Fills the parameters from a canonical safetensors file (`weights.load_weights`)."""
        loaded = weights.load_weights(path, self.config, prefix, self._shapes)
        with torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(loaded[name])

    def save_weights(self, path: str | Path, prefix: str = "") -> None:
        """Writes the parameters as a canonical safetensors file (`weights.save_weights`)."""
        weights.save_weights(path, self.weights(), self.config, prefix)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.parameters().items())


class ManifoldConstrainedHyperConnections(_Weighted):
    """The residual connection of n streams around one sub-layer (mathematics.md, "Forward").

    Args:
        config: the layer's parameters.
        device: where the parameters are made; ``"meta"`` makes none until ``to_empty`` and `reset_parameters`.
        dtype: of the parameters; the coefficients are computed in float32 or wider whatever it is.
    """

    def __init__(
        self, config: MHCConfig, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__(config, functional.weight_shapes(config), device, dtype)

    def pre(self, x: Float[Tensor, "... streams dim"]) -> tuple[Float[Tensor, "... dim"], functional.Context]:
        """u for the sub-layer, and the context that `post` takes."""
        return functional.pre(x, self.weights(), self.config)

    def post(self, y: Float[Tensor, "... dim"], context: functional.Context) -> Float[Tensor, "... streams dim"]:
        """The sub-layer's output spread over the mixed streams."""
        return functional.post(y, context)

    def forward(
        self,
        norm_fn: Callable[[Tensor], Tensor],
        branch_fn: Callable[..., Any],
        x: Float[Tensor, "batch seq streams dim"],
        mhc_type: HyperConnectionType,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch seq streams dim"], dict[str, Any]]:
        """The whole layer around ``branch_fn``.

        Args:
            norm_fn: the sub-layer's own pre-norm.
            branch_fn: ATTENTION: called with ``inputs_q`` and ``inputs_kv``, returns ``(y, _)``; MLP_DENSE: with
                ``inputs``, returns y; MLP_MOE: with ``inputs``, returns ``(y, load_balance_loss, moe_bias_updates)``.
            kwargs: handed to ``branch_fn``.

        Returns:
            The streams, and metadata: for MLP_MOE ``load_balance_loss`` and ``moe_bias_updates``, else empty.

        Raises:
            ValueError: x isn't ``[batch, seq, streams, dim]``.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be [batch, seq, streams, dim], got {list(x.shape)}")
        mhc_type = HyperConnectionType(mhc_type)
        u, context = self.pre(x)
        inputs = norm_fn(u)
        metadata: dict[str, Any] = {}
        if mhc_type is HyperConnectionType.ATTENTION:
            y, _ = branch_fn(inputs_q=inputs, inputs_kv=inputs, **kwargs)
        elif mhc_type is HyperConnectionType.MLP_DENSE:
            y = branch_fn(inputs=inputs, **kwargs)
        else:
            y, metadata["load_balance_loss"], metadata["moe_bias_updates"] = branch_fn(inputs=inputs, **kwargs)
        return self.post(y, context), metadata


class HyperHead(_Weighted):
    """The learned reduction of the streams to one."""

    def __init__(
        self, config: MHCConfig, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__(config, functional.head_shapes(config), device, dtype)

    def forward(self, x: Float[Tensor, "... streams dim"]) -> Float[Tensor, "... dim"]:
        return functional.head(x, self.weights(), self.config)
