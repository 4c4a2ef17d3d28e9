"""One item: whether an implementation claims it, the call, and the verdict on every tensor that it returns."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np

from conformance.cases.case import Item
from conformance.cases.corpus import is_golden
from conformance.interface import Capabilities, Implementation, describe
from conformance.judge.faint import check_faint
from conformance.judge.held import Held, changes
from conformance.judge.rule import GOOD, Check, check_item
from conformance.judge.stochasticity import check_stochasticity
from conformance.stages import relevant

MESSAGE = 500
"""Characters of an exception that are kept."""


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
    file: str = ""
    """The case's file where it isn't one of the corpus."""
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    """The implementation's device, description and settings, read in the process that ran it."""
    altered: str = ""
    """What is wrong with the case's file, where it is one of the corpus and wasn't as promised when it was read."""
    seconds: float = 0.0
    values: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """The arrays that were judged by their figures, for comparing implementations with one another."""

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


def run_item(implementation: Implementation, item: Item, probe: bool = False) -> Outcome:
    """Calls an implementation with one item and judges what it returns. Never raises for what the implementation does.

    Args:
        probe: hand over what isn't claimed too: it must be refused, or come out right.
    """
    outcome = Outcome(
        implementation.name, item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect
    )
    if not is_golden(item.case.path):
        outcome.file = str(item.case.path)
    claimed = implementation.capabilities
    outcome.about = {"device": claimed.device, "description": claimed.description, **claimed.settings}
    outcome.skipped = refusal(item, claimed)
    if not outcome.skipped:
        _call(implementation, item, outcome)
    elif probe and item.stage in claimed.stages and item.variant.contract in claimed.contracts:
        _probe(implementation, item, outcome)
    return outcome


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


def _call(implementation: Implementation, item: Item, outcome: Outcome) -> None:
    """Calls the stage and fills in the verdicts."""
    claimed = implementation.capabilities
    inputs, cotangents = item.inputs(), item.cotangents() if claimed.gradients else None
    held = Held(inputs, cotangents)
    started = time.perf_counter()
    try:
        outputs, gradients = mappings(implementation.call(item.stage, dict(inputs), item.config, cotangents))
    except NotImplementedError as error:
        outcome.skipped = f"refused: {describe(error)}"
        return
    except Exception as error:
        outcome.checks = [Check("-", "errored", np.inf, message=describe(error)[:MESSAGE])]
        return
    finally:
        outcome.seconds = time.perf_counter() - started
    outcome.checks = check_item(item, outputs, gradients, claimed)
    returned = {**outputs, **{f"d/{name}": gradient for name, gradient in gradients.items()}}
    outcome.values = {check.tensor: returned[check.tensor] for check in outcome.checks if check.worst}
    H = outputs.get("H")
    whole = (check_stochasticity(item, H), check_faint(H, item.expected.get("H"), item.variant.contract))
    outcome.checks += [check for check in whole if check]
    outcome.checks += [
        Check(name, "failed", np.inf, message=message) for name, message in changes(implementation, held)
    ]


def mappings(result: object) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Outputs and gradients.

    Raises:
        TypeError: there aren't two, or one is no mapping.
    """
    if not _is_tuple(result):
        raise TypeError(f"expected (outputs, gradients), two mappings, got a {type(result).__name__}")
    if len(result) != 2:
        raise TypeError(f"expected (outputs, gradients), two mappings, got a tuple of {len(result)}")
    outputs, gradients = result
    if _is_mapping(outputs) and _is_mapping(gradients):
        return outputs, gradients
    kinds = f"{type(outputs).__name__} and {type(gradients).__name__}"
    raise TypeError(f"expected two mappings, outputs and gradients, got {kinds}")


def _is_tuple(value: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(value, tuple)


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def order(items: Iterable[Item]) -> list[Item]:
    """The items, those that one compiled graph serves one after the other."""
    return sorted(items, key=_graph)


def _graph(item: Item) -> tuple[str, str, str, str]:
    """What a compiled graph depends on, then the case."""
    return item.stage, str(relevant(item.stage, item.config)), item.variant.name, item.case.id
