"""Calls at the sizes of models, which golden cases don't have: what a kernel is timed with.

FlashInfer-Bench draws the activations itself, from the normal distribution, and compares with what the reference makes
of them. Weights lie in a file, since normal ones would close every gate: here all logits have a variance near 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator

import numpy as np

from conformance.cases.dialects import dialect_rows
from conformance.cases.flashinfer_bench.kernel import Kernel
from conformance.cases.format import DTYPES

STREAMS = 4
TOKENS = (1, 128, 4096)
"""The numbers of tokens unless others are asked for: a step of decoding, a batch of them, and a prompt."""
WEIGHTS = ("norm_weight", "fn", "scale", "base")


def kernels(dialects: Collection[str], stages: Collection[str], widths: Collection[int]) -> Iterator[Kernel]:
    """The operations at these widths, with 4 streams, x in bfloat16 and weights in float32."""
    for dialect in dialects:
        row = dialect_rows()[dialect]
        coefficients = "bfloat16" if row["coefficients"] == "activation" else "float32"
        missing = {
            "residual_matrix": row["residual"] == "identity",
            "head": row["reduce"] != "head" and row["head_norm_eps"] is None,
        }
        for stage in stages:
            if missing.get(stage):
                continue
            for width in (None,) if stage == "residual_matrix" else widths:
                yield Kernel(stage, dialect, row, STREAMS, width, "bfloat16", "float32", coefficients)


def weights(kernel: Kernel) -> dict[str, np.ndarray]:
    """Random weights, the same ones for the same operation.

    They are exact in bfloat16, as golden ones are: where coefficients are rounded to x's dtype, weights may be too.
    """
    draw = np.random.default_rng(zlib.crc32(kernel.name.encode()))
    lengths = kernel.lengths
    values: dict[str, np.ndarray] = {}
    for name in kernel.arguments:
        if name in WEIGHTS:
            shape = [lengths[axis] for axis in kernel.tensor(name).shape]
            values[name] = draw.standard_normal(shape, np.float32)
    if "fn" in values:
        values["fn"] /= np.float32(lengths["flat"] ** 0.5)
        values["scale"] = np.ones_like(values["scale"])
    if "norm_weight" in values:
        values["norm_weight"] = 1 + values["norm_weight"] / 8
    return {name: value.astype(DTYPES["bfloat16"]).astype(np.float32) for name, value in values.items()}
