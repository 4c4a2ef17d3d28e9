"""What a checkpoint holds of hyper-connections, and what is odd about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.porter import dialects
from conformance.porter.errors import PortError
from conformance.porter.model import Model, understand
from conformance.porter.site import HEAD, NORM
from conformance.porter.storage.opening import open_checkpoint


@dataclass
class Inspection:
    """The answer to ``mhc-conformance inspect``.

    Attributes:
        layers: for each group (``layers``, ``mtp``) and kind of site, the layer numbers that have it.
        tensors: mHC tensors; ``all_tensors`` counts the others too.
        bytes: of the mHC tensors.
        stacked: how scanned layers lie, empty where none is; ``scan_axes`` along which axes.
        dialects: those whose weights look like these, the likeliest first.
        dialect: the one that a port would take, and ``told_by`` why.
        odd: a line for each thing that is unusual.
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
    odd: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: Path, layout: str | None = None, names: Mapping[str, str] | None = None) -> Inspection:
    """Reads names, shapes and mHC tensors of the checkpoint at ``path``.

    Args:
        layout: its layout, recognised where it isn't given.
        names: prefixes of its tensors that the layout doesn't know, under ``attention``, ``ffn`` and ``head``.

    Raises:
        Ambiguous: two layouts fit.
        PortError: none does, or the checkpoint is broken.
    """
    with open_checkpoint(path) as checkpoint:
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
            dialect=dialects.described(model.parameters), told_by=model.told_by, odd=_odd(model, groups),
        )  # fmt: skip


def _odd(model: Model, groups: dict[str, list[int]]) -> list[str]:
    found: list[str] = []
    if model.unplaced:
        found.append(_unplaced(model))
    if model.parameters["reduce"] == "head" and HEAD not in model.sites:
        found.append("the head is missing, and the dialect reduces the streams by one")
    for group in {name.partition(".")[0] for name in groups}:
        kinds = {name.partition(".")[2]: set(numbers) for name, numbers in groups.items() if name.startswith(group)}
        every = set().union(*kinds.values())
        gaps = sorted(set(range(max(every) + 1)) - every)
        if gaps:
            found.append(f"{group} {_numbers(gaps)} are missing")
        for kind in ("attention", "ffn"):
            lacking = sorted(every - kinds.get(kind, set()))
            if lacking and set(kinds) != {kind}:
                found.append(f"{group} {_numbers(lacking)} have no {kind} site")
    model.prepare()
    for site, rows in model.sites.items():
        try:
            weights = model.load(site)
        except PortError as error:
            found.append(str(error))
            continue
        for name, value in weights.items():
            label = f"{site}, {name}"
            bad = int(np.count_nonzero(~np.isfinite(value)))
            if bad:
                found.append(f"{label}: {bad} of {value.size} values aren't finite")
            elif name.endswith("_scale") and not value.any():
                found.append(f"{label} is 0: the projection has no effect")
            elif name == NORM and not value.all():
                found.append(f"{label} has {int(np.count_nonzero(value == 0))} zeros: folding it can't be undone")
            elif name.endswith(("_alpha", "_fn")) and not value.any():
                found.append(f"{label} is all zeros")
        if len({model.checkpoint.tensors[n].dtype for n in rows.values()}) > 1:
            found.append(f"{site}: its tensors have different dtypes")
    return found


def _unplaced(model: Model) -> str:
    return f"{len(model.unplaced)} tensors end as this layout's do and belong to no site, {model.unplaced[0]} first"


def _numbers(numbers: list[int]) -> str:
    """0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
