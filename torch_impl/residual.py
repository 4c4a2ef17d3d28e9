"""The residual matrix H from its logits (docs/mathematics.md, "The residual matrix").

Sinkhorn starts from a softmax over one axis and makes N iterations of two passes::

    P = softmax(logits, axis)                   # [n, n]; or exp(logits - their maximum over the axis normalised first)
    for _ in range(N):                          # the softmax takes the place of the first pass along the same axis
        P = P / P.sum(rows)                     # columns before rows where order = "columns-first"
        P = P / P.sum(columns)
    H = P                                       # [n, n]; with eps in the sums as guard says
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

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


def in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``; without an operator where it has that dtype, since one that does nothing takes as long as a
    small sum.
    """
    return value if value.dtype == dtype else value.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products aren't rounded, whatever autocast the caller is in; not every device has one.

    Entering autocast's own takes as long as three operators, so it is entered where there is something to turn off.
    """
    kind = device.type
    rounds = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if rounds else nullcontext()


def check_shape(name: str, value: Tensor, tail: tuple[int, ...]) -> None:
    """Checks the last axes of an argument.

    Raises:
        ValueError: they aren't ``tail``.
    """
    if value.shape[-len(tail) :] != tail:
        raise ValueError(f"{name} must end in {list(tail)}, got {list(value.shape)}")


def _first_axis(config: MHCConfig) -> int:
    return ROWS if config.order == "rows-first" else COLUMNS


def start_axis(config: MHCConfig) -> int | None:
    """The axis of the softmax that Sinkhorn starts from; None where it starts from exp."""
    start = AXES.get(str(config.softmax))
    if start is None and config.guard == "none":  # from exp(z) the first pass is a softmax too
        return _first_axis(config)
    return start


def passes(config: MHCConfig) -> list[int]:
    """The axes of Sinkhorn's passes after its start, one after the other."""
    first = _first_axis(config)
    every = [first, ROWS + COLUMNS - first] * (config.iterations or 0)
    return every[1:] if start_axis(config) == first else every  # the softmax takes the place of the first pass


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
    first, start = _first_axis(config), start_axis(config)
    z = logits if config.matrix == "activation" else logits.to(wide_dtype(logits.dtype))
    if config.logit_limit is not None:
        z = _limited(z, config.logit_limit)
    if start is None:
        p = (z - _largest(z, first)).exp()
    else:
        p = _balanced(z, start) if config.guard == "none" else torch.softmax(z, start)
    if config.guard == "add":
        p = p + (config.eps or 0.0)
    for axis in passes(config):
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
    matrices = permutation_matrices(config.streams, logits.device).to(weight.dtype)
    H = torch.einsum("...p,pij->...ij", weight, matrices)
    return H.to(logits.dtype)


def permutation_matrices(n: int, device: torch.device) -> Tensor:
    """Every permutation matrix ``[n!, n, n]`` in `itertools.permutations` order, made on the device.

    A table that is made on the host would be sent there in every forward pass, and no CUDA graph can hold that.
    """
    number = torch.arange(math.factorial(n), device=device)
    # The digits of a permutation's number in the factorial system say which of the values left comes next.
    images = [number // math.factorial(n - 1 - i) % (n - i) for i in range(n)]
    for i in range(n - 2, -1, -1):
        images[i + 1 :] = [later + (later >= images[i]) for later in images[i + 1 :]]
    return torch.stack(images, -1).unsqueeze(-1) == torch.arange(n, device=device)  # [n!, n] -> [n!, n, n]


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
