"""Which function a checkpoint's weights are for: a dialect's parameters, from a name, metadata or a ``config.json``."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from conformance import dialects
from conformance.dialects import Parameters, dialect_rows
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.storage.checkpoint import PORT_KEY, Checkpoint

FREE = ("coefficients", "matrix", "mixing", "reduction", "reduce", "head_norm_eps", "norm_weight")
"""Parameters that say where it is rounded, or what a port decides on its own."""
FROM_METADATA, FROM_CONFIG = "from its metadata", "from its config.json"


@functools.cache
def known() -> dict[str, Parameters]:
    """Every dialect's parameters, not to be changed."""
    return dialect_rows()


def parse(text: str) -> Parameters:
    """The parameters of a dialect: its name, what departs from it (``maxtext,norm_eps=1e-6``), or a file of all of it.

    Raises:
        PortError: an unknown dialect or parameter, or a value of the wrong kind.
    """
    with _ported():
        return dict(dialects.parse(text).parameters)


def check(parameters: Parameters, where: str) -> Parameters:
    """The parameters, where a layer can have them.

    Raises:
        PortError: a value that no layer has, or a combination.
    """
    with _ported():
        dialects.check(parameters, where)
    return parameters


@contextlib.contextmanager
def _ported() -> Iterator[None]:
    """Turns what is no dialect into the porter's error."""
    try:
        yield
    except dialects.DialectError as error:
        raise PortError(str(error)) from error


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
        return configured, f"from {checkpoint.config_name}"
    noted = checkpoint.metadata.get(PORT_KEY)
    if noted is not None:
        stated = _json(_json(noted, checkpoint).get("parameters", {}), checkpoint)
        found = {k: v for k, v in dialects.completed(stated).items() if k in rows["paper"]}
        if set(found) == set(rows["paper"]):
            return check(found, str(checkpoint.path)), FROM_METADATA
    if "parameters" in checkpoint.metadata and layout.keeps_dialect:
        stated = _json(checkpoint.metadata["parameters"], checkpoint)
        given = {k: v for k, v in dialects.completed(stated).items() if k in rows["paper"]}
        found = {**rows[layout.dialect], **given}
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
        if config.get(key) is not None:  # a row that says 0 or null has no such term
            found |= {name: config[key] for name in names if found[name]}
    return check(found, f"{checkpoint.path}, {checkpoint.config_name}")


def own(layout: Layout, parameters: Mapping[str, Any]) -> Parameters:
    """What the layout's software computes of such a source: its model of the source's dialect, where it has one.

    It has one where a dialect of its models differs from the source in what is configured or rounded, and in nothing
    else. Of several the one counts that reduces the streams as the source does, and the layout's own before others.
    """
    configured = {name for names in layout.config.values() for name in names}
    rows = [known()[name] for name in dict.fromkeys([layout.dialect, *layout.models.values()])]
    same = [row for row in rows if all(row[k] == parameters[k] for k in row if k not in {*configured, *FREE})]
    if not same:
        return dict(known()[layout.dialect])
    return dict(min(same, key=lambda row: row["reduce"] != parameters["reduce"]))


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
