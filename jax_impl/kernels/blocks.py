"""Blocks of tokens that fit a TPU's vector memory, and the call of a kernel on them.

A block has all of n*C, so that x is read once: sums over (streams, dim) are complete before u is made of the same
block. Within it a kernel goes along dim in chunks, whose float32 copies are small beside the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LEAST_VMEM = 64 << 20
"""Bytes of vector memory of a TPU v5p and of a core of a TPU7x; a v5e and a v6e have 128 MiB. Taken where no TPU is at
hand, since a program may be compiled for any of them."""
SIZES = (128, 64, 32, 16, 8)
"""Tokens of a block, the most that fit. What a kernel computes with grows with them, 20 MiB for 256 where n = 4."""
CHUNK = 512
LANES = 128
State = TypeVar("State")


@dataclass(frozen=True)
class Operand:
    """An array of a kernel: its shape, dtype, and whether it is shared out by tokens, its first axis, or whole."""

    shape: tuple[int, ...]
    dtype: Any
    tokens: bool = True

    @property
    def block_bytes(self) -> int:
        """Bytes in vector memory, for one token where they are shared out: the last two axes fill whole tiles."""
        size = jnp.dtype(self.dtype).itemsize
        *lead, last = self.shape[1:] if self.tokens else self.shape
        rows = 1  # of a matrix a token has one row, among those of others
        if lead:
            tile = next(tile for tile in (1, 2, 4, 8) if tile * size >= 4 and (tile >= lead[-1] or tile == 8))
            rows = -(-lead[-1] // tile) * tile
        return math.prod(lead[:-1]) * rows * -(-last // LANES) * LANES * size


def capacity() -> int:
    """Bytes of vector memory of the TPU at hand, else those that every supported one has."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if jax.default_backend() == "tpu" else LEAST_VMEM


def room() -> int:
    """Bytes that the blocks may take; the rest is for what a kernel computes with, and for XLA."""
    return capacity() * 5 // 8


def block(operands: Sequence[Operand]) -> int:
    """Tokens of a block whose arrays fit; 0 where none does."""
    return next((size for size in SIZES if needed(operands, size) <= room()), 0)


def needed(operands: Sequence[Operand], size: int) -> int:
    """Bytes of blocks of ``size`` tokens. Each is held twice: one is moved while the other is computed with."""
    return sum(2 * one.block_bytes * (size if one.tokens else 1) for one in operands)


def check_room(operands: Sequence[Operand]) -> None:
    """Checks that some tokens of these arrays fit into the vector memory.

    Raises:
        ValueError: they don't; it says how much they need.
    """
    if not block(operands):
        least = needed(operands, SIZES[-1])
        raise ValueError(
            f"backend='pallas' doesn't go with streams this wide: {SIZES[-1]} tokens need {least >> 20} MiB of the "
            f"{room() >> 20} MiB of vector memory that kernels take: share dim out over more devices, or "
            "take 'auto', which then runs the plain path"
        )


def along(dim: int, step: Callable[[Any, State], State], state: State) -> State:
    """Runs ``step(slice of dim, state)`` over chunks of dim."""

    def whole(index: Any, state: State) -> State:
        return step(pl.ds(pl.multiple_of(index * CHUNK, CHUNK), CHUNK), state)

    count, rest = divmod(dim, CHUNK)
    if count:
        state = jax.lax.fori_loop(0, count, whole, state)
    return step(pl.ds(count * CHUNK, rest), state) if rest else state


def run(
    kernel: Callable[[Mapping[str, Any]], None],
    name: str,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Operand],
    shared: Collection[str] = (),
) -> dict[str, Array]:
    """Calls a kernel on blocks of tokens: compiled on a TPU, interpreted elsewhere.

    Args:
        kernel: takes references to a block of each input and each output, by name.
        inputs: arrays, shared out by their first axis but for those that are ``shared``.
        outputs: what is made; one that isn't shared out is added up over the blocks by the kernel, one after the other.
        shared: inputs that every block has the whole of.

    Raises:
        ValueError: no block fits into the vector memory.
    """
    operands = [Operand(array.shape, array.dtype, key not in shared) for key, array in inputs.items()]
    made, names = list(outputs.values()), (*inputs, *outputs)
    total = next(one.shape[0] for one in operands if one.tokens)
    if not total:  # there is no block, and a kernel that adds up would begin nowhere
        return {key: jnp.zeros(one.shape, one.dtype) for key, one in outputs.items()}
    check_room([*operands, *made])
    size = min(block([*operands, *made]), total)
    apart = all(one.tokens for one in made)

    def call(*arrays: Array, interpret: bool) -> tuple[Array, ...]:
        over_blocks = pl.pallas_call(
            lambda *refs: kernel(dict(zip(names, refs, strict=True))),
            grid=(pl.cdiv(total, size),),
            in_specs=[_spec(one, size) for one in operands],
            out_specs=[_spec(one, size) for one in made],
            out_shape=[jax.ShapeDtypeStruct(one.shape, one.dtype) for one in made],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel" if apart else "arbitrary",), vmem_limit_bytes=capacity() * 7 // 8
            ),
            interpret=interpret,
            name=name,
        )
        with jax.enable_x64(False):  # Mosaic has no 64-bit indices
            return tuple(over_blocks(*arrays))

    compiled, interpreted = partial(call, interpret=False), partial(call, interpret=True)
    found = jax.lax.platform_dependent(*inputs.values(), tpu=compiled, default=interpreted)
    return dict(zip(outputs, found, strict=True))


def _spec(one: Operand, size: int) -> pl.BlockSpec:
    rest = len(one.shape) - 1
    if one.tokens:
        return pl.BlockSpec((size, *one.shape[1:]), lambda step: (step, *(0,) * rest))
    return pl.BlockSpec(one.shape, lambda step: (0,) * (rest + 1))
