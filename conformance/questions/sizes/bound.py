"""What an honest implementation may be off by at a size: the ensemble on some tokens, and a law for all of them.

The rule is that of the golden cases (docs/bound.md, "The bound"): K times the largest error of 16 honest evaluations.
Sixteen evaluations of 65,536 tokens would take hours, so they evaluate a few tokens, and the errors of all follow from
theirs:

* An element that belongs to one token is off by no more at other tokens, relative to the largest value there; the
  largest of N errors grows with N as sqrt(log N), as that of normal numbers does.
* A gradient of a weight is a sum over T tokens. Added one after the other, its partial sums grow like sqrt(T), and the
  T roundings of them add up to sqrt(T) of that: the error grows with T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from conformance.cases.description import Bound
from conformance.oracle.floats import FloatArithmetic
from conformance.oracle.residual import axes
from conformance.oracle.style import GATES, K_FLOAT32, K_ROUNDED, K_SUMS, SUMS, Style, ensemble
from conformance.questions.sizes.tensors import Tensors
from conformance.questions.sizes.truth import Truth, Wide, evaluated

DRAWN = 2
"""Tokens beside the first, the last and those with the largest values."""
MOST_PRODUCTS = 1 << 24
"""Products of the projections that an evaluation may have: where one token has many, fewer tokens are sampled."""
FEW_STYLES, MANY_PRODUCTS = (3, 5, 10, 12), 1 << 20
"""Members of the ensemble that evaluate where one token has more products than this: one on logarithms, one on
potentials, the norm before and after, and sums one after the other, which are off the most."""
NARROW = ("bfloat16", "float16")


class Sampled(FloatArithmetic):
    """The honest ensemble's arithmetic with exp and log of the library, in float64, rounded once.

    The golden bounds need them correctly rounded, so that they are the same bytes everywhere; here an error of 2^-29 of
    the last place doesn't matter, and python-flint isn't needed.
    """

    def exp(self, a: np.ndarray) -> np.ndarray:
        return np.exp(a.astype(np.float64)).astype(self.dtype)

    def log(self, a: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(a.astype(np.float64)).astype(self.dtype)


def sampled_tokens(tensors: Tensors, truth: Truth) -> list[int]:
    """The first, the last, those with the largest output and gradient, and a few drawn ones."""
    total = tensors.size.tokens
    drawn = tensors.source.uniform("sampled tokens", 0, DRAWN, 0, total - 1)
    largest = [
        int(np.argmax(np.abs(value).max(tuple(range(1, value.ndim)))))
        for name, value in truth.tokens.items()
        if not name.startswith("m/")
    ]
    wanted = list(dict.fromkeys([*largest, 0, total - 1, *(int(token) for token in drawn)]))
    return sorted(wanted[: max(1, MOST_PRODUCTS // products(tensors))])


def products(tensors: Tensors) -> int:
    """Products that the projections of one token have."""
    return max(1, sum(value.size for name, value in tensors.constants.items() if name.endswith(("_alpha", "_fn"))))


def styles(tensors: Tensors) -> tuple[Style, ...]:
    """The members of the ensemble that evaluate this size."""
    members = ensemble()
    return members if products(tensors) <= MANY_PRODUCTS else tuple(members[number] for number in FEW_STYLES)


def precision(tensors: Tensors, contract: str, x: str) -> tuple[str, str | None]:
    """The contract and the narrow dtype that the ensemble evaluates in.

    Where nothing is rounded to a narrow x's dtype before the last rounding, the figures are those of float32.
    """
    if x not in NARROW:
        return ("float32" if contract in ("mixing", "activation") else contract), None
    probe = Sampled(Style(round_weights=True, round_logits=True), contract, x)
    evaluated(tensors, tensors.inputs_at(0, 1), tensors.cotangents_at(0, 1), probe)
    return (contract, x) if probe.rounded else ("float32", None)


def bounds(tensors: Tensors, truth: Truth, contract: str, narrow: str | None) -> dict[str, Bound]:
    """A bound for each output and gradient, in what `precision` gives."""
    tokens = sampled_tokens(tensors, truth)
    inputs, cotangents = at(tensors, tokens)
    true = evaluated(tensors, inputs, cotangents, Wide())
    errors, rounded = _honest(tensors, inputs, cotangents, true, contract, narrow)
    factor = K_ROUNDED if rounded else K_FLOAT32
    unit = 2.0**-53 if contract == "float64" else 2.0**-24
    scales, result = truth.scales, dict[str, Bound]()
    for name, error in errors.items():
        if name == SUMS:
            result[name] = Bound(bound=K_SUMS * error, honest=error, K=K_SUMS, scale=1.0)
            continue
        scale = 1.0 if name in GATES else scales[name]
        honest = error * _law(name, tensors, truth, true, len(tokens), scale)
        result[name] = Bound(bound=factor * max(honest, unit * scale), honest=honest, K=factor, scale=scale)
    return result


def at(tensors: Tensors, tokens: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and cotangents of chosen tokens."""
    parts = [(tensors.inputs_at(token, token + 1), tensors.cotangents_at(token, token + 1)) for token in tokens]
    inputs = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    cotangents = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
    return inputs, cotangents


def _honest(
    tensors: Tensors,
    inputs: dict[str, np.ndarray],
    cotangents: dict[str, np.ndarray],
    true: dict[str, np.ndarray],
    contract: str,
    narrow: str | None,
) -> tuple[dict[str, float], bool]:
    """The largest error of the ensemble in each tensor, and whether anything was rounded to a narrow dtype."""
    names = [name for name in true if not name.startswith("m/")]
    errors, rounded = dict.fromkeys(names, 0.0), False
    last_axis = axes(tensors.parameters)[1] if tensors.parameters["guard"] == "none" else None
    for style in styles(tensors):
        arithmetic = Sampled(style, contract, narrow)
        with np.errstate(over="ignore", under="ignore"):
            values = evaluated(tensors, inputs, cotangents, arithmetic)
        rounded |= arithmetic.rounded
        if style.potentials and "H" in errors and last_axis is not None:
            sums = (values["H"].astype(np.float64) - true["H"]).sum(last_axis)
            errors[SUMS] = max(errors.get(SUMS, 0.0), float(np.max(np.abs(sums))))
        for name in names:
            error = float(np.max(np.abs(values[name].astype(np.float64) - true[name]), initial=0.0))
            if not math.isfinite(error):
                raise ArithmeticError(f"{name} isn't finite in an honest evaluation ({contract}, {narrow or 'wide'})")
            errors[name] = max(errors[name], error)
    return errors, rounded


def _law(name: str, tensors: Tensors, truth: Truth, true: dict[str, np.ndarray], sampled: int, scale: float) -> float:
    """The factor from the error of the sampled tokens to that of all."""
    if name in truth.sums:
        return tensors.size.tokens / sampled
    few = true[name].size
    spread = math.sqrt(math.log(2 + truth.tokens[name].size) / math.log(2 + few))
    largest = 1.0 if name in GATES else float(np.max(np.abs(true[name]), initial=0.0))
    return spread * (max(1.0, scale / largest) if largest else 1.0)
