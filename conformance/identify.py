"""Which dialect does this code compute?

The implementation runs once on the separating cases of the dialect that it is told to compute. What it returns is
compared with the true values of every dialect that takes the same weights, and of the told dialect with one thing
changed, on the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.cases import Item
from conformance.compare import allowance
from conformance.interface import describe
from conformance.oracle.evaluate import evaluate
from conformance.oracle.floats import Quick
from conformance.runner import refusal

FAMILIES = ("smoke", "generic", "slow", "slowest", "permutation", "wide", "eps-floor", "closed-gate", "tiny", "zero",
            "cancel-branch", "initial")  # fmt: skip
STAGES = ("residual_matrix", "coefficients", "pre", "post", "layer")
MATHEMATICS = (
    "norm_weight", "norm_eps", "norm_eps_position", "residual", "order", "guard", "eps", "iterations", "pre_eps",
    "post_scale", "post_eps", "mix",
)  # fmt: skip
"""Parameters that change the true value of a layer; the others are its precision and the reduction."""


@dataclass(frozen=True)
class Candidate:
    """A function that the implementation might compute.

    Attributes:
        dialect: the row of ``dialects.json`` that it starts from.
        changes: what differs from that row, in words; empty for the row itself.
    """

    dialect: str
    parameters: Mapping[str, Any]
    changes: tuple[str, ...] = ()
    transposed: bool = False

    def __hash__(self) -> int:
        return hash((self.dialect, self.changes))


@dataclass
class Answer:
    """How near a candidate comes: the largest error as a fraction of the bound, and where."""

    candidate: Candidate
    ratio: float = 0.0
    where: str = ""
    by_tensor: dict[str, float] = field(default_factory=dict)

    def add(self, item: Item, tensor: str, ratio: float) -> None:
        self.by_tensor[tensor] = max(self.by_tensor.get(tensor, 0.0), ratio)
        if ratio > self.ratio or not self.where:
            self.ratio, self.where = ratio, f"{item.case.id}, {item.stage}, {tensor}"


def candidates(told: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Candidate]:
    """Every dialect with H as it is and transposed, and the told dialect with every single change."""
    for name, row in rows.items():
        yield Candidate(name, row)
        if row["residual"] != "identity":
            yield Candidate(name, row, ("H transposed",), True)
    for changed, words in _changes(rows[told]):
        yield Candidate(told, {**rows[told], **changed}, (words,))


def _changes(row: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """One change at a time, and what it is in words."""
    if row["residual"] == "sinkhorn":
        yield from _sinkhorn_changes(row)
    if row["norm_eps"]:
        position = "root" if row["norm_eps_position"] == "mean" else "mean"
        yield {"norm_eps_position": position}, f"norm eps added to the {position}"
    for name, values in (
        ("norm_eps", (0.0, 1e-5, 1e-6, 2.0**-23)), ("pre_eps", (0.0, 1e-6)), ("post_eps", (0.0, 1e-6)),
        ("post_scale", (1.0, 2.0)),
    ):  # fmt: skip
        for value in values:
            if value != row[name]:
                yield {name: value}, f"{name} {value:g}, not {row[name]:g}"
    if row["norm_weight"]:
        yield {"norm_weight": False}, "the norm weight is ignored"


def _sinkhorn_changes(row: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    other = "columns-first" if row["order"] == "rows-first" else "rows-first"
    yield {"order": other}, f"order {other}, not {row['order']}"
    n = row["iterations"]
    for count in sorted({n - 1, n + 1, n // 2, 1} - {0, n}):
        yield {"iterations": count}, f"{count} iterations, not {n}"
    words = {"add": "eps added", "clip": "eps as a floor", "none": "no eps"}
    for guard in words:
        if guard != row["guard"]:
            eps = 0.0 if guard == "none" else row["eps"] or 1e-6
            yield {"guard": guard, "eps": eps}, f"{words[guard]}, not {words[row['guard']]}"
    if row["eps"]:
        for factor in (0.1, 10.0, 100.0):
            yield {"eps": row["eps"] * factor}, f"eps {row['eps'] * factor:g}, not {row['eps']:g}"


def expected(item: Item, candidate: Candidate) -> dict[str, np.ndarray]:
    """float64 outputs of a candidate on the inputs of an item."""
    case, stage = item.case, item.case.stages[item.stage]
    parameters = {**candidate.parameters, **{k: case.parameters[k] for k in ("streams", "dim")}}
    if candidate.transposed and item.stage == "layer":
        parameters["mix"] = {"in-out": "out-in", "out-in": "in-out"}[parameters["mix"]]
    ignored = () if parameters["norm_weight"] else ("mhc_norm.scale",)
    given = {k: v.astype(np.float64) for k, v in item.inputs().items() if k not in ignored}
    routed = ("load_balance_loss", "moe_bias_updates")
    cotangents = {k: v.astype(np.float64) for k, v in item.cotangents().items() if k not in routed}
    with np.errstate(all="ignore"):
        found = evaluate(item.stage, given, cotangents, parameters, stage["options"], Quick())
    outputs = {k: v for k, v in found.items() if "/" not in k}
    if candidate.transposed and "H" in outputs:
        outputs["H"] = np.swapaxes(outputs["H"], -1, -2)
    return outputs


def separates(item: Item, told: Mapping[str, Any]) -> bool:
    """Whether an item is of a row itself, and tells dialects apart."""
    return (
        item.case.family in FAMILIES
        and item.stage in STAGES
        and all(item.case.parameters[name] == value for name, value in told.items())
    )


def fits(candidate: Candidate, told: Mapping[str, Any]) -> bool:
    """Whether a candidate takes the weights of the dialect that the implementation was told."""
    return candidate.parameters["residual"] == told["residual"]


@dataclass
class Identity:
    """What was found.

    Attributes:
        told: the dialect that the implementation was told to compute.
        answers: every candidate, nearest first.
        items: how many items ran.
        precision: what the returned dtypes and errors say, in words.
        raised: a line for each item that raised instead.
    """

    told: str
    answers: list[Answer]
    items: int
    precision: str
    raised: list[str]

    @property
    def matches(self) -> list[Answer]:
        return [a for a in self.answers if a.ratio <= 1]

    @property
    def dialects(self) -> list[str]:
        """Dialects whose rows match as they are."""
        return [a.candidate.dialect for a in self.matches if not a.candidate.changes]

    @property
    def nearest(self) -> Answer:
        """The dialect that was told where it matches, else the nearest candidate."""
        mine = [a for a in self.matches if a.candidate.dialect == self.told and not a.candidate.changes]
        return (mine or self.matches or self.answers)[0]


def identify(implementation: Any, told: str, rows: Mapping[str, Mapping[str, Any]], items: Sequence[Item]) -> Identity:
    """Runs an implementation and compares it with every candidate.

    Args:
        implementation: what `registry.load` gives.
        told: the row whose configuration, weights and cases it is handed.
        rows: all dialects' parameters, and those of the told one where it isn't published.
        items: what may be run; those that don't separate dialects, or that it doesn't claim, are left out.
    """
    answers = {c: Answer(c) for c in candidates(told, rows) if fits(c, rows[told])}
    ran, seen, raised = 0, _Precision(), []
    for item in items:
        if not separates(item, rows[told]) or refusal(item, implementation.capabilities):
            continue
        try:
            outputs, _ = getattr(implementation, item.stage)(
                item.inputs(), item.config, item.cotangents() if implementation.capabilities.gradients else None
            )
        except NotImplementedError:
            continue
        except Exception as error:
            raised.append(f"{item.case.id}, {item.stage}: {describe(error)}")
            continue
        ran += 1
        for answer in answers.values():
            for tensor, value in expected(item, answer.candidate).items():
                actual = outputs.get(tensor)
                if isinstance(actual, np.ndarray) and actual.shape == value.shape:
                    answer.add(item, tensor, distance(item, tensor, actual, value))
        seen.look(item, outputs)
    return Identity(
        told, sorted(answers.values(), key=lambda a: (a.ratio, len(a.candidate.changes))), ran, seen.words(), raised
    )


class _Precision:
    """Collects the dtype of the coefficients, and whether out is rounded once."""

    def __init__(self) -> None:
        self.coefficients: set[str] = set()
        self.excess = 0.0
        self.narrow = False

    def look(self, item: Item, outputs: Mapping[str, Any]) -> None:
        self.narrow |= item.variant.x in ("bfloat16", "float16")
        self.coefficients |= {
            str(outputs[k].dtype) for k in ("pre", "post", "H") if item.stage == "coefficients" and k in outputs
        }
        if item.stage == "post" and "out" in outputs:
            value = item.expected["out"]
            beyond = np.abs(outputs["out"].astype(np.float64) - value) - allowance(
                outputs["out"].dtype, item.variant.contract, value, None
            )
            unit = 2.0**-24 * float(np.max(np.abs(value), initial=0.0)) or 1.0
            self.excess = max(self.excess, float(np.max(beyond, initial=0.0)) / unit)

    def words(self) -> str:
        if not self.narrow:
            return ""
        kept = f"coefficients in {' and '.join(sorted(self.coefficients))}" if self.coefficients else ""
        mixed = f"mixing {'in float32, rounded once' if self.excess < 64 else 'rounded before it is added'}"
        return ", ".join(part for part in (kept, mixed) if part)


def distance(item: Item, tensor: str, actual: np.ndarray, value: np.ndarray) -> float:
    """Error beyond the last rounding, as a fraction of the bound of this tensor."""
    error = np.abs(actual.astype(np.float64) - value) - allowance(actual.dtype, item.variant.contract, value, None)
    largest = float(np.max(error, initial=0.0))
    if not np.isfinite(largest):
        return float("inf")
    # a bound of 0 asks for equality; here the candidates are float64 themselves
    return max(0.0, largest) / (item.bounds[tensor]["bound"] or 2.0**-50)


def same_layer(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two dialects compute the same function, whatever their precision and reduction."""
    return all(a[k] == b[k] for k in MATHEMATICS)
