"""Which function a checkpoint's weights are for: a dialect's parameters, from a name, metadata or a ``config.json``."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from conformance.corpus import dialect_rows, fixtures
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint

Parameters = dict[str, Any]
MOST = 1e300
FROM_METADATA, FROM_CONFIG = "from its metadata", "from its config.json"


@functools.cache
def known() -> dict[str, Parameters]:
    """Every dialect's parameters, not to be changed."""
    return dialect_rows()


def parse(text: str) -> Parameters:
    """A dialect with what departs from it, ``maxtext,norm_eps=1e-6``.

    Raises:
        PortError: an unknown dialect or parameter, or a value of the wrong kind.
    """
    name, *changes = text.split(",")
    rows = known()
    if name not in rows:
        raise PortError(f"unknown dialect {name!r}, expected one of {', '.join(rows)}")
    found = dict(rows[name])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in found:
            raise PortError(f"dialect {text!r}: unknown parameter {key!r}, expected one of {', '.join(found)}")
        found[key] = _value(text, key, value)
    return check(found, text)


def _value(text: str, key: str, value: str) -> Any:
    try:
        if key == "norm_weight":
            return {"true": True, "false": False}[value.lower()]
        if key == "iterations":
            return int(value)
        if key in ("norm_eps", "eps", "pre_eps", "post_scale", "post_eps"):
            return float(value)
    except (ValueError, KeyError):
        raise PortError(f"dialect {text!r}: {key} can't be {value!r}") from None
    return value


@functools.cache
def choices() -> dict[str, list[Any]]:
    """What each parameter may be, where that is a choice: the schema of the dialects says it."""
    schema = json.loads((fixtures() / "dialects.schema.json").read_text())
    rows = schema["$defs"]["dialect"]["properties"]["parameters"]["properties"]
    values = {name: row["allOf"][1]["properties"]["value"] for name, row in rows.items() if "allOf" in row}
    return {name: value["enum"] for name, value in values.items() if "enum" in value}


def check(parameters: Parameters, where: str) -> Parameters:
    """The parameters, where a layer can have them (``jax_impl.MHCConfig`` and ``torch_impl.MHCConfig`` check the same).

    Raises:
        PortError: a value that no layer has, or a combination.
    """
    for key, allowed in choices().items():
        if parameters[key] not in allowed:
            raise PortError(f"{where}: {key} must be one of {', '.join(map(str, allowed))}, got {parameters[key]!r}")
    sinkhorn = parameters["residual"] == "sinkhorn"
    if type(parameters["norm_weight"]) is not bool:
        raise PortError(f"{where}: norm_weight must be true or false, got {parameters['norm_weight']!r}")
    for key in ("norm_eps", "pre_eps", "post_scale", "post_eps", *(("eps",) if sinkhorn else ())):
        value = parameters[key]
        real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
        if not real or value < 0 or (key == "post_scale" and value == 0):
            raise PortError(f"{where}: {key} must be a finite non-negative number, got {str(value)[:40]}")
    for key in ("order", "guard", "eps", "iterations"):
        if (parameters[key] is not None) != sinkhorn:
            raise PortError(f"{where}: {key} belongs to residual=sinkhorn, got {parameters[key]!r}")
    if (parameters["mix"] == "identity") != (parameters["residual"] == "identity"):
        raise PortError(f"{where}: mix=identity goes with residual=identity alone")
    if sinkhorn and (parameters["guard"] == "none") != (parameters["eps"] == 0):
        raise PortError(f"{where}: eps must be 0 with guard none and positive with any other, got {parameters['eps']}")
    if sinkhorn and (type(parameters["iterations"]) is not int or parameters["iterations"] < 1):
        raise PortError(f"{where}: iterations must be an integer of at least 1, got {parameters['iterations']!r}")
    return parameters


def described(parameters: Mapping[str, Any]) -> str:
    """The nearest dialect's name and what departs from it."""
    rows = known()
    departs = {name: [f"{k}={parameters[k]}" for k in row if parameters[k] != row[k]] for name, row in rows.items()}
    nearest = min(departs, key=lambda name: len(departs[name]))
    return ",".join([nearest, *departs[nearest]])


def of_checkpoint(layout: Layout, checkpoint: Checkpoint) -> tuple[Parameters, str]:
    """What the checkpoint itself says, and where it says it; the layout's own dialect where it says nothing.

    Raises:
        PortError: what it says is no dialect.
    """
    rows = known()
    configured = from_config(layout, checkpoint)  # what the software will run, whatever was noted
    if configured:
        return configured, FROM_CONFIG
    noted = checkpoint.metadata.get(PORT_KEY)
    if noted is not None:
        stated = _json(_json(noted, checkpoint).get("parameters", {}), checkpoint)
        found = {k: v for k, v in stated.items() if k in rows["paper"]}
        if set(found) == set(rows["paper"]):
            return check(found, str(checkpoint.path)), FROM_METADATA
    if "parameters" in checkpoint.metadata and layout.keeps_dialect:
        stated = _json(checkpoint.metadata["parameters"], checkpoint)
        found = {**rows[layout.dialect], **{k: v for k, v in stated.items() if k in rows["paper"]}}
        return check(found, str(checkpoint.path)), FROM_METADATA
    return dict(rows[layout.dialect]), "its layout's own"


def configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``config.json`` beside a checkpoint, of its language model where it has several parts; empty without one."""
    config = checkpoint.config or {}
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def from_config(layout: Layout, checkpoint: Checkpoint) -> Parameters | None:
    """The dialect that a ``config.json`` sets, where it speaks of hyper-connections.

    Raises:
        PortError: a value in it that no layer has.
    """
    config = configuration(checkpoint)
    name = layout.models.get(str(config.get("model_type")))
    if name is None and (not layout.config or "hc_mult" not in config):
        return None
    name = name or layout.dialect  # a model_type that is new here, with the settings of hyper-connections
    found = dict(known()[name])
    for key, names in layout.config.items():
        if key in config and config[key] is not None:
            found.update(dict.fromkeys(names, config[key]))
    return check(found, f"{checkpoint.path}/config.json")


def _json(value: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        content = json.loads(value) if isinstance(value, str) else value
        return dict(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise PortError(f"{checkpoint.path}: its metadata isn't what this project writes ({error})") from error


def fitting(layout: Layout, norm: bool, residual: str) -> list[str]:
    """Dialects whose weights look like these, the layout's own first."""
    fits = [
        name
        for name, row in known().items()
        if row["residual"] == residual and (row["norm_weight"] == norm or layout.norm == "always")
    ]
    return sorted(fits, key=lambda name: name != layout.dialect)
