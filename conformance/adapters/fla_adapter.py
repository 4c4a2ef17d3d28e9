"""``fla-core``: its naive Sinkhorn in logarithms, columns first, as it is. It computes in float32."""

from __future__ import annotations

from typing import Any

import torch

from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.interface import Arrays, Capabilities, Result
from conformance.witnesses.loading import load

PACKAGE = "fla-core==0.6.0"


class FlaCore:
    """The paper's residual matrix by `naive_sinkhorn`."""

    name = "fla-core"

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._sinkhorn: Any = load(PACKAGE, "fla.ops.utils.sinkhorn.naive").naive_sinkhorn
        self.capabilities = Capabilities(
            stages=frozenset({"residual_matrix"}),
            dialects=frozenset({"paper"}),
            overrides=frozenset({"iterations"}),
            description=f"{PACKAGE}, torch {torch.__version__}",
            settings=settings(),
        )

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"H": self._sinkhorn(values["logits"], config["iterations"])}

        return vector_jacobian("residual_matrix", body, inputs, cotangents)
