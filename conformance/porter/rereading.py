"""Checks that a reader of the target's layout will find every weight in its place, before it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from conformance.porter import names as naming
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layouts
from conformance.porter.names import without_optimiser
from conformance.porter.site import SiteKey
from conformance.porter.storage.checkpoint import Checkpoint, Tensor
from conformance.porter.storage.stacks import LISTED, PLACE, Unstacked

Shapes = Mapping[str, tuple[Sequence[int], str]]
KINDS = {("layers", "attention"): "attention", ("layers", "ffn"): "ffn", ("", "head"): "head", ("", ""): "site"}


def check(
    layout: Layout, prefixes: Mapping[SiteKey, Mapping[str, str]], tensors: Shapes, scanned: bool = False
) -> None:
    """Refuses to write tensors that their reader would not find, or would read as others.

    A reader that gets the user's prefixes (``--names``) as ``--from-names`` must find all sites. A reader without them
    may find fewer sites, but no wrong ones.

    Args:
        layout: the target's, with the user's prefixes.
        prefixes: for each site its rows and the names that they are written under, before layers are stacked.
        tensors: name, shape and dtype of each tensor that is written, after layers are stacked.
        scanned: whether layers are to be stacked.

    Raises:
        PortError: its message says what the reader would find.
    """
    _check_used(layout, prefixes)
    if "orbax" in layout.containers:
        _check_tree(tensors)
    if scanned:
        _check_scanned(prefixes)
    shown = _shown(layout, tensors)
    meant: dict[str, tuple[SiteKey, str]] = {}
    for site, rows in prefixes.items():
        for row, name in rows.items():
            meant[_bare(layout, name)] = site, row
    with_prefixes, problem = _located(layout, shown)
    if not with_prefixes:
        raise PortError(f"what would be written couldn't be read again: {problem}: {_advice(layout)}")
    for name in shown:
        place, read = meant.get(_bare(layout, name)), with_prefixes.get(name)
        if place is None or read != place:
            raise _misread(layout, name, place, read)
    read_again = {site for site, _ in with_prefixes.values()}
    lost = [site for site in prefixes if site not in read_again]
    if lost:
        raise PortError(f"nothing would be written of {lost[0]}: {_advice(layout)}")
    without_prefixes, _ = _located(layouts()[layout.name], shown)
    for name, read in without_prefixes.items():
        if read != meant[_bare(layout, name)]:
            raise _misread(layout, name, meant[_bare(layout, name)], read)


def _check_used(layout: Layout, prefixes: Mapping[SiteKey, Mapping[str, str]]) -> None:
    """Refuses a prefix of the user's under which no tensor would be written.

    Raises:
        PortError: its message names the prefix.
    """
    for key, templates in layout.names.items():
        template = templates[0]
        if template not in layout.named_by_user or key not in KINDS:
            continue
        option = f"--names {KINDS[key]}={template}"
        sites = [site for site in prefixes if (site.group, site.kind) == key]
        if not sites:
            written = ", ".join(map(str, list(prefixes)[:4])) + (", …" if len(prefixes) > 4 else "")
            raise PortError(f"{option} names nothing: the sites that are written are {written}")
        for site in sites:
            elsewhere = [name for name in prefixes[site].values() if not name.startswith(layout.prefix(site))]
            if elsewhere:
                raise PortError(
                    f"{option}: the checkpoint that takes the tensors has {elsewhere[0]}: leave --names out"
                )


def _check_tree(names: Iterable[str]) -> None:
    """Refuses names that can't be the paths of one tree's leaves.

    Raises:
        PortError: a leaf would hold others, or a key is empty.
    """
    paths = set(names)
    for name in sorted(paths):
        keys = name.split("/")
        above = next((up for k in range(1, len(keys)) if (up := "/".join(keys[:k])) in paths), None)
        if above or not all(keys):
            reason = f"{above} would be an array and hold {name}" if above else f"{name} would have an empty key"
            raise PortError(f"{reason}: give --names that are paths of their own in the tree")


def _check_scanned(prefixes: Mapping[SiteKey, Mapping[str, str]]) -> None:
    """Refuses names of layers that no reader knows how to take out of a stack.

    Raises:
        PortError: its message says which names a reader knows.
    """
    for site, rows in prefixes.items():
        name = next(iter(rows.values()))
        if site.group == "layers" and not PLACE.fullmatch(name):
            raise PortError(
                f"{name} can't be stacked with other layers: --names must end as decoder/layers_{{layer}}/"
                f"mhc_attention/ or decoder/layers_{{layer}}/mhc_mlp/ do, or the layers be written --stacks unscanned"
            )


def _shown(layout: Layout, tensors: Shapes) -> list[str]:
    """The names of weights that a reader of such a checkpoint shows.

    Raises:
        PortError: the reader takes some for an optimiser's, or can't split the stacks.
    """
    weights, aside = without_optimiser(tensors)
    kept = list(weights)
    if aside:
        raise PortError(
            f"{min(aside)} would be taken for the state of an optimiser, and not be read: {_advice(layout)}"
        )
    if not layout.stacked:
        return kept
    unread = {name: Tensor(name, tuple(tensors[name][0]), tensors[name][1], 0, Path(layout.name)) for name in kept}
    try:
        return list(Unstacked(Checkpoint(Path(layout.name), layout.containers[0], unread)).tensors)
    except PortError as error:
        raise PortError(f"what would be written couldn't be read again: {error}") from error


def _located(layout: Layout, shown: list[str]) -> tuple[dict[str, tuple[SiteKey, str]], str]:
    """The site and the row of each name, as the layout reads them; or the reason why it finds none."""
    try:
        sites = layout.locator.locate(shown)
    except PortError as error:
        return {}, str(error)
    located = {name: (site, row) for site, rows in sites.items() for row, name in rows.items()}
    return located, "" if located else f"its reader finds no site among {', '.join(shown[:3])}"


def _bare(layout: Layout, name: str) -> str:
    """A name as it is before and after its layers were stacked: a tree's reader takes wrappers out of those."""
    return LISTED.sub(r"\1layers_\2", naming.plain(name)) if layout.stacked else name


def _misread(
    layout: Layout, name: str, meant: tuple[SiteKey, str] | None, read: tuple[SiteKey, str] | None
) -> PortError:
    """The error for a tensor that isn't found again, or at another place."""
    where = f"as {read[1]} of {read[0]}" if read else "as no site's"
    is_ = f"it is {meant[1]} of {meant[0]}" if meant else "no such tensor is written"
    return PortError(f"{name} would be read {where}, and {is_}: {_advice(layout)}")


def _advice(layout: Layout) -> str:
    return "choose other --names" if layout.named_by_user else f"that is a mistake of the porter's layout {layout.name}"
