"""Dialects as the porter uses them: rows by name, departures from a row, and how a checkpoint's dialect is known."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from conformance.cases import dialects
from conformance.cases.dialects import Parameters, dialect_rows
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.verdict import ROUNDED

AS_GIVEN, LAYOUTS_OWN = "as given", "its layout's own"
FROM_METADATA, FROM_CONFIG = "from its metadata", "from its config.json"
SEEN = ("norm_weight", *ROUNDED)
"""The parameter that the tensors themselves tell, and those that only say where values are rounded."""


class Origin(Enum):
    """Where a dialect comes from; `KnownDialect.by` says it in words."""

    USER = auto()
    CONFIGURATION = auto()
    METADATA = auto()
    NAMES = auto()
    """The names of the tensors are those of one row's models."""
    LAYOUT = auto()
    """It is the row of the layout's own software, and nothing else says anything."""
    LAYOUT_SET = auto()
    """It is that row with values from elsewhere: the configuration, or a port's source."""
    SOURCE = auto()
    """A target takes over its source's dialect."""


@dataclass
class KnownDialect:
    """The function that a checkpoint is for, and how that is known.

    Attributes:
        parameters: all parameters of the dialect.
        origin: where they come from.
        by: the same in words, for reports.
        base: the published row that they are, or depart from.
        assumed: whether nothing says it, so that it is an assumption.
        problem: why it can't be known, where something speaks against assuming it; a port then needs ``--dialect``.
        target_states_it: for a target, whether its own configuration says it.
        left_open: for such a target, the settings that must be made in files that its configuration names.
        configured: the parameters that the configuration itself sets; the others are the row's.
        remarks: lines that should be reported and stop nothing.
    """

    parameters: Parameters
    origin: Origin
    by: str
    base: str
    assumed: bool = False
    problem: str = ""
    target_states_it: bool = False
    left_open: Mapping[str, Any] = field(default_factory=dict[str, Any])
    configured: Parameters = field(default_factory=Parameters)
    remarks: tuple[str, ...] = ()


@functools.cache
def known() -> dict[str, Parameters]:
    """The parameters of every published row, which callers must not change."""
    return dialect_rows()


def parse(text: str) -> Parameters:
    """The parameters of a dialect from a name, a name with changes (``maxtext,norm_eps=1e-6``), or a file.

    Raises:
        PortError: an unknown dialect or parameter, or a value of the wrong kind.
    """
    with _as_port_error():
        return dict(dialects.parse(text).parameters)


def check(parameters: Parameters, where: str) -> Parameters:
    """The parameters unchanged, if a layer can have them.

    Raises:
        PortError: a value or a combination of values that no layer has.
    """
    with _as_port_error():
        dialects.check(parameters, where)
    return parameters


@contextlib.contextmanager
def _as_port_error() -> Generator[None, None, None]:
    """Turns an error about a dialect into the porter's error."""
    try:
        yield
    except dialects.DialectError as error:
        raise PortError(str(error)) from error


def nearest(parameters: Mapping[str, Any]) -> str:
    """The published row that the fewest parameters depart from."""
    rows = known()
    return min(rows, key=lambda name: sum(parameters[k] != v for k, v in rows[name].items()))


def described(parameters: Mapping[str, Any], base: str = "") -> str:
    """The name of a row, ``base`` or the nearest one, with the parameters that depart from it."""
    name = base or nearest(parameters)
    departs = [f"{k}={parameters[k]}" for k, v in known()[name].items() if parameters[k] != v]
    return ",".join([name, *departs])


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The parameters in which two dialects are different functions.

    A head without an eps of its own has the norm's.
    """
    heads = [p["norm_eps"] if p["head_norm_eps"] is None else p["head_norm_eps"] for p in (first, second)]
    ignored = {*SEEN, *(["head_norm_eps"] if heads[0] == heads[1] or first["reduce"] != "head" else [])}
    return [name for name, value in first.items() if name not in ignored and value != second[name]]


def fitting(layout: Layout, norm: bool, residual: str) -> list[str]:
    """The rows whose weights look like these, the layout's own row first."""
    fits = [
        name
        for name, row in known().items()
        if row["residual"] == residual and (row["norm_weight"] == norm or layout.norm == "always")
    ]
    return sorted(fits, key=lambda name: name != layout.dialect)
