"""Cases of a few numbers, with verdicts that can be worked out by hand, and an implementation that answers as told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases.case import Case, Item
from conformance.cases.description import Bound, CaseDescription, StageDescription, Variant
from conformance.cases.format import DTYPES
from conformance.interface import Arrays, Capabilities, Result

PARAMETERS = {
    "streams": 2, "dim": 1, "residual": "sinkhorn", "order": "rows-first", "coefficients": "float32", "guard": "add",
}  # fmt: skip
CLAIMED = Capabilities(
    frozenset({"reduce", "residual_matrix", "coefficients", "pre", "head", "layer"}),
    frozenset({"paper"}),
    frozenset(DTYPES),
    overrides=None,
)
"""Everything that the cases here need."""


def array(values: Any, dtype: str = "float64") -> np.ndarray:
    return np.asarray(values, np.float64).astype(DTYPES[dtype])


def made(
    stage: str = "reduce",
    *,
    inputs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Any] | None = None,
    magnitudes: Mapping[str, Any] | None = None,
    bounds: Mapping[str, float] | None = None,
    variant: str = "float32-float32",
    contract: str = "",
    parameters: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    family: str = "generic",
    dialect: str = "paper",
    case: str = "made",
    path: str = "made.safetensors",
    other_variants: Collection[str] = (),
) -> Item:
    """One item, from the numbers of its tensors; each bound is 0.25 where nothing else is said."""
    inputs = {"x": [[[[1.0], [2.0]]]]} if inputs is None else inputs  # [batch, seq, n, C]
    outputs = {"out": [[[3.0]]]} if outputs is None else outputs  # [batch, seq, C]
    weights, gradients, magnitudes = weights or {}, gradients or {}, magnitudes or {}
    tensors = {f"input/{k}": array(v) for k, v in inputs.items()}
    tensors |= {f"weight/{k}": array(v) for k, v in weights.items()}
    for name, values in outputs.items():
        tensors[f"expected/{stage}/{name}"] = array(values)
        tensors[f"cotangent/{stage}/{name}"] = np.ones_like(array(values))
    tensors |= {f"gradient/{stage}/{k}": array(v) for k, v in gradients.items()}
    tensors |= {f"magnitude/{stage}/{k}": array(v) for k, v in magnitudes.items()}
    allowed = dict.fromkeys([*outputs, *(f"d/{k}" for k in gradients)], 0.25) | dict(bounds or {})
    rows = {name: Bound(bound, bound, 1.0, 1.0) for name, bound in allowed.items()}
    x, kind = variant.split("-")[:2]
    chosen = Variant(variant, x, kind, contract or ("float64" if x == "float64" else "float32"), (stage,))
    description = CaseDescription(
        id=case, family=family, why="", clause="", dialect=dialect, overrides=dict(overrides or {}),
        parameters={**PARAMETERS, **(parameters or {})}, layout="contiguous", quick=False,
        stages={stage: StageDescription(tuple(inputs), tuple(weights), tuple(outputs), dict(options or {}))},
        variants=(chosen,), bounds={stage: dict.fromkeys((variant, *other_variants), rows)},
    )  # fmt: skip
    whole = Case(Path(path), description)
    whole.__dict__["tensors"] = tensors  # a cached property, which would read the file
    return Item(whole, stage, chosen)


@dataclass
class Answers:
    """An implementation that returns what it is told, and keeps what it was handed."""

    outputs: Any = field(default_factory=dict)
    gradients: Any = field(default_factory=dict)
    capabilities: Capabilities = CLAIMED
    name: str = "answers"
    meanwhile: Callable[[dict[str, np.ndarray]], object] = lambda inputs: None
    handed: list[tuple[Any, ...]] = field(default_factory=list)

    def call(self, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        self.handed.append((stage, dict(inputs), dict(config), cotangents))
        self.meanwhile(inputs)  # type: ignore[arg-type]
        return self.outputs, self.gradients


def claims(**changes: Any) -> Capabilities:
    """Everything, but for the changes."""
    return replace(CLAIMED, **changes)
