"""``mlx-vlm``: its Xing-4, built from its own configuration's defaults, on mlx's CPU device, as it is.

Its decoder layer and its model run whole; the suite's branch stands where attention and the MLP are. A decoder layer
has two sites: where one is wanted, it is the first, and its output is what the second is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx  # pyright: ignore[reportMissingImports]

from conformance.adapters import branch
from conformance.adapters.mlx_gradients import vector_jacobian
from conformance.adapters.site import Site, Values, settings_of
from conformance.adapters.versions import version_of
from conformance.interface import Capabilities
from conformance.witnesses.loading import load

PACKAGE = "mlx-vlm==0.7.10"
MODELS = "mlx_vlm.models"
CONFIG = f"{MODELS}.xing4_0.config"
NEEDED = (
    CONFIG,
    *(f"{MODELS}.{name}" for name in ("base", "cache", "pipeline", "deepseek_v3.config", "deepseek_v3.language")),
)
ABSENT = ("PIL",)
NAMES = {"norm_eps": "rms_norm_eps", "iterations": "hc_sinkhorn_iters", "eps": "hc_eps"}


class MlxVlm(Site):
    """Sites by `HyperConnection` and `DecoderLayer`, expanding and the mean by `Xing4_0Model`."""

    def __init__(self) -> None:
        self._language: Any = load(PACKAGE, f"{MODELS}.xing4_0.language", NEEDED, ABSENT)
        self._config: Any = load(PACKAGE, CONFIG, NEEDED, ABSENT)
        claimed = Capabilities(
            stages=frozenset({"expand", "coefficients", "pre", "post", "layer", "reduce", "stack"}),
            dialects=frozenset({"xing-4"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            overrides=frozenset(NAMES),
            outputs={"coefficients": ("post", "H")},
            empty=False,  # its reshape to [batch, seq, -1] is ambiguous without tokens
            description=f"{PACKAGE}, mlx {version_of('mlx')}",
            copies=True,
        )
        super().__init__("mlx-vlm", claimed, vector_jacobian)

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        told = {"hidden_size": config["dim"], "hc_mult": config["streams"], **settings_of(config, NAMES)}
        module = self._language.HyperConnection(self._config.ModelConfig(**told))
        module.update({f"hc_{name}": value for name, value in branch.joined(values, mx.concatenate).items()})
        post, H, u = module(values["x"])
        return {"post": post, "H": H, "u": u}

    def mix(self, values: Values, config: Mapping[str, Any]) -> Any:
        y, H = values["y"], values["H"]
        handed: list[Any] = []
        layer = SimpleNamespace(
            attn_hc=lambda x: (values["post"], H, y), input_layernorm=_same, self_attn=lambda u, mask, cache: u,
            ffn_hc=lambda x: handed.append(x) or (values["post"], H, y), post_attention_layernorm=_same, mlp=_same,
        )  # fmt: skip
        self._language.DecoderLayer.__call__(layer, values["x"])
        return handed[0]

    def expand_streams(self, embedding: Any, config: Mapping[str, Any]) -> Any:
        seen: list[Any] = []
        self._run_model(embedding, lambda x, mask, cache: seen.append(x) or x, config["streams"])
        return seen[0]

    def reduce_streams(self, x: Any, how: str, carried: Any) -> Any:
        if how != "mean":
            raise NotImplementedError(f"Xing-4 reduces by the mean, got {how!r}")
        return self._run_model(x[:, :, 0], lambda *_, cache: x, x.shape[2])

    def _run_model(self, embedding: Any, layer: Callable[..., Any], streams: int) -> Any:
        """`Xing4_0Model` with one layer, and no norm of its own at the end."""
        model = SimpleNamespace(
            embed_tokens=lambda tokens: embedding, layers=[layer], norm=_same, config=SimpleNamespace(hc_mult=streams)
        )
        return self._language.Xing4_0Model.__call__(model, embedding)


def _same(x: Any) -> Any:
    return x
