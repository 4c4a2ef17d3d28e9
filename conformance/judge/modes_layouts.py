"""The layouts in memory in which callers hand arrays over, with the same values.

Models hold few packed arrays: x is a slice of what one fused projection wrote, has its axes in the order that the layer
before left, or is a part of a larger cache. What lies between the values is filled with NaN here, so that a result that
read it isn't finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

OFFSET, BESIDE = 3, 5
"""Elements of a wider last axis that lie before the values, and in all."""
Laid = tuple[np.ndarray, np.ndarray]
"""An array, and the whole buffer that it is a view of."""


def _buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def _slice(value: np.ndarray) -> Laid | None:
    """``wider[..., 3:3 + length]``"""
    length = value.shape[-1]
    whole = _buffer((*value.shape[:-1], length + BESIDE), value.dtype)
    view = whole[..., OFFSET : OFFSET + length]
    view[...] = value
    return view, whole


def _transposed(value: np.ndarray) -> Laid | None:
    """The last two axes are stored the other way round, as a weight that is kept transposed."""
    if value.ndim < 2:
        return None
    whole = np.ascontiguousarray(np.swapaxes(value, -1, -2))
    return np.swapaxes(whole, -1, -2), whole


def _seq_first(value: np.ndarray) -> Laid | None:
    """The first two axes are stored the other way round: [seq, batch, ...] read as [batch, seq, ...]."""
    if value.ndim < 3:
        return None
    whole = np.ascontiguousarray(np.swapaxes(value, 0, 1))
    return np.swapaxes(whole, 0, 1), whole


def _part(value: np.ndarray) -> Laid | None:
    """``larger[1:1 + batch, :seq]``, where the larger one has two rows and one position more."""
    longer = (value.shape[1] + 1,) if value.ndim > 1 else ()
    whole = _buffer((value.shape[0] + 2, *longer, *value.shape[2:]), value.dtype)
    view = whole[1 : 1 + value.shape[0]]
    view = view[:, : value.shape[1]] if value.ndim > 1 else view
    view[...] = value
    return view, whole


def _every_second(value: np.ndarray) -> Laid | None:
    """``wider[..., ::2]``"""
    whole = _buffer((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
    view = whole[..., ::2]
    view[...] = value
    return view, whole


def _expanded(value: np.ndarray) -> Laid | None:
    """Every axis along which the values are equal has the stride 0, as after ``expand``."""
    equal = [bool((value == value.take([0], axis)).all()) for axis in range(value.ndim)] if value.size else []
    if not any(equal):
        return None
    whole = np.ascontiguousarray(value[tuple(slice(0, 1) if same else slice(None) for same in equal)])
    strides = [0 if same else stride for same, stride in zip(equal, whole.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(whole, value.shape, strides), whole


EXPANDED = "expanded"
LAYOUTS: dict[str, Callable[[np.ndarray], Laid | None]] = {
    "slice": _slice,
    "transposed": _transposed,
    "part": _part,
    "seq-first": _seq_first,
    "every-second": _every_second,
    EXPANDED: _expanded,
}
"""By name; each gives None for an array that it has no form of."""
ROUNDS = len(LAYOUTS)
"""In so many rounds every array meets every layout."""


def layouts_of(names: Iterable[str], round: int) -> dict[str, str]:
    """The layout of each array in one round: neighbours have different ones."""
    kinds = list(LAYOUTS)
    return {name: kinds[(round + number) % ROUNDS] for number, name in enumerate(names)}


def lay(value: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, str]:
    """The values in a layout, the buffer that holds them, and the layout's name.

    An array that has no form of this layout (one axis can't be transposed) has the first of the others that it has.
    """
    if not value.ndim:
        return value, value, ""
    kinds = list(LAYOUTS)
    first = kinds.index(kind)
    for name in (*kinds[first:], *kinds[:first]):
        laid = LAYOUTS[name](value)
        if laid:
            return *laid, name
    return value, value, ""
