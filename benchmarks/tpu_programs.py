"""The programs that are compiled for TPUs (`tpu_aot`): their names, shapes, meshes and floors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax_impl import MHCConfig

KINDS = ("forward", "both", "stack")
LINES = ("unrolled", "line", "line-inputs")
STACKED = 4
SHAPES = ((1, 4096, 4, 2048), (1, 4096, 4, 4096), (4, 4096, 4, 7168))
WIDTHS = (1280, 2048, 4096, 7168)
"""Of the shapes (4, 4096, 4, width) that the Pallas kernels are compiled for."""
TOPOLOGIES = {
    "v5e": {1: "v5e:1x1", 8: "v5e:2x4", 16: "v5e:4x4", 64: "v5e:8x8"},
    "v5p": {1: "v5p:2x2x1", 8: "v5p:2x2x2", 64: "v5p:4x4x4"},
    "v6e": {1: "v6e:1x1", 8: "v6e:2x4", 64: "v6e:8x8"},
    "tpu7x": {1: "tpu7x:2x2x1", 8: "tpu7x:2x2x1", 128: "tpu7x:4x4x4"},
}
"""By number of devices; a TPU7x chip is two. Of a topology with more devices than asked for the first is taken."""
MESHES = {
    1: {
        8: {"sequence": 2, "tensor": 4}, 16: {"sequence": 4, "tensor": 4}, 64: {"sequence": 8, "tensor": 8},
        128: {"sequence": 16, "tensor": 8},
    },
    4: {
        8: {"data": 2, "tensor": 4}, 16: {"data": 4, "tensor": 4}, 64: {"data": 4, "sequence": 2, "tensor": 8},
        128: {"data": 4, "sequence": 4, "tensor": 8},
    },
}  # fmt: skip
"""By batch and number of devices."""


@dataclass(frozen=True)
class Program:
    """What is compiled: ``kind`` is ``forward``, ``both``, ``stack``, ``unrolled``, ``line`` or ``line-inputs``."""

    generation: str
    devices: int
    dialect: str
    shape: tuple[int, int, int, int]
    kind: str
    backend: str = "plain"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        suffix = "" if self.backend == "plain" else f"/{self.backend}"
        return f"{self.generation}/{self.devices}/{self.dialect}/{shape}/{self.kind}{suffix}"

    @property
    def topology(self) -> str:
        return TOPOLOGIES[self.generation][self.devices]

    @property
    def sizes(self) -> dict[str, Any]:
        """Of the mesh's axes; of one device there is no mesh."""
        if self.devices == 1:
            return {}
        return MESHES[self.shape[0]][self.devices]

    @property
    def config(self) -> MHCConfig:
        return MHCConfig.from_dialect(self.dialect, streams=self.shape[2], dim=self.shape[3])

    @property
    def floor(self) -> int:
        """Units that the mathematics moves."""
        n = self.shape[2]
        both = (3 * n + 2) + (5 * n + 3)
        return {"forward": 3 * n + 2, "both": both}.get(self.kind, STACKED * both)

    @property
    def stacked(self) -> bool:
        """Whether it has several sites."""
        return self.kind not in ("forward", "both")

    @property
    def unit(self) -> int:
        """Bytes of one stream on one device: tokens x dim x 2."""
        batch, seq, _, dim = self.shape
        return batch * seq * dim * 2 // math.prod(self.sizes.values())


def programs() -> Iterator[Program]:
    """All of them but the model; MaxText's dialect, which rounds the norm's output, to compare with."""
    for generation, topology in TOPOLOGIES.items():
        for devices in topology:
            for shape in SHAPES:
                for kind in KINDS:
                    yield Program(generation, devices, "deepseek-v4", shape, kind)
                    if (generation, devices) == ("v5e", 1) and kind != "stack":
                        yield Program(generation, devices, "maxtext", shape, kind)
    yield from kernel_programs()


def kernel_programs() -> Iterator[Program]:
    """Those by the Pallas kernels, and what of the plain path is compared with them alone."""
    for generation in TOPOLOGIES:
        for width in WIDTHS:
            for kind in KINDS if width == WIDTHS[-1] else KINDS[:2]:
                yield Program(generation, 1, "deepseek-v4", (4, 4096, 4, width), kind, "pallas")
    for kind in KINDS:
        yield Program("v5e", 8, "deepseek-v4", SHAPES[-1], kind, "pallas")
    for kind in KINDS[:2]:
        yield Program("v5e", 1, "maxtext", SHAPES[-1], kind, "pallas")
    for backend in ("plain", "pallas"):
        for kind in LINES:
            yield Program("v5e", 1, "deepseek-v4", SHAPES[-1], kind, backend)
