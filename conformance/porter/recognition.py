"""Recognises the layout of a checkpoint by names, then by shapes, and if several fit by its ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from conformance.porter import configuration, notes
from conformance.porter import names as naming
from conformance.porter.errors import INCOMPLETE, Ambiguous, PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.site import HEAD, SiteKey
from conformance.porter.storage.checkpoint import Checkpoint

Rows = dict[SiteKey, dict[str, str]]
Shapes = tuple[bool, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass
class Recognised:
    """A layout that fits a checkpoint.

    Attributes:
        sites: for each its rows and the tensors that hold them.
        sizes: for each (n, C, residual).
        candidates: names that end as tensors of hyper-connections do, whether they have a site or not.
    """

    layout: Layout
    sites: Rows
    sizes: dict[SiteKey, tuple[int, int, str]]
    candidates: list[str]

    @property
    def tensors(self) -> int:
        return sum(len(rows) for rows in self.sites.values())

    def weights(self) -> Any:
        """The weights and axes of each tensor; they are equal for two layouts that read the same weights."""
        weights_held = {}
        for site, names_of_rows in self.sites.items():
            rows = {row.name: row for row in self.layout.rows_of(site.kind)}
            weights_held[site] = {name: (rows[row].parts, rows[row].axes) for row, name in names_of_rows.items()}
        return weights_held, self.sizes, self.layout.flat


def recognise(checkpoint: Checkpoint, named: Layout | None, prefixes: Mapping[str, str]) -> Recognised:
    """The one layout that fits.

    Args:
        named: the layout that the user names; if None, every layout that is kept in such files.
        prefixes: the user's own prefixes, under ``attention``, ``ffn``, ``head`` and ``site``.

    Raises:
        Ambiguous: several layouts fit, and read different weights from the same tensors.
        PortError: no layout fits; the message names the tensor that is missing or has the wrong shape.
    """
    considered = [
        layout.named(prefixes)
        for layout in ([named] if named else layouts().values())
        if checkpoint.kind in layout.containers and not ("head" in prefixes and not layout.head and not named)
    ]
    names = candidates(checkpoint, considered)
    fits: list[Recognised] = []
    broken: list[tuple[tuple[int, bool], PortError]] = []
    for layout in considered:
        try:
            sites = layout.locator.locate(names)
        except PortError as error:  # twice, or of two models: it counts where no other layout has more
            broken.append(((layout.locator.count(names), True), error))
            continue
        if not sites:
            continue
        try:
            fits.append(Recognised(layout, sites, _sizes(checkpoint, layout, sites), names))
        except Misfit as error:
            broken.append(((error.whole, False), error))
    fits = _likeliest(checkpoint, fits)
    if len(fits) > 1:
        fitting = [fit.layout.name for fit in fits]
        raise Ambiguous(
            f"{checkpoint.path}: fits the layouts {' and '.join(fitting)}: say which with --from",
            fitting,
        )
    if broken and (not fits or max(broken, key=_whole)[0] > (len(fits[0].sites), False)):
        raise max(broken, key=_whole)[1]
    if not fits:
        raise _nothing(checkpoint, named)
    return fits[0]


class Misfit(PortError):
    """A layout has sites here, and one of them isn't whole.

    Attributes:
        whole: how many are.
    """

    def __init__(self, message: str, whole: int):
        super().__init__(message)
        self.whole = whole


def _whole(entry: tuple[tuple[int, bool], PortError]) -> tuple[int, bool]:
    return entry[0]


def _sizes(checkpoint: Checkpoint, layout: Layout, sites: Rows) -> dict[SiteKey, tuple[int, int, str]]:
    """Each site's (n, C, residual).

    Raises:
        Misfit: a site lacks a tensor, or no n explains its shapes.
    """
    lacks = {site: missing for site, rows in sites.items() if (missing := layout.missing(site, rows))}
    if lacks:
        site, missing = next(iter(lacks.items()))
        file = checkpoint.tensors[next(iter(sites[site].values()))].file
        raise Misfit(
            f"{file}: {site} of the layout {layout.name} lacks {', '.join(map(checkpoint.held, missing))}",
            len(sites) - len(lacks),
        )
    sizes: dict[SiteKey, tuple[int, int, str]] = {}
    known: dict[Shapes, tuple[int, int, str]] = {}
    for site, rows in sites.items():
        shapes = {row: checkpoint.tensors[name].shape for row, name in rows.items()}
        alike = site.head, tuple(sorted(shapes.items()))
        try:
            sizes[site] = known[alike] = known.get(alike) or layout.dimensions(site, shapes)
        except PortError as error:
            raise Misfit(str(_named(error, checkpoint, rows)), len(sizes)) from error
    return sizes


def _likeliest(checkpoint: Checkpoint, fits: list[Recognised]) -> list[Recognised]:
    """The likeliest of the layouts that fit; several only if they read different weights."""
    if any(set(fit.sites) != {HEAD} for fit in fits):  # another one's head under its name, and nothing else
        fits = [fit for fit in fits if set(fit.sites) != {HEAD}]
    if len(fits) < 2:
        return fits
    noted = notes.note(checkpoint)
    if noted and any(fit.layout.name == noted.layout for fit in fits):
        return [fit for fit in fits if fit.layout.name == noted.layout]
    stated = {*configuration.model_types(checkpoint.config)}
    if any(stated & set(fit.layout.models) for fit in fits):
        fits = [fit for fit in fits if stated & set(fit.layout.models)]
    most = max(fit.tensors for fit in fits)
    different: list[Recognised] = []
    for fit in sorted((fit for fit in fits if fit.tensors == most), key=lambda fit: fit.layout.rank):
        if all(fit.weights() != kept.weights() for kept in different):
            different.append(fit)
    return different


def _nothing(checkpoint: Checkpoint, named: Layout | None) -> PortError:
    """The error for a checkpoint that no layout fits: it has no mHC tensors, or names that no layout has."""
    stray = naming.plainly_ours(checkpoint.tensors)
    others = [
        o.name for o in layouts().values() if stray and checkpoint.kind in o.containers and o.locator.locate(stray)
    ]
    if named and others:
        return PortError(
            f"{checkpoint.path}: has no tensors of the layout {named.name}, and the layout {others[0]} has names for "
            f"what is there: leave --from out, or say --from {others[0]}"
        )
    if stray:
        return unplaced(checkpoint, named, stray)
    if named:
        return PortError(
            f"{checkpoint.path}: has no tensors of the layout {named.name}, among {len(checkpoint.tensors)}; leave "
            f"--from out to have it recognised, or say under which prefixes they are with --from-names"
        )
    return PortError(
        f"{checkpoint.path}: has no mHC tensors that any layout names ({', '.join(layouts())}), among "
        f"{len(checkpoint.tensors)}; where they have other prefixes say which with --from LAYOUT --from-names "
        f"attention=PREFIX --from-names ffn=PREFIX"
    )


def unplaced(checkpoint: Checkpoint, layout: Layout | None, stray: list[str], known: int = 0) -> PortError:
    """The error for hyper-connections under names that no layout has, with the option that would name them."""
    considered = [o for o in layouts().values() if checkpoint.kind in o.containers]
    best: tuple[tuple[int, bool], Layout | None, list[str]] = (0, False), layout, []
    for candidate in [layout] if layout else considered:
        rows = {kind: [row.name for row in candidate.rows_of(kind)] for kind in ("attention", "ffn", "head", "site")}
        proposed = naming.proposal(stray, rows)
        explained = sum(len(names) for names in proposed.values())
        score = explained, _fits(checkpoint, candidate, proposed)
        if explained and score > best[0]:
            best = score, candidate, list(proposed)
    _, named, options = best
    which = " ".join(["--from", named.name if named else "LAYOUT", *(f"--from-names '{text}'" for text in options)])
    advice = f"name their sites with {which}" if options else f"no row of {layout.name if layout else 'a layout'} fits"
    kinds = [text.partition("=")[0] for text in options]
    if len({*kinds}) < len(kinds):  # an option names one prefix for each kind
        advice = (
            f"they have several prefixes ({', '.join(options[:4])}), and --from-names takes one a kind: rename them"
        )
    examples = ", ".join(stray[:3]) + (", …" if len(stray) > 3 else "")
    or_partially = ", or port the rest with --allow-partial" if known else ""
    return PortError(
        f"{checkpoint.path}: {len(stray)} of {len(stray) + known} hyper-connection tensors belong to no site that is "
        f"known, {examples}: {advice}{or_partially}", INCOMPLETE,
    )  # fmt: skip


def _fits(checkpoint: Checkpoint, layout: Layout, options: Iterable[str]) -> bool:
    """Whether tensors have the shapes of a layout, with these values of ``--from-names``."""
    prefixes = dict(option.split("=", 1) for option in options)
    if "head" in prefixes and not layout.head:
        return False
    starts = tuple(prefix.partition("{")[0] for prefix in prefixes.values())
    try:
        sites = layout.named(prefixes).locator.locate(name for name in checkpoint.tensors if name.startswith(starts))
        _sizes(checkpoint, layout, sites)
    except PortError:
        return False
    return bool(sites)


def candidates(checkpoint: Checkpoint, considered: Iterable[Layout]) -> list[str]:
    """The few names of a large checkpoint that end as a layout's tensors do."""
    endings = frozenset[str]().union(*(layout.endings for layout in considered))
    endings |= {ending.replace("/", ".") for ending in endings} | {ending.replace(".", "/") for ending in endings}
    width = 8
    long, short = {e[-width:] for e in endings if len(e) >= width}, tuple(e for e in endings if len(e) < width)

    tails = {name[-width:] for name in checkpoint.tensors}  # of tens of thousands of names there are few
    right = {tail for tail in tails if tail in long or tail.endswith(short)}
    matching = [name for name in checkpoint.tensors if name[-width:] in right]
    hidden = [(name, naming.plain(name)) for name in naming.wrapped(checkpoint.tensors)]
    hidden_matches = [name for name, bare in hidden if bare[-width:] in long or bare.endswith(short)]
    return list(dict.fromkeys([*matching, *hidden_matches]))


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
