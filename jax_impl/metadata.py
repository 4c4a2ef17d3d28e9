"""What a canonical file states of its sites: the format, and once for all of them every parameter of their dialect.

A parameter that didn't exist yet when a file was written has the value that every layer had then (`SILENT`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_impl.config import FIRST, MHCConfig

FORMAT = "mhc-canonical/1"
SIZES = ("streams", "dim")
SILENT = {"logit_limit": None, "pre_from": "own", "matrix": "float32", "reduction": "float32", "head_norm_eps": None}
PORT = "mhc_port"  # what a port notes of itself: whether the parameters are known, or assumed


def metadata_of(config: MHCConfig) -> dict[str, str]:
    """The metadata of a file whose sites all have this configuration."""
    return {"format": FORMAT, "parameters": json.dumps(config.parameters(), sort_keys=True)}


def stated_parameters(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The parameters that a file states, with those that it is too old to know; empty where it states none.

    Raises:
        ValueError: what stands there isn't a JSON object.
    """
    if "parameters" not in metadata:
        return {}
    stated = _object(path, "parameters", metadata["parameters"])
    if "residual" not in stated:
        return stated
    return {"softmax": FIRST.get(str(stated.get("order"))), **SILENT, **stated}


def _object(path: str | Path, name: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: {name} in its metadata must be a JSON object, got {text[:40]!r} ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {name} in its metadata must be a JSON object, got {text[:40]!r}")
    return content


def check_metadata(path: str | Path, metadata: Mapping[str, str], config: MHCConfig, insist: bool = False) -> None:
    """Checks that the file's sites are of the configuration that they are loaded into.

    Args:
        insist: another dialect is accepted; the sizes never are.

    Raises:
        ValueError: a parameter has another value, or one that isn't known here; it lists all of them with both values.
    """
    stated, wanted = stated_parameters(path, metadata), config.parameters()
    for name in SIZES:
        if name in stated and not _same(stated[name], wanted[name]):
            raise ValueError(f"{path}: {name} must be {wanted[name]}, the file says {stated[name]}")
    apart = [
        f"{name} ({value!r} in the file, {wanted[name]!r} in config)" if name in wanted else f"{name} (not known here)"
        for name, value in sorted(stated.items())
        if name not in wanted or not _same(value, wanted[name])
    ]
    if apart and not insist:
        assumed = PORT in metadata and _object(path, PORT, metadata[PORT]).get("assumed") is True
        note = "; the file's own are an assumption of the port that wrote it" if assumed else ""
        raise ValueError(
            f"{path}: holds weights of another dialect than config's: {', '.join(apart)}{note}. Make the layer from "
            f"the file's parameters, or pass insist=True to load the weights into this function all the same"
        )


def check_alike(configs: Mapping[str, MHCConfig]) -> None:
    """Checks that sites can stand in one file, whose metadata has the parameters once.

    Args:
        configs: each site's, under its prefix.

    Raises:
        ValueError: a parameter differs; it lists all of them with both values.
    """
    first, *others = configs
    for prefix in others:
        pairs = {
            name: (value, configs[prefix].parameters()[name]) for name, value in configs[first].parameters().items()
        }
        apart = [f"{name} ({a!r} and {b!r})" for name, (a, b) in pairs.items() if not _same(a, b)]
        if apart:
            raise ValueError(
                f"all sites of a file must have one configuration, {first!r} and {prefix!r} differ in "
                f"{', '.join(apart)}: save those in files of their own"
            )


def _same(a: Any, b: Any) -> bool:
    """Equal, and not a number for a boolean."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
