"""The suite's bound on fresh data: K times the largest error of the honest ensemble (docs/bound.md, "The bound")."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.cases.dialects import dialect_rows
from conformance.oracle import formulas
from conformance.oracle.arithmetic import Arithmetic, Array
from conformance.oracle.floats import FloatArithmetic, Quick
from conformance.oracle.style import ensemble

K, FLOOR = 32.0, 2.0**-24  # of the contract float32
GATES = ("pre", "post", "H")
CERTIFIED = importlib.util.find_spec("flint") is not None


class _Plain(FloatArithmetic):
    """The ensemble without ball arithmetic: exp and log by way of float64, which is right but for one in a million."""

    def exp(self, a: np.ndarray) -> np.ndarray:
        return np.exp(a.astype(np.float64)).astype(np.float32)

    def log(self, a: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(a.astype(np.float64)).astype(np.float32)


@dataclass
class Expected:
    """True values, proved where python-flint is installed and float64 otherwise, with the bound of each."""

    values: dict[str, np.ndarray]
    bounds: dict[str, float]

    def ratios(self, values: Mapping[str, Any], against: Mapping[str, Any] | None = None) -> dict[str, float]:
        """The largest error of each value, as a multiple of its bound; against other values than the true ones."""
        ratios = {}
        for name, value in values.items():
            got = np.asarray(value).astype(np.float64)
            true = np.asarray(self.values[name] if against is None else against[name]).astype(np.float64)
            assert got.size == true.size and np.isfinite(got).all(), f"{name} {got.shape}, expected {true.shape}"
            ratios[name] = float(np.max(np.abs(got.reshape(true.shape) - true), initial=0.0)) / self.bounds[name]
        return ratios


def expect(run: Callable[[Arithmetic], dict[str, Array]]) -> Expected:
    """The values and bounds of ``run``, evaluated forward in the arithmetics of the oracle."""
    if CERTIFIED:
        from conformance.oracle.balls import BallArithmetic, certified

        true = certified(lambda: run(BallArithmetic()), "a test's own data")
    else:
        true = run(Quick())
    honest = dict.fromkeys(true, 0.0)
    for style in ensemble():
        rounded = run((FloatArithmetic if CERTIFIED else _Plain)(style, "float32", None))
        for name, value in rounded.items():
            honest[name] = max(honest[name], float(np.max(np.abs(value.astype(np.float64) - true[name]))))
    scales = {k: 1.0 if k in GATES else float(np.max(np.abs(v))) for k, v in true.items()}
    return Expected(true, {k: K * max(honest[k], FLOOR * scales[k]) for k in true})


def dialect(name: str, streams: int, **changes: Any) -> dict[str, Any]:
    """A dialect's parameters with what departs from it, as the formulas take them."""
    row = dialect_rows()[name]
    assert set(changes) <= set(row), changes
    return {**row, **changes, "streams": streams}


def site(x: np.ndarray, y: np.ndarray | None, weights: Mapping[str, np.ndarray], p: Mapping[str, Any]) -> Expected:
    """Coefficients, u and, where the branch's output y is given, the mixed streams; weights are flat."""
    n, dim = x.shape[-2:]

    def run(A: Arithmetic) -> dict[str, Array]:
        streams, arrays = A.array(x.reshape(-1, n, dim)), {k: A.array(v) for k, v in weights.items()}
        values, _ = formulas.coefficients(streams, arrays, p, A)
        values["u"], _ = formulas.pre_mix(streams, values["pre"], A)
        if y is not None:
            branch = A.array(y.reshape(-1, dim))
            values["out"], _ = formulas.post_mix(branch, streams, values["post"], values["H"], p, A)
        return values

    return expect(run)


def layer(x: np.ndarray, branch: np.ndarray, weights: Mapping[str, np.ndarray], p: Mapping[str, Any]) -> Expected:
    """The streams after a layer whose sub-layer multiplies by ``branch [C]``."""

    def run(A: Arithmetic) -> dict[str, Array]:
        streams, arrays = A.array(x.reshape(-1, *x.shape[-2:])), {k: A.array(v) for k, v in weights.items()}
        return {"out": formulas.layer(streams, arrays, A.array(branch), p, None, A)[0]}

    return expect(run)


def head(x: np.ndarray, weights: Mapping[str, np.ndarray], p: Mapping[str, Any]) -> Expected:
    """The learned reduction of the streams."""

    def run(A: Arithmetic) -> dict[str, Array]:
        streams, arrays = A.array(x.reshape(-1, *x.shape[-2:])), {k: A.array(v) for k, v in weights.items()}
        return {"out": formulas.head(streams, arrays, p, A)[0]}

    return expect(run)


def within(ratios: Mapping[str, float], label: str) -> None:
    """Every error is within its bound; the worst is printed."""
    worst = max(ratios, key=lambda name: ratios[name])
    print(f"{label}: {worst} at {ratios[worst]:.3f} of its bound")
    assert ratios[worst] <= 1, f"{label}: {dict(ratios)}"
