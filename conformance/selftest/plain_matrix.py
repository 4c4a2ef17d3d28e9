"""The residual matrix of the plain layer, a method a step."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from conformance.oracle.residual import POTENTIALS_UP_TO
from conformance.selftest.arithmetic import Arithmetic


class ResidualMatrix(Arithmetic):
    """H from its logits, on values, on logarithms or on potentials."""

    def axes(self, c: Any) -> tuple[int, int]:
        return (-1, -2) if c.order == "rows-first" else (-2, -1)

    def softmax_axis(self, c: Any) -> int | None:
        return {"rows": -1, "columns": -2}.get(c.softmax)

    def iterations(self, c: Any) -> int:
        return c.iterations

    def passes(self, c: Any) -> list[int]:
        """The axes of all passes after the start."""
        every = list(self.axes(c)) * self.iterations(c)
        return every[1:] if self.softmax_axis(c) == every[0] else every

    def shift(self, logits: Tensor, axis: int, c: Any) -> Tensor:
        largest = logits.amax(axis, keepdim=True)
        return logits - (largest if c.softmax == "none" else largest.detach())

    def softmax(self, logits: Tensor, axis: int, c: Any) -> Tensor:
        e = self.exp(self.shift(logits, axis, c))
        return self.divide(e, self.choice.sums.total(e, axis))

    def eps(self, c: Any) -> float:
        return c.eps

    def start(self, logits: Tensor, c: Any) -> Tensor:
        axis = self.softmax_axis(c)
        if axis is None:
            return self.exp(self.shift(logits, self.axes(c)[0], c))
        p = self.softmax(logits, axis, c)
        return p + self.eps(c) if c.guard == "add" else p

    def guarded(self, total: Tensor, c: Any) -> Tensor:
        if c.guard in ("add", "denominator"):
            return total + self.eps(c)
        return total.clamp(min=self.eps(c)) if c.guard == "clip" else total

    def normalise(self, p: Tensor, axis: int, c: Any) -> Tensor:
        return self.divide(p, self.guarded(self.choice.sums.total(p, axis), c))

    def iterate(self, p: Tensor, c: Any) -> Tensor:
        for axis in self.passes(c):
            p = self.normalise(p, axis, c)
        return p

    def iterate_logarithms(self, logits: Tensor, c: Any) -> Tensor:
        """The same iterations on log P, with guard "none"."""
        axis = self.softmax_axis(c)
        level = logits if axis is None else torch.log_softmax(logits, axis)
        for axis in self.passes(c):
            level = level - torch.logsumexp(level, axis, keepdim=True)
        return self.exp(level)

    def iterate_potentials(self, logits: Tensor, c: Any) -> Tensor:
        """The same on the logarithms of the scalings of rows and columns, with guard "none"."""
        start = self.softmax_axis(c)
        potential: dict[int, Any] = {-1: 0.0, -2: 0.0}
        for axis in [*([] if start is None else [start]), *self.passes(c)]:
            potential[axis] = -torch.logsumexp(logits + potential[-3 - axis], axis, keepdim=True)
        return self.exp(logits + potential[-1] + potential[-2])

    def limited(self, logits: Tensor, c: Any) -> Tensor:
        return logits if c.logit_limit is None else logits.clamp(-c.logit_limit, c.logit_limit)

    def sinkhorn(self, logits: Tensor, c: Any) -> Tensor:
        logits = self.limited(logits, c)
        plain = c.guard == "none" and c.matrix == "float32"
        if self.choice.potentials and plain and bool((logits.abs() <= POTENTIALS_UP_TO).all()):
            return self.iterate_potentials(logits, c)
        if self.choice.log_domain and plain:
            return self.iterate_logarithms(logits, c)
        return self.iterate(self.start(logits, c), c)

    def permutations(self, logits: Tensor, c: Any) -> Tensor:
        n = c.streams
        weight = self.softmax(logits, -1, c)
        orders = list(itertools.permutations(range(n)))
        entries = [
            self.choice.sums.total(weight[..., [k for k, order in enumerate(orders) if order[i] == j]], -1)
            for i, j in itertools.product(range(n), repeat=2)
        ]
        return torch.cat(entries, -1).unflatten(-1, (n, n))

    def matrix(self, logits: Tensor, c: Any, kept: torch.dtype) -> Tensor:
        """H from its logits, whose passes run in the dtype that coefficients are kept in where the row says so."""
        made_in = kept if c.matrix == "activation" else self.wide(logits.dtype)
        return (self.permutations if c.residual == "permutations" else self.sinkhorn)(logits.to(made_in), c)
