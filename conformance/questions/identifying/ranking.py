"""Which candidates come nearest to what an implementation returned.

The distance of a candidate is the largest error of any output, as a fraction of the bound. It can only grow with every
item that is looked at, so the candidate that is nearest so far is always the one to go on with: those that are far off
are evaluated on one item, and the order of the nearest ones is exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.cases.case import Item
from conformance.questions.identifying.candidates import Candidate
from conformance.questions.identifying.records import Record

RANKED = 5
"""How many of the nearest candidates are looked at on every item, beside those that match."""
NEAR, MUCH = 1000.0, 100.0
"""A candidate that doesn't match is named only if it is nearer than this, and so much nearer than the told row."""


@dataclass
class Answer:
    """How near a candidate comes: the largest error as a fraction of the bound, and where."""

    candidate: Candidate
    ratio: float = 0.0
    where: str = ""


class Ranking:
    """Distances of candidates on records, each computed once.

    Args:
        records: in the order in which candidates are held against them.
    """

    def __init__(self, records: Sequence[Record]):
        self.records = list(records)
        self._known: dict[tuple[Candidate, int], dict[str, float]] = {}

    def distances(self, candidate: Candidate, index: int) -> dict[str, float]:
        key = (candidate, index)
        if key not in self._known:
            self._known[key] = self.records[index].distances(candidate)
        return self._known[key]

    def answer(self, candidate: Candidate, indices: Iterable[int]) -> Answer:
        """The distance of a candidate on some of the records."""
        answer = Answer(candidate)
        for index in indices:
            _include(answer, self.records[index].item, self.distances(candidate, index))
        return answer

    def nearest(self, candidates: Sequence[Candidate], indices: Sequence[int] | None = None) -> list[Answer]:
        """All candidates that match, and of the others at least the nearest `RANKED` in all, nearest first.

        Those that match come in the order of ``candidates``.
        """
        order = range(len(self.records)) if indices is None else indices
        heap = [(0.0, position, 0, Answer(candidate)) for position, candidate in enumerate(candidates)]
        complete: list[tuple[float, int, Answer]] = []
        while heap:
            ratio, position, seen, answer = heapq.heappop(heap)
            if ratio > 1 and len(complete) >= RANKED:
                break
            if seen == len(order):
                complete.append((max(1.0, ratio), position, answer))
                continue
            _include(answer, self.records[order[seen]].item, self.distances(answer.candidate, order[seen]))
            heapq.heappush(heap, (answer.ratio, position, seen + 1, answer))
        return [answer for _, _, answer in sorted(complete, key=lambda entry: entry[:2])]

    def nearest_or(
        self, told: Candidate, answers: Sequence[Answer], indices: Sequence[int] | None = None
    ) -> list[Answer]:
        """The answers; the told row comes first where nothing matches and no other is both near and much nearer."""
        own = self.answer(told, range(len(self.records)) if indices is None else indices)
        others = [answer for answer in answers if answer.candidate != told]
        if answers[0].candidate == told:
            return [own, *others]
        best = answers[0].ratio
        return [*others, own] if best <= 1 or (best < NEAR and best * MUCH < own.ratio) else [own, *others]

    def order_by(self, candidate: Candidate) -> None:
        """Puts the records first in which a candidate is farthest off, stacks last: they take the longest."""
        each = [self.answer(candidate, [index]).ratio for index in range(len(self.records))]
        order = sorted(range(len(each)), key=lambda i: (self.records[i].stage == "stack", -each[i]))
        self._known = {(key, order.index(index)): value for (key, index), value in self._known.items()}
        self.records = [self.records[i] for i in order]

    def unexplained(self, candidate: Candidate, indices: Iterable[int]) -> float:
        """How much a candidate leaves unexplained: orders of magnitude beyond the bound, summed over outputs."""
        ratios = [r for index in indices for r in self.distances(candidate, index).values()]
        return float(sum(np.log10(min(max(r, 1.0), 1e12)) for r in ratios))


def _include(answer: Answer, item: Item, distances: dict[str, float]) -> None:
    for tensor, ratio in distances.items():
        if ratio > answer.ratio or not answer.where:
            answer.ratio, answer.where = ratio, f"{item.case.id}, {item.stage}, {tensor}"
