"""What an implementation returned, ready to be held against candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.cases.case import Item
from conformance.implementations.calling import called
from conformance.interface import Implementation, describe
from conformance.judge.item import refusal
from conformance.judge.rule import GOOD, allowance, check_item, is_of_numbers
from conformance.questions.identifying.candidates import Candidate
from conformance.questions.identifying.forward import evaluate

FINEST = 2.0**-40
"""No bound is smaller than this fraction of the largest value: the candidates are float64 themselves."""


@dataclass
class Record:
    """What an implementation returned for one item, ready for comparison.

    Attributes:
        outputs: the finite outputs that are compared.
        given: inputs and weights in float64.
        bounds, scales: the bound of each of these outputs, and the largest of its true values.
        infinite: outputs with a number that isn't finite, where the true values are.
        gradients: those that miss their bounds.
        vjps: the finite gradients that were returned, under ``d/<input>``.
    """

    item: Item
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    given: dict[str, np.ndarray] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    infinite: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    vjps: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        return self.item.stage

    def values(self, candidate: Candidate) -> dict[str, np.ndarray]:
        """float64 outputs of a candidate on these inputs."""
        case = self.item.case
        parameters = {**candidate.parameters, **{k: case.parameters[k] for k in ("streams", "dim")}}
        return evaluate(self.stage, self.given, parameters, case.stages[self.stage].options)

    def distances(self, candidate: Candidate) -> dict[str, float]:
        """For each output, the error beyond its last rounding as a fraction of its bound."""
        values = self.values(candidate)
        return {tensor: self._distance(tensor, values[tensor]) for tensor in self.outputs}

    def _distance(self, tensor: str, value: np.ndarray) -> float:
        largest = excess(self.item, self.outputs[tensor], value)
        if not np.isfinite(largest):
            return float("inf")
        scale, right = _largest(value), self.scales[tensor]
        # Bounds are those of the right values: a candidate whose values are larger has larger roundings.
        bound = self.bounds[tensor] * (max(1.0, scale / right) if right else 1.0)
        return largest / (max(bound, FINEST * scale) or FINEST)


def _largest(value: np.ndarray) -> float:
    return float(np.max(np.abs(value), initial=0.0))


def excess(item: Item, actual: np.ndarray, value: np.ndarray) -> float:
    """The largest error beyond the last rounding."""
    error = np.abs(actual.astype(np.float64) - value) - allowance(actual.dtype, item.variant.contract, value, None)
    return float(np.max(error, initial=0.0))


def recorded(item: Item, outputs: Mapping[str, Any]) -> Record:
    """What of an implementation's outputs can be compared: arrays of the right shape."""
    record = Record(item, given={k: v.astype(np.float64) for k, v in item.inputs().items()})
    for tensor, expected in item.expected.items():
        actual = outputs.get(tensor)
        if tensor.startswith("d/") or tensor in ("load_balance_loss", "moe_bias_updates"):
            continue
        if is_of_numbers(actual) and actual.shape == expected.shape:
            if np.isfinite(actual.astype(np.float64)).all():
                record.outputs[tensor] = actual
                record.bounds[tensor], record.scales[tensor] = item.bounds[tensor].bound, _largest(expected)
            else:
                record.infinite.append(tensor)
    return record


def _comparable(item: Item, gradients: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The returned gradients that are finite arrays of the right shape."""
    found = {}
    for name, value in gradients.items():
        expected = item.expected.get(f"d/{name}")
        if not isinstance(value, np.ndarray) or expected is None or value.shape != expected.shape:
            continue
        if np.isfinite(value.astype(np.float64)).all() and np.isfinite(expected).all():
            found[f"d/{name}"] = value
    return found


def run(implementation: Implementation, items: Sequence[Item]) -> tuple[list[Record], list[str]]:
    """What the implementation returned for each item that it claims, and a line for each that raised."""
    records, raised = [], []
    claimed = implementation.capabilities
    for item in items:
        if refusal(item, claimed):
            continue
        cotangents = item.cotangents() if claimed.gradients else None
        try:
            outputs, gradients = called(implementation, item.stage, item.inputs(), item.config, cotangents)
        except NotImplementedError:
            continue
        except Exception as error:
            raised.append(f"{item.case.id}, {item.stage}: {describe(error)}")
            continue
        record = recorded(item, outputs)
        if claimed.gradients:
            checks = [check for check in check_item(item, {}, gradients, claimed) if check.tensor.startswith("d/")]
            record.gradients = [check.tensor for check in checks if check.verdict not in GOOD]
            record.vjps = _comparable(item, gradients)
        records.append(record)
    return records, raised
