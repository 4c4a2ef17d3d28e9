"""What the schema of the dialects says: each parameter's domain, the rules between them, and the sizes of a layer.

A small part of JSON Schema, on plain values and without a package: a rule is ``if``, ``then`` and ``else`` over single
parameters, with the few keywords that `allows` knows; others are refused rather than passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conformance.files.places import CaseError, fixtures
from conformance.files.reading import Reader

SCHEMA = Reader(dict[str, Any], "a JSON Schema", CaseError)


@dataclass(frozen=True)
class Domain:
    """What a parameter may be, as the schema of the dialects says.

    Attributes:
        kind: ``boolean``, ``integer``, ``number`` or ``choice``.
        choices: the values of a choice, without null.
        nullable: whether it may be null.
        above: a number must be greater than this; None where ``least`` holds instead.
        least: the smallest number that it may be.
        most: the largest; the largest float for a finite number.
    """

    kind: str
    choices: tuple[str, ...] = ()
    nullable: bool = False
    above: float | None = None
    least: float | None = None
    most: float | None = None

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.nullable
        if self.kind == "boolean":
            return type(value) is bool
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "integer" else int | float):
            return False
        return not (
            value != value
            or (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.most is not None and value > self.most)
        )

    def __str__(self) -> str:
        """The domain in words, after "must be"."""
        null = " or null" if self.nullable else ""
        if self.kind == "boolean":
            return f"true or false{null}"
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}{null}"
        if self.kind == "integer":
            most = f" and at most {self.most}" if self.most is not None else ""
            return f"an integer of at least {self.least}{most}{null}"
        sign = "positive " if self.above == 0 else "non-negative " if self.least == 0 else ""
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
class Rule:
    """What parameters must be together.

    Attributes:
        text: the rule in words; ``{}`` in it is the parameter that breaks it.
        when: schemas of some parameters' values; where all of them hold, those of ``then`` must, else ``otherwise``'s.
    """

    text: str
    when: Mapping[str, Any]
    then: Mapping[str, Any]
    otherwise: Mapping[str, Any]

    def broken(self, row: Mapping[str, Any]) -> str | None:
        """The parameter that breaks it; None where it is kept. Each value must be in its domain already."""
        holds = all(allows(schema, row[key]) for key, schema in self.when.items())
        must = self.then if holds else self.otherwise
        return next((key for key, schema in must.items() if not allows(schema, row[key])), None)

    def said(self, parameter: str) -> str:
        return self.text.replace("{}", parameter)


def allows(schema: Mapping[str, Any], value: Any) -> bool:
    """Whether a value keeps a schema of ``const`` and ``not``.

    Raises:
        NotImplementedError: a keyword that isn't known here.
    """
    for keyword, content in schema.items():
        if keyword == "const":
            if value != content:
                return False
        elif keyword == "not":
            if allows(content, value):
                return False
        else:
            raise NotImplementedError(f"{keyword} in a rule of dialects.schema.json isn't known here")
    return True


@functools.cache
def schema() -> dict[str, Any]:
    """``fixtures/dialects.schema.json``, not to be changed."""
    return SCHEMA.read(fixtures() / "dialects.schema.json")


@functools.cache
def domains() -> dict[str, Domain]:
    """What each parameter may be, in the order of the rows."""
    parameters = schema()["$defs"]["dialect"]["properties"]["parameters"]["properties"]
    return {name: _domain(_value_schema(node)) for name, node in parameters.items()}


def _value_schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a parameter's schema says of its value, with references followed."""
    found: dict[str, Any] = {}
    if "$ref" in node:
        found |= _value_schema(schema()["$defs"][node["$ref"].rpartition("/")[2]])
    for part in node.get("allOf", ()):
        found |= _value_schema(part)
    return found | node.get("properties", {}).get("value", {})


def _domain(value: Mapping[str, Any]) -> Domain:
    if "enum" in value:
        return Domain("choice", tuple(v for v in value["enum"] if v is not None), None in value["enum"])
    kinds = [value["type"]] if isinstance(value["type"], str) else list(value["type"])
    (kind,) = (k for k in kinds if k != "null")
    return Domain(kind, (), "null" in kinds, value.get("exclusiveMinimum"), value.get("minimum"), value.get("maximum"))


@functools.cache
def rules() -> tuple[Rule, ...]:
    """The rules between parameters, in the order of the schema.

    Raises:
        NotImplementedError: one has another form than is read here.
    """
    found: list[Rule] = []
    for rule in schema()["$defs"]["rules"]["allOf"]:
        if not {"description", "if", "then"} <= set(rule) <= {"description", "if", "then", "else"}:
            raise NotImplementedError(f"a rule of dialects.schema.json must have description, if and then, got {rule}")
        found.append(Rule(rule["description"], *(_by_parameter(rule.get(part)) for part in ("if", "then", "else"))))
    return tuple(found)


def _by_parameter(node: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schemas of the single values that a part of a rule speaks of."""
    found: dict[str, Any] = {}
    for name, parameter in (node or {}).get("properties", {}).items():
        found[name] = parameter.get("properties", {}).get("value")
    form = {"properties": {name: {"properties": {"value": value}} for name, value in found.items()}}
    if node is not None and node != form:
        raise NotImplementedError(f"a rule of dialects.schema.json must be over values alone, got {node}")
    return found


@functools.cache
def sizes() -> dict[str, Domain]:
    """What streams and dim may be."""
    return {name: _domain(node) for name, node in schema()["$defs"]["sizes"]["properties"].items()}


@functools.cache
def most_permuted() -> int:
    """The most streams of a layer with residual=permutations."""
    return schema()["$defs"]["permuted_sizes"]["allOf"][1]["properties"]["streams"]["maximum"]
