"""What identify found, in English."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conformance.cases.dialects import dialect_names, evidence
from conformance.questions.identifying.candidates import Candidate, differences, same_layer

if TYPE_CHECKING:
    from conformance.questions.identify import Identity

LISTED = 6
"""How many candidates a line names before it counts the rest."""


def lines(
    name: str, dtype: str, identity: Identity, rows: Mapping[str, Mapping[str, Any]], verbose: bool
) -> Iterator[str]:
    """The answer for one implementation and one dialect that it was told; the first line says it all.

    Args:
        rows: all dialects' parameters.
        verbose: name the nearest candidates with their distances too.
    """
    start = f"{name}, told {identity.told}, {dtype}:"
    if not identity.answers:
        yield f"{start} returns nothing that can be compared ({identity.items} items)"
        yield from _not_finite(identity)
        return
    nearest = identity.nearest
    verb = "computes" if nearest.ratio <= 1 else "computes none of the dialects; nearest"
    yield f"{start} {verb} {nearest.candidate.words} ({nearest.ratio:.3g} of the bound, {identity.items} items)"
    yield from _differs(identity, rows)
    if nearest.ratio <= 1:
        yield from _same(identity, rows, verbose)
    else:
        yield from _rounded(identity, dtype)
    if identity.extreme:
        yield f"  but not where logits are so large that exp overflows or vanishes: {identity.extreme}"
    if identity.configured:
        yield f"  but where its configuration sets the eps apart (cases big-eps-*), {identity.configured}"
    if identity.gradients:
        case, stage, tensor = identity.gradients[0]
        count = f"{len(identity.gradients)} miss their bounds, first {tensor} of {case}, {stage}"
        yield f"  but its gradients are not this function's: {count}"
        yield from (f"    {finding}" for finding in identity.findings)
    yield from _by_stage(identity)
    yield from _read(nearest.candidate)
    yield from _not_finite(identity)
    if identity.precision:
        yield f"  precision: {identity.precision}"
    if verbose:
        yield from (f"    {a.ratio:9.3g}  {_named(a.candidate)} ({a.where})" for a in identity.answers)


def _differs(identity: Identity, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the nearest candidate's row has another value of than the told one."""
    candidate = identity.nearest.candidate
    others = differences(rows[candidate.dialect], rows[identity.told], identity.known)
    if candidate.dialect != identity.told and others:
        yield f"  {candidate.dialect} differs from {identity.told}, which it was told: {'; '.join(others)}"


def _same(identity: Identity, rows: Mapping[str, Mapping[str, Any]], verbose: bool) -> Iterator[str]:
    """Rows that are the same function, and candidates that its outputs can't be told from."""
    nearest, *others = identity.matches
    row = rows[nearest.candidate.dialect]
    layers = [name for name in nearest.candidate.same if same_layer(rows[name], row)]
    if layers and not nearest.candidate.changes:
        yield f"  the same layer, in another precision or with another reduction: {_listed(layers)}"
    if rest := [name for name in nearest.candidate.same if name not in layers]:
        weightless = {
            name: " without its norm weight" for name in rest if rows[name]["norm_weight"] > row["norm_weight"]
        }
        names = [_marked(name) + weightless.get(name, "") for name in rest]
        yield f"  of what it claims, the same as: {_listed(names)}"
    alike = [a.candidate for a in others if a.candidate.dialect != nearest.candidate.dialect or not a.candidate.changes]
    if alike:
        yield f"  not told apart by what it claims: {_listed([_named(candidate) for candidate in alike])}"
    changed = ["; ".join(a.candidate.changes) for a in others if a.candidate not in alike]
    if changed and (verbose or nearest.candidate.changes):
        yield f"  these cases would look the same with: {_listed(changed)}"


def _by_stage(identity: Identity) -> Iterator[str]:
    """The nearest function of each stage, where they aren't all the same: the stages that are right show the way."""
    stages: dict[str, list[str]] = {}
    for stage, answer in identity.by_stage.items():
        far = f"none, nearest {answer.candidate.words} ({answer.ratio:.3g} of the bound)"
        stages.setdefault(answer.candidate.words if answer.ratio <= 1 else far, []).append(stage)
    if len(stages) > 1:
        said = [f"{', '.join(names)}: {words}" for words, names in stages.items()]
        yield f"  stage by stage: {'; '.join(said)}"


def _rounded(identity: Identity, dtype: str) -> Iterator[str]:
    """Rows that differ by no more than roundings do, where nothing matches."""
    if identity.rounded:
        names = [
            f"{name} (within {error:.2g} of an output's largest value)" for name, error in identity.rounded.items()
        ]
        narrow = "bfloat16 or TF32" if dtype in ("float32", "float64") else dtype
        yield f"  it may be {_listed(names)} with a step in {narrow} where the dialect has none"


def _read(candidate: Candidate) -> Iterator[str]:
    if _is_read(candidate.dialect):
        source = evidence(candidate.dialect)
        yield f"  {candidate.dialect} was read, not run: {source['read']} ({source['date']})"


def _not_finite(identity: Identity) -> Iterator[str]:
    if identity.infinite:
        case, stage, tensor = identity.infinite[0]
        hint = "; is the maximum subtracted before exp?" if case.startswith("overflow") and tensor == "H" else ""
        yield f"  not finite, and left out: {len(identity.infinite)} outputs, first {tensor} of {case}, {stage}{hint}"


def _is_read(dialect: str) -> bool:
    return dialect in dialect_names() and "ran" not in evidence(dialect)


def _marked(dialect: str) -> str:
    return f"{dialect} (read, not run)" if _is_read(dialect) else dialect


def _named(candidate: Candidate) -> str:
    return candidate.words.replace(candidate.dialect, _marked(candidate.dialect), 1)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return "; ".join([*names[:LISTED], *([f"and {more} more"] if more > 0 else [])])
