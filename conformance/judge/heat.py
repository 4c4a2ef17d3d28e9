"""Where a tensor is wrong: a coarse map of its error by token and channel.

The worst four elements of a tensor don't say whether they stand alone. A map of at most 32 x 32 cells does: a tail of
tokens that was never written, a block with another block's values and a channel that is off each have a shape of their
own. A tensor ``[batch, seq, ...]`` has its tokens as rows, and everything after them as columns. A weight's gradient
has its first axis as rows.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Context
from typing import Any

import numpy as np

from conformance.stages import STAGES

MOST = 32
"""Rows and columns of a map."""
SMALLEST = 1e-3
"""Errors below this are 0 in a map, in units of the bound."""
ROUNDING = Context(prec=2, rounding=ROUND_CEILING)
WEIGHTS = frozenset(name for stage in STAGES.values() for name in stage.weights)


def units(value: np.ndarray, expected: np.ndarray, allowed: np.ndarray, bound: float) -> np.ndarray:
    """The error of each element in units of the bound; infinite where an element isn't finite and should be.

    Args:
        value: float64 results.
        expected: as `rule.check_tensor` takes it, of the same shape.
        allowed: how far the last rounding may move each element.
    """
    judged, finite = np.isfinite(expected), np.isfinite(value)
    with np.errstate(invalid="ignore", over="ignore"):
        excess = np.where(judged & finite, np.maximum(np.abs(value - expected) - allowed, 0.0), 0.0)
        errors = excess / bound if bound > 0 else np.where(excess > 0, np.inf, 0.0)
    wrong = np.where(judged, ~finite, np.isnan(expected) & finite)
    return np.where(wrong, np.inf, errors)


def heat_map(tensor: str, errors: np.ndarray) -> dict[str, Any]:
    """The map of a tensor.

    Args:
        tensor: its name; a gradient's begins with ``d/``.
        errors: of each element in units of the bound, in the tensor's shape; at least one.
    """
    tokens = errors.ndim > 1 and tensor.removeprefix("d/") not in WEIGHTS
    rows = int(np.prod(errors.shape[: 2 if tokens else 1])) if errors.ndim > 1 else 1
    columns = errors.size // rows
    heat = Heat(rows, columns, tokens)
    heat.add(0, errors.reshape(rows, columns))
    return heat.record()


class Heat:
    """A map that is filled a few rows at a time.

    Args:
        rows, columns: of the tensor, as `heat_map` lays it out.
        tokens: whether rows are tokens.
    """

    def __init__(self, rows: int, columns: int, tokens: bool):
        self._rows, self._columns, self._tokens = rows, columns, tokens
        self._firsts = _firsts(rows), _firsts(columns)
        self._cells = np.zeros([len(firsts) for firsts in self._firsts])  # [rows of cells, columns of cells]

    def add(self, start: int, errors: np.ndarray) -> None:
        """Adds the errors ``[rows, columns]`` of the rows from ``start`` on, in units of the bound."""
        cells_of_rows, cells_of_columns = self._firsts
        if errors.size:
            numbers = np.arange(start, start + len(errors))
            cells = np.searchsorted(cells_of_rows, numbers, side="right") - 1
            np.maximum.at(self._cells, cells, np.maximum.reduceat(errors, cells_of_columns, axis=1))

    def record(self) -> dict[str, Any]:
        """The map as a report has it.

        The entry ``cells`` has the worst error of each cell, in units of the bound, rounded up to two digits: what is
        above 1 stays above it. ``rows`` and ``columns`` are the tensor's; cell k of R has the rows from k * rows // R
        on.
        """
        cells = [[_rounded_up(float(error)) for error in row] for row in self._cells]
        return {"tokens": self._tokens, "rows": self._rows, "columns": self._columns, "cells": cells}


def _firsts(count: int) -> np.ndarray:
    """The first index of each cell along an axis."""
    cells = min(count, MOST)
    return np.arange(cells) * count // cells


def _rounded_up(error: float) -> float:
    return 0.0 if error < SMALLEST else float(ROUNDING.create_decimal(repr(error)))
