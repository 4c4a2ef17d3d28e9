"""Two implementations against each other on fresh data, for finding where a port goes wrong: no oracle, any shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from conformance.cases.case import DTYPES
from conformance.cases.dialects import Dialect, check_sizes, dialect_names, unclaimed
from conformance.implementations.calling import called
from conformance.interface import Capabilities, Implementation, describe
from conformance.judge.rule import is_array, is_of_numbers
from conformance.oracle.build import Wish, build
from conformance.questions.bitwise import in_layouts
from conformance.questions.sizes.design import largest_here, sizes
from conformance.questions.sizes.item import sized
from conformance.questions.sizes.tensors import STAGES_OF_SIZES
from conformance.stages import ACTIVATION, COEFFICIENT, STAGES

ORDER = ("expand", "residual_matrix", "coefficients", "pre", "post", "layer", "reduce", "head")
"""From the inside out: the first that differs is where to look."""
DEFAULT_STREAMS = 4


@dataclass(frozen=True)
class Shared:
    """What two implementations both claim, in the order of the tables.

    Attributes:
        streams: how many a comparison has by default: 4, or the least that both take; 0 where there is none.
    """

    stages: tuple[str, ...]
    dialects: tuple[str, ...]
    dtypes: tuple[str, ...]
    streams: int

    @property
    def missing(self) -> list[str]:
        """The kinds of which they have nothing in common; none where they can be compared."""
        kinds = {
            "stage": self.stages,
            "dialect": self.dialects,
            "dtype": self.dtypes,
            "number of streams": self.streams,
        }
        return [kind for kind, names in kinds.items() if not names]


def shared(a: Capabilities, b: Capabilities) -> Shared:
    """What both claim, of the stages that are compared; a dtype counts where both claim a stage for it."""
    stages = [stage for stage in ORDER if stage in a.stages and stage in b.stages]
    dtypes = [
        dtype for dtype in DTYPES if any(dtype in a.dtypes_of(stage) & b.dtypes_of(stage) for stage in stages)
    ]  # fmt: skip
    limits = [claimed.streams for claimed in (a, b) if claimed.streams is not None]
    numbers = frozenset.intersection(*limits) if limits else {DEFAULT_STREAMS}
    streams = DEFAULT_STREAMS if DEFAULT_STREAMS in numbers else min(numbers, default=0)
    dialects = [name for name in dialect_names() if name in a.dialects and name in b.dialects]
    return Shared(tuple(stages), tuple(dialects), tuple(dtypes), streams)


@dataclass
class Call:
    """Everything that one stage is handed."""

    stage: str
    inputs: dict[str, np.ndarray]
    config: dict[str, Any]
    cotangents: dict[str, np.ndarray]
    dialect: Dialect
    place: str = ""
    """The size, where there are several."""


@dataclass
class Row:
    """One tensor: the largest difference, in absolute terms and in units in the last place of its largest value.

    The unit is the coarsest dtype's among the inputs and the tensor itself.
    """

    tensor: str
    largest: float = 0.0
    units: float = 0.0
    index: tuple[int, ...] = ()
    a: float = 0.0
    b: float = 0.0
    note: str = ""

    def apart(self, tolerance: float) -> bool:
        return bool(self.note) or not self.units <= tolerance


def calls(
    dialect: Dialect, streams: int, dim: int, lead: tuple[int, int], dtype: str, seed: int, deviation: float
) -> Iterator[Call]:
    """The stages of one layer on fresh data, float32 weights (float64 under float64).

    Raises:
        DialectError: sizes that no layer of this dialect has.
    """
    row = dialect.parameters
    check_sizes(streams, dim, row["residual"], dialect.name)
    head = [] if row["reduce"] != "head" else ["head"]
    how = row["reduce"] if row["reduce"] in ("sum", "mean", "carried") else "sum"
    stages: list[Any] = [
        *("expand", "coefficients", "pre", "post", ("layer", {"branch": "mlp_dense"}), ("reduce", {"how": how}), *head),
        *([] if row["residual"] == "identity" else ["residual_matrix"]),
    ]
    wish = Wish(
        "compare", "", "", dialect.name, f"seed{seed}", streams, dim, lead, stages=stages, logit_deviation=deviation,
        variants=("float64-float64" if dtype == "float64" else f"{dtype}-float32",), row=dialect,
    )  # fmt: skip
    case = build(wish)
    wide = "float64" if dtype == "float64" else "float32"
    kept = dtype if row["coefficients"] == "activation" else wide
    tensors = dict(case.tensors)
    # gates of order 1, and a matrix that is nearly doubly stochastic: post's own inputs, from no implementation
    tensors["post"] = 2 / (1 + np.exp(-tensors["y"][..., :1] * np.ones(streams)))
    mixed = np.exp(np.resize(tensors["logits"], (*lead, streams, streams)))
    for axis in (-1, -2) * 10:
        mixed = mixed / mixed.sum(axis, keepdims=True)
    tensors["H"] = np.broadcast_to(np.eye(streams), mixed.shape) if row["residual"] == "identity" else mixed
    dtypes = {ACTIVATION: dtype, COEFFICIENT: kept}
    for stage in ORDER:
        if stage not in case.stages:
            continue
        entry = case.stages[stage]
        inputs = {k: _cast(tensors[k], dtypes.get(STAGES[stage].inputs[k], wide)) for k in entry["inputs"]}
        inputs.update({k: _cast(tensors[k], wide) for k in entry["weights"]})
        roles = STAGES[stage].outputs
        cotangents = {k: _cast(v, dtypes.get(roles[k], wide)) for k, v in case.cotangents[stage].items()}
        config = {**case.parameters, "dialect": dialect.told, **entry["options"]}
        yield Call(stage, inputs, config, cotangents, dialect)


ANYTHING = Capabilities(frozenset(STAGES), frozenset(), overrides=None, dtypes=frozenset(DTYPES))


def calls_at_sizes(dialect: Dialect, form: str, dtype: str, seed: int) -> Iterator[Call]:
    """The stages of a layer at production sizes (`conformance.questions.sizes`), a size at a time.

    Args:
        form: of sizes, ``short`` or ``quick``.
        dtype: of x: float32, bfloat16 or float16.
    """
    for size in sizes(form, largest_here(1), seed):
        for stage in STAGES_OF_SIZES:
            item = sized(size, dialect, stage, dtype, ANYTHING)
            if item is not None:
                yield Call(stage, item.inputs(), item.config, item.cotangents(), dialect, size.id)


def _cast(value: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(value).astype(DTYPES[dtype])).reshape(np.shape(value))


def compare(a: Implementation, b: Implementation, call: Call, layouts: bool = False) -> list[Row] | str:
    """A row for each tensor that both return, or why there is none.

    Args:
        layouts: hand the arrays over as views, each in another layout in memory.
    """
    results = []
    for implementation in (a, b):
        claimed = implementation.capabilities
        reason = "" if call.stage in claimed.stages else f"stage {call.stage} not claimed"
        if reason := reason or unclaimed(call.dialect, claimed):
            return f"{reason} by {implementation.name}"
        dtype = str(call.inputs[next(iter(call.inputs))].dtype)
        if dtype not in claimed.dtypes_of(call.stage) and "logits" not in call.inputs:
            return f"this dtype is not claimed by {implementation.name}"
        try:
            inputs = {k: v.copy() for k, v in call.inputs.items()}
            cotangents = {k: v.copy() for k, v in call.cotangents.items()} if claimed.gradients else None
            if layouts:
                inputs, cotangents = in_layouts(inputs), None if cotangents is None else in_layouts(cotangents)
            outputs, gradients = called(implementation, call.stage, inputs, call.config, cotangents)
        except NotImplementedError as error:
            return f"refused by {implementation.name}: {describe(error)}"
        except Exception as error:
            return f"raised in {implementation.name}: {describe(error)}"
        results.append({**outputs, **{f"d/{k}": v for k, v in gradients.items()}})
    first, second = results
    coarsest = max((_epsilon(v.dtype) for v in call.inputs.values()), default=0.0)
    return [_row(k, first[k], second[k], _scale(k, first), coarsest) for k in first if k in second]


def _epsilon(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps)


def _scale(tensor: str, values: dict[str, np.ndarray]) -> float:
    """The largest value; for a weight's gradient, of all of the same projection: α's own is a sum that may cancel."""
    group = [tensor]
    if tensor.startswith("d/") and "_" in tensor:
        group = [k for k in values if k.startswith(tensor.split("_")[0] + "_")]
    arrays = [values[k] for k in group if is_of_numbers(values[k])]
    largest = max((float(np.max(np.abs(value.astype(np.float64)), initial=0.0)) for value in arrays), default=1.0)
    return largest if np.isfinite(largest) and largest else 1.0


def _kind(value: object) -> str:
    return str(value.dtype) if is_array(value) else f"a {type(value).__name__}"


def _row(tensor: str, a: Any, b: Any, scale: float, coarsest: float) -> Row:
    if not is_of_numbers(a) or not is_of_numbers(b):
        return Row(tensor, note=f"{_kind(a)} and {_kind(b)}, expected arrays of {', '.join(DTYPES)}")
    if a.shape != b.shape or a.dtype != b.dtype:
        return Row(tensor, note=f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
    if not a.size:
        return Row(tensor)
    x, y = a.astype(np.float64), b.astype(np.float64)
    apart = np.where(np.isnan(x) & np.isnan(y), 0.0, np.abs(x - y))
    apart = np.where(np.isnan(apart), np.inf, apart)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(apart), apart.shape))
    largest = float(apart[index])
    unit = max(_epsilon(a.dtype), coarsest) * scale
    return Row(tensor, largest, largest / unit, index, float(x[index]), float(y[index]))
