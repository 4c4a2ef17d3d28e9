"""Planted mistakes in training, and the step at which each dies: ``python -m conformance.selftest.training``.

`PlainTraining` is a correct step in NumPy, from the oracle's formulas and an AdamW of its own; a mistake overrides one
of its methods. The class's docstring says which mistake it is (docs/trajectories.md, "Mistakes").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conformance.adapters.training_state import State, returned, taken
from conformance.cases.trajectories import fixture
from conformance.cases.trajectories.model import STEP, TRAJECTORIES
from conformance.interface import Arrays, Capabilities, Result
from conformance.oracle.arithmetic import Arithmetic, Array, Parameters
from conformance.oracle.floats import FloatArithmetic
from conformance.oracle.style import Style
from conformance.oracle.trajectories.transformer import Gradients, RunSite, Weights, loss_and_gradients, site

LATEST = 10
"""The step by which every mistake must be noticed."""


class Plain(FloatArithmetic):
    """float32 or float64 with NumPy's own elementary functions."""

    def __init__(self, dtype: str):
        super().__init__(Style(order="pairwise"), dtype, None)

    def exp(self, a: np.ndarray) -> np.ndarray:
        return np.exp(a)

    def log(self, a: np.ndarray) -> np.ndarray:
        return np.log(a)


class PlainTraining:
    """No mistake"""

    run_site: RunSite = staticmethod(site)

    def __init__(self) -> None:
        self.name = self.title()
        self.capabilities = Capabilities(
            stages=frozenset({STEP}),
            dialects=frozenset(TRAJECTORIES),
            dtypes=frozenset(fixture.DTYPES),
            gradients=False,
        )

    @classmethod
    def title(cls) -> str:
        return " ".join((cls.__doc__ or "").split())

    def arithmetic(self, dtype: str) -> FloatArithmetic:
        return Plain(dtype)

    def step(self, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        state = taken(inputs)
        A = self.arithmetic(inputs["weight/embedding"].dtype.name)
        loss, gradients = self.gradients(state.weight, inputs["tokens"], inputs["targets"], config, A)
        norms = {f"gradient_norm/{name}": np.sqrt(np.sum(np.square(g))) for name, g in gradients.items()}
        new = State({}, {}, {})
        for name, g in self.used(gradients, state, config).items():
            first, second = self.moments(g, state.first[name], state.second[name], config)
            new.first[name], new.second[name] = first, second
            new.weight[name] = self.updated(name, state.weight[name], first, second, g, config)
        return {"loss": np.asarray(loss), **norms, **returned(new)}, {}

    def gradients(
        self, weights: Weights, tokens: Array, targets: Array, p: Parameters, A: Arithmetic
    ) -> tuple[Array, Gradients]:
        return loss_and_gradients(weights, tokens, targets, p, A, self.run_site)

    def used(self, gradients: Gradients, state: State, config: Mapping[str, Any]) -> Gradients:
        """The gradients as the optimizer has them."""
        return gradients

    def moments(self, g: Array, first: Array, second: Array, config: Mapping[str, Any]) -> tuple[Array, Array]:
        b1, b2 = (g.dtype.type(config[name]) for name in ("beta1", "beta2"))
        return b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g

    def updated(self, name: str, w: Array, m: Array, v: Array, g: Array, config: Mapping[str, Any]) -> Array:
        rate, decay = w.dtype.type(config["learning_rate"]), w.dtype.type(self.decay(name, w, config))
        direction = self.corrected(m, "beta1", config) / self.root(self.corrected(v, "beta2", config), config)
        return w - rate * (direction + decay * w)

    def corrected(self, moment: Array, beta: str, config: Mapping[str, Any]) -> Array:
        return moment / moment.dtype.type(1 - config[beta] ** config["step"])

    def root(self, second: Array, config: Mapping[str, Any]) -> Array:
        return np.sqrt(second) + second.dtype.type(config["adam_eps"])

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return config["weight_decay"] if name in config["decayed"] else 0.0


class AlphaFromOneRow(PlainTraining):
    """The gradient of α from one row of the batch"""

    class OneRow(Plain):
        def sum_tokens(self, a: np.ndarray) -> np.ndarray:
            # α's gradient is one sum over all tokens and columns; biases have a row for each element
            return super().sum_tokens(a[:, : a.shape[1] // 2] if a.shape[0] == 1 else a)

    def arithmetic(self, dtype: str) -> FloatArithmetic:
        return self.OneRow(dtype)


class StaleCarried(PlainTraining):
    """A site reads with the pre of the site before the last"""

    def __init__(self) -> None:
        super().__init__()
        self.older: Array | None = None
        self.run_site = self._stale

    def _stale(self, x: Array, w: Weights, sublayer: Any, p: Parameters, carried: Array | None, A: Arithmetic) -> Any:
        used, self.older = self.older if self.older is not None else carried, carried
        return site(x, w, sublayer, p, used, A)

    def gradients(self, *arguments: Any) -> tuple[Array, Gradients]:
        self.older = None
        return super().gradients(*arguments)


class CarriedFromTheStepBefore(PlainTraining):
    """A site reads with the pre that was handed to it in the step before"""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Array | None] = []
        self.handed: list[Array | None] = []
        self.run_site = self._kept

    def _kept(self, x: Array, w: Weights, sublayer: Any, p: Parameters, carried: Array | None, A: Arithmetic) -> Any:
        used = self.kept[len(self.handed)] if self.kept else carried
        self.handed.append(carried)
        return site(x, w, sublayer, p, used, A)

    def gradients(self, *arguments: Any) -> tuple[Array, Gradients]:
        self.kept, self.handed = self.handed, []
        return super().gradients(*arguments)


class CarriedWithoutGradient(PlainTraining):
    """No gradient flows through the pre that is carried"""

    @staticmethod
    def run_site(x: Array, w: Weights, sublayer: Any, p: Parameters, carried: Array | None, A: Arithmetic) -> Any:
        out, handed, pullback = site(x, w, sublayer, p, carried, A)
        return out, handed, lambda g, g_handed: pullback(g, None if g_handed is None else g_handed * 0)


class DecayOnBiases(PlainTraining):
    """Weight decay on biases"""

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return config["weight_decay"] if name.endswith(("_beta", "_bias", "base")) else super().decay(name, w, config)


class DecayByAxes(PlainTraining):
    """Weight decay on every tensor of two axes, b of the residual matrix among them"""

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return config["weight_decay"] if w.ndim > 1 else 0.0


class DecayOnScales(PlainTraining):
    """Weight decay on α"""

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return config["weight_decay"] if name.endswith("_alpha_scale") else super().decay(name, w, config)


class NoDecay(PlainTraining):
    """No weight decay"""

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return 0.0


class DecayInTheGradient(PlainTraining):
    """Weight decay added to the gradient, as in Adam with an L2 penalty"""

    def used(self, gradients: Gradients, state: State, config: Mapping[str, Any]) -> Gradients:
        return {
            n: g + g.dtype.type(super(type(self), self).decay(n, g, config)) * state.weight[n]
            for n, g in gradients.items()
        }

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return 0.0


class DecayWithoutTheRate(PlainTraining):
    """Weight decay that isn't multiplied by the learning rate"""

    def decay(self, name: str, w: Array, config: Mapping[str, Any]) -> float:
        return super().decay(name, w, config) / config["learning_rate"]


class LazyRows(PlainTraining):
    """Rows of the embedding without a gradient are left as they are"""

    def updated(self, name: str, w: Array, m: Array, v: Array, g: Array, config: Mapping[str, Any]) -> Array:
        new = super().updated(name, w, m, v, g, config)
        return np.where(np.any(g != 0, -1, keepdims=True), new, w) if name == "embedding" else new


class NoBiasCorrection(PlainTraining):
    """Moments without the correction of their start"""

    def corrected(self, moment: Array, beta: str, config: Mapping[str, Any]) -> Array:
        return moment


class CorrectionOfTheStepBefore(PlainTraining):
    """The correction of the second moment counts steps from 0"""

    def corrected(self, moment: Array, beta: str, config: Mapping[str, Any]) -> Array:
        behind = {**config, "step": max(1, config["step"] - 1)}
        return super().corrected(moment, beta, behind if beta == "beta2" else config)


class EpsInsideTheRoot(PlainTraining):
    """Adam's eps inside of the root"""

    def root(self, second: Array, config: Mapping[str, Any]) -> Array:
        return np.sqrt(second + second.dtype.type(config["adam_eps"]))


class ClippedGradients(PlainTraining):
    """Gradients clipped to a norm of 1"""

    def used(self, gradients: Gradients, state: State, config: Mapping[str, Any]) -> Gradients:
        norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in gradients.values()))
        return {name: g * g.dtype.type(min(1.0, 1.0 / norm)) for name, g in gradients.items()}


class SumOfTokens(PlainTraining):
    """The sum over tokens for their mean"""

    def gradients(self, *arguments: Any) -> tuple[Array, Gradients]:
        loss, gradients = super().gradients(*arguments)
        return loss, {name: g * g.dtype.type(arguments[1].size) for name, g in gradients.items()}


class HalfTheIterations(PlainTraining):
    """Half of Sinkhorn's iterations"""

    def gradients(self, weights: Weights, tokens: Array, targets: Array, p: Parameters, A: Arithmetic) -> Any:
        return super().gradients(weights, tokens, targets, {**p, "iterations": p["iterations"] // 2}, A)


class TransposedMix(PlainTraining):
    """H transposed"""

    def gradients(self, weights: Weights, tokens: Array, targets: Array, p: Parameters, A: Arithmetic) -> Any:
        other = {"in-out": "out-in", "out-in": "in-out"}[p["mix"]]
        return super().gradients(weights, tokens, targets, {**p, "mix": other}, A)


SINGLE_PASS = (StaleCarried, CarriedFromTheStepBefore, CarriedWithoutGradient)
"""Mistakes that only a dialect of a single pass can have."""
MUTANTS: tuple[type[PlainTraining], ...] = (
    AlphaFromOneRow, *SINGLE_PASS, DecayOnBiases, DecayByAxes, DecayOnScales, NoDecay, DecayInTheGradient,
    DecayWithoutTheRate, LazyRows, NoBiasCorrection, CorrectionOfTheStepBefore, EpsInsideTheRoot, ClippedGradients,
    SumOfTokens, HalfTheIterations, TransposedMix,
)  # fmt: skip


def dialects_of(mutant: type[PlainTraining]) -> tuple[str, ...]:
    """The trajectories in which a mistake can be made."""
    return ("deepseek-v4.1",) if mutant in SINGLE_PASS else TRAJECTORIES


def main() -> None:
    """Prints the table of docs/trajectories.md."""
    from conformance.implementations.wrapping import wrap
    from conformance.questions.training import train

    print("| mistake | float32: step, figure | float64: step, figure |\n|---|---|---|")
    for mutant in MUTANTS:
        cells: list[str] = []
        for dtype in fixture.DTYPES:
            latest = None
            for dialect in dialects_of(mutant):
                left = train(wrap(mutant()), fixture.load(dialect), dtype, LATEST).left
                if left is None:
                    raise SystemExit(f"{mutant.title()} survives {dialect} in {dtype}")
                latest = left if latest is None or left.step > latest.step else latest
            assert latest is not None
            cells.append(f"{latest.step}, `{latest.tensor}` at {latest.ratio:.2g}")
        print(f"| {mutant.title()} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
