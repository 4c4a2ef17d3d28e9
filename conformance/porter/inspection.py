"""Inspects the hyper-connections of a checkpoint, and lists its oddities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conformance.porter import configuration, damage, dialects
from conformance.porter import names as naming
from conformance.porter.model import Model
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.understanding import understand


@dataclass
class Inspection:
    """The answer to ``mhc-conformance inspect``.

    Attributes:
        layers: for each group (``layers``, ``mtp``) and kind of site, the layer numbers that have it.
        tensors: the number of mHC tensors; ``all_tensors`` counts the others too.
        bytes: the size of the mHC tensors.
        stacked: how scanned layers are stacked, empty if none is; ``scan_axes`` lists the axes.
        dialects: the dialects whose weights look like these, the likeliest first.
        dialect: the dialect that a port would take, and ``told_by`` the reason.
        assumed: whether that dialect is only an assumption.
        problem: why no dialect can be assumed; then there is no verdict on a port.
        odd: a line for each oddity.
    """

    path: str
    storage: str
    files: int
    layout: str
    streams: int
    dim: int
    residual: str
    norm_weight: bool
    head: bool
    sites: int
    layers: dict[str, list[int]]
    dtypes: list[str]
    tensors: int
    all_tensors: int
    bytes: int
    stacked: str
    scan_axes: list[int]
    dialects: list[str]
    dialect: str
    told_by: str
    assumed: bool = False
    problem: str = ""
    odd: list[str] = field(default_factory=list[str])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    path: Path,
    layout: str | None = None,
    names: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> Inspection:
    """Reads names, shapes and mHC tensors of the checkpoint at ``path``.

    Args:
        layout: its layout; it is recognised if this is None.
        names: prefixes of its tensors that the layout doesn't know, under ``attention``, ``ffn`` and ``head``.
        config: the configuration of its model; if this is None, the ``config.json`` in the same directory.

    Raises:
        Ambiguous: two layouts fit.
        PortError: no layout fits, or the checkpoint is broken.
    """
    with open_checkpoint(path) as checkpoint:
        if config is not None:
            checkpoint.config, checkpoint.config_file = configuration.read(config), config
        model = understand(checkpoint, layout, names=names)
        groups: dict[str, list[int]] = {}
        for site in model.sites:
            if site.layer is not None:
                groups.setdefault(f"{site.group}.{site.kind}", []).append(site.layer)
        return Inspection(
            path=str(path), storage=checkpoint.kind, files=checkpoint.files, layout=model.layout.name,
            streams=model.streams, dim=model.dim, residual=model.residual, norm_weight=model.norm, head=model.head,
            sites=len(model.sites), layers=groups, dtypes=model.dtypes,
            tensors=sum(len(rows) for rows in model.sites.values()), all_tensors=len(checkpoint.tensors),
            bytes=model.nbytes, stacked=checkpoint.stacks,
            scan_axes=sorted(checkpoint.axes),
            dialects=dialects.fitting(model.layout, model.norm, model.residual),
            dialect=dialects.described(model.parameters), told_by=model.dialect.by, assumed=model.dialect.assumed,
            problem=model.dialect.problem, odd=_odd(model),
        )  # fmt: skip


def _odd(model: Model) -> list[str]:
    lines = [*([model.differing] if model.differing else []), *model.lacking(), *model.remarks()]
    aside = naming.plainly_ours(model.checkpoint.aside)
    if aside:
        lines.append(f"{len(aside)} tensors are left aside as an optimiser's, by their names: {min(aside)}, …")
    return [*lines, *damage.signs(model)]
