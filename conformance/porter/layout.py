"""A checkpoint layout is a table of the tensors that a site has, of the weights in each, and of their names.

Everything that reads or writes a layout is derived from its table (`Layout`); a file of `layouts/` holds one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from conformance.cases.rules import most_permuted
from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.locating import Locator
from conformance.porter.site import SiteKey, Weights, canonical_shapes

WRITTEN = {"{any}": "", "{layers}": "layers", "{attention}": "attention", "{ffn}": "ffn"}
MOST_STREAMS = 64


@dataclass(frozen=True)
class Packed:
    """One tensor of a site in the file.

    Attributes:
        name: the part of its name that follows the site's prefix.
        parts: the canonical weights in it, one after the other along its columns.
        axes: its axes in letters: ``k`` is the flat (streams, dim) axis, ``m`` the columns, ``1`` an axis of length
            one; ``"i j"`` is the residual bias as a matrix if there is one; empty for a scalar.
        optional: whether a site may lack it.
    """

    name: str
    parts: tuple[str, ...]
    axes: str
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout.

    Attributes:
        rows: the tensors of a hyper-connection; a row whose parts a residual kind lacks is absent there.
        head: the tensors of a head.
        names: for ``(group, kind)`` the prefixes of a site's tensors. All of them are read, and the first one is
            written. ``{layer}`` is its number; ``{any}`` stands for anything, ``{layers}`` for layers, blocks or h,
            ``{attention}`` and ``{ffn}`` for a word that contains attention or ffn, or a synonym.
        dialect: the dialect that its own software computes.
        anchors: rows each of which shows that a site is there; if this is empty, every row does.
        flat: order of the flat axis: ``streams-first`` (i*C + c) or ``dim-first`` (c*n + i).
        norm: whether it has a norm weight: ``never``, ``optional`` or ``always``.
        residuals: kinds of residual matrix that it has a place for.
        containers: the kinds of checkpoint (`storage`) that it is kept in; the first is written if the path leaves
            the kind open.
        dtype: the only dtype that its weights have; empty if they may have any.
        company: whether tensors of other modules may have a site's prefix.
        paired: whether each layer of its models has both kinds of sites.
        stacked: whether layers may be scanned: stacked in one array (`storage.stacks`).
        keeps_dialect: whether its files state their dialect, and a port to it keeps the source's.
        models: the dialect of each ``model_type`` in a ``config.json``.
        source: the document or program that its names come from.
        leads: for a dialect the start of its models' names, if another prefix than the first one is written for it.
        rank: if two layouts read the same weights from the same names, the one with the lower rank is taken.
        named_by_user: the prefixes that the user named.
    """

    name: str
    summary: str
    source: str
    dialect: str
    rows: tuple[Packed, ...]
    names: Mapping[tuple[str, str], tuple[str, ...]]
    head: tuple[Packed, ...] = ()
    anchors: tuple[str, ...] = ()
    flat: str = "streams-first"
    norm: str = "never"
    residuals: frozenset[str] = frozenset({"sinkhorn"})
    containers: tuple[str, ...] = ("safetensors", "torch")
    dtype: str = ""
    company: bool = False
    paired: bool = True
    stacked: bool = False
    keeps_dialect: bool = False
    models: Mapping[str, str] = field(default_factory=dict[str, str])
    leads: Mapping[str, str] = field(default_factory=dict[str, str])
    rank: int = 0
    named_by_user: frozenset[str] = frozenset()

    def named(self, names: Mapping[str, str]) -> Layout:
        """The layout with these prefixes before its own, under ``attention``, ``ffn``, ``head`` and ``site``.

        Raises:
            PortError: a head is named, and the layout has none.
        """
        if not names:
            return self
        prefixes = dict(self.names)
        for kind, template in names.items():
            if kind == "head" and not self.head:
                raise PortError(f"the layout {self.name} has no head that could be named")
            key = {"head": ("", "head"), "site": ("", "")}.get(kind, ("layers", kind))
            prefixes[key] = (template, *prefixes.get(key, ()))
        return replace(self, names=prefixes, named_by_user=frozenset(names.values()))

    def of_dialect(self, name: str) -> Layout:
        """The layout for a dialect: it writes the names that the dialect's models have (`leads`)."""
        if name not in self.leads:
            return self
        lead = self.leads[name]
        names = {
            key: tuple(sorted(templates, key=lambda t: (t not in self.named_by_user, not t.startswith(lead))))
            for key, templates in self.names.items()
        }
        return replace(self, names=names)

    def rows_of(self, kind: str) -> tuple[Packed, ...]:
        return self.head if kind == "head" else self.rows

    @cached_property
    def endings(self) -> frozenset[str]:
        """The ends of its tensors' names, after the last placeholder."""
        return self._endings({})

    @cached_property
    def endings_of_anchors(self) -> frozenset[str]:
        """The ends of the names of those rows that show that a site is there."""
        return self._endings(dict.fromkeys(self.anchors))

    def _endings(self, only: Mapping[str, None]) -> frozenset[str]:
        return frozenset(
            re.sub(r".*\}", "", template) + row.name
            for (_, kind), templates in self.names.items()
            for template in templates
            for row in self.rows_of(kind)
            if not only or row.name in only
        )

    def template(self, site: SiteKey) -> str | None:
        """The prefix that ``site`` is written under, before its number is put in; None if the layout has none."""
        templates = self.names.get((site.group, site.kind))
        return templates[0] if templates else None

    def prefix(self, site: SiteKey) -> str:
        """The prefix of a site's tensors as written.

        Raises:
            PortError: the layout has no name for such a site.
        """
        template = self.template(site)
        if template is None:
            raise PortError(f"the layout {self.name} has no name for {site}")
        for token, text in WRITTEN.items():
            template = template.replace(token, text)
        return template.replace("{layer}", str(site.layer))

    @cached_property
    def locator(self) -> Locator:
        """Finds the tensors of its sites among names."""
        return Locator(self)

    @property
    def separate_residual(self) -> bool:
        """Whether the residual projection has tensors of its own; they are absent if H is the identity."""
        return any(all(part.startswith("res_") for part in row.parts) for row in self.rows)

    @property
    def separator(self) -> str:
        """The character between the words of its names."""
        return "/" if self.containers[0] == "orbax" else "."

    def missing(self, site: SiteKey, rows: Mapping[str, str]) -> list[str]:
        """Tensors that the site lacks, under the names that they would have."""
        row, name = next(iter(rows.items()))
        plain = name if name.endswith(row) else naming.plain(name)
        prefix = plain[: len(plain) - len(row)]
        lacks = [r for r in self.rows_of(site.kind) if r.name not in rows and not r.optional]
        residual = [r for r in self.rows_of(site.kind) if all(p.startswith("res_") for p in r.parts)]
        if "identity" in self.residuals and not any(r.name in rows for r in residual):  # H = I has none of them
            lacks = [r for r in lacks if r not in residual]
        return [prefix + r.name for r in lacks]

    def file_shapes(
        self, site: SiteKey, streams: int, dim: int, residual: str, norm: bool = True
    ) -> dict[str, tuple[int, ...]]:
        """Shape of each row's tensor."""
        shapes = canonical_shapes(site, streams, dim, residual, norm)
        return {row.name: _file_shape(row, shapes, streams, residual) for row in _present(self, site, shapes)}

    def dimensions(self, site: SiteKey, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, str]:
        """(n, C, residual) of a site from the shapes of its rows.

        Raises:
            PortError: no n explains the shapes.
        """
        fits: list[tuple[int, int, str]] = []
        rows = self.rows_of(site.kind)
        shapes = {k: tuple(v) for k, v in shapes.items()}
        wide = next(r for r in rows if r.name in shapes and "k" in r.axes.split() and r.axes != "k")
        if len(shapes[wide.name]) != 2:
            raise PortError(f"{wide.name} must have two axes, got {list(shapes[wide.name])}")
        flat = shapes[wide.name][wide.axes.split().index("k")]
        for n in range(1, MOST_STREAMS + 1):
            for residual in sorted(self.residuals):
                if flat % n or flat == 0 or (residual == "permutations" and n > most_permuted()):
                    continue
                expected = self.file_shapes(site, n, flat // n, residual)
                lacking = {r.name for r in rows if r.optional and r.name not in shapes}
                if {k: v for k, v in expected.items() if k not in lacking} == dict(shapes):
                    fits.append((n, flat // n, residual))
        if not fits:
            raise PortError(_explain(self, site, shapes, wide, flat))
        return fits[0]

    def pack(self, site: SiteKey, weights: Weights, streams: int, dim: int, residual: str) -> dict[str, np.ndarray]:
        """The rows of a site from its canonical weights, as views of them if possible."""
        shapes = {name: value.shape for name, value in weights.items()}
        packed: dict[str, np.ndarray] = {}
        for row in _present(self, site, shapes):
            parts = [weights[p] for p in row.parts if p in weights]
            if "k" in row.axes.split():
                parts = [_reorder(p, streams, dim, self.flat) for p in parts]
                value = _joined(site, row, parts)
                value = value.T if row.axes == "m k" else value
            elif row.axes == "i j":
                value = parts[0]
            else:
                value = _joined(site, row, [p.reshape(-1) for p in parts])
            packed[row.name] = value.reshape(_file_shape(row, shapes, streams, residual))
        return packed

    def unpack(
        self, site: SiteKey, tensors: Mapping[str, np.ndarray], streams: int, dim: int, residual: str
    ) -> Weights:
        """The canonical weights of a site from its rows, as views of them if possible."""
        norm = any(row.axes == "k" and row.name in tensors for row in self.rows)
        shapes = canonical_shapes(site, streams, dim, residual, norm)
        weights: Weights = {}
        for row in _present(self, site, shapes):
            value = tensors[row.name]
            parts = [p for p in row.parts if p in shapes]
            if "k" in row.axes.split():
                flat = value.T if row.axes == "m k" else value
                flat = _restore(flat, streams, dim, self.flat)
                if row.axes == "k":
                    weights[parts[0]] = flat
                    continue
                start = 0
                for part in parts:
                    width = shapes[part][-1]
                    weights[part] = flat[:, start : start + width]
                    start += width
            else:
                flat, start = value.reshape(-1), 0
                for part in parts:
                    width = math.prod(shapes[part])
                    weights[part] = flat[start : start + width].reshape(shapes[part])
                    start += width
        return {name: weights[name] for name in shapes if name in weights}


def _joined(site: SiteKey, row: Packed, parts: list[np.ndarray]) -> np.ndarray:
    """Parts side by side along their last axis.

    Raises:
        PortError: no dtype holds them all.
    """
    try:
        return np.concatenate(parts, -1) if len(parts) > 1 else parts[0]
    except TypeError as error:  # bfloat16 beside float16
        kinds = ", ".join(sorted({str(part.dtype) for part in parts}))
        raise PortError(f"{site}: {row.name} would hold {kinds} together: set --dtype") from error


def _present(layout: Layout, site: SiteKey, shapes: Mapping[str, Any]) -> Sequence[Packed]:
    return [row for row in layout.rows_of(site.kind) if any(p in shapes for p in row.parts)]


def _file_shape(row: Packed, shapes: Mapping[str, tuple[int, ...]], streams: int, residual: str) -> tuple[int, ...]:
    parts = [shapes[p] for p in row.parts if p in shapes]
    if "k" in row.axes.split():
        flat = parts[0][0]
        width = sum(p[-1] for p in parts) if row.axes != "k" else 0
        return tuple({"k": flat, "m": width}[axis] for axis in row.axes.split())
    width = sum(math.prod(p) for p in parts)
    if row.axes == "i j":
        return (streams, streams) if residual == "sinkhorn" else (width,)
    return tuple(1 if axis == "1" else width for axis in row.axes.split())


def _reorder(value: np.ndarray, streams: int, dim: int, flat: str) -> np.ndarray:
    if flat == "streams-first":
        return value
    tail = value.shape[1:]
    return value.reshape(streams, dim, *tail).swapaxes(0, 1).reshape(streams * dim, *tail)


def _restore(value: np.ndarray, streams: int, dim: int, flat: str) -> np.ndarray:
    return value if flat == "streams-first" else _reorder(value, dim, streams, "dim-first")


def _explain(layout: Layout, site: SiteKey, shapes: Mapping[str, tuple[int, ...]], wide: Packed, flat: int) -> str:
    """The tensor that has the wrong shape, and the right shape for the n that the others suggest."""
    for row in layout.rows_of(site.kind):
        if row.name in shapes and len(shapes[row.name]) != len(row.axes.split()) and row.axes != "i j":
            return f"{row.name} must have {len(row.axes.split())} axes ({row.axes}), got {list(shapes[row.name])}"
    rows = [r for r in layout.rows_of(site.kind) if r.name in shapes]
    best: tuple[tuple[int, bool], str] | None = None
    for n in range(1, MOST_STREAMS + 1):
        for residual in sorted(layout.residuals):
            if residual == "permutations" and n > most_permuted():
                continue
            expected = layout.file_shapes(site, n, max(flat // n, 1), residual)
            right = shapes[wide.name] == expected[wide.name] and flat % n == 0
            agree = sum(shapes[r.name] == expected.get(r.name) for r in rows), right
            if agree[0] > 0 and (best is None or agree > best[0]):
                wrong = [k for k in shapes if k in expected and tuple(shapes[k]) != expected[k]] or [wide.name]
                text = (
                    f"{wrong[0]} must be {list(expected.get(wrong[0], ()))} for n = {n}, got {list(shapes[wrong[0]])}"
                )
                if flat % n:
                    text = f"the flat axis of {wide.name} must be a multiple of n = {n}, got {list(shapes[wide.name])}"
                best = (agree, text)
    if best:
        return best[1]
    shapes_of_4 = canonical_shapes(site, 4, 1, "sinkhorn", True)
    width = sum(shapes_of_4[p][-1] for p in wide.parts)
    return (
        f"no number of streams explains {wide.name} {list(shapes[wide.name])} with "
        + ", ".join(f"{k} {list(v)}" for k, v in shapes.items() if k != wide.name)
        + (f" (n = 4 would have {width} columns)" if not site.head else "")
    )
