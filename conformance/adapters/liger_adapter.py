"""The autograd functions of the installed ``liger-kernel`` package: on a GPU, or in Triton's interpreter on the CPU.

Claimed is what they compute: float32 coefficients from pre, post and residual slices of one projection, "out-in"
mixing, no norm weight, no post_eps. On a GPU their projections run in TF32 where x is float32.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("without a GPU triton must be imported with TRITON_INTERPRET=1, and was without it before")
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, triton's own and Liger's: at the import below

from liger_kernel.ops.mhc import LigerMHCCoeffsFunction, LigerMHCPostResFunction, LigerMHCPreFunction  # pyright: ignore[reportMissingImports]

from conformance.adapters import branch
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.adapters.versions import version_of
from conformance.interface import Arrays, Capabilities, Result
from conformance.stages import PROJECTIONS

Values = dict[str, torch.Tensor]
INTERPRETED = 256
"""Tokens that Triton's interpreter computes within a minute or so."""


class LigerImplementation:
    """Coefficients, pre, post and the layer made of them."""

    name = "liger-kernel"

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.capabilities = Capabilities(
            stages=frozenset({"coefficients", "pre", "post", "layer"}),
            dialects=frozenset({"liger"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            overrides=frozenset({"norm_eps", "eps", "iterations", "pre_eps", "post_scale"}),
            contracts=frozenset({"tf32"} if self._device == "cuda" else {"float32"}),
            device=self._device,
            empty=False,
            tokens=None if self._device == "cuda" else INTERPRETED,
            description=f"liger-kernel {version_of('liger-kernel')}, triton {version_of('triton')}, "
            + ("compiled" if self._device == "cuda" else "interpreted"),
            settings={
                **settings(),
                "interpreter": os.environ.get("TRITON_INTERPRET", "0"),
            },
        )

    def _coefficients(self, values: Values, config: dict[str, Any]) -> Any:
        phi = torch.cat([values[f"{k}_alpha"] for k in PROJECTIONS], -1)
        bias = torch.cat([values[f"{k}_beta"].reshape(-1) for k in PROJECTIONS]).float()
        scales = [values[f"{k}_alpha_scale"].reshape(()).float() for k in PROJECTIONS]
        return LigerMHCCoeffsFunction.apply(
            values["x"], phi, bias, *scales, True, config["iterations"], config["norm_eps"], config["pre_eps"],
            config["eps"], config["post_scale"],
        )  # fmt: skip

    def _on_device(self, body: Any) -> Any:
        def moved(values: Values) -> Values:
            return {k: v.cpu() for k, v in body({k: v.to(self._device) for k, v in values.items()}).items()}

        return moved

    def coefficients(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            return dict(zip(("pre", "post", "H"), self._coefficients(values, config), strict=True))

        return vector_jacobian("coefficients", self._on_device(body), inputs, cotangents)

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            return {"u": LigerMHCPreFunction.apply(values["x"], self._coefficients(values, config)[0])}

        return vector_jacobian("pre", self._on_device(body), inputs, cotangents)

    def post(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            return {"out": LigerMHCPostResFunction.apply(values["x"], values["y"], values["post"], values["H"])}

        return vector_jacobian("post", self._on_device(body), inputs, cotangents)

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            x = values["x"]
            pre, post, H = self._coefficients(values, config)
            u = branch.norm_fn(values)(LigerMHCPreFunction.apply(x, pre))
            y, extra = branch.call(config["branch"], values, u)
            return {"out": LigerMHCPostResFunction.apply(x, y, post, H), **extra}

        return vector_jacobian("layer", self._on_device(body), inputs, cotangents)
