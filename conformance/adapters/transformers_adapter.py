"""The classes of the installed ``transformers`` package itself: hyper-connections of DeepSeek-V4, GLM-5 and Hunyuan V4.

Each is built from its default configuration: only the sizes are set, and what a case overrides. Claimed is what they
compute: no float64 (they cast to float32), no ``pre`` among the coefficients (it is consumed inside), and one
``hc_eps`` that is both pre_eps and Sinkhorn's (Hunyuan: post_eps). The mixing is written as their decoder layers do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.deepseek_v4 import configuration_deepseek_v4, modeling_deepseek_v4
from transformers.models.glm5_next import configuration_glm5_next, modeling_glm5_next
from transformers.models.hy_v4 import configuration_hy_v4, modeling_hy_v4

from conformance.adapters import branch
from conformance.adapters.site import Site, Values, settings_of
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.interface import Arrays, Capabilities, Result
from conformance.stages import PROJECTIONS


class TransformersImplementation(Site):
    """One model family's hyper-connection classes.

    Args:
        connection, head: the classes.
        configuration: makes the model configuration they read.
        head_stage: whether the head has weights (DeepSeek) or is a mean (GLM).
    """

    kinds = PROJECTIONS
    coefficient_outputs: tuple[str, ...] = ("post", "H")
    names: Mapping[str, str] = {"norm_eps": "rms_norm_eps", "iterations": "hc_sinkhorn_iters"}

    def __init__(self, name: str, dialect: str, connection: Any, head: Any, configuration: Any, head_stage: str):
        torch.set_num_threads(1)
        self._connection, self._head, self._configuration = connection, head, configuration
        claimed = Capabilities(
            stages=frozenset({"expand", "coefficients", "pre", "post", "layer", "stack", head_stage}),
            dialects=frozenset({dialect}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            outputs={"coefficients": self.coefficient_outputs},
            overrides=frozenset(self.names),
            empty=False,  # their reshape to [batch, seq, -1] is ambiguous without tokens
            description=f"transformers {transformers.__version__}, torch {torch.__version__}",
            settings=settings(),
        )
        super().__init__(name, claimed, vector_jacobian)

    def _settings(self, config: Mapping[str, Any]) -> Any:
        sizes = {"hidden_size": config["dim"], "hc_mult": config["streams"]}
        return self._configuration(**sizes, **settings_of(config, self.names))

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        module = self._connection(self._settings(config))
        returned = torch.func.functional_call(module, branch.joined(values, torch.cat, self.kinds), (values["x"],))
        return dict(zip((*self.coefficient_outputs, "u"), returned, strict=True))

    def mix(self, values: Values, config: Mapping[str, Any]) -> torch.Tensor:
        """As both decoder layers mix: post and H in the activations' dtype, H contracted over its first index."""
        x = values["x"]
        own = values["post"].to(x.dtype).unsqueeze(-1) * values["y"].unsqueeze(-2)
        return own + torch.matmul(values["H"].to(x.dtype).transpose(-1, -2), x)

    def expand_streams(self, embedding: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
        return embedding.unsqueeze(2).expand(-1, -1, config["streams"], -1).contiguous()

    def reduce_streams(self, x: torch.Tensor, how: str, carried: Any) -> torch.Tensor:
        if how != "mean" or "reduce" not in self.capabilities.stages:
            return super().reduce_streams(x, how, carried)
        return self._head()(x)

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values) -> dict[str, Any]:
            packed = {"hc_fn": v["head_fn"].T, "hc_base": v["head_base"], "hc_scale": v["head_scale"]}
            return {"out": torch.func.functional_call(self._head(self._settings(config)), packed, (v["x"],))}

        return vector_jacobian("head", body, inputs, cotangents)


class HunyuanImplementation(TransformersImplementation):
    """Hunyuan V4's independent hyper-connections: no residual matrix, ``(post, u)`` from its class."""

    kinds = ("pre", "post")
    coefficient_outputs = ("post",)
    names = {"norm_eps": "rms_norm_eps", "post_scale": "hc_magnitude"}  # noqa: RUF012

    def mix(self, values: Values, config: Mapping[str, Any]) -> torch.Tensor:
        """As its decoder layer adds: in float32, rounded once."""
        y, x = values["y"], values["x"]
        return (values["post"].float().unsqueeze(-1) * y.float().unsqueeze(-2) + x.float()).to(x.dtype)


def deepseek_v4() -> TransformersImplementation:
    return TransformersImplementation(
        "transformers-deepseek-v4", "deepseek-v4-transformers", modeling_deepseek_v4.DeepseekV4HyperConnection,
        modeling_deepseek_v4.DeepseekV4HyperHead, configuration_deepseek_v4.DeepseekV4Config, "head",
    )  # fmt: skip


def glm_5() -> TransformersImplementation:
    return TransformersImplementation(
        "transformers-glm-5", "glm-5", modeling_glm5_next.Glm5NextTextHyperConnection,
        modeling_glm5_next.Glm5NextTextHyperHead, configuration_glm5_next.Glm5NextTextConfig, "reduce",
    )  # fmt: skip


def hunyuan_v4() -> HunyuanImplementation:
    return HunyuanImplementation(
        "transformers-hunyuan-v4", "hunyuan-v4", modeling_hy_v4.HYV4HyperConnection,
        modeling_hy_v4.HYV4HyperHead, configuration_hy_v4.HYV4Config, "head",
    )  # fmt: skip
