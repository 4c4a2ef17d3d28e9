"""One item: whether an implementation claims it, the call, and the verdict on every tensor that it returns."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from conformance.cases.case import Item
from conformance.cases.corpus import is_golden
from conformance.files.plain import name_of, plain, text_of
from conformance.implementations.calling import called
from conformance.interface import Arrays, Capabilities, Implementation, describe
from conformance.judge.faint import check_faint
from conformance.judge.frames import frames, place
from conformance.judge.held import Held, changes
from conformance.judge.rule import GOOD, Check, check_item
from conformance.judge.stochasticity import check_stochasticity
from conformance.stages import relevant

if TYPE_CHECKING:
    from conformance.judge.modes_plan import Plan


@dataclass
class Outcome:
    """What one implementation did with one item."""

    implementation: str
    case: str
    stage: str
    variant: str
    x: str
    dialect: str
    checks: list[Check] = field(default_factory=list[Check])
    skipped: str = ""
    reference: str = ""
    """What ``--impl`` was given: a registered name or ``module:attribute``."""
    asked: str = ""
    """The id of the item, which is the same in every run with the same options (`judge.run.Label.id`)."""
    file: str = ""
    """The case's file where it isn't one of the corpus."""
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    """The implementation's device, description and settings, read in the process that ran it."""
    altered: str = ""
    """What is wrong with the case's file, where it is one of the corpus and wasn't as promised when it was read."""
    seconds: float = 0.0
    """Of the plain call."""
    whole: float = 0.0
    """Seconds of all its calls, of its truth and of judging it."""
    values: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """The arrays that were judged by their figures, for comparing implementations with one another."""
    modes: tuple[str, ...] = ()
    """The modes in which it was called again."""
    refused: dict[str, str] = field(default_factory=dict[str, str])
    """The modes that it refused, with the reasons."""
    repeats: int = 0
    """How often it was called with the same content, for its bits to be compared."""
    family: str = ""
    """Of the case; ``size`` for a production size."""
    elements: int = 0
    """Numbers that the item hands over."""
    differences: list[str] = field(default_factory=list[str])
    """The tensors whose bits weren't the same each time, and how far they were from one another."""

    @property
    def reproduce(self) -> str:
        """One command that runs this item alone."""
        return (
            f"mhc-conformance run --impl {shlex.quote(self.reference or self.implementation)} "
            f"--case {shlex.quote(self.file or self.case)} "
            f"--stage {self.stage} --dtype {self.x}"
        )

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.verdict not in GOOD]

    @property
    def ratio(self) -> float:
        return max((check.ratio for check in self.checks), default=0.0)


def refusal(item: Item, claimed: Capabilities) -> str:
    """Why an item isn't claimed; empty where it is."""
    case, variant = item.case, item.variant
    if item.stage not in claimed.stages:
        return f"stage {item.stage} not claimed"
    if case.dialect not in claimed.dialects and not (case.unpublished and claimed.overrides is None):
        return f"dialect {case.dialect} not claimed"
    if variant.x not in claimed.dtypes_of(item.stage):
        return f"{variant.x} not claimed"
    kind = "float32" if variant.weights in ("float64", "float32") else "x"
    if case.stages[item.stage].weights and kind not in claimed.weights_of(item.stage):
        return f"weights in {variant.weights} not claimed"
    if "tf32" in claimed.contracts and variant.name + "-tf32" in case.bounds[item.stage]:
        return "judged by the tf32 contract instead"
    if variant.contract not in claimed.contracts:
        return f"contract {variant.contract} not claimed"
    if claimed.streams is not None and case.parameters["streams"] not in claimed.streams:
        return f"{case.parameters['streams']} streams not claimed"
    if not claimed.empty and not all(case.tensors[f"input/{k}"].size for k in case.stages[item.stage].inputs):
        return "zero tokens not claimed"
    unclaimed = sorted(k for k, v in case.overrides.items() if not claimed.allows(k, v))
    if unclaimed:
        return f"other values of {', '.join(unclaimed)} not claimed"
    return ""


def about(claimed: Capabilities) -> dict[str, Any]:
    """An implementation's device, description and settings, as JSON can have them."""
    return {"device": text_of(claimed.device), "description": text_of(claimed.description), **settings(claimed)}


def settings(claimed: Capabilities) -> dict[str, Any]:
    """The settings that an implementation tells of itself; of a mapping that can't be read, the reason."""
    try:
        told = dict(claimed.settings)
    except Exception as error:
        return {"settings": f"unreadable: {describe(error)}"}
    return plain(told)


def run_item(implementation: Implementation, item: Item, probe: bool = False, plan: Plan | None = None) -> Outcome:
    """Calls an implementation with one item and judges what it returns. Never raises for what the implementation does.

    Args:
        probe: hand over what isn't claimed too: it must be refused, or come out right.
        plan: further calls of the item, each in other modes; none where it is None.
    """
    outcome = _begun(implementation, item, plan)
    if outcome.checks:  # its capabilities can't be read
        return outcome
    if not outcome.skipped:
        answer = _call(implementation, item, outcome)
        if plan is not None and not answer.refused and not answer.error:
            plan.judge(implementation, item, outcome, answer)
    elif probe and _may_be_probed(item, implementation.capabilities):
        _probe(implementation, item, outcome)
    return outcome


def skipped(implementation: Implementation, item: Item, plan: Plan | None = None) -> Outcome | None:
    """The outcome of an item that isn't claimed; None for one that is, and would be called."""
    outcome = _begun(implementation, item, plan)
    return outcome if outcome.skipped else None


def _begun(implementation: Implementation, item: Item, plan: Plan | None) -> Outcome:
    """What is known before a call: the item, the implementation's settings, and whether it claims the item."""
    outcome = Outcome(
        name_of(implementation.name), item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect,
        family=item.case.family,
    )  # fmt: skip
    if not is_golden(item.case.path):
        outcome.file = str(item.case.path)
    claimed = implementation.capabilities
    outcome.about = about(claimed)
    if plan is not None:
        outcome.about["modes"] = plan.fewer(claimed)
    try:
        outcome.skipped = refusal(item, claimed)
    except Exception as error:  # a mapping or a set of its own
        message = f"its capabilities can't be read: {describe(error)}"
        outcome.checks = [Check("-", "errored", np.inf, message=message)]
    return outcome


def _may_be_probed(item: Item, claimed: Capabilities) -> bool:
    return item.stage in claimed.stages and item.variant.contract in claimed.contracts


def _probe(implementation: Implementation, item: Item, outcome: Outcome) -> None:
    """Calls it with an item that it doesn't claim. One that it accepts and gets wrong has a verdict of its own."""
    reason, outcome.skipped = outcome.skipped, ""
    _call(implementation, item, outcome)
    failed, outcome.checks, outcome.values = outcome.failed, [], {}
    if outcome.skipped or any(check.verdict == "errored" for check in failed):
        outcome.skipped = f"{reason}, and refused"
    elif not failed:
        outcome.skipped = f"{reason}, yet right"
    else:
        for check in failed:
            check.message = f"{reason}, yet accepted: {check.verdict} {check.message}".rstrip()
            check.verdict = "unsupported-not-refused"
        outcome.checks = failed


def _call(implementation: Implementation, item: Item, outcome: Outcome) -> Answer:
    """Calls the stage and fills in the verdicts."""
    claimed = implementation.capabilities
    inputs, cotangents = item.inputs(), item.cotangents() if claimed.gradients else None
    outcome.elements = sum(array.size for array in inputs.values())
    answer = answered(implementation, item, inputs, cotangents)
    outcome.seconds, outcome.skipped = answer.seconds, answer.refused
    if not answer.refused:
        outcome.checks = judged(item, answer, claimed)
        returned = answer.returned
        outcome.values = {check.tensor: returned[check.tensor] for check in outcome.checks if check.worst}
    return answer


@dataclass
class Answer:
    """What an implementation did in one call."""

    inputs: Mapping[str, np.ndarray]
    """What it was handed, with the cotangents."""
    cotangents: Mapping[str, np.ndarray] | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    gradients: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refused: str = ""
    """Its reason, where it refused."""
    error: str = ""
    """The exception that it raised and where, or the kind of thing that it returned in place of a result."""
    trace: tuple[str, ...] = ()
    """The frames of the exception, outermost first."""
    changed: tuple[tuple[str, str], ...] = ()
    """(array, sentence) for each array whose memory isn't what it was before."""
    seconds: float = 0.0

    @property
    def returned(self) -> dict[str, Any]:
        """Outputs, and gradients under ``d/<input>``."""
        return {**self.outputs, **{f"d/{name}": gradient for name, gradient in self.gradients.items()}}


def answered(
    implementation: Implementation, item: Item, inputs: Arrays, cotangents: Arrays | None,
    memory: Mapping[str, np.ndarray] | None = None,
) -> Answer:  # fmt: skip
    """The answer to one call. Never raises for what the implementation does.

    Args:
        inputs, cotangents: what it is handed.
        memory: for each array that must not change the buffer that holds it; the inputs themselves where it is None.
    """
    memory = inputs if memory is None else memory
    answer, held = Answer(inputs, cotangents), Held(memory, cotangents)
    started = time.perf_counter()
    try:
        with np.errstate(all="ignore" if item.case.infinite else None):  # NumPy warns of what was handed over
            answer.outputs, answer.gradients = called(implementation, item.stage, dict(inputs), item.config, cotangents)
    except NotImplementedError as error:
        answer.refused = f"refused: {describe(error)}"
        return answer
    except Exception as error:
        answer.error, answer.trace = raised(error), tuple(frames(error))
        return answer
    finally:
        answer.seconds = time.perf_counter() - started
    answer.changed = tuple(changes(implementation, held))
    return answer


def raised(error: BaseException) -> str:
    """An exception in one line, with the last line of the user's that it went through."""
    where = place(error)
    return describe(error) + (f" ({where})" if where else "")


def judged(item: Item, answer: Answer, claimed: Capabilities) -> list[Check]:
    """Every check of an answer that is no refusal."""
    if answer.error:
        return [Check("-", "errored", np.inf, message=answer.error, trace=list(answer.trace))]
    checks = check_item(item, answer.outputs, answer.gradients, claimed, answer.inputs)
    H = answer.outputs.get("H") if "H" in item.expected else None  # a stage may return more than it is asked for
    whole = (check_stochasticity(item, H), check_faint(H, item.expected.get("H"), item.variant.contract))
    checks += [check for check in whole if check]
    return checks + [Check(name, "failed", np.inf, message=message) for name, message in answer.changed]


def order(items: Iterable[Item]) -> list[Item]:
    """The items, those that one compiled graph serves one after the other."""
    return sorted(items, key=_graph)


def _graph(item: Item) -> tuple[str, str, str, str]:
    """What a compiled graph depends on, then the case."""
    return item.stage, str(relevant(item.stage, item.config)), item.variant.name, item.case.id
