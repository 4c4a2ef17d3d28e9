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
from flax import nnx
from jax import Array

from jax_impl import metadata, shards, weights
from jax_impl.modules import Site

Sites = Mapping[Any, Site]  # the keys of a Mapping are invariant: str | tuple would refuse a dict[str, Site]
"""Layers and heads, each under what stands before its tensors' canonical names; a stack under the tuple of its own."""
Pairs = Sequence[tuple[weights.Prefix, Site]]


def save_model(path: str | Path, sites: Sites, *, replace: bool = False) -> None:
    """Writes layers and heads as one canonical file; it appears whole or not at all.

    A module under two prefixes is written twice. What can't be loaded again isn't written.

    Args:
        sites: under their prefixes, for instance ``{"layers.0.attention.": layer, "head.": head}``, and a stack as
            ``{("layers.0.ffn.", "layers.1.ffn."): layers}``; parameters may be sharded, also over several processes,
            all of which call this.
        replace: replace a file whatever it holds, also other sites.

    Raises:
        ValueError: no site, something else than one, one without values (of `flax.nnx.eval_shape`), not a prefix for
            each layer, NaN or infinity in one, or configurations that differ; it names the parameters.
        FileExistsError: the file holds other tensors than these sites', or can't be read.
        OSError: the target can't be written; a former file is left as it was. On every process.
    """
    save_sites(path, _pairs(sites), replace)


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
        ValueError: no site, something else than one, one without values (of `flax.nnx.eval_shape`), or two that share a
            parameter; a prefix is missing in the file, or in ``sites``; else as `weights.load_weights`. On every
            process.
    """
    load_sites(path, _pairs(sites), insist, round, whole=True)


def save_sites(path: str | Path, sites: Pairs, replace: bool) -> None:
    """Does the work of `save_model`: gathers each site, and hands it to the writing process before the next one."""
    _check(sites)
    for prefix, site in sites:
        site.check_prefix(prefix)
    metadata.check_alike({weights.listed(prefix)[0]: site.config for prefix, site in sites})
    writes = jax.process_index() == 0
    with shards.agreed():
        if writes:
            weights.check_replaceable(path, _names(sites), replace)
    flat: dict[str, np.ndarray] = {}
    for prefix, site in sites:
        for name, value in site.weights().items():
            if writes or not value.is_fully_addressable:
                whole = shards.gather(value)
                if writes:
                    flat |= weights.flattened({name: whole}, prefix)
    with shards.agreed():
        if writes:
            weights.write(path, flat, sites[0][1].config)


def load_sites(path: str | Path, sites: Pairs, insist: bool, round: bool, whole: bool) -> None:
    """Does the work of `load_model`.

    Args:
        whole: the file must hold these sites and no others.
    """
    _check(sites)
    for prefix, site in sites:
        site.check_prefix(prefix)
    _check_apart(sites)
    shardings = [{name: value.sharding for name, value in site.weights().items()} for _, site in sites]
    dtypes = [{name: value.dtype for name, value in site.weights().items()} for _, site in sites]
    loaded: list[dict[str, Array]] = []
    with shards.agreed():
        if not whole:
            for (prefix, site), where, held in zip(sites, shardings, dtypes, strict=True):
                loaded.append(
                    weights.load_weights(
                        path, site.config, prefix, site.shapes(), where, dtypes=held, insist=insist, round=round
                    )
                )
        else:
            with weights.opened(path) as file:
                for _, site in sites:
                    metadata.check_metadata(path, file.metadata() or {}, site.config, insist)
                metadata.warn_of_doubts(path, file.metadata() or {}, sites[0][1].config)
                _check_names(path, set(file.keys()), _names(sites))
                for (prefix, site), where, held in zip(sites, shardings, dtypes, strict=True):
                    loaded.append(weights.read_site(path, file, prefix, site.shapes(), where, held, round))
    for (_, site), values in zip(sites, loaded, strict=True):
        site.assign(values)


def _names(sites: Pairs) -> list[str]:
    return [before + name for prefix, site in sites for before in weights.listed(prefix) for name in site.shapes()]


def _pairs(sites: Sites) -> list[tuple[weights.Prefix, Site]]:
    if not isinstance(sites, Mapping):
        raise ValueError(
            f"sites must be a mapping of prefixes to layers and heads, {{'layers.0.attention.': layer}}, got "
            f"{type(sites).__name__}"
        )
    return list(sites.items())


def _check(sites: Pairs) -> None:
    """Checks that these are prefixes, and layers and heads that have values.

    Raises:
        ValueError: one isn't; it names it.
    """
    if not sites:
        raise ValueError("sites must have a layer or a head under its prefix, got none")
    for prefix, site in sites:
        if not all(isinstance(part, str) for part in (prefix if isinstance(prefix, tuple | list) else (prefix,))):
            raise ValueError(f"a prefix must be a string, or a tuple of them for stacked layers, got {prefix!r}")
        if not isinstance(site, Site):
            raise ValueError(
                f"{prefix!r} must be a ManifoldConstrainedHyperConnections or a HyperHead, got {type(site).__name__}"
                f"{_inside(site)}"
            )
        if any(isinstance(value.get_value(), jax.ShapeDtypeStruct) for value in site.parameters().values()):
            raise ValueError(
                f"{prefix!r} must have parameters with values, got shapes alone, as eval_shape makes them: make the "
                f"module itself first, on a mesh by sharding.create"
            )
    _check_named_apart(sites)


def _inside(module: Any) -> str:
    """Says in words which sites another module holds."""
    children = nnx.iter_modules(module) if isinstance(module, nnx.Module) else ()
    held = [".".join(map(str, path)) for path, child in children if isinstance(child, Site)]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return f": it holds {', '.join(held[:3])}{more}, each of which takes a prefix of its own" if held else ""


def _check_apart(sites: Pairs) -> None:
    """Checks that no parameter is filled twice: the last would win, and the others' weights be lost.

    Raises:
        ValueError: two sites are one module, or share a parameter.
    """
    filled: dict[int, weights.Prefix] = {}
    for prefix, site in sites:
        for name, parameter in site.parameters().items():
            first = filled.setdefault(id(parameter), prefix)
            if first != prefix:
                raise ValueError(
                    f"each prefix must have a module of its own to load into, {first!r} and {prefix!r} share {name}: "
                    f"load one of them with load_weights"
                )


def _check_named_apart(sites: Pairs) -> None:
    names = _names(sites)
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
