"""What adapters in mlx share: arrays to mlx and back, and vector-Jacobian products on its CPU device.

It is public (docs/contract.md), and imports no implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import mlx.core as mx  # pyright: ignore[reportMissingImports]
import numpy as np

from conformance.interface import Arrays, Result, asked_for
from conformance.stages import STAGES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
mx.set_default_device(mx.cpu)


def to_mlx(value: np.ndarray) -> Any:
    """A copy in order, since mlx has no strides of a caller; bfloat16 by way of its bits."""
    whole = np.ascontiguousarray(value).reshape(value.shape)
    if value.dtype == BFLOAT16:
        return mx.array(whole.view(np.uint16)).view(mx.bfloat16)
    return mx.array(whole)


def to_numpy(value: Any) -> np.ndarray:
    return np.array(value.view(mx.uint16)).view(BFLOAT16) if value.dtype == mx.bfloat16 else np.array(value)


def vector_jacobian(
    stage: str, function: Callable[[dict[str, Any]], dict[str, Any]], inputs: Arrays, cotangents: Arrays | None
) -> Result:
    """Outputs of ``function`` and the gradients of its inputs by ``mx.vjp``; zeros where it ignores one."""
    arrays = {k: to_mlx(v) for k, v in inputs.items()}
    wanted = [k for k in arrays if k not in STAGES[stage].constants and asked_for(k)]
    names: list[str] = []

    def listed(*values: Any) -> list[Any]:
        outputs = function({**arrays, **dict(zip(wanted, values, strict=True))})
        names[:] = outputs
        return list(outputs.values())

    primals = [arrays[k] for k in wanted]
    if cotangents is None:
        return {k: to_numpy(v) for k, v in zip(names, listed(*primals), strict=True)}, {}
    shapes = function(arrays)
    cotangents_in = [to_mlx(cotangents[k]).astype(v.dtype) for k, v in shapes.items()]
    outputs, gradients = mx.vjp(listed, primals, cotangents_in)
    return (
        {k: to_numpy(v) for k, v in zip(names, outputs, strict=True)},
        {k: to_numpy(v) for k, v in zip(wanted, gradients, strict=True)},
    )
