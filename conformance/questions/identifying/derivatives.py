"""Which gradients does this code compute, where its values are right?

A candidate is a function with its backward pass: the told row with one of `MISTAKES`, or the backward pass of the row
with one change. Its vector-Jacobian product is never written out. A complex step through `forward` gives the derivative
of the outputs along a direction, and the returned gradients, multiplied by the same direction, must come to as much.
Random signs make the directions; a token's share is its own, so each batch row is told from the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.judge.rule import allowance
from conformance.questions.identifying.candidates import Candidate, Functions
from conformance.questions.identifying.forward import STAGES, evaluate
from conformance.questions.identifying.records import Record
from conformance.stages import PROJECTIONS

STEP = 1e-30
"""The complex step: its square vanishes beside every number, so that the derivative is exact to float64."""
DIRECTIONS = 4
DEVIATIONS = 4.0
"""How many standard deviations of the rounding errors of all elements a product may be off by."""
FAR = 10.0
"""How many times their tolerance products must be off by, before a factor is made of it."""
MOST = 4
"""Records of a stage on which gradients are compared."""
MISTAKES = {
    "last iteration": "through the last iteration only",
    "limit": "of infinitely many iterations (the implicit function theorem), not of those that ran",
    "constant H": "of a constant H: nothing comes back through it",
    "constant pre": "of constant pre gates",
    "constant post": "of constant post gates",
    "constant norm": "of a constant norm: the root mean square counts as a number",
    "constant carried": "of a constant carried pre",
    "constant y": "of a constant y: nothing comes back through the sub-layer",
    "x constant in the gates": "without what x does in the gates and H",
    "x constant in the reading": "without what x does in the reading",
    "x constant in the mixing": "without what x does in the mixing",
    "H untransposed": "with x's not transposed through H",
    "folded w": "with w folded into φ, whose own gradient misses the factor w",
}
"""Backward passes that differ from the values' own, as `forward` names them and in words after "the gradients are"."""


@dataclass(frozen=True)
class Finding:
    """What the gradients of some inputs and weights are."""

    tensors: tuple[str, ...]
    words: str

    def __str__(self) -> str:
        return f"gradients of {named(self.tensors)}: {self.words}"


def named(tensors: Sequence[str]) -> str:
    """The inputs and weights of gradients, those of one projection as ``res_*``."""
    names = [tensor.removeprefix("d/") for tensor in tensors]
    for part in PROJECTIONS:
        of_part = {f"{part}_alpha", f"{part}_alpha_scale", f"{part}_beta"}
        if of_part <= set(names):
            at = min(names.index(name) for name in of_part)
            names = [*names[:at], f"{part}_*", *(name for name in names[at:] if name not in of_part)]
    return ", ".join(names)


class Question:
    """The gradients of one record that miss their bounds, against a direction each time.

    Args:
        tensors: ``d/<input>``, those that are compared.
    """

    def __init__(self, record: Record, tensors: Sequence[str]):
        self.record, item = record, record.item
        self.tensors, self.names = tensors, [tensor.removeprefix("d/") for tensor in tensors]
        self.cotangents = {k: v.astype(np.float64) for k, v in item.cotangents().items()}
        rng = np.random.default_rng(zlib.crc32(f"{item.id} {tensors}".encode()))
        shapes = {name: record.given[name].shape for name in self.names}
        self.directions = [
            {name: rng.choice((-1.0, 1.0), shape) for name, shape in shapes.items()} for _ in range(DIRECTIONS)
        ]
        returned = {name: record.vjps[f"d/{name}"].astype(np.float64) for name in self.names}
        self.returned = [sum(float(np.sum(returned[k] * way[k])) for k in self.names) for way in self.directions]
        self.tolerance = DEVIATIONS * float(np.sqrt(sum(self._variance(tensor) for tensor in tensors)))

    def _variance(self, tensor: str) -> float:
        """The sum of the squares of all elements' allowed errors."""
        item, expected = self.record.item, self.record.item.expected[tensor]
        last = allowance(self.record.vjps[tensor].dtype, item.variant.contract, expected, item.magnitude(tensor))
        return float(np.sum((item.bounds[tensor].bound + last) ** 2))

    def derivatives(self, candidate: Candidate) -> list[np.ndarray]:
        """What each direction comes to, the share of each batch row ``[batch]``."""
        item = self.record.item
        p = {**candidate.parameters, **{k: item.case.parameters[k] for k in ("streams", "dim")}}
        shares = []
        for way in self.directions:
            given = {k: v + 1j * STEP * way[k] if k in way else v for k, v in self.record.given.items()}
            outputs = evaluate(item.stage, given, p, item.case.stages[item.stage].options)
            moved = [np.imag(outputs[k]) / STEP * g for k, g in self.cotangents.items() if k in outputs]
            shares.append(sum(part.reshape(part.shape[0], -1).sum(-1) for part in moved))
        return shares

    def agrees(self, products: Sequence[float]) -> bool:
        """Whether what was returned comes to these products, within its rounding."""
        return all(abs(a - b) <= self.tolerance for a, b in zip(self.returned, products, strict=True))


def findings(records: Sequence[Record], functions: Functions, told: Candidate) -> list[Finding]:
    """What the gradients that miss their bounds are instead; nothing where no candidate has them.

    Args:
        records: those whose values are the told row's.
        told: the row itself.
    """
    asked = [record for record in records if record.gradients and record.stage != "stack"]
    if not asked:
        return []
    first = min((record.stage for record in asked), key=STAGES.index)  # later ones follow from it
    mine = [record for record in asked if record.stage == first][:MOST]
    tensors = tuple(sorted({tensor for record in mine for tensor in record.gradients}))
    whole = _explained(mine, tensors, functions, told)
    if whole:
        return [Finding(tensors, whole)]
    found: dict[str, list[str]] = {}
    for tensor in tensors:
        words = _explained([r for r in mine if tensor in r.gradients], (tensor,), functions, told)
        found.setdefault(words, []).append(tensor)
    return [Finding(tuple(group), words) for words, group in found.items() if words]


def _explained(records: Sequence[Record], tensors: Sequence[str], functions: Functions, told: Candidate) -> str:
    """What these gradients are in all of the records, in words; empty where nothing fits."""
    questions = [Question(r, [t for t in tensors if t in r.vjps and t in r.gradients]) for r in records]
    questions = [question for question in questions if question.tensors]
    if not questions:
        return ""
    right = [question.derivatives(told) for question in questions]
    for words, products in _shares(questions, right):
        if all(question.agrees(one) for question, one in zip(questions, products, strict=True)):
            return words
    if all(q.agrees([float(np.sum(s)) for s in one]) for q, one in zip(questions, right, strict=True)):
        return ""  # a few elements are off: no other function
    for words, candidate in _candidates(functions, told):
        if all(q.agrees([float(np.sum(s)) for s in q.derivatives(candidate)]) for q in questions):
            return words
    return _factor(questions, right)


def _shares(
    questions: Sequence[Question], right: Sequence[list[np.ndarray]]
) -> Iterator[tuple[str, list[list[float]]]]:
    """Sums over fewer tokens than all, and what each question's products would be."""
    yield "zero", [[0.0] * DIRECTIONS for _ in right]
    if all(len(share) > 1 for one in right for share in one):
        yield "of the first batch row alone", [[float(share[0]) for share in one] for one in right]
        yield "of the last batch row alone", [[float(share[-1]) for share in one] for one in right]
    tokens = [int(np.prod(question.record.given[_leading(question)].shape[:2])) for question in questions]
    means = [[float(np.sum(share)) / count for share in one] for count, one in zip(tokens, right, strict=True)]
    yield "means over the tokens, not sums", means


def _leading(question: Question) -> str:
    """An input that has the axes of the tokens."""
    return next(name for name in ("x", "embedding", "logits", "y") if name in question.record.given)


def _candidates(functions: Functions, told: Candidate) -> Iterator[tuple[str, Candidate]]:
    """Backward passes, from the told row's own with one mistake to those of other functions."""
    for name, words in MISTAKES.items():
        yield words, Candidate(told.dialect, {**told.parameters, "backward": name}, (words,))
    for change in functions.changes(told.dialect):
        yield f"of another function: {change.words}", functions.changed(told.dialect, change)


def _factor(questions: Sequence[Question], right: Sequence[list[np.ndarray]]) -> str:
    """A factor that all products have, in words."""
    returned = np.concatenate([question.returned for question in questions])
    due = np.concatenate([[float(np.sum(share)) for share in one] for one in right])
    if not np.any(due):
        return ""
    factor = float(returned @ due / (due @ due))
    scaled = [[factor * float(np.sum(share)) for share in one] for one in right]
    fits = all(q.agrees(one) for q, one in zip(questions, scaled, strict=True))
    far = np.linalg.norm(returned - due) > FAR * np.linalg.norm([q.tolerance for q in questions])
    return f"{factor:.4g} times what they should be" if fits and far else ""
