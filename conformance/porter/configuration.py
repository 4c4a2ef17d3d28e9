"""What a model's configuration says of its hyper-connections, and which values a port carries from one to another."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance import dialects
from conformance.dialects import Configuration, Parameters
from conformance.porter.errors import PACKAGE, PortError
from conformance.porter.storage.checkpoint import PORT_KEY

OURS = re.compile(r"^m?hc_|(?:^|_)mhc_|hyper_?connection", re.IGNORECASE)
"""Keys that speak of hyper-connections, in whatever software."""
OTHERS = {
    "qwen4_exp": "Qwen4's gated residual: elementwise gates of low rank, and no matrix that mixes the streams",
    "kimi_k3": "attention residuals, which weigh the outputs of all earlier layers",
    "inkling2": "attention residuals, which weigh the outputs of all earlier layers",
}
"""Starts of a ``model_type``, and what such a model computes in the place of this layer."""


def model_types(config: Mapping[str, Any] | None) -> list[str]:
    """The ``model_type`` of a configuration and of its text part, as far as they are stated."""
    found = [part.get("model_type") for part in _parts(config)]
    return [str(kind) for kind in found if kind is not None]


def of_language_model(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The configuration of the text part, of the whole where there is no such part."""
    return _parts(config)[-1]


def _parts(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    inner = (config or {}).get("text_config")
    return [config or {}, inner] if isinstance(inner, Mapping) else [config or {}]


def other_function(config: Mapping[str, Any] | None) -> str:
    """What such a model computes where it is known to be no hyper-connection of this kind; empty otherwise."""
    for kind in model_types(config):
        for start, what in OTHERS.items():
            if kind.startswith(start):
                return f"model_type {kind} computes {what}"
    return ""


def layers_stated(config: Mapping[str, Any] | None) -> tuple[int, int]:
    """How many layers a configuration states, and how many more for multi-token prediction; 0 where it doesn't."""
    part = of_language_model(config)
    counts = [part.get(key) for key in ("num_hidden_layers", "num_nextn_predict_layers")]
    layers, more = (count if type(count) is int and count > 0 else 0 for count in counts)
    return layers, more


def unknown_keys(config: Mapping[str, Any] | None, known: Configuration) -> list[str]:
    """Keys that speak of hyper-connections and that the software of the row isn't known to have."""
    names = [key for part in _parts(config) for key in part if isinstance(key, str) and OURS.search(key)]
    fixed = (*known.keys, *known.fixed, *known.requires, PORT_KEY)
    return [key for key in dict.fromkeys(names) if not any(fnmatch.fnmatchcase(key, pattern) for pattern in fixed)]


def contradicted(config: Mapping[str, Any] | None, known: Configuration) -> str:
    """The switch that makes the software compute another row, with its value; empty where none does."""
    part = of_language_model(config)
    wrong = (key for key, value in known.requires.items() if part.get(key) is not None and part[key] != value)
    return next((f"{key} is {part[key]}" for key in wrong), "")


def values(config: Mapping[str, Any] | None, known: Configuration) -> Parameters:
    """The parameters that a configuration sets, and ``streams`` where it states n.

    Raises:
        PortError: two keys set one parameter differently.
    """
    part, found, told_by = of_language_model(config), Parameters(), dict[str, str]()
    for key, parameters in known.keys.items():
        if part.get(key) is None:
            continue
        stated = _number(part[key])
        for name in parameters:
            value = -stated if name.startswith("-") and isinstance(stated, int | float) else stated
            name = name.removeprefix("-")
            if name in found and found[name] != value:
                raise PortError(f"{told_by[name]} and {key} set {name} to {found[name]} and to {value}")
            found[name], told_by[name] = value, key
    return found


def _number(value: Any) -> Any:
    """The number that a text is: YAML takes ``1e-6``, which has no point, for a text."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    except ValueError:
        return value


def settings(parameters: Mapping[str, Any], base: str) -> dict[str, Any]:
    """For each key whose value isn't the row's own, what must be set for these parameters; the first key of each."""
    row, told = dialects.dialect_rows()[base], set[str]()
    found: dict[str, Any] = _switches(base)
    for key, names in dialects.configuration(base).keys.items():
        bare = [name.removeprefix("-") for name in names if name != "streams"]
        if not bare or told >= {*names} or len({parameters[name] for name in bare}) > 1:
            continue
        told |= {*names}
        if any(parameters[name] != row[name] for name in bare):
            value = parameters[bare[0]]
            found[key] = -value if names[0].startswith("-") else value
    return found


def _switches(base: str) -> dict[str, Any]:
    """The switches that choose a row among those of its software, where they aren't off for it."""
    own = dialects.configuration(base)
    others = [dialects.configuration(name) for name in dialects.dialect_names()]
    rivals = [other.requires for other in others if other.place == own.place]
    return {k: v for k, v in own.requires.items() if v and any(other.get(k) is False for other in rivals)}


def carried(parameters: Mapping[str, Any], base: str) -> Parameters:
    """The row ``base`` with the values of ``parameters`` wherever its software takes them from its configuration.

    A key that sets several parameters can carry one value: where the source's differ, the row's own stay; and so they
    do where the software can't have the source's, such as an eps of 0 under a guard that adds it.
    """
    found = dialects.dialect_rows()[base]
    for names in dialects.configuration(base).keys.values():
        bare = [name.removeprefix("-") for name in names if name != "streams"]
        wanted = {parameters[name] for name in bare}
        if len(wanted) == 1 and all((found[name] is None) == (parameters[name] is None) for name in bare):
            candidate = found | dict.fromkeys(bare, wanted.pop())
            with contextlib.suppress(dialects.DialectError):
                dialects.check(candidate, base)
                found = candidate
    return found


def described(parameters: Mapping[str, Any], base: str, streams: int) -> dict[str, Any]:
    """Every key of the row's software with its value for these parameters, the first key of each parameter."""
    found, told = dict[str, Any](), set[str]()
    for key, names in dialects.configuration(base).keys.items():
        having = {**parameters, "streams": streams}
        wanted = {having[name.removeprefix("-")] for name in names}
        if not told >= {*names} and len(wanted) == 1 and None not in wanted:
            value = wanted.pop()
            found[key] = -value if names[0].startswith("-") else value
            told |= {*names}
    return found


def written(
    parameters: Mapping[str, Any], base: str, models: Mapping[str, str], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """A ``config.json`` that states a model's hyper-connections, and nothing else of it; empty where no software of the
    row reads one.

    Args:
        models: the layout's, for each ``model_type`` its row.
        sizes: ``streams``, ``dim`` and ``layers``.
    """
    kind = next((kind for kind, row in models.items() if row == base), None)
    if kind is None or dialects.configuration(base).place != "config.json":
        return {}
    part = {
        **described(parameters, base, sizes["streams"]), "hidden_size": sizes["dim"],
        "num_hidden_layers": sizes["layers"],
    }  # fmt: skip
    of_text = f"{kind}_text"
    inner = {"text_config": {"model_type": of_text, **part}} if of_text in models else part
    return {"model_type": kind, **inner}


def read(path: Path) -> dict[str, Any]:
    """A configuration from a file: JSON, or YAML.

    Raises:
        PortError: it can't be read, isn't a mapping, or PyYAML is missing.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise PortError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        content = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise PortError(f"{path}: expected JSON, or YAML where it ends in .yml, got {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise PortError(f"{path}: expected a mapping of settings, got {type(content).__name__}")
    return content


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise PortError("a configuration in YAML needs PyYAML: pip install pyyaml", PACKAGE) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
