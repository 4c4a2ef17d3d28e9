"""The classes of the installed ``transformers`` package itself: hyper-connections of DeepSeek-V4, GLM-5 and Hunyuan V4.

Claimed is what they compute: no float64 (they cast to float32), no ``pre`` among the coefficients (it is consumed
inside), and one ``hc_eps`` that is both pre_eps and Sinkhorn's (Hunyuan: post_eps). The mixing is written as their
decoder layers do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.models.deepseek_v4 import configuration_deepseek_v4, modeling_deepseek_v4
from transformers.models.glm5_next import configuration_glm5_next, modeling_glm5_next
from transformers.models.hy_v4 import configuration_hy_v4, modeling_hy_v4

from conformance.adapters import branch
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.interface import Arrays, Capabilities, Result
from conformance.stages import PROJECTIONS

Values = dict[str, torch.Tensor]


class TransformersImplementation:
    """One model family's hyper-connection classes.

    Args:
        connection, head: the classes.
        configuration: makes the model configuration they read.
        head_stage: whether the head has weights (DeepSeek) or is a mean (GLM).
    """

    kinds = PROJECTIONS
    coefficient_outputs: tuple[str, ...] = ("post", "H")
    overrides = frozenset({"norm_eps", "iterations"})

    def __init__(self, name: str, dialect: str, connection: Any, head: Any, configuration: Any, head_stage: str):
        torch.set_num_threads(1)
        self.name, self._connection, self._head, self._configuration = name, connection, head, configuration
        self._head_stage = head_stage
        self.capabilities = Capabilities(
            stages=frozenset({"expand", "coefficients", "pre", "post", "layer", "stack", head_stage}),
            dialects=frozenset({dialect}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            outputs={"coefficients": self.coefficient_outputs},
            overrides=self.overrides,
            empty=False,  # their reshape to [batch, seq, -1] is ambiguous without tokens
            description=f"transformers {transformers.__version__}, torch {torch.__version__}",
            settings=settings(),
        )

    def _settings(self, config: dict[str, Any]) -> Any:
        return self._configuration(
            hidden_size=config["dim"], hc_mult=config["streams"], hc_sinkhorn_iters=config["iterations"],
            hc_eps=config["eps"], rms_norm_eps=config["norm_eps"],
        )  # fmt: skip

    def _call(self, module: torch.nn.Module, parameters: Values, x: torch.Tensor) -> Any:
        return torch.func.functional_call(module, parameters, (x,))

    def _coefficients(self, values: Values, config: dict[str, Any]) -> Any:
        """(post, H, u) as the class returns them, from canonical weights."""
        packed = {
            "fn": torch.cat([values[f"{k}_alpha"].T for k in self.kinds]),
            "base": torch.cat([values[f"{k}_beta"].reshape(-1) for k in self.kinds]),
            "scale": torch.cat([values[f"{k}_alpha_scale"] for k in self.kinds]),
        }
        return self._call(self._connection(self._settings(config)), packed, values["x"])

    def _mix(self, post: torch.Tensor, H: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As both decoder layers mix: post and H in the activations' dtype, H contracted over its first index."""
        own = post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2)
        return own + torch.matmul(H.to(x.dtype).transpose(-1, -2), x)

    def expand(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return vector_jacobian("expand", lambda v: {"out": self._expand(v["embedding"], config)}, inputs, cotangents)

    def _expand(self, embedding: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
        return embedding.unsqueeze(2).expand(-1, -1, config["streams"], -1).contiguous()

    def coefficients(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            post, H, _ = self._coefficients(values, config)
            return {k: v for k, v in (("post", post), ("H", H)) if k in self.coefficient_outputs}

        return vector_jacobian("coefficients", body, inputs, cotangents)

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return vector_jacobian("pre", lambda v: {"u": self._coefficients(v, config)[2]}, inputs, cotangents)

    def post(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return vector_jacobian(
            "post", lambda v: {"out": self._mix(v["post"], v["H"], v["y"], v["x"])}, inputs, cotangents
        )

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            out, extra = self._layer(values, config, config["branch"])
            return {"out": out, **extra}

        return vector_jacobian("layer", body, inputs, cotangents)

    def _layer(self, values: Values, config: dict[str, Any], kind: str) -> tuple[torch.Tensor, Values]:
        post, H, u = self._coefficients(values, config)
        y, extra = branch.call(kind, values, branch.norm_fn(values)(u))
        return self._mix(post, H, y, values["x"]), extra

    def stack(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            given, weights = branch.split(values)
            x = self._expand(given["embedding"], config)
            for index in range(config["layers"]):
                x, _ = self._layer({**given, "x": x, **{k: v[index] for k, v in weights.items()}}, config, "mlp_dense")
            how: Callable[..., torch.Tensor] = {"sum": torch.sum, "mean": torch.mean}.get(config["reduce"], _same)
            return {"out": how(x, dim=2)}

        return vector_jacobian("stack", body, inputs, cotangents)

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(v: Values) -> Values:
            packed = {"hc_fn": v["head_fn"].T, "hc_base": v["head_base"], "hc_scale": v["head_scale"]}
            return {"out": self._call(self._head(self._settings(config)), packed, v["x"])}

        return vector_jacobian("head", body, inputs, cotangents)

    def reduce(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        if config["how"] != "mean":
            raise NotImplementedError("GLM-5 reduces by the mean")
        return vector_jacobian("reduce", lambda v: {"out": self._head()(v["x"])}, inputs, cotangents)


def _same(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x


class HunyuanImplementation(TransformersImplementation):
    """Hunyuan V4's independent hyper-connections: no residual matrix, ``(post, u)`` from its class."""

    kinds = ("pre", "post")
    coefficient_outputs = ("post",)
    overrides = frozenset({"norm_eps", "post_scale"})

    def _settings(self, config: dict[str, Any]) -> Any:
        return self._configuration(
            hidden_size=config["dim"], hc_mult=config["streams"], hc_eps=config["pre_eps"],
            hc_magnitude=config["post_scale"], rms_norm_eps=config["norm_eps"],
        )  # fmt: skip

    def _coefficients(self, values: Values, config: dict[str, Any]) -> Any:
        post, u = super()._coefficients(values, config)
        return post, None, u

    def _mix(self, post: torch.Tensor, H: torch.Tensor | None, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As its decoder layer adds: in float32, rounded once."""
        return (post.float().unsqueeze(-1) * y.float().unsqueeze(-2) + x.float()).to(x.dtype)


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
