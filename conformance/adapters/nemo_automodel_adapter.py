"""``nemo-automodel``: its module of DeepSeek-V4.1, built from its own configuration's defaults, as it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from conformance.adapters import branch
from conformance.adapters.site import Site, Values, settings_of
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.interface import Capabilities
from conformance.witnesses.loading import load

PACKAGE = "nemo-automodel==0.7.0"
MODELS = "nemo_automodel.components.models"
CONFIG = f"{MODELS}.deepseek_v41.config"
NEEDED = (CONFIG, f"{MODELS}.deepseek_v4.optimized_kernels", "nemo_automodel.shared.import_utils",
          f"{MODELS}.deepseek_v4.kernels._tilelang")  # fmt: skip
NAMES = {"norm_eps": "rms_norm_eps", "iterations": "hc_sinkhorn_iters"}  # its one hc_eps is pre_eps and Sinkhorn's eps


class NemoAutomodel(Site):
    """One site by `DeepseekV41HyperConnection`: its forward, collapse and expand."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._layers: Any = load(PACKAGE, f"{MODELS}.deepseek_v41.layers", NEEDED)
        claimed = Capabilities(
            stages=frozenset({"expand", "coefficients", "pre", "post", "layer", "reduce", "stack"}),
            dialects=frozenset({"deepseek-v4.1"}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            weights=("float32",),
            overrides=frozenset(NAMES),
            description=f"{PACKAGE}, torch {torch.__version__}",
            settings=settings(),
        )
        super().__init__("nemo-automodel", claimed, vector_jacobian)
        self._class = self._layers.DeepseekV41HyperConnection

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        told = {"hidden_size": config["dim"], "hc_mult": config["streams"], **settings_of(config, NAMES)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its default of rope_scaling, by transformers
            module = self._class(self._layers.DeepseekV41TextConfig(**told))
        opened = torch.func.functional_call(module, branch.joined(values, torch.cat), (values["x"],))
        u = {"u": self._class.collapse(values["x"], values["carried"])} if "carried" in values else {}
        return {"pre": opened.pre, "post": opened.post, "H": opened.comb, **u}

    def mix(self, values: Values, config: Mapping[str, Any]) -> Any:
        mixing = self._layers.DeepseekV41Mix(None, values["post"], values["H"])
        return self._class.expand(values["y"], values["x"], mixing)

    def expand_streams(self, embedding: Any, config: Mapping[str, Any]) -> Any:
        return embedding.unsqueeze(2).expand(-1, -1, config["streams"], -1)

    def reduce_streams(self, x: Any, how: str, carried: Any) -> Any:
        return self._class.collapse(x, carried) if how == "carried" else super().reduce_streams(x, how, carried)

    def first_carried(self, x: Any) -> Any:
        return torch.nn.functional.one_hot(torch.zeros(x.shape[:2], dtype=torch.long), x.shape[2]).float()
