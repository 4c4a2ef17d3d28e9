"""Whole models in one canonical file: every layer and head under a prefix of its own, their parameters stated once.

    save_model("model.safetensors", {"layers.0.attention.": layer, …, "head.": head})
    load_model("model.safetensors", {"layers.0.attention.": layer, …, "head.": head})

Layers that are stacked (`flax.nnx.scan`) stand under a tuple of prefixes, one for each. Sharded sites come and go as
whole ones: every process calls with the same sites, and the first one writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jax_impl import metadata, sharding, weights
from jax_impl.modules import Site

Sites = Mapping[Any, Site]  # the keys of a Mapping are invariant: str | tuple would refuse a dict[str, Site]
"""Layers and heads, each under what stands before its tensors' canonical names; a stack under the tuple of its own."""
Pairs = Sequence[tuple[weights.Prefix, Site]]


def save_model(path: str | Path, sites: Sites, *, replace: bool = False) -> None:
    """Writes layers and heads as one canonical file; it appears whole or not at all.

    Args:
        sites: under their prefixes, for instance ``{"layers.0.attention.": layer, "head.": head}``, and a stack as
            ``{("layers.0.ffn.", "layers.1.ffn."): layers}``; parameters may be sharded, also over several processes,
            all of which call this.
        replace: replace a file whatever it holds, also other sites.

    Raises:
        ValueError: no site, something else than one, not a prefix for each layer, or configurations that differ; it
            names the parameters.
        FileExistsError: the file holds other tensors than these sites', or can't be read.
        OSError: the target can't be written; a former file is left as it was. On every process.
    """
    _check(sites)
    save_sites(path, list(sites.items()), replace)


def load_model(path: str | Path, sites: Sites, *, insist: bool = False) -> None:
    """Fills layers and heads from one canonical file, which holds these and no others; all are filled or none.

    Args:
        sites: as `save_model` takes them; of sharded parameters each process reads its own parts alone.
        insist: take weights whose file states another dialect than a site's; streams and dim must agree always.

    Raises:
        ValueError: no site, or something else than one; a prefix is missing in the file, or in ``sites``; else as
            `weights.load_weights`. On every process.
    """
    _check(sites)
    load_sites(path, list(sites.items()), insist, whole=True)


def save_sites(path: str | Path, sites: Pairs, replace: bool) -> None:
    """`save_model` of sites that are checked; each is gathered and handed to the writing process in turn."""
    for prefix, site in sites:
        site.check_prefix(prefix)
    metadata.check_alike({weights.listed(prefix)[0]: site.config for prefix, site in sites})
    writes = jax.process_index() == 0
    with sharding.agreed():
        if writes:
            weights.check_replaceable(path, _names(sites), replace)
    flat: dict[str, np.ndarray] = {}
    for prefix, site in sites:
        for name, value in site.weights().items():
            if writes or not value.is_fully_addressable:
                whole = sharding.gather(value)
                if writes:
                    flat |= weights.flattened({name: whole}, prefix)
    with sharding.agreed():
        if writes:
            weights.write(path, flat, sites[0][1].config)


def load_sites(path: str | Path, sites: Pairs, insist: bool, whole: bool) -> None:
    """`load_model` of sites that are checked.

    Args:
        whole: the file must hold no others.
    """
    for prefix, site in sites:
        site.check_prefix(prefix)
    shardings = [{name: value.sharding for name, value in site.weights().items()} for _, site in sites]
    loaded: list[dict[str, Array]] = []
    with sharding.agreed():
        if not whole:
            for (prefix, site), where in zip(sites, shardings, strict=True):
                loaded.append(weights.load_weights(path, site.config, prefix, site.shapes(), where, insist=insist))
        else:
            with weights.opened(path) as file:
                for _, site in sites:
                    metadata.check_metadata(path, file.metadata() or {}, site.config, insist)
                _check_names(path, set(file.keys()), _names(sites))
                for (prefix, site), where in zip(sites, shardings, strict=True):
                    loaded.append(weights.read_site(path, file, prefix, site.shapes(), where))
    for (_, site), values in zip(sites, loaded, strict=True):
        site.assign(values)


def _names(sites: Pairs) -> list[str]:
    return [one + name for prefix, site in sites for one in weights.listed(prefix) for name in site.shapes()]


def _check(sites: Sites) -> None:
    if not sites:
        raise ValueError("sites must have a layer or a head under its prefix, got none")
    for prefix, site in sites.items():
        if not all(isinstance(one, str) for one in (prefix if isinstance(prefix, tuple) else (prefix,))):
            raise ValueError(f"a prefix must be a string, or a tuple of them for stacked layers, got {prefix!r}")
        if not isinstance(site, Site):
            raise ValueError(
                f"{prefix!r} must be a ManifoldConstrainedHyperConnections or a HyperHead, got {type(site).__name__}"
            )
    names = _names(list(sites.items()))
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
    """Tensors in a few words: a prefix where all of a site is meant."""
    partly = {weights.prefix_of(name) for name in others}
    found = sorted({name if (prefix := weights.prefix_of(name)) in partly else prefix for name in names})
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return (", ".join(found[:6]) + more) or "none"
