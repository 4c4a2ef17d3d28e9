"""The layer's heavy parts as autograd functions of their own, each with a derivative that recomputes what is small.

Written out as operators, a site keeps float32 copies of a narrow x and every iterate of Sinkhorn, and reads x once for
each of them. Here:

* `site.Site`: from x to u and the coefficients; keeps x and m + 1 sums a token;
* `mixing.Mixing`: from y, x and the coefficients to the streams; keeps its inputs;
* `crossing.Crossing`: `mixing` of a site and `site` of the next; keeps what both keep;
* `balancing.Balancing`: Sinkhorn; keeps the logits.

What computes them and their cotangents is an `Engine`: `torch_impl.lean`, by operators on blocks of tokens, or
`torch_impl.kernels`, by Triton. Each function has a plain twin of operators, which serves what an autograd function
doesn't (`transforms`): derivatives of derivatives, forward mode and `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.residual import wide_dtype

if TYPE_CHECKING:
    from torch_impl.fused.site import Reading

BACKENDS = ("auto", "plain", "lean", "triton")
KINDS = {Tensor, torch.nn.Parameter}


class BackendError(ValueError):
    """A backend that was asked for can't be had for this call."""


@runtime_checkable
class Engine(Protocol):
    """What computes the functions of this package. Shapes are those of the functions, T tokens flattened."""

    def read(
        self, x: Tensor, carried: Tensor | None, reading: Reading, scale: Tensor | list[Tensor],
        shift: Tensor | list[Tensor], norm: Tensor | None, phis: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """u ``[T, dim]``, pre, post ``[T, n]``, H ``[T, n, n]`` and the sums ``[T, m + 1]``; empty where not wanted.

        Args:
            scale, shift: ``[m]``; where nothing is differentiated, the lean path gets those of each projection, and
                what it returns in place of the sums isn't used.
        """
        ...

    def read_back(
        self, x: Tensor, carried: Tensor | None, reading: Reading, weights: Sequence[Tensor | None], sums: Tensor,
        cotangents: Sequence[Tensor | None], wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """The cotangents of x, carried, None, scale, shift, norm and each projection."""
        ...

    def mix(self, y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool) -> Tensor:
        """The streams ``[..., n, dim]``."""
        ...

    def mix_back(
        self, y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, cotangent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The cotangents of y, x, post and H."""
        ...

    def mix_read(
        self, y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, carried: Tensor | None,
        reading: Reading, scale: Tensor, shift: Tensor, norm: Tensor | None, phis: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The streams ``[..., n, dim]`` that a site with the configuration ``mixer`` writes, and `read` of them."""
        ...

    def balance(self, logits: Tensor, config: MHCConfig) -> Tensor:
        """H ``[..., n, n]``."""
        ...

    def balance_back(self, logits: Tensor, config: MHCConfig, cotangent: Tensor) -> Tensor:
        """The cotangent of the logits."""
        ...


def engine(name: str) -> Engine:
    """The engine of that name, ``"lean"`` or ``"triton"``; one that isn't asked for isn't imported."""
    if name == "lean":
        from torch_impl import lean

        return cast(Engine, lean)
    from torch_impl.kernels import engine as kernels

    return cast(Engine, kernels)


def chosen(backend: str, x: Tensor, others: Iterable[Tensor], lean: str, triton: Callable[[], str]) -> str:
    """The engine that a call takes; empty for plain operators.

    Args:
        backend: ``"auto"`` takes the lean path wherever it can be taken, ``"plain"`` never. Nothing but
            ``"triton"`` takes kernels.
        x: the streams, or the logits.
        others: further tensors that go in.
        lean: why the caller can't take the lean path; empty where he can.
        triton: says why he can't take kernels.

    Raises:
        ValueError: ``backend`` is another word.
        BackendError: what it names can't be taken.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "plain":
        return ""
    others = tuple(others)
    if backend == "triton":
        unseen = torch.compiler.is_compiling()  # a traced tensor has a class of the compiler
        reason = triton() or ("" if unseen else _subclass(x, others)) or _elsewhere(x, others)
    else:
        reason = lean or _hindrance(x, others)
    if reason and backend != "auto":
        raise BackendError(f"backend={backend!r} doesn't go with {reason}: take 'auto', which finds a path that does")
    if reason:
        return ""
    return "triton" if backend == "triton" else "lean"


def _subclass(x: Tensor, others: Iterable[Tensor]) -> str:
    if {type(x), *map(type, others)} <= KINDS:
        return ""
    return f"a subclass of Tensor ({type(x).__name__})"


def _elsewhere(x: Tensor, others: Iterable[Tensor]) -> str:
    """An operator of our own runs where one of its tensors is, wherever the others are."""
    apart = {str(value.device) for value in others if value.device != x.device}
    return f"tensors on {', '.join(sorted(apart))} beside x on {x.device}" if apart else ""


def _hindrance(x: Tensor, others: Iterable[Tensor]) -> str:
    """Why these tensors can't take the lean path; empty where they can."""
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export, which plan memory themselves"
    if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" and wide_dtype(x.dtype) == torch.float32:
        return "TF32, to which its products outside of the projections would be rounded too"
    return _subclass(x, others)
