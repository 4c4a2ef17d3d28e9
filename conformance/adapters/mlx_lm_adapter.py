"""``mlx-lm``: its module of DeepSeek-V4.1, built from its own arguments' defaults, on mlx's CPU device, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx  # pyright: ignore[reportMissingImports]

from conformance.adapters import branch
from conformance.adapters.mlx_gradients import vector_jacobian
from conformance.adapters.site import Site, Values, settings_of
from conformance.adapters.versions import version_of
from conformance.interface import Capabilities
from conformance.witnesses.loading import load

PACKAGE = "mlx-lm==0.32.2"
MODULE = "mlx_lm.models.deepseek_v41"
NEEDED = tuple(f"mlx_lm.models.{name}" for name in ("base", "pipeline"))
NAMES = {"norm_eps": "rms_norm_eps", "iterations": "hc_sinkhorn_iters"}  # its one hc_eps is pre_eps and Sinkhorn's eps


class MlxLm(Site):
    """One site by `HyperConnection`, `_collapse` and `_expand`."""

    def __init__(self) -> None:
        self._model: Any = load(PACKAGE, MODULE, NEEDED)
        claimed = Capabilities(
            stages=frozenset({"expand", "coefficients", "pre", "post", "layer", "reduce", "stack"}),
            dialects=frozenset({"deepseek-v4.1"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            weights=("float32",),
            overrides=frozenset(NAMES),
            empty=False,  # its reshape to [batch, seq, -1] is ambiguous without tokens
            description=f"{PACKAGE}, mlx {version_of('mlx')}",
            copies=True,
        )
        super().__init__("mlx-lm", claimed, vector_jacobian)

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        told = {"hidden_size": config["dim"], "hc_mult": config["streams"], **settings_of(config, NAMES)}
        module = self._model.HyperConnection(self._model.ModelArgs(**told))
        module.update(branch.joined(values, mx.concatenate))
        pre, post, H = module(values["x"])
        u = {"u": self._model._collapse(values["x"], values["carried"])} if "carried" in values else {}
        return {"pre": pre, "post": post, "H": H, **u}

    def mix(self, values: Values, config: Mapping[str, Any]) -> Any:
        return self._model._expand(values["y"], values["x"], values["post"], values["H"])

    def expand_streams(self, embedding: Any, config: Mapping[str, Any]) -> Any:
        return mx.repeat(embedding[:, :, None], config["streams"], axis=2)

    def reduce_streams(self, x: Any, how: str, carried: Any) -> Any:
        return self._model._collapse(x, carried) if how == "carried" else super().reduce_streams(x, how, carried)

    def first_carried(self, x: Any) -> Any:
        return mx.broadcast_to(mx.arange(x.shape[2]) == 0, x.shape[:3]).astype(mx.float32)
