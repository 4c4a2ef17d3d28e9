"""The cause of each implementation's failures, in one sentence, with what supports it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from conformance.cases.dialects import dialect_names
from conformance.implementations.child import PythonChild
from conformance.judge.groups import Diagnosis
from conformance.judge.item import Outcome
from conformance.judge.modes import AFTER
from conformance.mesh import MARK
from conformance.questions.diagnosis import measured
from conformance.questions.diagnosis.child import Function, Task
from conformance.questions.diagnosis.measured import Shown

SECONDS = 20.0
"""For each implementation, the start of its process included."""


def diagnosed(outcomes: Sequence[Outcome], failed: Sequence[Outcome], seconds: float = SECONDS) -> list[Diagnosis]:
    """A diagnosis for each implementation that fails.

    Args:
        outcomes: of the whole run.
        failed: those that fail, and that no known result covers.
        seconds: for the calls that it takes for one implementation.
    """
    found = []
    for name in dict.fromkeys(o.implementation for o in failed):
        mine, wrong = ([o for o in some if o.implementation == name] for some in (outcomes, failed))
        found.append(_diagnosed(name, measured.shown(mine, wrong), wrong[0].reference, seconds))
    return found


def _diagnosed(name: str, seen: Shown, reference: str, seconds: float) -> Diagnosis:
    cause = measured.at_once(seen)
    if cause:
        return Diagnosis(name, cause, _standing(seen))
    found = _asked(seen, reference, seconds)
    function = found.get("function")
    causes = list(dict.fromkeys(filter(None, _causes(seen, found))))
    cause = causes[0] if causes else ""
    return Diagnosis(name, cause, [*causes[1:], *_supports(seen, function)])


def _asked(seen: Shown, reference: str, seconds: float) -> dict[str, Any]:
    """What a process of its own finds in time, under the names of `child.work`."""
    leader = seen.leader
    if MARK in reference or leader.dialect not in dialect_names():
        return {}
    stage = "" if leader.mode else leader.stage
    task = Task(
        reference, leader.dialect, seen.dtype, leader.case, stage, leader.x, leader.gradient, seen.golden, seconds
    )
    found: dict[str, Any] = {}
    child = PythonChild("conformance.questions.diagnosis.child:work", kept="2")
    try:
        child.send(task)
        ends = time.monotonic() + seconds
        while "end" not in found and child.connection.poll(max(0.0, ends - time.monotonic())):
            kind, content = child.receive()
            found[kind] = content
    except EOFError:  # it has died, as the run may have shown already
        pass
    finally:
        child.end()
    return found


def _causes(seen: Shown, found: dict[str, Any]) -> Iterator[str]:
    """Every cause that was found, the most telling first."""
    function: Function | None = found.get("function")
    place: str = found.get("place", "")
    if found.get("alone"):
        dtype = any(AFTER in o.mode for out in seen.outcomes for o in out.failed)
        others = "others in another dtype" if dtype else "others"
        yield f"right as the first call of a process, wrong after {others}: it keeps state of them, or is a race"
    where = f"{'' if seen.golden else 'right at small sizes; '}wrong {place}" if place else ""
    if not seen.golden:
        yield where
    if function and function.infinite:
        yield f"not finite in {function.infinite}: {measured.FAMILIES['overflow']}"
    if function and function.changes and function.ratio <= 1:
        yield f"{'; '.join(function.changes)} (passes as {function.words}, {function.ratio:.2g} of the bound)"
    if function and not function.changes and function.ratio <= 1 and function.words != function.told:
        yield f"computes {function.words}, not {function.told} ({function.ratio:.2g} of the bound)"
    if function and function.gradients:
        yield f"the values are right; {'; '.join(function.gradients)}"
    yield where
    yield measured.of_parameters(seen)
    yield measured.of_dtype(seen, function.precision if function else "")
    yield measured.of_family(seen)
    if function and function.configured:
        yield f"doesn't follow its configuration: {function.configured}"
    if function and function.rounded and seen.wide:
        yield f"a step is computed in bfloat16 or TF32 where {function.told} has none: all errors are of that size"
    if seen.gradients:
        name = seen.leader.tensor.removeprefix("d/")
        yield f"the values are right; the gradient of {name} isn't, first in {seen.leader.stage}"


def _supports(seen: Shown, function: Function | None) -> list[str]:
    lines = _standing(seen)
    if function and function.stages and function.changes:
        lines.append(f"the stages that show it: {', '.join(function.stages)}")
    if function and function.precision and not seen.wide:
        lines.append(f"precision: {function.precision}")
    return lines


def _standing(seen: Shown) -> list[str]:
    """Where the first failure stands, and the line that repeats it."""
    leader = seen.leader
    mode = f" ({leader.mode})" if leader.mode else ""
    return [f"first in {leader.stage}, {leader.tensor}{mode}, {leader.x}: {leader.case}", leader.reproduce]
