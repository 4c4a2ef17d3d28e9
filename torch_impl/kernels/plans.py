"""What kernels are launched with: block sizes, the split of dim, and the configuration as they take it.

The split depends on dim alone; only how many programs share it depends on how many tokens there are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.residual import ROWS, passes, permutation_matrices, start_axis

FEW = 2048
"""Tokens below which the chunks of dim go to programs of their own; above, the tokens alone fill a GPU."""
SEGMENT = 2048
"""Tokens that one program adds up into its part of the projections' cotangent."""
MOST_CHUNKS = 8
NUMBERS = 1024
"""Channels times tokens of a block, where no product of matrices is in it: 8 numbers a thread."""


class Blocks(NamedTuple):
    """Tokens and channels of a program's block: of the kernels with products, and of those without."""

    tokens: int
    channels: int
    plain_tokens: int
    plain_channels: int


def blocks_of(count: int, size: int) -> int:
    """How many blocks of a size hold so many."""
    return -(-count // size)


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


@functools.cache
def blocks(dim: int, streams: int, large: bool) -> Blocks:
    """Block sizes for a width; large ones for the interpreter, where each operator costs the same whatever its size."""
    most = 4096 if large else NUMBERS // (2 if streams > 4 else 1)
    plain = min(most, max(16, _power(dim)))
    tokens, channels = (64, 512) if large else (16, 64)
    return Blocks(tokens, min(channels, max(16, _power(dim))), max(1, most // plain), plain)


class Split(NamedTuple):
    """How a sum over dim is split: chunks of ``size`` channels, of which ``parts`` programs take ``each``."""

    size: int
    each: int
    parts: int


def split(dim: int, tokens: int, block: int) -> Split:
    """At most `MOST_CHUNKS` chunks of whole blocks, of at least 1,024 channels; one program each if tokens are few."""
    count = max(1, min(MOST_CHUNKS, dim // 1024))
    size = blocks_of(blocks_of(dim, count), block) * block
    count = blocks_of(dim, size)
    return Split(size, 1, count) if tokens <= FEW else Split(size, count, 1)


class Recipe(NamedTuple):
    """The configuration as the kernels take it."""

    numbers: dict[str, Any]
    constants: dict[str, Any]


def padded(streams: int) -> int:
    """Streams as kernels hold them."""
    return 4 if streams <= 4 else 8


@functools.cache
def sinkhorn(config: MHCConfig) -> Recipe:
    """What the Sinkhorn kernels take; for another residual matrix, what they don't look at."""
    if config.residual != "sinkhorn":
        numbers = {"eps": 0.0, "limit": 0.0, "pairs": 0}
        shape = {"START": 0, "A": 1, "ODD": False, "GUARD": "none", "LIMITED": False}
    else:
        axes = [2 if axis == ROWS else 1 for axis in passes(config)]
        start = start_axis(config)
        numbers = {"eps": config.eps or 0.0, "limit": config.logit_limit or 0.0, "pairs": len(axes) // 2}
        # With one iteration after its softmax a row has a single pass, which is then both first and last.
        shape = {
            "START": 0 if start is None else 2 if start == ROWS else 1,
            "A": axes[0],
            "ODD": len(axes) % 2 == 1,
            "GUARD": config.guard,
            "LIMITED": config.logit_limit is not None,
        }
    return Recipe(numbers, {**shape, "N": config.streams, "NP": padded(config.streams)})


def kept_of(config: MHCConfig) -> dict[str, int]:
    """The block of tokens, and the places of totals, of a kernel that goes back through Sinkhorn."""
    places = _power(max(2, 2 * (config.iterations or 1)))
    most = 4096 // (places * padded(config.streams))
    return {"B": max(1, min(16, most)), "K": places}


@functools.cache
def columns_of(config: MHCConfig, head: bool) -> dict[str, Any]:
    width = 0 if head else config.residual_columns
    return {
        "HEAD": head,
        "N": config.streams,
        "NP": padded(config.streams),
        "R": max(16, _power(width)) if width else 0,
        "WIDTH": width,
    }


def options_of(columns: dict[str, Any], fused: bool = False) -> dict[str, int]:
    """How a program with products is compiled; other settings spill on one target or another."""
    if fused:
        return {"num_warps": 8, "num_stages": 1}
    return {"num_warps": 8, "num_stages": 2} if columns["R"] > 16 else {"num_warps": 4, "num_stages": 3}


def projections(matrix: Tensor, config: MHCConfig, columns: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The projections ``[n * C, m]`` as the kernels read them: gates ``[n * C, 16]``, the rest ``[n * C, R]``."""
    n, NP = config.streams, columns["NP"]
    gates = matrix.new_zeros(len(matrix), 16)
    gates[:, :n] = matrix[:, :n]
    if columns["HEAD"]:
        return gates, gates
    gates[:, NP : NP + n] = matrix[:, n : 2 * n]
    if not columns["R"]:
        return gates, gates
    rest = matrix.new_zeros(len(matrix), columns["R"])
    rest[:, : columns["WIDTH"]] = matrix[:, 2 * n :]
    return gates, rest


def table(config: MHCConfig, columns: dict[str, Any], like: Tensor) -> Tensor:
    """The permutation matrices ``[R, NP * NP]``; what no kernel looks at for another residual matrix."""
    if config.residual != "permutations" or columns["HEAD"]:
        return like
    n, NP = config.streams, columns["NP"]
    matrices = like.new_zeros(columns["R"], NP, NP)
    matrices[: columns["WIDTH"], :n, :n] = permutation_matrices(n, like.device).to(like.dtype)
    return matrices


def kind(config: MHCConfig, head: bool) -> str:
    return "none" if head else config.residual


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first argument, which need not be the current one.

    What compiles kernels for a GPU that isn't there takes this function's place.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)
