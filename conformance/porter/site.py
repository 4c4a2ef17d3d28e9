"""A site is one hyper-connection of a model, or its head; its weights have canonical names and flat shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conformance.stages import head_shapes, layer_shapes

NORM = "mhc_norm.scale"
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class SiteKey:
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


HEAD = SiteKey("", None, "head")
ALONE = SiteKey("", None, "")


def canonical_shapes(site: SiteKey, streams: int, dim: int, residual: str, norm: bool) -> dict[str, tuple[int, ...]]:
    """Name and flat shape of each canonical weight of a site."""
    return head_shapes(streams, dim) if site.head else layer_shapes(streams, dim, residual, norm)
