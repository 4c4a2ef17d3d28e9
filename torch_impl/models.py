"""Whole models in one canonical file: every layer and head under a prefix of its own, their parameters stated once.

    save_model("model.safetensors", {"layers.0.attention.": layer, …, "head.": head})
    load_model("model.safetensors", {"layers.0.attention.": layer, …, "head.": head})

Sharded sites come and go as whole ones: every process calls with the same sites, and the mesh's first one writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from torch_impl import metadata, weights
from torch_impl.modules import Site

Sites = Mapping[str, Site]
"""Layers and heads, each under what stands before its tensors' canonical names."""


def save_model(path: str | Path, sites: Sites, *, replace: bool = False) -> None:
    """Writes layers and heads as one canonical file; it appears whole or not at all.

    A module under two prefixes is written twice. What can't be loaded again isn't written.

    Args:
        sites: under their prefixes, for instance ``{"layers.0.attention.": layer, "head.": head}``; parameters may be
            sharded over one mesh, all of whose processes call this.
        replace: replace a file whatever it holds, also other sites.

    Raises:
        ValueError: no site, something else than one, one without values (on the device meta), NaN or infinity in one,
            or configurations that differ; it names the parameters.
        FileExistsError: the file holds other tensors than these sites', or can't be read.
        OSError: the target can't be written; a former file is left as it was. On every process.
    """
    save_sites(path, sites, replace)


def load_model(path: str | Path, sites: Sites, *, insist: bool = False, round: bool = False) -> None:
    """Fills layers and heads from one canonical file, which holds these and no others; all are filled or none.

    The dialect is compared as far as the file states it (`metadata.check_metadata`); a port's notes against itself are
    warnings.

    Args:
        sites: as `save_model` takes them, but each module once; of sharded parameters each process reads its own parts
            alone.
        insist: take weights whose file states another dialect than a site's, or another format; streams and dim must
            agree always.
        round: take weights that the parameters' dtype rounds, for instance float32 ones for a layer in bfloat16.

    Raises:
        ValueError: no site, something else than one, one without values (on the device meta), or two that share a
            parameter; a prefix is missing in the file, or in ``sites``; else as `weights.load_weights`. On every
            process.
    """
    load_sites(path, sites, insist, round, whole=True)


@torch.no_grad()
def save_sites(path: str | Path, sites: Sites, replace: bool) -> None:
    """Does the work of `save_model`: gathers each site, and hands it to the writing process before the next one."""
    sites = _checked(sites)
    metadata.check_alike({prefix: site.config for prefix, site in sites.items()})
    agreed, writes, gathered = _distributed(sites)
    with agreed():
        if writes:
            weights.check_replaceable(path, _names(sites), replace)
    flat: dict[str, torch.Tensor] = {}
    for prefix, site in sites.items():
        for name, value in site.weights().items():
            whole = gathered(value)
            if writes:
                flat |= weights.flattened({name: whole}, prefix)
    with agreed():
        if writes:
            weights.write(path, flat, next(iter(sites.values())).config)


@torch.no_grad()
def load_sites(path: str | Path, sites: Sites, insist: bool, round: bool, whole: bool) -> None:
    """Does the work of `load_model`.

    Args:
        whole: the file must hold these sites and no others.
    """
    sites = _checked(sites)
    agreed, _, _ = _distributed(sites)
    held = {prefix: _parts(site) for prefix, site in sites.items()}
    dtypes = {prefix: {name: local.dtype for name, (local, _) in own.items()} for prefix, own in held.items()}
    parts = {prefix: {name: part for name, (_, part) in own.items()} for prefix, own in held.items()}
    loaded: dict[str, dict[str, torch.Tensor]] = {}
    with agreed():
        _check_apart(held)
        if not whole:
            for prefix, site in sites.items():
                loaded[prefix] = weights.load_weights(
                    path,
                    site.config,
                    prefix,
                    _shapes(site),
                    parts=parts[prefix],
                    dtypes=dtypes[prefix],
                    insist=insist,
                    round=round,
                )
        else:
            with weights.opened(path) as file:
                for site in sites.values():
                    metadata.check_metadata(path, file.metadata() or {}, site.config, insist)
                metadata.warn_of_doubts(path, file.metadata() or {}, next(iter(sites.values())).config)
                _check_names(path, set(file.keys()), _names(sites))
                for prefix, site in sites.items():
                    loaded[prefix] = weights.read_site(
                        path, file, prefix, _shapes(site), parts[prefix], dtypes[prefix], round
                    )
    for prefix, values in loaded.items():
        for name, (local, _) in held[prefix].items():
            local.copy_(values[name])


def _parts(site: Site) -> dict[str, tuple[torch.Tensor, weights.Index]]:
    """This process's part of each parameter."""
    return {name: weights.local_part(value.detach()) for name, value in site.weights().items()}


def _shapes(site: Site) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in site.weights().items()}


def _names(sites: Sites) -> set[str]:
    return {prefix + name for prefix, site in sites.items() for name in _shapes(site)}


def _checked(sites: Sites) -> dict[str, Site]:
    """The layers and heads themselves, without what torch.compile wraps them in.

    Raises:
        ValueError: ``sites`` is no mapping of prefixes to layers and heads that have values.
    """
    if not isinstance(sites, Mapping):
        raise ValueError(
            f"sites must be a mapping of prefixes to layers and heads, {{'layers.0.attention.': layer}}, got "
            f"{type(sites).__name__}"
        )
    if not sites:
        raise ValueError("sites must have a layer or a head under its prefix, got none")
    checked: dict[str, Site] = {}
    for prefix, module in sites.items():
        if not isinstance(prefix, str):
            raise ValueError(f"a prefix must be a string, got {prefix!r}")
        site = getattr(module, "_orig_mod", module)
        if not isinstance(site, Site):
            raise ValueError(
                f"{prefix!r} must be a ManifoldConstrainedHyperConnections or a HyperHead, got {type(site).__name__}"
                f"{_inside(site)}"
            )
        if any(value.is_meta for value in site.parameters()):
            raise ValueError(
                f"{prefix!r} must have parameters with values, got some on the device meta: call to_empty(device=…), "
                f"then load or fill them"
            )
        checked[prefix] = site
    _check_named_apart(checked)
    return checked


def _inside(module: Any) -> str:
    """Says in words which sites another module holds."""
    children = module.named_modules() if isinstance(module, torch.nn.Module) else ()
    held = [name for name, child in children if isinstance(child, Site)]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return f": it holds {', '.join(held[:3])}{more}, each of which takes a prefix of its own" if held else ""


def _check_apart(held: Mapping[str, Mapping[str, tuple[torch.Tensor, weights.Index]]]) -> None:
    """Checks that no parameter is filled twice: the last would win, and the others' weights be lost.

    Raises:
        ValueError: two sites are one module, or share a parameter.
    """
    filled: dict[tuple[torch.device, int], str] = {}
    for prefix, own in held.items():
        for name, (local, _) in own.items():
            if not local.numel():
                continue
            first = filled.setdefault((local.device, local.data_ptr()), prefix)
            if first != prefix:
                raise ValueError(
                    f"each prefix must have a module of its own to load into, {first!r} and {prefix!r} share {name}: "
                    f"load one of them with load_weights"
                )


def _check_named_apart(sites: Sites) -> None:
    names = [prefix + name for prefix, site in sites.items() for name in _shapes(site)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"prefixes must give each tensor a name of its own, two are {twice}: change one of the prefixes"
        )


def _check_names(path: str | Path, present: Collection[str], wanted: Collection[str]) -> None:
    """Checks that a file holds these tensors and no others.

    Raises:
        ValueError: it names the prefixes that are missing altogether, and else the tensors.
    """
    missing, surplus = set(wanted) - set(present), set(present) - set(wanted)
    if missing or surplus:
        raise ValueError(
            f"{path}: missing {_told(missing, present)}, surplus {_told(surplus, wanted)}: the sites must be those of "
            f"the file; load_weights takes single ones"
        )


def _told(names: Collection[str], others: Collection[str]) -> str:
    """Names the tensors in a few words: by their prefix where all of a site is meant."""
    partly = {weights.prefix_of(name) for name in others}
    told = sorted({name if (prefix := weights.prefix_of(name)) in partly else prefix for name in names})
    more = f" and {len(told) - 6} more" if len(told) > 6 else ""
    return (", ".join(told[:6]) + more) or "none"


def _distributed(sites: Sites) -> tuple[Any, bool, Any]:
    """Finds out how sharded sites are gathered, and who writes.

    Returns:
        A context that fails on all processes if it fails on one, whether this one writes, and a function that gathers a
        parameter.
    """
    if not any([site.is_sharded() for site in sites.values()]):  # all of them: FSDP lets go of what it has gathered
        return nullcontext, True, lambda value: value
    from torch_impl import shards  # here, since it needs torch.distributed

    mesh = shards.mesh_of(sites)
    return lambda: shards.agreed(mesh), not any(mesh.get_coordinate() or ()), shards.whole
