"""The engine of `torch_impl.fused` that computes by Triton kernels, on a GPU or in Triton's interpreter.

Every kernel accumulates in float32, products with ``input_precision="ieee"``. Equal inputs give equal bits, and a
token's bits don't depend on how many others there are: sums over channels are split by dim alone, and nothing is added
by atomic operations.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

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

INSTALLED = find_spec("triton") is not None
"""Whether there is Triton. Nothing here imports it, or Dynamo, before kernels are asked for."""


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def somewhere(x: Tensor) -> str:
    """Why kernels don't run where a tensor is; empty where they do."""
    if x.is_cuda or x.is_meta or interpreted():
        return ""
    return f"a tensor on {x.device}: kernels run on a GPU, or anywhere with TRITON_INTERPRET=1 set before they load"


def hindrance(x: Tensor, config: MHCConfig, shards: Shards | None = None) -> str:
    """Why kernels don't serve these streams or logits; empty where they do."""
    if not INSTALLED:
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
    # A compiler asks for it when the graph runs (`plans.launch`): to look it up is nothing that Dynamo could trace.
    return "" if torch.compiler.is_compiling() else somewhere(x)
