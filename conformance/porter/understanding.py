"""Understands an opened checkpoint: recognises its layout, finds its sites and their sizes, and settles its dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from conformance.porter import configuration, dialects, notes, source_dialect
from conformance.porter import names as naming
from conformance.porter.dialects import KnownDialect, Origin
from conformance.porter.errors import CANNOT, INCOMPLETE, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layout_named, layouts
from conformance.porter.model import Model
from conformance.porter.recognition import Recognised, recognise
from conformance.porter.site import HEAD, NORM, SiteKey
from conformance.porter.storage.checkpoint import Checkpoint


def understand(
    checkpoint: Checkpoint,
    layout: str | None = None,
    dialect: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Model:
    """The hyper-connections of a checkpoint, from names and shapes alone.

    Args:
        layout: its layout; it is recognised if this is None.
        dialect: its dialect; if this is None, its metadata, its ``config.json`` or its layout says it.
        names: prefixes of its tensors that the layout doesn't know, under ``attention``, ``ffn`` and ``head``.

    Raises:
        Ambiguous: two layouts fit.
        PortError: no layout fits, or the tensors contradict each other.
    """
    other_function = configuration.other_function(checkpoint.config)
    if other_function:  # also if the user names a dialect: such a model can't compute that
        way_out = f"; if {checkpoint.config_name} isn't this model's, remove it" if dialect else ""
        raise PortError(
            f"{checkpoint.path}: {other_function}: that is another function, and none of its tensors are ported"
            f"{way_out}",
            CANNOT,
        )
    recognised = recognise(checkpoint, layout_named(layout) if layout else None, names or {})
    chosen, sites, sizes = recognised.layout, recognised.sites, recognised.sizes
    bodies = [site for site in sites if not site.head]
    streams, dim, residual = sizes[(bodies or list(sites))[0]]
    norm = _has_norm(checkpoint, chosen, sites, bodies)
    known = (
        source_dialect.given(dialect, checkpoint, chosen)
        if dialect
        else source_dialect.of_checkpoint(chosen, checkpoint)
    )
    if known.origin is Origin.LAYOUT and (row := _named_after(chosen, sites)):
        known = replace(
            known, parameters=dialects.parse(row), base=row, origin=Origin.NAMES, by=f"its names are those of {row}"
        )
    if HEAD in sites and known.parameters["reduce"] in (("mean", "sum") if known.assumed else ("sum",)):
        # a head that is there speaks against the sum, which is MaxText's of a model without one, and a guessed mean
        known = replace(known, parameters={**known.parameters, "reduce": "head"})
    if not bodies:  # a head alone says nothing of the matrix
        residual, norm = known.parameters["residual"], known.parameters["norm_weight"]
    else:
        known = _with_residual(checkpoint, chosen, known, residual, norm)
    if known.parameters["residual"] != residual:
        raise PortError(
            f"{checkpoint.path}: the dialect has residual={known.parameters['residual']}, and the columns are those of "
            f"{residual}"
        )
    noted = source_dialect.from_metadata(chosen, checkpoint)
    noted_without = noted is not None and not noted.problem and not noted.parameters["norm_weight"]
    lost_norm = known.parameters["norm_weight"] and not norm and known.origin is not Origin.LAYOUT and not noted_without
    known.parameters = dialects.check({**known.parameters, "norm_weight": norm}, str(checkpoint.path))
    model = Model(
        checkpoint, chosen, sites, streams, dim, residual, norm, known, [],
        _differing(checkpoint, recognised, known.base), sizes, lost_norm,
    )  # fmt: skip
    placed = {name for rows in sites.values() for name in rows.values()}
    endings = tuple(chosen.endings_of_anchors)
    stray = dict.fromkeys(n for n in naming.plainly_ours(checkpoint.tensors) if n not in placed)
    stray |= dict.fromkeys(n for n in recognised.candidates if n.endswith(endings) and n not in placed)
    stray |= dict.fromkeys(chosen.locator.beside(checkpoint.tensors, recognised.candidates, sites))
    model.stray = list(stray)
    if layout and model.stray:
        model.copies = _copies(model)
        model.stray = [n for n in model.stray if n not in model.copies]
    return model


def _has_norm(
    checkpoint: Checkpoint, layout: Layout, sites: Mapping[SiteKey, Mapping[str, str]], bodies: list[SiteKey]
) -> bool:
    """Whether the sites have a norm weight.

    Raises:
        PortError: some have one and others don't.
    """
    norms = {s: any(r.parts == (NORM,) and r.name in sites[s] for r in layout.rows) for s in bodies}
    if any(norms.values()) and not all(norms.values()):
        without = next(site for site, has_norm in norms.items() if not has_norm)
        raise PortError(f"{checkpoint.path}: {without} has no norm weight, and other sites have one")
    return any(norms.values())


def _with_residual(
    checkpoint: Checkpoint, layout: Layout, known: KnownDialect, residual: str, norm: bool
) -> KnownDialect:
    """The dialect; if it is only the layout's own, a row whose residual matrix has the columns that are there.

    Raises:
        PortError: no site has a residual projection, and nothing says that there should be none.
    """
    if known.origin is not Origin.LAYOUT:
        return known
    if residual == "identity" and layout.separate_residual:
        raise PortError(
            f"{checkpoint.path}: no site has res_alpha, res_alpha_scale and res_beta: they are missing, or H is the "
            f"identity, which --dialect hunyuan-v4 says", INCOMPLETE,
        )  # fmt: skip
    if known.parameters["residual"] == residual:
        return known
    fits = dialects.fitting(layout, norm, residual)
    return replace(known, parameters=dialects.parse(fits[0]), base=fits[0]) if fits else known


def _copies(model: Model) -> dict[str, str]:
    """Tensors that hold the model's sites once more under the names of another layout, and that layout's name.

    They count only where the user has chosen the layout.
    """
    copies: dict[str, str] = {}
    for layout in layouts().values():
        if layout.name == model.layout.name or model.checkpoint.kind not in layout.containers:
            continue
        located = layout.locator.locate(model.stray)
        if {*located} <= {*model.sites}:
            copies |= {name: layout.name for rows in located.values() for name in rows.values()}
    return copies


def _named_after(layout: Layout, sites: Mapping[SiteKey, Mapping[str, str]]) -> str:
    """The dialect whose models' names start as these do; empty if none has a start of its own."""
    first = next(name for rows in sites.values() for name in rows.values())
    return next((row for row, lead in layout.leads.items() if naming.plain(first).startswith(lead)), "")


def _differing(checkpoint: Checkpoint, recognised: Recognised, base: str) -> str:
    """How sites differ from each other or from the stated sizes, in words; empty if nothing is wrong."""
    bodies = [site for site in recognised.sites if not site.head] or list(recognised.sites)
    first = bodies[0]
    streams, dim, residual = recognised.sizes[first]
    for site, (n, width, kind) in recognised.sizes.items():
        if (n, width) != (streams, dim) or (not site.head and kind != residual):
            name = next(iter(recognised.sites[site].values()))
            return (
                f"{checkpoint.tensors[name].file}: {name} has n = {n}, C = {width} ({kind}), "
                f"and {first} has n = {streams}, C = {dim} ({residual}): all sites must have the same sizes"
            )
    noted = notes.sizes_noted(checkpoint, recognised.layout.keeps_dialect)
    if any(noted[key] != size for key, size in (("streams", streams), ("dim", dim)) if key in noted):
        stated = ", ".join(f"{key} = {value!r}" for key, value in noted.items())
        return f"{checkpoint.path}: its metadata states {stated}, and the tensors have n = {streams}, C = {dim}"
    if recognised.layout.keeps_dialect:
        return ""
    return source_dialect.other_sizes(checkpoint, base, streams, dim)
