"""An implementation that computes in float64 by the oracle's formulas, and ones that go wrong somewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from conformance.cases.format import DTYPES
from conformance.interface import Capabilities
from conformance.oracle.evaluate import evaluate
from conformance.questions.sizes.truth import Wide
from conformance.stages import COEFFICIENT, STAGES

CLAIMED = Capabilities(
    stages=frozenset({"coefficients", "pre", "post", "layer", "head"}),
    dialects=frozenset({"deepseek-v4"}),
    dtypes=frozenset({"float32", "bfloat16", "float16"}),
    overrides=None,
)


class Exact:
    """Right everywhere.

    Args:
        change: is handed the outputs and gradients by name, and whether gradients were asked for.
    """

    def __init__(
        self,
        change: Callable[[dict, bool], None] = lambda results, with_gradients: None,
        capabilities: Capabilities = CLAIMED,
    ):
        self.name, self.capabilities, self.change, self.calls = "exact", capabilities, change, []

    def call(self, stage, inputs, config, cotangents):
        self.calls.append((stage, str(inputs["x"].dtype), cotangents is not None))
        lead = inputs["x"].shape[:2]
        shapes = {"out": config["dim"], "u": config["dim"], "pre": config["streams"], "post": config["streams"]}
        nothing: dict[str, np.ndarray] = {k: np.zeros((*lead, shapes.get(k, 1))) for k in STAGES[stage].outputs}
        nothing["H"] = np.zeros((*lead, config["streams"], config["streams"]))
        if stage in ("layer", "post"):
            nothing["out"] = np.zeros_like(inputs["x"], np.float64)
        wanted = {k: v.astype(np.float64) for k, v in (cotangents or nothing).items()}
        wide = {k: v.astype(np.float64) for k, v in inputs.items()}
        values = evaluate(stage, wide, wanted, config, {"branch": "mlp_dense"}, Wide())
        x = inputs["x"].dtype
        outputs = {
            k: values[k].astype(DTYPES["float32"] if role == COEFFICIENT else x)
            for k, role in STAGES[stage].outputs.items()
            if k in values
        }
        gradients = {k: values[f"d/{k}"].astype(v.dtype) for k, v in inputs.items() if f"d/{k}" in values}
        results = {**outputs, **{f"d/{k}": v for k, v in gradients.items()}}
        self.change(results, cotangents is not None)
        outputs = {k: v for k, v in results.items() if not k.startswith("d/")}
        gradients = {k.removeprefix("d/"): v for k, v in results.items() if k.startswith("d/")}
        return outputs, gradients if cotangents is not None else {}
