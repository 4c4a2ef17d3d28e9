"""Names in a claim that nothing has: a slip there would leave every item out, and look like a run that passed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any

from conformance.cases.dialects import dialect_names
from conformance.cases.format import CONTRACTS, DTYPES
from conformance.cases.rules import domains
from conformance.cases.trajectories.model import STEP
from conformance.files.line import one_line
from conformance.files.problems import shown, slip, unknown
from conformance.interface import Capabilities
from conformance.stages import STAGES

WEIGHTS = ("float32", "x")
CLAIMABLE = (*STAGES, STEP)
"""The stages of a layer, and the step of a training (docs/trajectories.md)."""


def misnamed(claimed: Capabilities) -> str:
    """What is wrong with the names that an implementation claims, in one line; empty where all of them are known."""
    return one_line(next(_problems(claimed), ""))


def _problems(claimed: Capabilities) -> Iterator[str]:
    """Each unknown name; those of stages first, since the others may depend on them."""
    yield from _unknown("stages", "stage", claimed.stages, CLAIMABLE)
    yield from _dialects(claimed.dialects)
    yield from _by_stage("dtypes", "dtype", claimed.dtypes, DTYPES)
    yield from _by_stage("weights", "kind of weights", claimed.weights, WEIGHTS)
    yield from _unknown("contracts", "contract", claimed.contracts, CONTRACTS)
    if claimed.overrides is not None:
        yield from _unknown("overrides", "parameter", claimed.overrides, domains())
    yield from _unknown("outputs", "stage", claimed.outputs, STAGES)
    for stage, names in claimed.outputs.items():
        yield from _unknown(f"outputs[{stage!r}]", f"output of {stage}", names, STAGES[stage].outputs)


def _dialects(names: Any) -> Iterator[str]:
    """A dialect may be a row of the user's own, which no table has: only what is nearly a published name is a slip."""
    yield from _unknown("dialects", "dialect", names, None)
    for name in sorted(names):
        if slip(name, dialect_names()):
            yield f"capabilities.dialects: {unknown('dialect', name, dialect_names())}"


def _by_stage(
    field: str, kind: str, claim: Collection[str] | Mapping[str, Collection[str]], known: Collection[str]
) -> Iterator[str]:
    if not isinstance(claim, Mapping):
        yield from _unknown(field, kind, claim, known)
        return
    yield from _unknown(field, "stage", claim, CLAIMABLE)
    for stage, names in claim.items():
        yield from _unknown(f"{field}[{stage!r}]", kind, names, known)


def _unknown(field: str, kind: str, names: Any, known: Collection[str] | None) -> Iterator[str]:
    """The names of one field, which must be a collection of texts; without ``known`` they may be any texts."""
    if not isinstance(names, Set | list | tuple | Mapping):
        yield f"capabilities.{field}: expected a set of names, got {shown(names)}"
        return
    for name in sorted(names, key=str):
        if not isinstance(name, str):
            yield f"capabilities.{field}: expected names, got {shown(name)}"
        elif known is not None and name not in known:
            yield f"capabilities.{field}: {unknown(kind, name, known)}"
