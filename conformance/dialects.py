"""What a dialect is: the published rows, what each parameter may be, and rows that a user writes.

A row is named (``deepseek-v4``), named with what departs from it (``deepseek-v4,norm_eps=1e-20``), or a JSON file that
holds all of it (``mine.json``). The rules are those of ``jax_impl.MHCConfig`` and ``torch_impl.MHCConfig``.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.interface import Capabilities
from conformance.places import fixtures

Parameters = dict[str, Any]
SINKHORN = ("softmax", "order", "guard", "eps", "iterations", "logit_limit")
"""Parameters of ``residual=sinkhorn`` alone, null in every other row."""
OPTIONAL = ("logit_limit",)
"""Those of them that may be null with Sinkhorn too."""

SILENT: Parameters = {
    "logit_limit": None, "pre_from": "own", "matrix": "float32", "reduction": "float32", "head_norm_eps": None,
}  # fmt: skip
"""What a row that doesn't know these parameters means by it."""


class DialectError(ValueError):
    """A text or a file that is no row: what was expected, what came and what to do, in one line."""


@dataclass(frozen=True)
class Domain:
    """What a parameter may be, as the schema of the dialects says.

    Attributes:
        kind: ``boolean``, ``integer``, ``number`` or ``choice``.
        choices: the values of a choice, without null.
        nullable: whether it may be null.
        above: a number must be greater than this; None where ``least`` holds instead.
        least: the smallest number that it may be.
    """

    kind: str
    choices: tuple[str, ...] = ()
    nullable: bool = False
    above: float | None = None
    least: float | None = None

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.nullable
        if self.kind == "boolean":
            return type(value) is bool
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "integer" else int | float):
            return False
        return _finite(value) and not (
            (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        )

    def __str__(self) -> str:
        """The domain in words, after "must be"."""
        null = " or null" if self.nullable else ""
        if self.kind == "boolean":
            return f"true or false{null}"
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}{null}"
        if self.kind == "integer":
            return f"an integer of at least {self.least:g}{null}" if self.least is not None else f"an integer{null}"
        sign = {(None, 0): "non-negative ", (0, None): "positive "}.get((self.above, self.least), "")
        return f"a finite {sign}number{null}"

    def read(self, text: str) -> Any:
        """The value that a text stands for, not yet checked.

        Raises:
            ValueError, KeyError: it stands for no value of this kind.
        """
        if text == "null":
            return None
        if self.kind == "boolean":
            return {"true": True, "false": False}[text.lower()]
        if self.kind == "choice":
            return text
        return int(text) if self.kind == "integer" else float(text)


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


@functools.cache
def _published() -> dict[str, dict[str, Any]]:
    """The table of ``fixtures/dialects.json`` as it stands, not to be changed."""
    return json.loads((fixtures() / "dialects.json").read_text())["dialects"]


@functools.cache
def _rows() -> dict[str, Parameters]:
    """Every published row, not to be changed."""
    return {name: {k: v["value"] for k, v in row["parameters"].items()} for name, row in _published().items()}


def dialect_names() -> list[str]:
    return list(_rows())


def dialect_rows() -> dict[str, Parameters]:
    """The parameters of each published dialect."""
    return {name: dict(row) for name, row in _rows().items()}


def edition(name: str) -> str:
    """What the ids of a row's cases end in: its edition where its function was once corrected, else nothing."""
    return str(_published().get(name, {}).get("edition", ""))


def evidence(name: str) -> dict[str, str]:
    """What a published row rests on: the software that ``ran``, or what was ``read`` and the ``date``; a ``note``."""
    return dict(_published()[name]["evidence"])


@dataclass(frozen=True)
class Configuration:
    """What the software of a row takes from its configuration; the rest is constant in it.

    Attributes:
        place: where the configuration is: ``config.json``, a command line, a constructor.
        keys: for each key the parameters that it sets, all to one value; ``streams`` is n, and a parameter after a
            minus is set to the negative of it.
        fixed: patterns of keys that speak of hyper-connections and set no parameter.
    """

    place: str
    keys: Mapping[str, tuple[str, ...]]
    fixed: tuple[str, ...] = ()


def configuration(name: str) -> Configuration:
    """What the software of a published row takes from its configuration; no key for a row that is no software's."""
    found = _published()[name].get("configuration")
    if found is None:
        return Configuration("", {})
    keys = {key: tuple(parameters) for key, parameters in found["keys"].items()}
    return Configuration(found["place"], keys, tuple(found.get("fixed", ())))


def published(name: str) -> Dialect:
    """The published dialect of this name.

    Raises:
        DialectError: there is none.
    """
    if name not in _rows():
        raise DialectError(f"unknown dialect {name!r}{_meant(name, _rows())}, expected one of {', '.join(_rows())}")
    return Dialect(name, dict(_rows()[name]), name)


@functools.cache
def _schema() -> dict[str, Any]:
    return json.loads((fixtures() / "dialects.schema.json").read_text())


@functools.cache
def domains() -> dict[str, Domain]:
    """What each parameter may be, in the order of the rows."""
    parameters = _schema()["$defs"]["dialect"]["properties"]["parameters"]["properties"]
    return {name: _domain(_value_schema(node)) for name, node in parameters.items()}


def _value_schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter's schema says of its value, with references followed."""
    found: dict[str, Any] = {}
    if "$ref" in node:
        found |= _value_schema(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    for part in node.get("allOf", ()):
        found |= _value_schema(part)
    return found | node.get("properties", {}).get("value", {})


def _domain(value: Mapping[str, Any]) -> Domain:
    if "enum" in value:
        return Domain("choice", tuple(v for v in value["enum"] if v is not None), None in value["enum"])
    kinds = [value["type"]] if isinstance(value["type"], str) else list(value["type"])
    (kind,) = (k for k in kinds if k != "null")
    return Domain(kind, (), "null" in kinds, value.get("exclusiveMinimum"), value.get("minimum"))


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
    try:
        content = json.loads(path.read_text(), object_pairs_hook=lambda pairs: _unrepeated(path, pairs))
    except OSError as error:
        raise DialectError(f"{path}: can't be read ({error.strerror})") from error
    except DialectError:
        raise
    except (ValueError, RecursionError) as error:
        raise DialectError(f"{path}: expected a dialect as JSON, got {error}") from error
    given = _parameters(path, content)
    _known(str(path), given)
    missing = [name for name in domains() if name not in given]
    if missing:
        raise DialectError(f"{path}: a whole row is expected, missing are {', '.join(missing)}")
    parameters = {key: _number(domains()[key], given[key]) for key in domains()}
    check(parameters, str(path))
    name = path.stem
    if name not in _rows():
        return Dialect(name, parameters)
    if parameters != _rows()[name]:
        raise DialectError(f"{path}: holds another row than the published dialect {name}: give the file another name")
    return published(name)


def _unrepeated(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise DialectError(f"{path}: {next(name for name in names if names.count(name) > 1)} is given twice")
    return dict(pairs)


def _parameters(path: Path, content: Any) -> Parameters:
    """The values of a file's row, whichever form it has."""
    form = '{"parameters": {...}} or the parameters alone'
    if not isinstance(content, dict):
        raise DialectError(f"{path}: expected {form}, got {type(content).__name__}")
    if "dialects" in content:
        raise DialectError(f"{path}: holds a table of dialects, expected one row: {form}")
    rows = content
    if "parameters" in content:
        rows = content["parameters"]
        beside = {"$schema", *_schema()["$defs"]["dialect"]["properties"]}
        surplus = [name for name in content if name not in beside]
        if surplus or not isinstance(rows, dict):
            raise DialectError(f"{path}: expected {form}, got {surplus[0] if surplus else type(rows).__name__!r}")
    found = {}
    for name, value in rows.items():
        sourced = isinstance(value, dict) and "value" in value and set(value) <= {"value", "source"}
        found[name] = value["value"] if sourced else value
    return found


def _number(domain: Domain, value: Any) -> Any:
    """A whole number as the float that the rows have, where the parameter is one."""
    whole = domain.kind == "number" and isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and _finite(value) else value


def _known(where: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in domains():
            hint = _meant(name, domains())
            raise DialectError(f"{where}: unknown parameter {name!r}{hint}, expected one of {', '.join(domains())}")


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _text(value: Any) -> str:
    """A value as it is written in ``key=value``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _shown(value: Any) -> str:
    """A value in a message; a file may hold anything, of any length."""
    return (repr(value) if isinstance(value, str) else _text(value))[:40]


def check(parameters: Mapping[str, Any], where: str) -> None:
    """Raises for parameters that no layer has: all of a row, each in its domain, and what they must be together.

    Raises:
        DialectError: it names the parameter.
    """
    for key, domain in domains().items():
        if not domain.holds(parameters[key]):
            raise DialectError(f"{where}: {key} must be {domain}, got {_shown(parameters[key])}")
    for key, problem in _contradictions(parameters):
        raise DialectError(f"{where}: {problem}, got {_shown(parameters[key])}")


def _contradictions(p: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Each rule between parameters that is broken: the parameter at fault, and the rule."""
    sinkhorn = p["residual"] == "sinkhorn"
    for key in SINKHORN:
        if not sinkhorn and p[key] is not None:
            yield key, f"{key} belongs to residual=sinkhorn and must be null for residual={p['residual']}"
        if sinkhorn and p[key] is None and key not in OPTIONAL:
            yield key, f"{key} belongs to residual=sinkhorn and must be given for it"
    if (p["mix"] == "identity") != (p["residual"] == "identity"):
        yield "mix", "mix=identity goes with residual=identity alone"
    if sinkhorn and (p["guard"] == "none") != (p["eps"] == 0):
        yield "eps", f"eps must be 0 with guard=none and positive with any other, here {p['guard']}"
    if sinkhorn and p["guard"] == "add" and p["softmax"] == "none":
        yield "softmax", "guard=add adds eps to a softmax, so that softmax can't be none: take guard=denominator"
    if p["coefficients"] == "activation" and p["mixing"] != "activation":
        yield "mixing", "mixing must be activation where coefficients is"
    if p["matrix"] == "activation" and (p["coefficients"] != "activation" or p["residual"] != "sinkhorn"):
        yield "matrix", "matrix=activation needs coefficients=activation and residual=sinkhorn"
    if (p["pre_from"] == "previous") != (p["reduce"] == "carried"):
        yield "reduce", "reduce=carried and pre_from=previous go with each other alone"
    if p["pre_from"] == "previous" and p["coefficients"] != "float32":
        yield "coefficients", "pre_from=previous needs coefficients=float32"


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
