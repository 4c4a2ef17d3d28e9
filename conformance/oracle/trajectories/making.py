"""Makes the files of `fixtures/trajectories`: true values from balls, bounds from honest runs.

Each step is evaluated in balls of `BITS` bits, from the state of the step before. Between steps the balls are replaced
by their midpoints, 200 bits and more beyond float64, and at the end each value is rounded to float64 once. `proved`
carries the balls through the steps instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flint
import numpy as np

from conformance.cases.dialects import dialect_rows
from conformance.cases.trajectories.fixture import FORMAT, MANIFEST_FORMAT
from conformance.cases.trajectories.model import KEPT, STEPS, STREAMS, TRAJECTORIES, configuration
from conformance.files import atomic
from conformance.oracle.arithmetic import Array, Parameters
from conformance.oracle.balls import to_float64
from conformance.oracle.floats import FloatArithmetic
from conformance.oracle.generate import canonical_bytes
from conformance.oracle.pool import processes
from conformance.oracle.style import Style, ensemble
from conformance.oracle.trajectories.data import batches, initial_weights
from conformance.oracle.trajectories.training import Balls, State, Step, adamw_step, start, train

BITS = 640
BITS_A_STEP, LAST_BITS = 400, 192
"""The precision of `proved`: a step widens balls by some 375 bits, more than half of them in Sinkhorn's passes."""
VANISHING = 2.0**-100
"""What is proved to be smaller is stored as 0: a gradient that vanishes identically is a ball around 0."""
K = 16.0
TOLERANCE_FLOAT64 = 1e-11
Tensors = dict[str, np.ndarray]


def parameters_of(dialect: str) -> Parameters:
    return {**dialect_rows()[dialect], "streams": STREAMS}


def centred(state: State) -> State:
    """The midpoints of a state's balls."""
    middle = np.frompyfunc(lambda ball: ball.mid(), 1, 1)

    def of(arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: middle(value) for name, value in arrays.items()}

    return State(of(state.weights), of(state.first), of(state.second))


def evaluated(dialect: str, steps: int = STEPS) -> Iterator[Step]:
    """Steps in balls, each from the midpoints of the state before it."""
    return _in_balls(dialect, steps, lambda _: BITS, centred)


def proved(dialect: str, steps: int = STEPS) -> Iterator[Step]:
    """Steps in balls that hold the true trajectory: nothing is dropped between them."""
    return _in_balls(dialect, steps, lambda left: LAST_BITS + BITS_A_STEP * left, lambda state: state)


def _in_balls(
    dialect: str, steps: int, bits: Callable[[int], int], handed_on: Callable[[State], State]
) -> Iterator[Step]:
    """Steps whose precision depends on how many are left; it also holds where a step is looked at."""
    p, A, before = parameters_of(dialect), Balls(), flint.ctx.prec
    state = start(initial_weights(p), A)
    try:
        for number, batch in enumerate(batches()[:steps], 1):
            flint.ctx.prec = bits(steps - number + 1)
            step = adamw_step(state, batch, number, p, A)
            yield step
            state = handed_on(step.state)
    finally:
        flint.ctx.prec = before


def rounded(balls: Array) -> np.ndarray:
    """Each ball's one float64, 0 where it is proved to vanish.

    Raises:
        NotRounded: a ball holds numbers that round to two.
    """
    kept = np.frompyfunc(lambda ball: flint.arb(0) if abs(ball) < VANISHING else ball, 1, 1)
    return to_float64(np.asarray(kept(balls), dtype=object))


def values_of(step: Step, number: int, exact: Callable[[Array], np.ndarray], kept: Collection[int] = KEPT) -> Tensors:
    """What is recorded of a step: scalars ``loss``, ``gradient_norm``, ``gradient_norm/NAME``, and weights if kept."""
    names = sorted(step.norms)
    norms = exact(np.array([step.norms[name] for name in names] + [step.norm, step.loss]))
    found: Tensors = {f"gradient_norm/{name}": norms[k] for k, name in enumerate(names)}
    found |= {"gradient_norm": norms[-2], "loss": norms[-1]}
    if number in kept:
        found |= {f"weight/{number}/{name}": exact(step.state.weights[name]) for name in names}
    return found


def disagreements(dialect: str, expected: Mapping[str, np.ndarray], steps: int) -> list[str]:
    """The recorded values of the first steps that aren't what balls prove, a line for each; the rest is right."""
    lines: list[str] = []
    for number, step in enumerate(proved(dialect, steps), 1):
        for name, value in values_of(step, number, rounded).items():
            recorded = expected[name] if name.startswith("weight/") else expected[name][number - 1]
            if not np.array_equal(value, recorded):
                lines.append(f"{dialect}, step {number}, {name}: {np.abs(value - recorded).max():.3g} off")
    return lines


def joined(steps: Sequence[Tensors]) -> Tensors:
    """One array for each series, ``[steps]``; weights as they are."""
    series = [name for name in steps[0] if not name.startswith("weight/")]
    found = {name: np.array([step[name] for step in steps], np.float64) for name in series}
    for step in steps:
        found |= {name: value for name, value in step.items() if name.startswith("weight/")}
    return found


def honest_errors(
    expected: Mapping[str, np.ndarray], dialect: str, styles: Sequence[Style], contract: str = "float32"
) -> Tensors:
    """The largest error of honest runs: of each series up to each step ``[steps]``, of kept weights one number."""
    p = parameters_of(dialect)
    worst: Tensors = {}
    for style in styles:
        run = train(initial_weights(p), batches(), STEPS, p, FloatArithmetic(style, contract, None))
        found = joined([values_of(step, number, _as_float64) for number, step in enumerate(run, 1)])
        for name, value in found.items():
            error = np.abs(value - expected[name])
            error = error.max() if name.startswith("weight/") else np.maximum.accumulate(error)
            worst[name] = np.maximum(worst.get(name, np.float64(0)), error)
    return worst


def _as_float64(a: Array) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def scales(expected: Mapping[str, np.ndarray]) -> Tensors:
    """The size that a rounding of each value is told by: of norms the norm of all gradients, up to each step."""
    found: Tensors = {}
    for name, value in expected.items():
        if name.startswith("weight/"):
            found[name] = np.abs(value).max()
        else:
            of = expected["gradient_norm"] if name.startswith("gradient_norm") else value
            found[name] = np.maximum.accumulate(np.abs(of))
    return found


def bounds(expected: Mapping[str, np.ndarray], honest: Mapping[str, np.ndarray]) -> Tensors:
    """``K max(honest, floor)`` in float32 and the tolerance times the scale in float64."""
    scale = scales(expected)
    found = {f"bound/float32/{k}": K * np.maximum(honest[k], 2.0**-24 * _floor(k, expected)) for k in expected}
    return found | {f"bound/float64/{k}": TOLERANCE_FLOAT64 * scale[k] for k in expected}


def _floor(name: str, expected: Mapping[str, np.ndarray]) -> np.ndarray:
    value = np.abs(expected[name])
    return value.max() if name.startswith("weight/") else np.maximum.accumulate(value)


def complete(dialect: str) -> bytes:
    """The bytes of a trajectory's file."""
    p = parameters_of(dialect)
    expected = joined([values_of(step, k, rounded) for k, step in enumerate(evaluated(dialect), 1)])
    honest = honest_errors(expected, dialect, ensemble())
    tensors = {"tokens": batches()}
    tensors |= {f"weight/{name}": value for name, value in initial_weights(p).items()}
    tensors |= {f"expected/{name}": value for name, value in expected.items()}
    tensors |= bounds(expected, honest)
    told = {k: v for k, v in configuration(dialect, dialect_rows()[dialect], 1).items() if k != "step"}
    metadata = {
        "format": FORMAT,
        "trajectory": json.dumps(
            {"dialect": dialect, "config": told, "steps": STEPS, "kept": KEPT, "K": K}, sort_keys=True
        ),
    }
    return canonical_bytes(
        {k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in sorted(tensors.items())}, metadata
    )


def regenerate(target: Path, jobs: int = 2, check: bool = False) -> list[str]:
    """Rewrites the files in ``target``, and returns a line for each that changed.

    Args:
        check: only compare, write nothing.
    """
    with processes(min(jobs, len(TRAJECTORIES))) as pool:
        made = {f"{k}.safetensors": v for k, v in zip(TRAJECTORIES, pool.map(complete, TRAJECTORIES, 1), strict=True)}
    files = {name: {"sha256": hashlib.sha256(v).hexdigest(), "bytes": len(v)} for name, v in sorted(made.items())}
    manifest: dict[str, Any] = {"format": MANIFEST_FORMAT, "count": len(files), "files": files}
    made["MANIFEST.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    target.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in target.iterdir() if path.suffix in (".safetensors", ".json")}
    changes: list[str] = []
    for name in sorted(present | set(made)):
        path, content = target / name, made.get(name)
        if (path.read_bytes() if path.exists() else None) == content:
            continue
        changes.append(f"{'removed' if content is None else 'changed' if path.exists() else 'added'}  {name}")
        if check:
            continue
        if content is None:
            path.unlink()
        else:
            atomic.write(path, content)
    return changes
