"""What a canonical file states of its sites: the format, and once for all of them every parameter of their dialect.

A parameter that didn't exist yet when a file was written has the value that every layer had then (`SILENT`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_impl.config import FIRST, MHCConfig

FORMAT = "mhc-canonical/1"
CASE = "mhc-conformance-case/1"  # a golden file, which has canonical weights and states their parameters in its case
FRAMEWORKS = ("pt", "tf", "flax", "np", "mlx")  # which framework wrote a file, by Hugging Face's habit
SIZES = ("streams", "dim")
SILENT = {"logit_limit": None, "pre_from": "own", "matrix": "float32", "reduction": "float32", "head_norm_eps": None}
PORT = "mhc_port"  # what a port notes of itself: how good it is, and whether the parameters are known, or assumed
FAITHFUL = ("exact", "exact to rounding")  # of a port's verdicts those that need no words


def metadata_of(config: MHCConfig) -> dict[str, str]:
    """The metadata of a file whose sites all have this configuration."""
    return {"format": FORMAT, "parameters": json.dumps(config.parameters(), sort_keys=True)}


def stated_parameters(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The parameters that a file states, with those that it is too old to know; empty where it states none.

    Raises:
        ValueError: what stands there isn't a JSON object.
    """
    if "parameters" in metadata:
        stated = _object(path, "parameters", metadata["parameters"])
    elif metadata.get("format") == CASE and "case" in metadata:
        stated = _mapping(path, "parameters of the case", _object(path, "case", metadata["case"]).get("parameters"))
    else:
        return {}
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
    return _mapping(path, name, content)


def _mapping(path: str | Path, name: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {name} in its metadata must be a JSON object, got {json.dumps(content)[:40]!r}")
    return content


def check_metadata(path: str | Path, metadata: Mapping[str, str], config: MHCConfig, insist: bool = False) -> None:
    """Checks that the file's sites are of the configuration that they are loaded into, as far as the file says it.

    Every parameter that the file states is compared. One that it leaves open isn't, unless it is merely younger than
    the file (`SILENT`): a file without metadata, or with another project's, is taken for whatever ``config`` is.

    Args:
        insist: another dialect is accepted, and another format; the sizes never are.

    Raises:
        ValueError: the file has another format, or a parameter has another value or isn't known here; it lists all of
            them with both values.
    """
    form = metadata.get("format", FORMAT)
    known = form in (FORMAT, CASE) or (form in FRAMEWORKS and "parameters" not in metadata)
    if not known and not insist:
        raise ValueError(
            f"{path}: its metadata must have the format {FORMAT}, got {form[:40]!r}: another version wrote it, or "
            f"other software. Load it with that, or pass insist=True to take its tensors for canonical ones"
        )
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


def warn_of_doubts(path: str | Path, metadata: Mapping[str, str], config: MHCConfig) -> None:
    """Warns of what a file says against itself: that a port of it is no faithful one, or states a part of a dialect.

    Raises:
        ValueError: the port's note isn't a JSON object.
    """
    stated, wanted = stated_parameters(path, metadata), config.parameters()
    left = [name for name in wanted if name not in stated]
    if stated and left:
        warnings.warn(
            f"{path}: its metadata leaves parameters open, which are taken for config's: {', '.join(left)}",
            stacklevel=2,
        )
    note = _object(path, PORT, metadata[PORT]) if PORT in metadata else {}
    if words := _doubts(note):
        warnings.warn(f"{path}: the port that wrote it notes: {'; '.join(words)}", stacklevel=2)


def _doubts(note: Mapping[str, Any]) -> list[str]:
    """What a port notes of itself in words: its reason where it isn't exact, what is lacking, what was assumed."""
    verdict, reason, lacking = (note.get(name) for name in ("verdict", "reason", "lacking"))
    faithful = verdict is None or verdict in FAITHFUL
    words = [] if faithful else [str(reason or verdict)]
    missing = [str(line) for line in lacking] if isinstance(lacking, list) else [str(lacking)] if lacking else []
    words += [f"lacking: {line}" for line in missing if faithful or line not in str(reason or "")]
    if note.get("assumed") is True:
        words.append("the dialect of its source is an assumption")
    return words


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
