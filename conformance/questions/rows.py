"""What a row of dialects.json says, in English, and what two rows differ in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from conformance.cases.dialects import Dialect, configuration, dialect_names, dialect_rows, edition, evidence, summary
from conformance.questions.identifying.candidates import MATHEMATICS, same_layer

WORDS: dict[str, Mapping[Any, str] | str] = {
    "norm_weight": {True: "the norm has a weight", False: "the norm has no weight"},
    "norm_eps": "the norm's eps is {:g}",
    "norm_eps_position": {
        "mean": "the norm's eps is added to the mean square",
        "root": "the norm's eps is added to the root of the mean square",
    },
    "residual": {
        "sinkhorn": "H comes from Sinkhorn's iterations",
        "permutations": "H is a weighted sum of all permutation matrices",
        "identity": "H is the identity",
    },
    "softmax": {
        "rows": "Sinkhorn starts with a softmax over rows",
        "columns": "Sinkhorn starts with a softmax over columns",
        "none": "Sinkhorn starts with exponentials, without a softmax",
    },
    "order": {
        "rows-first": "an iteration divides by row sums first, by column sums last",
        "columns-first": "an iteration divides by column sums first, by row sums last",
    },
    "guard": {
        "none": "no eps guards the sums",
        "add": "eps is added to the softmax and to every sum",
        "denominator": "eps is added to every sum",
        "clip": "a sum is at least eps",
    },
    "eps": "Sinkhorn's eps is {:g}",
    "iterations": "{} iterations",
    "logit_limit": "logits are clipped to ±{:g}",
    "pre_eps": "{:g} is added to pre",
    "post_scale": "post is {:g} times a sigmoid",
    "post_eps": "{:g} is added to post",
    "mix": {
        "in-out": "out_j sums H[i, j] x_i over i",
        "out-in": "out_j sums H[j, i] x_i over i",
        "identity": "each stream keeps its own x",
    },
    "pre_from": {
        "own": "a site reads with its own pre",
        "previous": "a site reads with the pre of the site before it",
    },
    "coefficients": {
        "float32": "the norm, the gates and H stay in float32",
        "activation": "the norm, the gates and H are rounded to x's dtype",
    },
    "matrix": {
        "float32": "Sinkhorn's passes stay in float32",
        "activation": "Sinkhorn's passes are rounded to x's dtype",
    },
    "mixing": {
        "float32": "out is summed in float32 and rounded once",
        "activation": "out is summed in x's dtype",
    },
    "reduce": {
        "sum": "a model ends with the sum of the streams",
        "mean": "a model ends with the mean of the streams",
        "head": "a model ends with a learned head",
        "carried": "a model ends with the sum weighted by the last pre",
        "none": "it has no reduction",
    },
    "reduction": {
        "float32": "the sum or mean over the streams is made in float32",
        "activation": "the sum or mean over the streams is made in x's dtype",
    },
    "head_norm_eps": "the eps of the head's norm is {:g}",
}
"""A sentence for each value of a parameter, or one for all."""
WITHOUT = {
    "logit_limit": "logits aren't clipped",
    "head_norm_eps": "the head's norm has the layer's eps",
    "eps": "Sinkhorn has no eps",
    "pre_eps": "nothing is added to pre",
    "post_eps": "nothing is added to post",
}
"""Sentences for null or 0, where there is something to say."""
SINKHORN = ("softmax", "order", "guard", "eps", "iterations", "logit_limit")
"""Parameters that say nothing of another residual matrix."""


def said(parameter: str, value: Any) -> str:
    """What a parameter's value means; empty for null where nothing depends on it."""
    if value is None or (value == 0 and parameter in WITHOUT):
        return WITHOUT.get(parameter, "")
    words = WORDS[parameter]
    return words.format(value) if isinstance(words, str) else words[value]


def listing() -> Iterator[str]:
    """A line for each published row: what ran, or what was only read and when."""
    width = max(map(len, dialect_names()))
    for name in dialect_names():
        yield f"{name:{width}}  {_grounds(evidence(name))}"


def _grounds(found: Mapping[str, str]) -> str:
    ran = f"ran: {found['ran']}" if "ran" in found else ""
    read = f"{'read' if ran else 'read, not run'}: {found['read']} ({found['date']})" if "read" in found else ""
    return "; ".join(filter(None, (ran, read)))


def described(dialect: Dialect) -> Iterator[str]:
    """A row: what it is, what it rests on, what software takes from its configuration, and every parameter in words."""
    if dialect.base:
        yield f"{dialect.name}: {summary(dialect.base)}"
        found = evidence(dialect.base)
        yield f"evidence: {_grounds(found)}"
        if note := found.get("note"):
            yield f"note: {note}"
        if number := edition(dialect.base):
            yield f"edition: {number}, which the ids of its cases end in"
        if keys := configuration(dialect.base).keys:
            yield f"set in {configuration(dialect.base).place}: {_set(keys)}"
        alike = [
            name for name, row in dialect_rows().items() if name != dialect.base and same_layer(row, dialect.parameters)
        ]
        if alike:
            yield f"the same layer, in another precision or with another reduction: {', '.join(alike)}"
    else:
        yield f"{dialect.name}: a row of your own"
    yield "parameters:"
    for name, value in dialect.parameters.items():
        changed = "  (changed)" if name in dialect.overrides else ""
        yield f"  {name:18} {_shown(value):14} {_meaning(dialect, name)}{changed}".rstrip()


def _set(keys: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{key} ({', '.join(parameters)})" for key, parameters in keys.items())


def _meaning(dialect: Dialect, name: str) -> str:
    unused = name in SINKHORN and dialect.parameters["residual"] != "sinkhorn"
    return "" if unused else said(name, dialect.parameters[name])


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing(a: Dialect, b: Dialect) -> dict[str, tuple[Any, Any]]:
    """The parameters in which two rows differ, with both values."""
    return {
        name: (a.parameters[name], b.parameters[name]) for name in WORDS if a.parameters[name] != b.parameters[name]
    }


def compared(a: Dialect, b: Dialect) -> Iterator[str]:
    """What two rows differ in, in words: first what changes the function, then precision and the end of the model."""
    apart = differing(a, b)
    if not apart:
        yield f"{a.name} and {b.name} are the same row"
        return
    function = [name for name in apart if name in MATHEMATICS]
    rest = [name for name in apart if name not in MATHEMATICS]
    same = "are the same layer, and differ in precision or in the end of the model alone"
    yield f"{a.name} and {b.name} {'compute different functions' if function else same}"
    width = max(map(len, (a.name, b.name)))
    for title, names in (("the function:", function), ("precision, and the end of the model:", rest)):
        if names:
            yield title
        for name in names:
            for row, label in ((a, name), (b, "")):
                value = f"{_shown(row.parameters[name]):14} {_meaning(row, name)}"
                yield f"  {label:18} {row.name:{width}}  {value}".rstrip()
