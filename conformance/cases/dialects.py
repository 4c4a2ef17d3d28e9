"""What a dialect is: the published rows, what each parameter may be, and rows that a user writes.

A row is named (``deepseek-v4``), named with what departs from it (``deepseek-v4,norm_eps=1e-20``), or a JSON file that
holds all of it (``mine.json``). What a row must be stands in ``fixtures/dialects.schema.json`` and is read from there
(`conformance.cases.rules`); everything here that takes a row from outside checks it by `check`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from msgspec import Struct

from conformance.cases.rules import Domain, domains, most_permuted, rules, schema, sizes
from conformance.files.places import CaseError, fixtures
from conformance.files.problems import shown, unknown
from conformance.files.reading import Reader, Scalar
from conformance.interface import Capabilities

Parameters = dict[str, Any]
SILENT: Parameters = {
    "logit_limit": None, "pre_from": "own", "matrix": "float32", "reduction": "float32", "head_norm_eps": None,
}  # fmt: skip
"""What a row that doesn't know these parameters means by it."""


class DialectError(CaseError):
    """A text or a file that is no row: what was expected, what came and what to do, in one line."""


@dataclass(frozen=True)
class Dialect:
    """A whole row, published or not.

    Attributes:
        name: what it is called in ids and reports, for instance ``deepseek-v4,norm_eps=1e-20``.
        parameters: all of them.
        base: the published row that it departs from, or is; None for a row of its own.
    """

    name: str
    parameters: Mapping[str, Any]
    base: str | None = None

    @property
    def published(self) -> bool:
        """Whether it is a row of ``fixtures/dialects.json`` as it stands, and the corpus has cases of it."""
        return self.name == self.base

    @property
    def told(self) -> str:
        """The name that an implementation is told (``config["dialect"]``), and that it must claim."""
        return self.base or self.name

    @property
    def overrides(self) -> Parameters:
        """The parameters that depart from the base, empty for a row of its own."""
        row = _rows()[self.base] if self.base else self.parameters
        return {key: value for key, value in self.parameters.items() if row.get(key) != value}


@dataclass(frozen=True)
class Configuration:
    """What the software of a row takes from its configuration; the rest is constant in it.

    Attributes:
        place: where the configuration is: ``config.json``, a command line, a constructor.
        keys: for each key the parameters that it sets, all to one value; ``streams`` is n, and a parameter after a
            minus is set to the negative of it.
        fixed: patterns of keys that speak of hyper-connections and set no parameter.
        requires: switches that must be so, where they are given, for the software to compute this row.
    """

    place: str
    keys: Mapping[str, tuple[str, ...]]
    fixed: tuple[str, ...] = ()
    requires: Mapping[str, bool] = field(default_factory=dict[str, bool])


class Sourced(Struct, frozen=True):
    """The value of a parameter, and where it is from."""

    value: Scalar
    source: str


class Row(Struct, frozen=True):
    """A row of ``fixtures/dialects.json`` (fixtures/README.md, "Rows")."""

    summary: str
    evidence: dict[str, str]
    parameters: dict[str, Sourced]
    edition: int | None = None
    configuration: Configuration | None = None


class Table(Struct, frozen=True):
    """``fixtures/dialects.json``."""

    dialects: dict[str, Row]


TABLE = Reader(Table, "a table of dialects", DialectError)
OWN = Reader(dict[str, Any], "a dialect as JSON", DialectError)


@functools.cache
def _published() -> dict[str, Row]:
    """The rows of ``fixtures/dialects.json``, not to be changed."""
    return TABLE.read(fixtures() / "dialects.json").dialects


@functools.cache
def _rows() -> dict[str, Parameters]:
    """The parameters of every published row, not to be changed."""
    rows: dict[str, Parameters] = {}
    for name, row in _published().items():
        rows[name] = {key: parameter.value for key, parameter in row.parameters.items()}
        check(rows[name], f"{fixtures() / 'dialects.json'}: dialects.{name}.parameters")
    return rows


def dialect_names() -> list[str]:
    return list(_rows())


def dialect_rows() -> dict[str, Parameters]:
    """The parameters of each published dialect."""
    return {name: dict(row) for name, row in _rows().items()}


def edition(name: str) -> str:
    """What the ids of a row's cases end in: its edition where its function was once corrected, else nothing."""
    number = _published()[name].edition if name in _published() else None
    return str(number or "")


def summary(name: str) -> str:
    """What a published row is, in a sentence."""
    return _published()[name].summary


def evidence(name: str) -> dict[str, str]:
    """What a published row rests on: the software that ``ran``, or what was ``read`` and the ``date``; a ``note``."""
    return dict(_published()[name].evidence)


def configuration(name: str) -> Configuration:
    """What the software of a published row takes from its configuration; no key for a row that is no software's."""
    return _published()[name].configuration or Configuration("", {})


def published(name: str) -> Dialect:
    """The published dialect of this name.

    Raises:
        DialectError: there is none.
    """
    if name not in _rows():
        raise DialectError(unknown("dialect", name, _rows()))
    return Dialect(name, dict(_rows()[name]), name)


def parse(text: str) -> Dialect:
    """A row from ``NAME``, ``NAME,key=value,…`` or the path of a JSON file that holds all of it.

    Raises:
        DialectError: an unknown dialect or parameter, a value that it can't be, a file that can't be read.
    """
    name, *changes = text.split(",")
    if text.endswith(".json"):
        return read(Path(text))
    if name.endswith(".json"):
        raise DialectError(f"dialect {text!r}: a file holds the whole row, write {', '.join(changes)} into it")
    base = published(name)
    parameters = dict(base.parameters)
    for change in changes:
        key, equals, value = change.partition("=")
        _known(f"dialect {text!r}", [key])
        if not equals:
            raise DialectError(f"dialect {text!r}: a change must be {key}=value, got {change!r}")
        try:
            parameters[key] = domains()[key].read(value)
        except (ValueError, KeyError):
            raise DialectError(f"dialect {text!r}: {key} can't be {value!r}, it must be {domains()[key]}") from None
    check(parameters, f"dialect {text!r}")
    found = Dialect(name, parameters, name)
    departs = [f"{key}={_text(value)}" for key, value in found.overrides.items()]
    return Dialect(",".join([name, *departs]), parameters, name)


def read(path: Path) -> Dialect:
    """The row that a JSON file holds; its name is the file's, without the ending.

    The file has ``{"parameters": {...}}`` as ``fixtures/dialects.json`` has it, or the parameters alone; each is its
    value, or ``{"value", "source"}``.

    Raises:
        DialectError: it can't be read, lacks a parameter, has one too many or a value that it can't be.
    """
    if not path.stem.isprintable():
        raise DialectError(f"{path}: the row is called as its file, whose name must be printable")
    content = OWN.read(path)
    given = _parameters(path, content)
    check(given, str(path))
    parameters = {key: _number(domains()[key], given[key]) for key in domains()}
    name = path.stem
    if name not in _rows():
        return Dialect(name, parameters)
    if parameters != _rows()[name]:
        raise DialectError(f"{path}: holds another row than the published dialect {name}: give the file another name")
    return published(name)


def _parameters(path: Path, content: Parameters) -> Parameters:
    """The values of a file's row, whichever form it has."""
    form = '{"parameters": {...}} or the parameters alone'
    if "dialects" in content:
        raise DialectError(f"{path}: holds a table of dialects, expected one row: {form}")
    rows: Any = content
    if "parameters" in content:
        rows = content["parameters"]
        beside = {"$schema", *schema()["$defs"]["dialect"]["properties"]}
        surplus = [name for name in content if name not in beside]
        if surplus or not isinstance(rows, dict):
            raise DialectError(f"{path}: expected {form}, got {shown(surplus[0] if surplus else rows)}")
    return {name: _value(value) for name, value in cast(Parameters, rows).items()}


def _value(written: Any) -> Any:
    """What stands for a parameter: the value, or an object of it and its source."""
    if isinstance(written, dict) and "value" in written and set(cast(Parameters, written)) <= {"value", "source"}:
        return cast(Parameters, written)["value"]
    return cast(Any, written)


def _number(domain: Domain, value: Any) -> Any:
    """A whole number as the float that the rows have, where the parameter is one."""
    whole = domain.kind == "number" and isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole else value


def _known(where: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in domains():
            raise DialectError(f"{where}: {unknown('parameter', name, domains())}")


def _text(value: Any) -> str:
    """A value as it is written in ``key=value``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def check(parameters: Mapping[str, Any], where: str) -> None:
    """Raises for parameters that no layer has: all of a row, each in its domain, and what they must be together.

    Raises:
        DialectError: it names the parameter.
    """
    _known(where, parameters)
    missing = [name for name in domains() if name not in parameters]
    if missing:
        raise DialectError(f"{where}: a whole row is expected, missing are {', '.join(missing)}")
    for key, domain in domains().items():
        if not domain.holds(parameters[key]):
            raise DialectError(f"{where}: {key} must be {domain}, got {shown(parameters[key])}")
    for rule in rules():
        key = rule.broken(parameters)
        if key is not None:
            raise DialectError(f"{where}: {rule.said(key)}, got {key}={shown(parameters[key])}")


def check_sizes(streams: Any, dim: Any, residual: Any, where: str) -> None:
    """Raises for numbers of streams and dim that a layer of this residual matrix can't have.

    Raises:
        DialectError: it names the size.
    """
    for name, value in (("streams", streams), ("dim", dim)):
        domain = sizes()[name]
        if not domain.holds(value):
            raise DialectError(f"{where}: {name} must be {domain}, got {shown(value)}")
    if residual == "permutations" and streams > most_permuted():
        raise DialectError(f"{where}: permutations need at most {most_permuted()} streams, got {streams}")


def completed(parameters: Mapping[str, Any]) -> Parameters:
    """Parameters that were written down before some existed, with the values that these had then."""
    if "residual" not in parameters:
        return dict(parameters)
    first = {"rows-first": "rows", "columns-first": "columns"}.get(str(parameters.get("order")))
    return {"softmax": first, **SILENT, **parameters}


def unclaimed(dialect: Dialect, claimed: Capabilities) -> str:
    """Why an implementation doesn't claim a row; empty where it does."""
    own = dialect.base is None and claimed.overrides is None
    if dialect.told not in claimed.dialects and not own:
        return f"dialect {dialect.told} not claimed"
    others = [key for key, value in dialect.overrides.items() if not claimed.allows(key, value)]
    return f"other values of {', '.join(others)} not claimed" if others else ""
