"""The layer's heavy parts as autograd functions of their own, for eager calls.

Written out as operators, a site keeps float32 copies of a narrow x and every iterate of Sinkhorn, and reads x once for
each of them. Here x is read a block of tokens at a time, and what is small is computed again on the way back:

* `site.Site`: from x to u and the coefficients; keeps x and m + 1 sums a token;
* `mixing.Mixing`: from y, x and the coefficients to the streams; keeps its inputs;
* `balancing.Balancing`: Sinkhorn; keeps the logits.

Each has a plain twin of operators, which serves what an autograd function doesn't (`transforms`): derivatives of
derivatives, forward mode and `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torch_impl.residual import wide_dtype

BACKENDS = ("auto", "plain", "lean")
KINDS = (Tensor, torch.nn.Parameter)
FEW = 1 << 21
"""Numbers of x below which plain operators are faster where no gradient is asked for: a function costs some Python."""


def chosen(backend: str, x: Tensor, others: Iterable[Tensor], reason: str = "") -> bool:
    """Whether a call takes the lean path.

    Args:
        backend: ``"auto"`` takes it wherever it can be taken and pays, ``"plain"`` never.
        x: the streams, or the logits.
        others: further tensors that go in.
        reason: why the caller can't take it; empty where he can.

    Raises:
        ValueError: ``backend`` is another word, or ``"lean"`` and the path can't be taken.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "plain":
        return False
    others = tuple(others)
    if backend == "auto" and x.numel() < FEW and not _differentiated(x, others):
        return False
    reason = reason or _hindrance(x, others)
    if reason and backend == "lean":
        raise ValueError(f"backend='lean' doesn't go with {reason}: take 'auto', which then runs plain operators")
    return not reason


def _differentiated(x: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a gradient of any of them may be asked for."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in (x, *others))


def _hindrance(x: Tensor, others: Iterable[Tensor]) -> str:
    """Why these tensors can't take the lean path; empty where they can."""
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export, which plan memory themselves"
    if any(type(value) not in KINDS for value in (x, *others)):
        return f"a subclass of Tensor ({type(x).__name__})"
    if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" and wide_dtype(x.dtype) == torch.float32:
        return "TF32, to which its products outside of the projections would be rounded too"
    return ""
