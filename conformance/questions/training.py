"""Trains an implementation's model along a recorded trajectory: where does it leave the bound?

Step k is handed what step k - 1 returned, so that errors add up as they do in training (docs/trajectories.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.cases.trajectories.fixture import DTYPES, Trajectory
from conformance.cases.trajectories.model import STEP
from conformance.implementations.calling import called
from conformance.interface import Capabilities, Implementation, describe

GROUPS = {"losses": "loss", "gradient norms": "gradient_norm", "weights": "weight"}
"""What is compared, and the first word of its names."""
KINDS = ("weight", "first", "second")
LARGEST = sys.float_info.max
"""What stands for an error that is a larger multiple of its bound: JSON has no infinity."""
MARKS = (1, 3, 10, 30)
"""The steps up to which the worst errors are told."""


class Unfit(Exception):
    """A step returned something that can't be compared, or did what a step mustn't."""


@dataclass(frozen=True)
class Place:
    """Where a trajectory first leaves the bound."""

    step: int
    tensor: str
    ratio: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.tensor}, {self.ratio:.3g} of the bound"


@dataclass
class Training:
    """One implementation's training of one dialect in one dtype.

    Attributes:
        steps: how many were asked for.
        ratios: for each group the worst error of each step as a fraction of its bound; NaN where nothing is recorded.
        left: the first figure beyond its bound.
        broken: why it ended early, with the step's number.
        skipped: why nothing ran.
    """

    implementation: str
    dialect: str
    dtype: str
    steps: int
    ratios: dict[str, list[float]] = field(default_factory=lambda: {group: [] for group in GROUPS})
    left: Place | None = None
    broken: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not (self.skipped or self.broken or self.left)

    def worst(self, group: str, step: int) -> float:
        """The worst error up to a step as a fraction of the bound; NaN where nothing is recorded up to it."""
        known = [ratio for ratio in self.ratios[group][:step] if not np.isnan(ratio)]
        return max(known, default=float("nan"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ratios are null where nothing is recorded."""
        ratios = {k: [None if np.isnan(r) else r for r in v] for k, v in self.ratios.items()}
        left = None if self.left is None else vars(self.left)
        told = {k: getattr(self, k) for k in ("implementation", "dialect", "dtype", "steps", "broken", "skipped")}
        return {**told, "passed": self.passed, "left": left, "ratios": ratios}


def unclaimed(claimed: Capabilities, dialect: str, dtype: str) -> str:
    """Why an implementation isn't asked; empty where it is."""
    if STEP not in claimed.stages:
        return f"stage {STEP} not claimed"
    if dialect not in claimed.dialects:
        return f"dialect {dialect} not claimed"
    return "" if dtype in claimed.dtypes_of(STEP) else f"{dtype} not claimed"


def train(
    implementation: Implementation,
    trajectory: Trajectory,
    dtype: str,
    steps: int,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Trains for some steps and compares each of them.

    Args:
        dtype: one of `fixture.DTYPES`, of weights and moments.
        progress: called with the number of each step that is done.
    """
    result = Training(implementation.name, trajectory.dialect, dtype, steps)
    result.skipped = unclaimed(implementation.capabilities, trajectory.dialect, dtype)
    if result.skipped:
        return result
    number = 0
    try:
        for number, found in enumerate(trained(implementation, trajectory, dtype, steps), 1):
            if number <= steps:
                _judge(result, trajectory, number, found)
            else:  # the first step again, after the others
                _judge_again(result, trajectory, found)
            if progress:
                progress(number)
    except NotImplementedError as error:
        result.skipped = f"refused: {describe(error)}"
    except Exception as error:
        text = str(error) if isinstance(error, Unfit) else describe(error)
        result.broken = f"step {number + 1}: {text}"
    return result


def trained(implementation: Implementation, trajectory: Trajectory, dtype: str, steps: int) -> Iterator[dict[str, Any]]:
    """What each step returned, in float64; after the last one the first step is asked once more.

    Raises:
        NotImplementedError: the implementation refuses.
        Unfit: it returned something else than a step does, or changed what it was handed.
    """
    first = begin(trajectory, dtype)
    state = first
    for number in range(1, steps + 1):
        outputs = call(implementation, trajectory, number, state)
        yield recorded(outputs, number)
        state = {name: outputs[name] for name in first}
    yield recorded(call(implementation, trajectory, 1, first), 1)


def begin(trajectory: Trajectory, dtype: str) -> dict[str, np.ndarray]:
    """The state that the first step is handed."""
    weights = {f"weight/{name}": value.astype(dtype) for name, value in trajectory.weights.items()}
    zeros = {f"{k}/{name}": np.zeros(v.shape, dtype) for k in KINDS[1:] for name, v in trajectory.weights.items()}
    return weights | zeros


def call(
    implementation: Implementation, trajectory: Trajectory, number: int, state: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of one step, in their dtypes and shapes."""
    batch = np.ascontiguousarray(trajectory.tokens[number - 1])
    inputs = {**state, "tokens": batch[:, :-1].copy(), "targets": batch[:, 1:].copy()}
    before = {name: value.copy() for name, value in inputs.items()}
    outputs, _ = called(implementation, STEP, inputs, trajectory.config(number), None)
    changed = [name for name, value in before.items() if not np.array_equal(value, inputs[name], equal_nan=True)]
    if changed:
        raise Unfit(f"changed the {changed[0]} that it was handed: return another array")
    dtype = state["weight/embedding"].dtype
    scalars = ["loss", *(f"gradient_norm/{name}" for name in trajectory.weights)]
    shapes = dict.fromkeys(scalars, ()) | {name: value.shape for name, value in state.items()}
    return {name: _checked(name, outputs.get(name), shape, dtype) for name, shape in shapes.items()}


def _checked(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    expected = f"{name}: expected an array {list(shape)} of {dtype}"
    if value is None:
        raise Unfit(f"{expected}, got none")
    if not isinstance(value, np.ndarray | np.generic):
        raise Unfit(f"{expected}, got a {type(value).__name__}")
    if value.dtype != dtype or value.shape != shape:
        raise Unfit(f"{expected}, got {list(value.shape)} of {value.dtype}")
    if not np.isfinite(value).all():
        raise Unfit(f"{name}: expected finite numbers, got NaN or infinity")
    return np.array(value)


def recorded(outputs: Mapping[str, np.ndarray], number: int) -> dict[str, Any]:
    """The values of a step under the names of the record, in float64."""
    norms = {name: np.float64(value) for name, value in outputs.items() if name.startswith("gradient_norm/")}
    weights = {
        f"weight/{number}/{name.removeprefix('weight/')}": value.astype(np.float64)
        for name, value in outputs.items()
        if name.startswith("weight/")
    }
    total = np.sqrt(sum(np.square(norm) for norm in norms.values()))
    return {"loss": np.float64(outputs["loss"]), "gradient_norm": total, **norms, **weights}


def compared(trajectory: Trajectory, dtype: str, number: int, found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Each recorded value of a step, and its error as a fraction of the bound."""
    for name, value in found.items():
        if name in trajectory.expected:
            expected, bound = trajectory.expected[name], trajectory.bounds[dtype][name]
            if not name.startswith("weight/"):
                expected, bound = expected[number - 1], bound[number - 1]
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                error = np.abs(value - expected).max()
                ratio = float(error / bound) if error else 0.0
            yield name, min(ratio, LARGEST)


def _judge(result: Training, trajectory: Trajectory, number: int, found: Mapping[str, Any]) -> None:
    ratios = dict(compared(trajectory, result.dtype, number, found))
    for group, word in GROUPS.items():
        own = [ratio for name, ratio in ratios.items() if name.partition("/")[0] == word]
        result.ratios[group].append(max(own, default=float("nan")))
    worst = max(ratios, key=lambda name: ratios[name])
    if result.left is None and ratios[worst] > 1:
        result.left = Place(number, worst, ratios[worst])


def _judge_again(result: Training, trajectory: Trajectory, found: Mapping[str, Any]) -> None:
    """Whether the first step is still right after the others; what it leaves behind would show here."""
    beyond = [(ratio, name) for name, ratio in compared(trajectory, result.dtype, 1, found) if ratio > 1]
    if beyond and result.left is None:
        ratio, name = max(beyond)
        raise Unfit(f"the first step was asked again, and {name} is {ratio:.3g} of the bound: a step left something")


__all__ = ["DTYPES", "GROUPS", "MARKS", "Place", "Training", "Unfit", "begin", "call", "train", "trained", "unclaimed"]
