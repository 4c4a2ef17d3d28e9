"""A site is one hyper-connection of a model, or its head; its weights have canonical names and flat shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS, PROJECTIONS

NORM = "mhc_norm.scale"
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Site:
    """Where a hyper-connection sits.

    Attributes:
        group: ``layers``, ``mtp`` (multi-token prediction) or empty: a module on its own, or the model's head.
        layer: its number in the group; None outside of one.
        kind: ``attention``, ``ffn``, ``head``, or empty for a module on its own.
    """

    group: str
    layer: int | None
    kind: str

    def __str__(self) -> str:
        return ".".join(str(part) for part in (self.group, self.layer, self.kind) if part not in ("", None)) or "site"

    @property
    def order(self) -> tuple[str, int, str]:
        """Layers by number, then the rest."""
        return (self.group or "~", -1 if self.layer is None else self.layer, self.kind)

    @property
    def head(self) -> bool:
        return self.kind == "head"


HEAD = Site("", None, "head")
ALONE = Site("", None, "")


def columns(part: str, streams: int, residual: str) -> int:
    """Columns of one projection: n, n, and n*n, n! or none."""
    if part != "res":
        return streams
    return {"sinkhorn": streams**2, "permutations": math.factorial(streams), "identity": 0}[residual]


def canonical_shapes(site: Site, streams: int, dim: int, residual: str, norm: bool) -> dict[str, tuple[int, ...]]:
    """Name and flat shape of each canonical weight of a site (mathematics.md, "Symbols")."""
    flat = streams * dim
    if site.head:
        return dict(zip(HEAD_WEIGHTS, ((flat, streams), (streams,), (1,)), strict=True))
    shapes: dict[str, tuple[int, ...]] = {NORM: (flat,)} if norm else {}
    for part in PROJECTIONS:
        width = columns(part, streams, residual)
        if width:
            beta = (streams, streams) if part == "res" and residual == "sinkhorn" else (width,)
            shapes |= {f"{part}_alpha": (flat, width), f"{part}_alpha_scale": (1,), f"{part}_beta": beta}
    return {name: shapes[name] for name in LAYER_WEIGHTS if name in shapes}
