"""What kernels are launched with: block sizes, the split of dim, and the configuration as they take it.

The split depends on dim alone; only how many programs share it depends on how many tokens there are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.fused import BackendError
from torch_impl.kernels import somewhere
from torch_impl.residual import ROWS, passes, permutation_matrices, start_axis

FEW = 2048
"""Tokens up to which the chunks of dim go to programs of their own; above, the tokens alone fill a GPU."""
SEGMENT, MOST_SEGMENTS = 2048, 32
"""Tokens that one program adds up into its part of the projections' cotangent, and how many parts there are at most."""
MOST_CHUNKS = 8
NUMBERS = 1024
"""Channels times tokens of a block, where no product of matrices is in it: 8 numbers a thread."""
KEPT = 4096
"""Totals of Sinkhorn's passes that a program keeps on the way back."""


class Columns(NamedTuple):
    """The columns of the sums as kernels hold them.

    Attributes:
        HEAD: they are those of a head's gates alone.
        N, NP: streams, and the power of two that they are held as.
        R, WIDTH: columns of H's projection as they are held, and how many of them count; 0 where there are none.
    """

    HEAD: bool
    N: int
    NP: int
    R: int
    WIDTH: int


class Blocks(NamedTuple):
    """Tokens and channels of a program's block.

    Attributes:
        tokens, channels: of kernels with products.
        mixed: half of them, for a kernel that holds more beside them, such as all streams of a block.
        last: channels of u that are made after the coefficients.
        plain_tokens, plain_channels: of kernels without products.
    """

    tokens: int
    channels: int
    mixed: int
    last: int
    plain_tokens: int
    plain_channels: int


class Split(NamedTuple):
    """How a sum over dim is split: chunks of ``size`` channels, of which ``parts`` programs take ``each``."""

    size: int
    each: int
    parts: int


class Recipe(NamedTuple):
    """The configuration as Sinkhorn's kernels take it."""

    numbers: dict[str, Any]
    constants: dict[str, Any]


def blocks_of(count: int, size: int) -> int:
    """How many blocks of a size hold so many."""
    return -(-count // size)


def _power(value: int) -> int:
    """The next power of two."""
    return 1 << max(0, value - 1).bit_length()


def padded(streams: int) -> int:
    """Streams as kernels hold them."""
    return 4 if streams <= 4 else 8


def fills(streams: int) -> bool:
    """Whether they are held without padding, as 4 and 8 are."""
    return streams == padded(streams)


@functools.cache
def columns_of(config: MHCConfig, head: bool) -> Columns:
    """The columns of a site, or of a head."""
    width = 0 if head else config.residual_columns
    return Columns(head, config.streams, padded(config.streams), max(16, _power(width)) if width else 0, width)


def streams_alone(streams: int) -> Columns:
    """Of a kernel that has no sums."""
    return Columns(False, streams, padded(streams), 0, 0)


@functools.cache
def blocks(dim: int, columns: Columns, large: bool) -> Blocks:
    """Block sizes for a width; large ones for the interpreter, where each operator costs the same whatever its size."""
    width = max(16, _power(dim))
    most = 4096 if large else NUMBERS // (2 if columns.N > 4 else 1)
    plain = min(most, width)
    if large:
        return Blocks(64, min(512, width), min(512, width), plain, most // plain, plain)
    return Blocks(16, min(64, width), min(32, width), min(128, width), most // plain, plain)


def split(dim: int, tokens: int, block: int) -> Split:
    """At most `MOST_CHUNKS` chunks of whole blocks, of at least 1,024 channels; one program each if tokens are few."""
    count = max(1, min(MOST_CHUNKS, dim // 1024))
    size = blocks_of(blocks_of(dim, count), block) * block
    count = blocks_of(dim, size)
    return Split(size, 1, count) if tokens <= FEW else Split(size, count, 1)


def segments_of(tokens: int) -> tuple[int, int]:
    """How many segments of how many tokens the projections' cotangent is summed over."""
    size = max(SEGMENT, blocks_of(blocks_of(tokens, MOST_SEGMENTS), 64) * 64)  # a multiple of a block's tokens
    return blocks_of(tokens, size), size


@functools.cache
def sinkhorn(config: MHCConfig) -> Recipe:
    """What Sinkhorn's kernels take; for another residual matrix, what they don't look at."""
    if config.residual != "sinkhorn":
        numbers = {"eps": 0.0, "limit": 0.0, "pairs": 0}
        return Recipe(numbers, {"START": 0, "A": 1, "ODD": False, "GUARD": "none", "LIMITED": False})
    axes, start = [2 if axis == ROWS else 1 for axis in passes(config)], start_axis(config)
    numbers = {"eps": float(config.eps or 0), "limit": float(config.logit_limit or 0), "pairs": len(axes) // 2}
    constants = {
        "START": 0 if start is None else 2 if start == ROWS else 1,
        "A": axes[0],
        "ODD": len(axes) % 2 == 1,
        "GUARD": config.guard,
        "LIMITED": config.logit_limit is not None,
    }
    return Recipe(numbers, constants)


def kept_of(config: MHCConfig) -> dict[str, int]:
    """The block of tokens, and the places of totals, of a kernel that goes back through Sinkhorn.

    Padding takes registers: masks of it are held beside the matrices, so that half the tokens go into a block.
    """
    places = _power(max(2, 2 * (config.iterations or 1)))
    most = min(16, KEPT // (places * padded(config.streams)))
    return {"B": max(1, most if fills(config.streams) else most // 2), "K": places}


def options_of(columns: Columns, first: bool = False) -> dict[str, int]:
    """How a program with products is compiled; other settings spill on one target or another.

    Args:
        first: whether x is mixed first, or normed and rounded.
    """
    if first:
        return {"num_warps": 8, "num_stages": 1}
    return {"num_warps": 8, "num_stages": 2} if columns.R > 16 else {"num_warps": 4, "num_stages": 3}


def registers(most: int, told: bool = True) -> dict[str, int]:
    """How many registers a thread may have, where the compiler is told.

    Where it isn't, ptxas may keep a word or two of a thread in memory, so that more programs run at a time.
    """
    return {"maxnreg": most} if told else {}


def plan_of_sums(columns: Columns, reads: bool, wide: bool) -> tuple[bool, dict[str, int]]:
    """Whether `site.sums_kernel` takes half the channels of a block, and the registers that the compiler is told.

    Where neither is said, in 16 bits with 4 streams and with 8 that are not read, it compiles without a spill as it is.

    Args:
        reads: whether carried gates read u on the way, which is held beside the sums.
        wide: whether x is in float32.
    """
    if columns.HEAD:
        return False, registers(96, not fills(columns.N))
    narrow = not fills(columns.N) or (reads and (wide or columns.N > 4))
    return narrow, registers(128, narrow and not (wide and columns.R > 32))


def plan_of_back(columns: Columns, wide: bool) -> tuple[bool, dict[str, int]]:
    """Whether `site_back.large_back_kernel` takes half the channels of a block, and how it is compiled then."""
    narrow = wide and (not fills(columns.N) or columns.R == 32)
    return narrow, {"num_warps": 8} if narrow else {}


def projections(matrix: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """The projections ``[n * C, m]`` as the kernels read them: gates ``[n * C, 16]``, the rest ``[n * C, R]``."""
    n, NP = columns.N, columns.NP
    gates = matrix.new_zeros(len(matrix), 16)
    gates[:, :n] = matrix[:, :n]
    if columns.HEAD:
        return gates, gates
    gates[:, NP : NP + n] = matrix[:, n : 2 * n]
    if not columns.R:
        return gates, gates
    rest = matrix.new_zeros(len(matrix), columns.R)
    rest[:, : columns.WIDTH] = matrix[:, 2 * n :]
    return gates, rest


def table(config: MHCConfig, columns: Columns, like: Tensor) -> Tensor:
    """The permutation matrices ``[R, NP * NP]``; what no kernel looks at for another residual matrix."""
    if config.residual != "permutations" or columns.HEAD:
        return like
    n, NP = columns.N, columns.NP
    matrices = like.new_zeros(columns.R, NP, NP)
    matrices[: columns.WIDTH, :n, :n] = permutation_matrices(n, like.device).to(like.dtype)
    return matrices


def kind(config: MHCConfig, head: bool) -> str:
    """How H is made; a head has none."""
    return "none" if head else config.residual


def aligned(value: Tensor) -> Tensor:
    """The tensor packed, and at an address that is a multiple of 16.

    Triton compiles a kernel anew for another address, with another order of its sums.
    """
    value = value.contiguous()
    return value if value.is_meta or value.data_ptr() % 16 == 0 else value.clone()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first argument, which need not be the current one.

    What compiles kernels for a GPU that isn't there takes this function's place.

    Raises:
        BackendError: there is neither a GPU nor the interpreter.
    """
    reason = somewhere(arguments[0])
    if reason:
        raise BackendError(f"backend='triton' doesn't go with {reason}")
    if torch.version.hip:  # its compiler has no such option, and needs none
        constants.pop("maxnreg", None)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)
