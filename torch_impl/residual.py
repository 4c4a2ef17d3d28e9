"""The residual matrix H from its logits (docs/mathematics.md, "The residual matrix").

Sinkhorn starts from a softmax over one axis and makes N iterations of two passes::

    P = softmax(logits, axis)                   # [n, n]; or exp(logits - their maximum over the axis normalised first)
    for _ in range(N):                          # the softmax takes the place of the first pass along the same axis
        P = P / P.sum(rows)                     # columns before rows where order = "columns-first"
        P = P / P.sum(columns)
    H = P                                       # [n, n]; with eps in the sums as guard says
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from torch_impl.config import MHCConfig

ROWS, COLUMNS = -1, -2
"""The axes of a pass over rows and over columns of ``[..., n, n]``."""
AXES = {"rows": ROWS, "columns": COLUMNS}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that coefficients are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_shape(name: str, value: Tensor, tail: tuple[int, ...]) -> None:
    """Checks the last axes of an argument.

    Raises:
        ValueError: they aren't ``tail``.
    """
    if tuple(value.shape[value.ndim - len(tail) :]) != tail or value.ndim < len(tail):
        raise ValueError(f"{name} must end in {list(tail)}, got {list(value.shape)}")


def _normalise(p: Tensor, axis: int, config: MHCConfig) -> Tensor:
    total, eps = p.sum(axis, keepdim=True), config.eps or 0.0  # [..., n, 1] or [..., 1, n]
    if config.guard in ("add", "denominator"):
        total = total + eps
    elif config.guard == "clip":
        total = total.clamp(min=eps)
    return p / total


def _largest(logits: Tensor, axis: int) -> Tensor:
    """The maximum along ``axis``, whose gradient goes to the first entry that it is."""
    return logits.gather(axis, logits.argmax(axis, keepdim=True))  # [..., n, 1] or [..., 1, n]


def _balanced(logits: Tensor, axis: int) -> Tensor:
    """A softmax along ``axis``, each line across it times a factor that makes its largest entry of order 1.

    Where no eps guards a sum the next pass, across ``axis``, divides the factor out again: it changes no result.
    Without it a line far below the others vanishes, and the pass divides 0 by 0.
    """
    across = ROWS + COLUMNS - axis
    level = logits - logits.amax(axis, keepdim=True).detach()  # [..., n, n]
    factor = level.amax(across, keepdim=True).detach()  # [..., n, 1] or [..., 1, n]
    return (level - factor).exp() / level.exp().sum(axis, keepdim=True)


def _limited(logits: Tensor, limit: float) -> Tensor:
    """The logits clipped; one that is exactly at the limit has its gradient still."""
    return logits.clamp(-limit, limit)


def sinkhorn(logits: Float[Tensor, "... n n"], config: MHCConfig) -> Float[Tensor, "... n n"]:
    """Makes ``config.iterations`` Sinkhorn iterations as written (docs/mathematics.md, "The residual matrix").

    It computes in float32 or wider, and in the logits' own dtype where ``config.matrix`` is ``"activation"``.

    Args:
        logits: ``[..., n, n]``.

    Returns:
        H in the dtype of the logits. The axis normalised last sums to 1 to rounding, the other need not.
    """
    first, second = (ROWS, COLUMNS) if config.order == "rows-first" else (COLUMNS, ROWS)
    z = logits if config.matrix == "activation" else logits.to(wide_dtype(logits.dtype))
    if config.logit_limit is not None:
        z = _limited(z, config.logit_limit)
    passes = [first, second] * (config.iterations or 0)
    start = AXES.get(str(config.softmax))
    if config.guard == "none":  # from exp(z) the first pass is a softmax too
        p, start = _balanced(z, first if start is None else start), first if start is None else start
    else:
        p = (z - _largest(z, first)).exp() if start is None else torch.softmax(z, start)
    if config.guard == "add":
        p = p + (config.eps or 0.0)
    for axis in passes[1:] if start == first else passes:  # the softmax takes the place of the first pass
        p = _normalise(p, axis, config)
    return p.to(logits.dtype)


def permutations(logits: Float[Tensor, "... factorial"], config: MHCConfig) -> Float[Tensor, "... n n"]:
    """Weights the n! permutation matrices by a softmax, in `itertools.permutations` order with ``P[i, p(i)] = 1``
    (docs/mathematics.md, "The residual matrix").

    Args:
        logits: ``[..., n!]``.

    Returns:
        H in the dtype of the logits.
    """
    weight = torch.softmax(logits.to(wide_dtype(logits.dtype)), -1)  # [..., n!]
    matrices = torch.zeros(config.residual_columns, config.streams, config.streams, dtype=torch.bool)  # [n!, n, n]
    for index, order in enumerate(itertools.permutations(range(config.streams))):
        for i, j in enumerate(order):
            matrices[index, i, j] = True
    H = torch.einsum("...p,pij->...ij", weight, matrices.to(logits.device, weight.dtype))
    return H.to(logits.dtype)


def residual_matrix(logits: Float[Tensor, ...], config: MHCConfig) -> Float[Tensor, "... n n"]:
    """Computes H from its logits (docs/mathematics.md, "The residual matrix").

    Args:
        logits: ``[..., n, n]`` for Sinkhorn, ``[..., n!]`` for permutations.

    Returns:
        H ``[..., n, n]`` in the dtype of the logits.

    Raises:
        ValueError: the logits have another shape, or the dialect's H is the identity and has no logits.
    """
    n = config.streams
    if config.residual == "identity":
        raise ValueError("residual='identity' has no logits: H is the identity")
    if config.residual == "permutations":
        check_shape("logits", logits, (config.residual_columns,))
        return permutations(logits, config)
    check_shape("logits", logits, (n, n))
    return sinkhorn(logits, config)
