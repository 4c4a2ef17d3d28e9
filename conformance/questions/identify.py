"""Which dialect does this code compute?

The implementation runs once on the separating cases of the dialect that it is told to compute. What it returns is
compared with every dialect that takes the same weights; where none matches, with each of these with one change, and
with the told one with two (`identifying`). Where all that fails, each stage still has a nearest function.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.cases.case import Item, Variant
from conformance.cases.description import Bound, Bounds
from conformance.interface import Implementation
from conformance.questions.identifying import derivatives, precision
from conformance.questions.identifying.candidates import Candidate, Functions, relevant, same_layer
from conformance.questions.identifying.configured import configured
from conformance.questions.identifying.forward import STAGES
from conformance.questions.identifying.ranking import NEAR, RANKED, Answer, Ranking
from conformance.questions.identifying.records import run

__all__ = ["FAMILIES", "STAGES", "Identity", "identify", "same_layer", "separating"]

FAMILIES = (
    "smoke", "generic", "slow", "slowest", "permutation", "wide", "overflow", "eps-floor", "closed-gate", "tiny",
    "zero", "cancel-branch", "initial", "head", "stack",
)  # fmt: skip
EXTREME = "overflow"
"""The family whose logits are so large that float32's own range shows."""
FAILING = 12
"""Items, the worst ones, on which it is measured what a change explains."""
OTHER_ROWS = 2
"""Rows beside the told one of which two changes are tried."""
CHUNK = 100
"""Pairs of changes between two looks at the clock."""
SECONDS = 8.0
"""Time for pairs of changes."""
LOOSE = 2.0**-12
"""The bound of a stack in a dtype that the corpus has none in, as a fraction of the largest value."""


@dataclass
class Identity:
    """What was found.

    Attributes:
        told: the dialect that the implementation was told to compute.
        answers: the nearest candidates, nearest first.
        by_stage: of each stage that ran, the nearest candidate there.
        items: how many items ran.
        known: what can be told of an implementation that claims these stages.
        configured: where the told row matches, what of another configuration it doesn't follow, in words.
        extreme: where logits are so large that the nearest function doesn't match any more, though it does elsewhere.
        precision: what the returned dtypes and errors say, in words.
        raised: a line for each item that raised instead.
        rounded: where nothing matches, the rows that roundings alone may be the difference to, and the largest error
            as a fraction of the largest value of an output.
        gradients: where the told row matches, (case, stage, gradient) that miss their bounds, inner stages first.
        findings: what these gradients are instead, where that is found.
        infinite: (case, stage, output) with numbers that aren't finite; they are left out of the comparison.
    """

    told: str
    answers: list[Answer]
    by_stage: dict[str, Answer] = field(default_factory=dict)
    items: int = 0
    known: tuple[str, ...] = ()
    configured: str = ""
    extreme: str = ""
    precision: str = ""
    rounded: dict[str, float] = field(default_factory=dict)
    raised: list[str] = field(default_factory=list)
    gradients: list[tuple[str, str, str]] = field(default_factory=list)
    findings: list[derivatives.Finding] = field(default_factory=list)
    infinite: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def matches(self) -> list[Answer]:
        return [a for a in self.answers if a.ratio <= 1]

    @property
    def dialects(self) -> list[str]:
        """Dialects whose rows match as they are."""
        rows = [a.candidate for a in self.matches if not a.candidate.changes]
        return [name for candidate in rows for name in (candidate.dialect, *candidate.same)]

    @property
    def as_told(self) -> bool:
        """Whether it computes what it was told, gradients among it."""
        right = self.told in self.dialects and not self.nearest.candidate.changes
        return right and not (self.infinite or self.configured or self.extreme or self.gradients)

    @property
    def nearest(self) -> Answer:
        """The simplest candidate that matches, the told dialect before all; else the nearest."""
        return self.answers[0]


def separating(items: Sequence[Item], told: Mapping[str, Any], dtype: str) -> list[Item]:
    """The items that are of a row itself and tell dialects apart; a stack in a wide dtype where its case has none."""
    mine = [
        item
        for item in items
        if item.case.family in FAMILIES
        and item.stage in STAGES
        and not item.variant.secondary
        and all(item.case.parameters[name] == value for name, value in told.items())
    ]
    chosen = [item for item in mine if item.variant.x == dtype]
    if dtype in ("float32", "float64") and not any(item.stage == "stack" for item in chosen):
        chosen += [_in_dtype(item, dtype) for item in mine if item.stage == "stack"][:1]
    return chosen


class _Loose(Item):
    """The outputs of an item in a dtype that its case has no bounds for."""

    @property
    def expected(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in super().expected.items() if not k.startswith("d/")}

    @property
    def bounds(self) -> Bounds:
        scales = {k: float(np.max(np.abs(v), initial=0.0)) for k, v in self.expected.items()}
        return {k: Bound(LOOSE * scale, 0.0, LOOSE, scale) for k, scale in scales.items()}


def _in_dtype(item: Item, dtype: str) -> Item:
    wide = "float64" if dtype == "float64" else "float32"
    contract = "float64" if dtype == "float64" else item.variant.contract
    variant = Variant(f"{dtype}-{wide}", dtype, wide, contract, (item.stage,))
    return _Loose(item.case, item.stage, variant)


def identify(
    implementation: Implementation,
    told: str,
    rows: Mapping[str, Mapping[str, Any]],
    items: Sequence[Item],
    dtype: str | None = None,
) -> Identity:
    """Runs an implementation and compares it with every candidate.

    Args:
        implementation: what `registry.load` gives.
        told: the row whose configuration, weights and cases it is handed.
        rows: all dialects' parameters, and those of the told one where it isn't published.
        items: what may be run; those that don't separate dialects, or that it doesn't claim, are left out.
        dtype: of x; None for that of the first item.
    """
    dtype = dtype or (items[0].variant.x if items else "float32")
    records, raised = run(implementation, separating(items, rows[told], dtype))
    identity = Identity(told, [], items=len(records), raised=raised)
    identity.infinite = [(r.item.case.id, r.stage, tensor) for r in records for tensor in r.infinite]
    records = [r for r in records if r.outputs]
    if not records:
        return identity
    identity.known = relevant({(r.stage, tensor) for r in records for tensor in r.outputs})
    same_weights = {name: p for name, p in rows.items() if p["residual"] == rows[told]["residual"]}
    functions = Functions(told, same_weights, identity.known)
    plain = functions.of_rows()
    extreme = [r for r in records if r.item.case.family == EXTREME]
    records = [r for r in records if r.item.case.family != EXTREME] or extreme
    _compare(identity, functions, plain, Ranking(records))
    _hold_to(identity, Ranking(extreme))
    if not identity.matches:
        identity.rounded = precision.rounded(records, plain)
    elif told in identity.dialects:
        missed = [(r.item.case.id, r.stage, tensor) for r in records for tensor in r.gradients]
        identity.gradients = sorted(missed, key=lambda entry: STAGES.index(entry[1]))
        identity.findings = derivatives.findings(records, functions, plain[0])
        identity.configured = configured(implementation, told, rows[told], items, dtype)
    identity.precision = precision.words(records, identity.nearest.candidate)
    return identity


def _compare(identity: Identity, functions: Functions, plain: Sequence[Candidate], ranking: Ranking) -> None:
    """Fills in the answers: rows and the told row's changes, then every row's changes, then pairs."""
    told = plain[0]
    ranking.order_by(told)
    own, others = functions.by_weights(plain)
    near = [*own, *functions.with_one_change([identity.told]), *others]
    every = near
    identity.answers = ranking.nearest(near)
    if not identity.matches:
        every = [*near, *functions.with_one_change(c.dialect for c in plain[1:])]
        identity.answers = ranking.nearest(every)
    if not identity.matches:
        identity.answers = _best(_pairs(functions, ranking, plain), identity.answers)[:RANKED]
    if not identity.matches:
        identity.answers = ranking.nearest_or(told, identity.answers)
    matched = [identity.nearest.candidate] if identity.matches else []
    for stage in STAGES:
        ran = [index for index, record in enumerate(ranking.records) if record.stage == stage]
        if ran:
            tried = [told, *matched] if matched else near if stage == "stack" else every
            identity.by_stage[stage] = ranking.nearest_or(told, ranking.nearest(tried, ran), ran)[0]


def _hold_to(identity: Identity, extreme: Ranking) -> None:
    """Puts the matches first that hold for extreme logits too, and says where not even the first of them does.

    Logits of 100 and more tell a limit of the logits. But what underflows in float32 doesn't in the float64 of the
    candidates, and where the told row clips, its bound is too narrow for one that doesn't: a function that is right
    otherwise is not given up for them.
    """
    each = [extreme.answer(answer.candidate, range(len(extreme.records))) for answer in identity.matches]
    if not each:
        return
    order = sorted(range(len(each)), key=lambda i: max(1.0, each[i].ratio))
    identity.answers[: len(each)] = [identity.answers[i] for i in order]
    first = each[order[0]]
    if first.ratio > (NEAR if first.candidate.changes else 1):
        identity.extreme = first.where


def _best(*lists: list[Answer]) -> list[Answer]:
    """Answers of several rankings, nearest first; of those that match, an earlier list's come first."""
    return sorted((answer for answers in lists for answer in answers), key=lambda a: max(1.0, a.ratio))


def _pairs(functions: Functions, ranking: Ranking, plain: Sequence[Candidate]) -> list[Answer]:
    """The nearest functions with two changes, of the told row and of those that explain the most, up to a match.

    A row's changes are paired in the order of how much each of them explains.
    """
    ends, answers = time.monotonic() + SECONDS, []
    failing = [i for i, record in enumerate(ranking.records) if record.stage != "stack"][:FAILING] or [0]
    others = sorted(plain[1:], key=lambda candidate: ranking.unexplained(candidate, failing))
    for row in [plain[0].dialect, *(candidate.dialect for candidate in others[:OTHER_ROWS])]:
        explained = [(ranking.unexplained(functions.changed(row, c), failing), c) for c in functions.changes(row)]
        changes = [change for _, change in sorted(explained, key=lambda entry: entry[0])]
        pairs = functions.with_two_changes(row, changes)
        while pairs and time.monotonic() < ends:
            chunk, pairs = pairs[:CHUNK], pairs[CHUNK:]
            answers = _best(answers, ranking.nearest(chunk))[:RANKED]
            if answers[0].ratio <= 1:
                return answers
    return answers
