"""Sinkhorn by operators: in place, tokens last, iterates made again on the way back.

With tokens last, ``[n, n, T]``, a sum over streams adds whole rows of tokens. For q = p / t with t = sum p, which a
guard may change, the way back is ``dp = (dq - sum(dq * q)) / t``; the sum is left out where ``t`` is the guard's own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.residual import COLUMNS, ROWS, in_dtype, passes, start_axis, wide_dtype

BLOCK = 2048
"""Tokens at a time on a CPU: all iterates of a block stay in its caches."""
Totals = tuple[Tensor, Tensor | None]
"""What a pass divided by ``[n, 1, T]`` or ``[1, n, T]``, and where that is the guard's."""


def blocks(tokens: int, most: int, device: torch.device) -> list[slice]:
    """Ranges of at most so many tokens; all of them on a device where each operator is launched."""
    size = max(1, most) if device.type == "cpu" else max(1, tokens)
    return [slice(begin, min(tokens, begin + size)) for begin in range(0, tokens, size)]


def block(value: Tensor, part: slice) -> Tensor:
    """A block of a value's tokens; the value itself where it is all of them, since a slice takes as long as a sum of a
    few thousand numbers.
    """
    return value if part.start == 0 and part.stop == value.shape[0] else value[part]


def balanced(logits: Tensor, config: MHCConfig) -> Tensor:
    """H ``[T, n, n]`` of wide logits ``[T, n, n]``; as `residual.sinkhorn` writes it."""
    held = blocks(logits.shape[0], BLOCK, logits.device)
    if len(held) == 1:
        return _balanced_block(logits, config).contiguous()
    H = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in held:
        H[part] = _balanced_block(logits[part], config)
    return H


def _balanced_block(logits: Tensor, config: MHCConfig) -> Tensor:
    """H of a block of tokens, a view of a tensor with the tokens last."""
    p = _start(_limited(_tokens_last(logits), config), config)[0]
    n, tokens = p.shape[1:]
    lines = p, p  # what is summed along the first and along the second axis
    if config.guard in ("add", "denominator"):
        # eps is the last term of every sum, in a further line that no pass changes: an operator less in each pass.
        whole = torch.nn.functional.pad(p, (0, 0, 0, 1, 0, 1), value=config.eps or 0.0)
        lines = whole.narrow(1, 0, n), whole.narrow(0, 0, n)
        p = lines[0].narrow(0, 0, n)
    totals = p.new_empty(1, n, tokens), p.new_empty(n, 1, tokens)  # by axis, written by every pass
    clipped, least = config.guard == "clip", config.eps or 0.0
    for axis in _passes(config):
        total = torch.sum(lines[axis], axis, True, out=totals[axis])
        p.div_(total.clamp_(min=least) if clipped else total)
    return p.permute(2, 0, 1)


def pulled(logits: Tensor, config: MHCConfig, cotangent: Tensor) -> Tensor:
    """The cotangent of the logits ``[T, n, n]``."""
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    axes, eps = _passes(config), _eps(logits, config)
    for part in blocks(logits.shape[0], BLOCK, logits.device):
        raw = _tokens_last(block(logits, part))
        z = _limited(raw, config)
        p, soft = _start(z, config)
        first = p
        kept, totals = list[Tensor](), list[Totals]()
        for axis in axes:
            totals.append(_total(p, axis, eps, config))
            p = p / totals[-1][0]
            kept.append(p)
        g = _tokens_last(block(cotangent, part)).to(p.dtype, copy=True)
        for axis, q, (total, guarded) in zip(reversed(axes), reversed(kept), reversed(totals), strict=True):
            inner = q.mul_(g).sum(axis, keepdim=True)
            g.sub_(inner if guarded is None else inner.masked_fill_(guarded, 0.0)).div_(total)
        g = _of_start(g, z, first, soft, config)
        if config.logit_limit is not None:
            g.masked_fill_((raw.abs() <= config.logit_limit).logical_not_(), 0.0)  # NaN's too, as `clamp` has it
        result[part] = g.permute(2, 0, 1)
    return result


def _tokens_last(value: Tensor) -> Tensor:
    """``[T, n, n]`` to a packed ``[n, n, T]``."""
    return value.permute(1, 2, 0).contiguous()


def _axis(axis: int) -> int:
    """An axis of ``[..., n, n]`` as one of ``[n, n, T]``."""
    return {ROWS: 1, COLUMNS: 0}[axis]


@functools.cache
def _passes(config: MHCConfig) -> tuple[int, ...]:
    return tuple(_axis(axis) for axis in passes(config))


def _limited(logits: Tensor, config: MHCConfig) -> Tensor:
    return logits if config.logit_limit is None else logits.clamp(-config.logit_limit, config.logit_limit)


def _start(z: Tensor, config: MHCConfig) -> tuple[Tensor, Tensor | None]:
    """What the passes begin with, a tensor of its own, and the softmax that it comes from where it comes from one."""
    start = start_axis(config)
    if start is None:
        return (z - z.amax(_passes(config)[0], keepdim=True)).exp_(), None
    axis = _axis(start)
    soft = torch.softmax(z, axis)
    if config.guard == "none":  # each line across times a factor, which the next pass divides out again
        level = z - z.amax(axis, keepdim=True)
        factor = level.amax(1 - axis, keepdim=True)
        return (level - factor).exp_().div_(level.exp().sum(axis, keepdim=True)), soft
    return soft + (config.eps or 0.0) if config.guard == "add" else soft.clone(), soft


def _of_start(g: Tensor, z: Tensor, p: Tensor, soft: Tensor | None, config: MHCConfig) -> Tensor:
    """The cotangent of the limited logits from that of the beginning ``p``."""
    start = start_axis(config)
    if start is None:
        axis = _passes(config)[0]
        g.mul_(p)
        largest = z.argmax(axis, keepdim=True)  # the maximum that was taken off has its gradient at one entry
        return g.scatter_add_(axis, largest, -g.sum(axis, keepdim=True))
    assert soft is not None
    own = p if config.guard == "none" else soft
    g.mul_(own)
    return g.sub_(soft * g.sum(_axis(start), keepdim=True))


def _eps(logits: Tensor, config: MHCConfig) -> Tensor:
    """The eps of the guard as a tensor: a number is made one, and converted, at each pass."""
    return torch.full((), config.eps or 0.0, dtype=logits.dtype, device=logits.device)


def _total(p: Tensor, axis: int, eps: Tensor, config: MHCConfig) -> Totals:
    """What a pass along an axis divides by."""
    total = p.sum(axis, keepdim=True)
    if config.guard in ("add", "denominator"):
        return total.add_(eps), None
    if config.guard == "clip":
        guarded = total < eps
        return total.clamp_(min=eps), guarded
    return total, None


def balance(logits: Tensor, config: MHCConfig) -> Tensor:
    """H ``[..., n, n]`` of logits in any dtype, which it has too."""
    n = config.streams
    wide = in_dtype(logits.reshape(-1, n, n), wide_dtype(logits.dtype))
    return in_dtype(balanced(wide, config), logits.dtype).view(logits.shape)


def balance_back(logits: Tensor, config: MHCConfig, cotangent: Tensor) -> Tensor:
    """The cotangent of the logits ``[..., n, n]`` from that of H."""
    n, wide = config.streams, wide_dtype(logits.dtype)
    z, g = (value.reshape(-1, n, n).to(wide) for value in (logits, cotangent))
    return pulled(z, config, g).to(logits.dtype).view(logits.shape)
