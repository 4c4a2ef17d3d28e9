"""vLLM's own references in PyTorch, ``kernels/mhc/torch.py`` of the wheel ``vllm-tpu``, as they are.

`mhc_pre_torch` takes x in bfloat16 only and keeps its pre to itself; `mhc_pre_delayed_torch` (DeepSeek-V4.1) takes any
dtype and hands its pre on. Every eps and the number of iterations are arguments there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from conformance.adapters import branch
from conformance.adapters.site import Site, Values
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.interface import Capabilities
from conformance.witnesses.loading import load

PACKAGE, MODULE = "vllm-tpu==0.32.0", "vllm.model_executor.kernels.mhc.torch"
SITE = ("coefficients", "pre", "layer", "stack")
EVERY = {"float32", "bfloat16", "float16"}


class Vllm(Site):
    """One site by `mhc_pre_torch` and `mhc_post_torch`, or with the pre of the site before it."""

    others: tuple[str, ...] = ("post",)
    """Stages that take any dtype."""

    def __init__(self, name: str, dialect: str, dtypes: set[str], outputs: dict[str, tuple[str, ...]]):
        torch.set_num_threads(1)
        self._mhc: Any = load(PACKAGE, MODULE)
        claimed = Capabilities(
            stages=frozenset({*SITE, *self.others}),
            dialects=frozenset({dialect}),
            dtypes=dict.fromkeys(SITE, dtypes) | dict.fromkeys(self.others, EVERY),
            weights=("float32",),
            overrides=frozenset({"norm_eps", "eps", "iterations", "pre_eps", "post_scale"}),
            outputs=outputs,
            description=f"{PACKAGE}, torch {torch.__version__}",
            settings=settings(),
        )
        super().__init__(name, claimed, vector_jacobian)

    def _arguments(self, values: Values, config: Mapping[str, Any]) -> tuple[Any, ...]:
        ours = branch.joined(values, torch.cat)
        told = (config[k] for k in ("norm_eps", "pre_eps", "eps", "post_scale", "iterations"))
        return ours["fn"], ours["scale"], ours["base"], *told

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        x = values["x"].contiguous()  # it takes views
        post, H, u = self._mhc.mhc_pre_torch(x, *self._arguments(values, config))
        return {"post": post.squeeze(-1), "H": H, "u": u}

    def mix(self, values: Values, config: Mapping[str, Any]) -> Any:
        return self._mhc.mhc_post_torch(values["y"], values["x"], values["post"].unsqueeze(-1), values["H"])

    def expand_streams(self, embedding: Any, config: Mapping[str, Any]) -> Any:
        return embedding.unsqueeze(2).expand(-1, -1, config["streams"], -1)


class Delayed(Vllm):
    """`mhc_pre_delayed_torch` has one axis of tokens, and stands for the first carried pre itself."""

    others = ("post", "reduce")

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        x, carried = values["x"], values.get("carried")
        tokens = {k: v.flatten(0, 1) for k, v in (("x", x), ("carried", carried)) if v is not None}
        post, H, u, pre = self._mhc.mhc_pre_delayed_torch(
            tokens["x"], *self._arguments(values, config), tokens.get("carried")
        )
        opened = {"pre": pre, "post": post.squeeze(-1), "H": H, "u": u}
        return {k: v.unflatten(0, x.shape[:2]) for k, v in opened.items()}

    def reduce_streams(self, x: Any, how: str, carried: Any) -> Any:
        """By the line that reads x with a carried pre: the coefficients of weights 0 are thrown away."""
        if how != "carried":
            return super().reduce_streams(x, how, carried)
        n = x.shape[2]
        fn, base = torch.zeros(2 * n + n**2, n * x.shape[3]), torch.zeros(2 * n + n**2)
        arguments = x.flatten(0, 1), fn, torch.zeros(3), base, 1.0, 0.0, 0.0, 1.0, 1, carried.flatten(0, 1)
        return self._mhc.mhc_pre_delayed_torch(*arguments)[2].unflatten(0, x.shape[:2])


def vllm_mhc() -> Vllm:
    return Vllm("vllm-mhc", "deepseek-v4", {"bfloat16"}, {"coefficients": ("post", "H")})


def vllm_mhc_delayed() -> Delayed:
    return Delayed("vllm-mhc-delayed", "deepseek-v4.1", EVERY, {})
