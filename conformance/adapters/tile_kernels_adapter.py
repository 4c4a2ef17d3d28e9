"""``tile-kernels``: DeepSeek's own references in PyTorch, ``tile_kernels/torch/mhc.py``, as they are.

Mixing and collapsing return bfloat16 whatever they are given, the coefficients float32; Sinkhorn keeps its input's
dtype. Every eps and the number of iterations are arguments there, so that any may depart from the dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from conformance.adapters import branch
from conformance.adapters.site import Site, Values
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.interface import Arrays, Capabilities, Result
from conformance.witnesses.loading import load

PACKAGE = "tile-kernels==2.1.0"
BFLOAT16 = {"bfloat16"}


class TileKernels(Site):
    """Every stage, from the references' functions."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._mhc: Any = load(PACKAGE, "tile_kernels.torch.mhc")
        narrow = {stage: BFLOAT16 for stage in ("pre", "post", "layer", "stack", "head")}
        every = {"float32", "bfloat16", "float16"}
        claimed = Capabilities(
            stages=frozenset({"expand", "residual_matrix", "coefficients", *narrow}),
            dialects=frozenset({"deepseek-v4"}),
            dtypes={"expand": {*every, "float64"}, "residual_matrix": {"float32", "float64"}, "coefficients": every}
            | narrow,
            weights=("float32",),
            overrides=frozenset({"norm_eps", "eps", "iterations", "pre_eps", "post_scale", "norm_weight"}),
            description=f"{PACKAGE}, torch {torch.__version__}",
            settings=settings(),
        )
        super().__init__("tile-kernels", claimed, vector_jacobian)

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        ours = branch.joined(values, torch.cat)
        mixes = self._mhc.mhc_pre_norm_fn_ref(
            values["x"], ours["fn"], values.get("mhc_norm.scale"), config["norm_eps"]
        )  # [batch, seq, 2n+n²]
        pre, post, logits = self._mhc.mhc_pre_split_mixes_ref(
            mixes, ours["scale"], ours["base"], config["streams"], config["post_scale"], config["pre_eps"]
        )  # [batch, seq, n, 1] twice, [batch, seq, n, n]
        H = self._mhc.sinkhorn_normalize_ref(logits, config["iterations"], config["eps"])
        u = self._mhc.mhc_pre_apply_mix_ref(values["x"], pre)
        return {"pre": pre.squeeze(-1), "post": post.squeeze(-1), "H": H, "u": u}

    def mix(self, values: Values, config: Mapping[str, Any]) -> Any:
        return self._mhc.mhc_post_ref(values["y"], values["x"], values["post"].unsqueeze(-1), values["H"])

    def expand_streams(self, embedding: Any, config: Mapping[str, Any]) -> Any:
        return self._mhc.expand_to_mhc_ref(embedding, config["streams"])

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> dict[str, Any]:
            return {"H": self._mhc.sinkhorn_normalize_ref(values["logits"], config["iterations"], config["eps"])}

        return vector_jacobian("residual_matrix", body, inputs, cotangents)

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> dict[str, Any]:
            mixes = self._mhc.mhc_pre_norm_fn_ref(values["x"], values["head_fn"].T, None, config["norm_eps"])
            gates = self._mhc.mhc_head_compute_mix_ref(
                mixes, values["head_scale"], values["head_base"], config["pre_eps"]
            )
            return {"out": self._mhc.mhc_pre_apply_mix_ref(values["x"], gates.unsqueeze(-1))}

        return vector_jacobian("head", body, inputs, cotangents)
