"""Layers with the usual mistakes, for tests of what identify says of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from conformance.cases.dialects import dialect_rows
from conformance.selftest.plain import Plain, Values


class SinglePassAlways(Plain):
    """Chains the sites' pre in a stack, whatever dialect it is told; a site alone has nothing but its own."""

    def stack(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        return super().stack(inputs, {**config, "pre_from": "previous"}, cotangents)


class NormEps(Plain):
    """Keeps an eps of its own in the norm, whatever it is told."""

    def __init__(self, eps: float):
        super().__init__(f"norm_eps {eps:g}")
        self.eps_of_norm = eps

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        return super().rms(flat, SimpleNamespace(**{**vars(c), "norm_eps": self.eps_of_norm}))


class Swapped(Plain):
    """Takes pre for post and post for pre, weights and all."""

    def gates(self, x: Tensor, weights: Values, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        other = {"pre": "post", "post": "pre", "res": "res"}
        named = {k: k.partition("_") for k in weights}
        return super().gates(x, {f"{other.get(a, a)}{b}{d}": weights[k] for k, (a, b, d) in named.items()}, c)


class TwoMistakes(Plain):
    """Makes 19 iterations, and doesn't double post."""

    def iterations(self, c: Any) -> int:
        return c.iterations - 1

    def post_gate(self, z: Tensor, c: Any) -> Tensor:
        return self.sigmoid(z) + c.post_eps


class ReadsTheMean(Plain):
    """Reads with the mean of the streams."""

    def reads_with(self, pre: Tensor, given: Values, c: Any) -> Tensor:
        return pre * 0 + 1 / c.streams


class Computes(Plain):
    """Computes one row, whatever it is told."""

    def __init__(self, dialect: str, **changes: Any):
        super().__init__(f"computes {dialect}")
        row = {**dialect_rows()[dialect], **changes}
        self.row = {name: value for name, value in row.items() if name != "reduce"}  # which a stack is told

    def _run(self, stage: str, body: Any, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        return super()._run(stage, body, inputs, {**config, **self.row}, cotangents)


class Narrow(Plain):
    """Rounds what it mixes to x's dtype before it is added."""

    def rounds_both(self, c: Any) -> bool:
        return True


class Claims(Plain):
    """Right, and claims little."""

    def __init__(self, dialect: str, *stages: str, outputs: dict[str, tuple[str, ...]] | None = None):
        super().__init__("claims little")
        self.capabilities = dataclasses.replace(
            self.capabilities, stages=frozenset(stages), dialects=frozenset({dialect}), gradients=False
        )
        self.returned = outputs or {}

    def _run(self, stage: str, body: Any, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super()._run(stage, body, inputs, config, cotangents)
        return {k: v for k, v in outputs.items() if k in self.returned.get(stage, outputs)}, gradients


class _Backwards(Plain):
    """Changes the gradients of every stage alone."""

    def changed(self, gradients: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _run(self, stage: str, body: Any, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super()._run(stage, body, inputs, config, cotangents)
        return outputs, self.changed(gradients) if gradients else gradients


class HalfOfPhi(_Backwards):
    """Half of the gradient of pre's projection is missing."""

    def changed(self, gradients: dict[str, Any]) -> dict[str, Any]:
        return {k: (v / 2).astype(v.dtype) if k == "pre_alpha" else v for k, v in gradients.items()}


class NoisyGradient(_Backwards):
    """The gradient of x is off by a random number in each element."""

    def changed(self, gradients: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {
            k: (v * rng.uniform(0.5, 1.5, v.shape)).astype(v.dtype) if k == "x" else v for k, v in gradients.items()
        }


class BackwardOfFewer(Plain):
    """The values of all iterations with the gradients of half of them."""

    def _run(self, stage: str, body: Any, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, _ = super()._run(stage, body, inputs, config, cotangents)
        half = {**config, "iterations": (config["iterations"] or 0) // 2}
        return outputs, super()._run(stage, body, inputs, half, cotangents)[1]
