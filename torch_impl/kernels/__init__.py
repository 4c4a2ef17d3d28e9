"""The engine of `torch_impl.fused` that computes by Triton kernels, on a GPU or in Triton's interpreter.

Every kernel accumulates in float32, products with ``input_precision="ieee"``. Equal inputs give equal bits, and a
token's bits don't depend on how many others there are: sums over channels are split by dim alone, and nothing is added
by atomic operations.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from torch_impl.config import MHCConfig
from torch_impl.projections import Shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STREAMS = 8
MOST_COLUMNS = MOST_STREAMS**2
"""The columns of H's projection are held in registers: the 120 permutations of 5 streams are too many."""
MOST_ITERATIONS = 512
"""The way back keeps the total of every pass in registers."""


class Setting(NamedTuple):
    """What is known of Triton here."""

    installed: bool
    interpreted: bool


@functools.cache
def _setting() -> Setting:
    if find_spec("triton") is None:
        return Setting(False, False)
    from triton import knobs

    return Setting(True, bool(knobs.runtime.interpret))


@torch.compiler.assume_constant_result
def installed() -> bool:
    """Whether there is Triton."""
    return _setting().installed


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return _setting().interpreted


def hindrance(x: Tensor, config: MHCConfig, shards: Shards | None = None) -> str:
    """Why kernels don't serve these streams or logits; empty where they do."""
    if not installed():
        return "a Python without Triton: pip install triton"
    if shards:
        return "shards of dim"
    if x.dtype not in DTYPES:
        return f"{str(x.dtype).removeprefix('torch.')}: kernels take float32, bfloat16 and float16"
    if config.streams > MOST_STREAMS:
        return f"{config.streams} streams: kernels have at most {MOST_STREAMS}"
    if config.residual_columns > MOST_COLUMNS:
        return f"{config.residual_columns} permutations: kernels have at most {MOST_COLUMNS}"
    if (config.iterations or 0) > MOST_ITERATIONS:
        return f"{config.iterations} iterations: kernels have at most {MOST_ITERATIONS}"
    if not (x.is_cuda or x.is_meta or interpreted()):
        return f"a tensor on {x.device}: kernels run on a GPU, or anywhere with TRITON_INTERPRET=1 set before they load"
    return ""
