"""A checkpoint, understood: its layout, its sites, their sizes and their dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.porter import dialects
from conformance.porter.errors import Ambiguous, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layout_named, layouts
from conformance.porter.site import HEAD, NORM, Site, Weights
from conformance.porter.storage.checkpoint import Checkpoint, check_dtype


@dataclass
class Model:
    """The hyper-connections of an opened checkpoint.

    Attributes:
        sites: for each its rows and the tensors that hold them.
        norm: whether the sites have a norm weight.
        parameters: of the dialect, as given, or as the checkpoint says.
        told_by: where the dialect comes from.
        unplaced: tensors that end as the layout's do and belong to no site.
    """

    checkpoint: Checkpoint
    layout: Layout
    sites: dict[Site, dict[str, str]]
    streams: int
    dim: int
    residual: str
    norm: bool
    parameters: dict[str, Any]
    told_by: str
    unplaced: list[str]

    @property
    def head(self) -> bool:
        return HEAD in self.sites

    @property
    def layers(self) -> list[int]:
        return sorted({s.layer for s in self.sites if s.group == "layers" and s.layer is not None})

    @property
    def nbytes(self) -> int:
        """Bytes of the mHC tensors."""
        return sum(self.checkpoint.tensors[n].nbytes for rows in self.sites.values() for n in rows.values())

    @property
    def dtypes(self) -> list[str]:
        return sorted({self.checkpoint.tensors[n].dtype for rows in self.sites.values() for n in rows.values()})

    def prepare(self) -> None:
        self.checkpoint.prepare([n for rows in self.sites.values() for n in rows.values()])

    def check_dtypes(self) -> None:
        """Raises for a tensor of a dtype that weights can't have.

        Raises:
            PortError: it names the tensor.
        """
        for rows in self.sites.values():
            for name in rows.values():
                check_dtype(self.checkpoint.tensors[name])

    def load(self, site: Site) -> Weights:
        """The canonical weights of one site, not looked at (`check`).

        Raises:
            PortError: a tensor can't be read, or has another dtype than weights can have.
        """
        tensors = {row: self.checkpoint.read(name) for row, name in self.sites[site].items()}
        return self.layout.unpack(site, tensors, self.streams, self.dim, self.residual)

    def check(self, site: Site) -> None:
        """Raises for a weight that isn't finite.

        Raises:
            PortError: it names the tensor and the element.
        """
        for name in self.sites[site].values():
            value = self.checkpoint.read(name)
            finite = np.isfinite(value)
            if not finite.all():
                where = np.argwhere(~finite)[0].tolist()
                raise PortError(
                    f"{self.checkpoint.tensors[name].file}: {name} must be finite, got {value[tuple(where)]} at {where}"
                )


def understand(
    checkpoint: Checkpoint,
    layout: str | None = None,
    dialect: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Model:
    """What a checkpoint holds, from names and shapes alone.

    Args:
        layout: its layout, recognised where it isn't given.
        dialect: its dialect; else its metadata, its ``config.json`` or its layout says.
        names: prefixes of its tensors that the layout doesn't know, under ``attention``, ``ffn`` and ``head``.

    Raises:
        Ambiguous: two layouts fit.
        PortError: none does, or the tensors contradict each other.
    """
    chosen, sites = _recognise(checkpoint, layout_named(layout) if layout else None, names or {})
    sizes: dict[Site, tuple[int, int, str]] = {}
    known: dict[tuple[bool, tuple[tuple[str, tuple[int, ...]], ...]], tuple[int, int, str]] = {}
    for site, rows in sites.items():
        shapes = {row: checkpoint.tensors[name].shape for row, name in rows.items()}
        alike = site.head, tuple(sorted(shapes.items()))
        try:
            sizes[site] = known[alike] = known.get(alike) or chosen.dimensions(site, shapes)
        except PortError as error:
            raise _named(error, checkpoint, rows) from error
    bodies = [s for s in sites if not s.head] or list(sites)
    first = bodies[0]
    streams, dim, residual = sizes[first]
    for site, (n, width, kind) in sizes.items():
        if (n, width) != (streams, dim) or (not site.head and kind != residual):
            name = next(iter(sites[site].values()))
            raise PortError(
                f"{checkpoint.tensors[name].file}: {name} has n = {n}, C = {width} ({kind}), "
                f"and {first} has n = {streams}, C = {dim} ({residual}): all sites must be alike"
            )
    stated = dialects.configuration(checkpoint).get("hc_mult")
    if chosen.models and isinstance(stated, int) and stated != streams:
        raise PortError(f"{checkpoint.path}: config.json says hc_mult = {stated}, and the tensors have n = {streams}")
    norms = {s: any(r.parts == (NORM,) and r.name in sites[s] for r in chosen.rows) for s in bodies if not s.head}
    norm = any(norms.values())
    if norm and not all(norms.values()):
        without = next(s for s, has in norms.items() if not has)
        raise PortError(f"{checkpoint.path}: {without} has no norm weight, and other sites have one")
    if dialect:
        parameters, told_by = dialects.parse(dialect), "as given"
    else:
        parameters, told_by = dialects.of_checkpoint(chosen, checkpoint)
        if parameters["residual"] != residual:
            fits = dialects.fitting(chosen, norm, residual)
            if fits:
                parameters = dialects.parse(fits[0])
    if parameters["residual"] != residual:
        raise PortError(
            f"{checkpoint.path}: the dialect has residual={parameters['residual']}, and the columns are those of "
            f"{residual}"
        )
    parameters = dialects.check({**parameters, "norm_weight": norm}, str(checkpoint.path))
    placed = {name for rows in sites.values() for name in rows.values()}
    endings = tuple(chosen.endings_of_anchors)
    unplaced = [n for n in _candidates(checkpoint, [chosen]) if n.endswith(endings) and n not in placed]
    return Model(checkpoint, chosen, sites, streams, dim, residual, norm, parameters, told_by, unplaced)


def _recognise(
    checkpoint: Checkpoint, given: Layout | None, prefixes: Mapping[str, str]
) -> tuple[Layout, dict[Site, dict[str, str]]]:
    full: dict[str, dict[Site, dict[str, str]]] = {}
    lacking: list[tuple[int, str]] = []
    considered = [
        layout.named(prefixes)
        for layout in ([given] if given else layouts().values())
        if checkpoint.kind in layout.containers
    ]
    names = _candidates(checkpoint, considered)
    for layout in considered:
        name, sites = layout.name, layout.locate(names)
        if not sites:
            continue
        lacks = {s: layout.missing(s, rows) for s, rows in sites.items()}
        broken = [(s, m) for s, m in lacks.items() if m]
        if broken:
            site, missing = broken[0]
            file = checkpoint.tensors[next(iter(sites[site].values()))].file
            whole = len(sites) - len(broken)
            lacking.append((whole, f"{file}: {site} of the layout {name} lacks {', '.join(missing)}"))
        else:
            full[name] = sites
    full = _heads_aside(full)
    if len(full) > 1:
        raise Ambiguous(f"{checkpoint.path}: fits the layouts {' and '.join(full)}: say which with --from", list(full))
    if full:
        ((name, sites),) = full.items()
        return next(layout for layout in considered if layout.name == name), sites
    if lacking:
        raise PortError(max(lacking)[1])
    if given:
        raise PortError(
            f"{checkpoint.path}: has no tensors of the layout {given.name}, among {len(checkpoint.tensors)}"
        )
    raise PortError(
        f"{checkpoint.path}: has no mHC tensors that any layout names ({', '.join(layouts())}), among "
        f"{len(checkpoint.tensors)}"
    )


def _candidates(checkpoint: Checkpoint, considered: list[Layout]) -> list[str]:
    """The few names of a large checkpoint that end as a layout's tensors do."""
    endings = frozenset[str]().union(*(layout.endings for layout in considered))
    width = 8
    long, short = {e[-width:] for e in endings if len(e) >= width}, tuple(e for e in endings if len(e) < width)
    return [name for name in checkpoint.tensors if name[-width:] in long or name.endswith(short)]


def _heads_aside(full: dict[str, dict[Site, dict[str, str]]]) -> dict[str, dict[Site, dict[str, str]]]:
    """Where one layout has sites, another that finds but a head under its names doesn't count."""
    if any(set(sites) != {HEAD} for sites in full.values()):
        return {name: sites for name, sites in full.items() if set(sites) != {HEAD}}
    return full


def _named(error: PortError, checkpoint: Checkpoint, rows: Mapping[str, str]) -> PortError:
    """An error about a row, with the tensor's own name and file."""
    text, mentioned = str(error), next(iter(rows.values()))
    pattern = re.compile(
        "|".join(rf"(?<![\w.]){re.escape(row)}(?![\w.])" for row in sorted(rows, key=len, reverse=True))
    )
    match = pattern.search(text)
    if match:
        mentioned = rows[match[0]]
        text = pattern.sub(lambda m: rows[m[0]], text)
    return PortError(f"{checkpoint.tensors[mentioned].file}: {text}")
