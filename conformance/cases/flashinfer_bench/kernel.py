"""The operations that kernels compute: which stage each is of, what it takes and what it returns.

An operation's arguments are laid out as kernels take them, not as case files have them. The tokens are one axis. The
projections of pre, post and the residual matrix are the rows of one matrix, as in DeepSeek-V4's checkpoints, and so
are their scales and biases::

    x [tokens, streams, dim]    fn [columns, streams * dim]    scale [3]    base [columns]    columns = n + n + n*n
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from conformance.cases.flashinfer_bench.records import Constant, Definition, Tensor, Variable
from conformance.cases.flashinfer_bench.references import reference
from conformance.stages import COEFFICIENT, PROJECTIONS, residual_columns

STAGES = ("pre", "post", "residual_matrix", "head")
"""The stages that are exported. `pre` is two operations: `mhc_pre_delayed` reads with the pre of the site before."""

TOKENS, X = "tokens", ("tokens", "streams", "dim")
GATES, MATRIX = ("tokens", "streams"), ("tokens", "streams", "streams")
TENSORS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "x": (X, "x", "the residual streams"),
    "y": (("tokens", "dim"), "x", "the sub-layer's output"),
    "u": (("tokens", "dim"), "x", "the sub-layer's input: the streams, weighted by pre and summed"),
    "carried": (GATES, COEFFICIENT, "the pre of the site before, with which this site reads"),
    "pre": (GATES, COEFFICIENT, "this site's own pre, which it hands to the next site"),
    "post": (GATES, COEFFICIENT, "the weight of y in each stream"),
    "H": (MATRIX, COEFFICIENT, "the residual matrix"),
    "logits": (MATRIX, COEFFICIENT, "the logits of the residual matrix"),
    "norm_weight": (("flat",), "weights", "the weight of the norm, streams first"),
    "fn": (("columns", "flat"), "weights", "the projections, one row for each logit of a token"),
    "scale": (("scales",), "weights", "the factor of each part of the logits"),
    "base": (("columns",), "weights", "the bias of each logit"),
}
"""For each argument and result its axes, its role (`conformance.stages`) and its meaning."""
ELSEWHERE = {
    "mhc_pre": "mhc_pre_torch of vLLM 0.32.0 calls these residual (our x), fn, hc_scale and hc_base.",
    "mhc_post": "mhc_post of FlashInfer 0.7.2 calls these x (our y), residual (our x), post_layer_mix, comb_res_mix.",
}
"""What the arguments are called elsewhere, where a kernel's H is summed over its first index."""


@dataclass(frozen=True)
class Kernel:
    """One operation of a dialect at one width, in one pair of dtypes.

    Attributes:
        stage: one of `STAGES`.
        dialect: the row's name.
        row: its parameters.
        streams, dim: n and C; ``residual_matrix`` has no dim.
        x, weights, coefficients: the dtypes of the activations, of the weights, of gates and H.
    """

    stage: str
    dialect: str
    row: Mapping[str, Any]
    streams: int
    dim: int | None
    x: str
    weights: str
    coefficients: str

    @property
    def op_type(self) -> str:
        if self.stage == "pre":
            return "mhc_pre_delayed" if self.row["pre_from"] == "previous" else "mhc_pre"
        if self.stage == "residual_matrix":
            return f"mhc_{self.row['residual']}"
        return f"mhc_{self.stage}"

    @property
    def name(self) -> str:
        width = "" if self.dim is None else f"_c{self.dim}"
        dtype = self.coefficients if self.stage == "residual_matrix" else self.x
        narrow = f"_weights_{self.weights}" if self.weights != "float32" and self.weighed else ""
        dialect = self.dialect.replace("-", "_").replace(".", "_")
        return f"{self.op_type}_{dialect}_n{self.streams}{width}_{dtype}{narrow}"

    @property
    def weighed(self) -> bool:
        """Whether the operation has weights."""
        return self.stage in ("pre", "head")

    @property
    def mixed(self) -> bool:
        """Whether H is anything but the identity."""
        return self.row["residual"] != "identity"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the weights whose projections are the rows of ``fn``."""
        return PROJECTIONS if self.mixed else PROJECTIONS[:2]

    @property
    def arguments(self) -> tuple[str, ...]:
        if self.stage == "post":
            return ("y", "x", "post", "H") if self.mixed else ("y", "x", "post")
        if self.stage == "residual_matrix":
            return ("logits",)
        norm = ("norm_weight",) if self.stage == "pre" and self.row["norm_weight"] else ()
        carried = ("carried",) if self.op_type == "mhc_pre_delayed" else ()
        return ("x", *carried, *norm, "fn", "scale", "base")

    @property
    def results(self) -> tuple[str, ...]:
        if self.stage == "pre":
            handed = ("pre",) if self.op_type == "mhc_pre_delayed" else ()
            return ("u", *handed, "post", "H") if self.mixed else ("u", *handed, "post")
        return ("H",) if self.stage == "residual_matrix" else ("out",)

    def tensor(self, name: str) -> Tensor:
        """The shape, dtype and meaning of an argument or a result."""
        if name == "out":
            axes = X if self.stage == "post" else ("tokens", "dim")
            return Tensor(axes, self.x, "the streams after the site" if self.stage == "post" else "one stream")
        axes, role, meaning = TENSORS[name]
        if name == "logits" and self.row["residual"] == "permutations":
            axes = ("tokens", "columns")
        if name == "H":
            summed = "second" if self.row["mix"] == "out-in" else "first"
            meaning += f"; the mixing sums over its {summed} index of streams"
        return Tensor(axes, {"x": self.x, "weights": self.weights}.get(role, self.coefficients), meaning)

    @property
    def axes(self) -> dict[str, Constant | Variable]:
        n, residual = self.streams, str(self.row["residual"])
        columns = residual_columns(n, residual) + (2 * n if self.stage == "pre" else 0)
        parts = f": {', '.join(self.parts)}" if self.stage == "pre" else ""
        lengths = {
            "streams": Constant(n, "the residual streams of a token"),
            "dim": Constant(self.dim or 0, "the width of one stream"),
            "flat": Constant(n * (self.dim or 0), "streams times dim, streams first"),
            "columns": Constant(n if self.stage == "head" else columns, "the logits of a token" + parts),
            "scales": Constant(1 if self.stage == "head" else len(self.parts), "the parts of the logits" + parts),
        }
        used = {axis for name in (*self.arguments, *self.results) for axis in self.tensor(name).shape}
        tokens = Variable("the tokens: batch times seq")
        return {TOKENS: tokens, **{name: axis for name, axis in lengths.items() if name in used}}

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of all axes but the tokens."""
        return {name: axis.value for name, axis in self.axes.items() if isinstance(axis, Constant)}

    @cached_property
    def definition(self) -> Definition:
        """The operation as FlashInfer-Bench describes it."""
        axes = self.axes
        said = [f"Stage {self.stage} of manifold-constrained hyper-connections (arXiv:2512.24880), as {self.dialect}."]
        if self.op_type in ELSEWHERE and self.row["mix"] == "in-out":
            said.append(ELSEWHERE[self.op_type])
        return Definition(
            name=self.name,
            op_type=self.op_type,
            description=" ".join(said),
            tags=(f"dialect:{self.dialect}", f"stage:{self.stage}"),
            axes=axes,
            constraints=("flat == streams * dim",) if "flat" in axes and "dim" in axes else (),
            inputs={name: self.tensor(name) for name in self.arguments},
            outputs={name: self.tensor(name) for name in self.results},
            reference=reference(self),
        )
