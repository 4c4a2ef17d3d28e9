"""What an honest implementation may be off by at a size: the ensemble on some tokens, and a law for all of them.

The rule is that of the golden cases (docs/bound.md, "The bound"): K times the error of honest evaluations. Sixteen
evaluations of 65,536 tokens would take hours, so they evaluate a few tokens, and the errors of all follow from theirs
(docs/sizes.md, "The bound"):

* An element that belongs to one token is off by no more at other tokens, relative to the largest value there; the
  largest of N errors grows with N as sqrt(log N), as that of normal numbers does.
* A gradient of a weight is a sum over T tokens. The errors of its terms are independent, so that their sum grows with
  sqrt(T). Added one after the other, the partial sums grow with sqrt(T) too, and the T roundings of them with T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from conformance.cases.description import Bound
from conformance.cases.format import DTYPES
from conformance.oracle.floats import FloatArithmetic
from conformance.oracle.residual import axes
from conformance.oracle.style import GATES, K_FLOAT32, K_ROUNDED, K_SUMS, SUMS, Style, ensemble
from conformance.questions.sizes.tensors import Tensors
from conformance.questions.sizes.truth import Truth, Wide, evaluated, of_weights
from conformance.stages import HEAD_WEIGHTS

DRAWN, MOST_DRAWN, DRAWN_ELEMENTS = 2, 64, 1 << 16
"""Tokens beside the first, the last and those with the largest values: as many as have so many elements of x. A tensor
with one number a token needs dozens, or the largest of their errors says little of the largest of all."""
TERMS = 12
"""Tokens whose terms of the sums are evaluated one by one."""
MOST_PRODUCTS = 1 << 24
"""Products of the projections that an evaluation may have: where one token has many, fewer tokens are sampled."""
FEW_STYLES, MANY_PRODUCTS = (3, 5, 10, 12), 1 << 20
"""Members of the ensemble that evaluate where one token has more products than this, and that evaluate the terms of
sums: one on logarithms, one on potentials, the norm before and after, and sums one after the other."""
OF_THE_TERMS = 0.41
"""T roundings of partial sums of independent terms add up to this, 1/sqrt(6), times T times that of one term."""
SMALL_SAMPLE = 4.0
"""A deviation that is estimated from t terms may be too small by a factor of ``1 + SMALL_SAMPLE / t``."""
NARROW = ("bfloat16", "float16")
NARROW_UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


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
    count = min(max(DRAWN, DRAWN_ELEMENTS // (tensors.size.streams * tensors.size.dim)), MOST_DRAWN)
    drawn = tensors.source.uniform("sampled tokens", 0, count, 0, total - 1)
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
    """A bound for each output and gradient, in what `precision` gives.

    Raises:
        ArithmeticError: an honest evaluation isn't finite.
    """
    _hold(truth, contract, narrow)
    tokens = sampled_tokens(tensors, truth)
    inputs, cotangents = at(tensors, tokens)
    true = evaluated(tensors, inputs, cotangents, Wide())
    errors, rounded = _honest(tensors, inputs, cotangents, true, contract, narrow)
    errors |= _of_sums(tensors, contract, narrow)
    factor = K_ROUNDED if rounded else K_FLOAT32
    unit = 2.0**-53 if contract == "float64" else 2.0**-24
    scales, result = truth.scales, dict[str, Bound]()
    for name, error in errors.items():
        if name == SUMS:
            result[name] = Bound(bound=K_SUMS * error, honest=error, K=K_SUMS, scale=1.0)
            continue
        scale = 1.0 if name in GATES else scales[name]
        if name not in truth.sums:
            error *= _growth(name, truth, true, scale)
        result[name] = Bound(bound=factor * max(error, unit * scale), honest=error, K=factor, scale=scale)
    return result


def _hold(truth: Truth, contract: str, narrow: str | None) -> None:
    """Raises `ArithmeticError` where a weight's gradient is larger than the dtype that the weight is rounded to holds.

    It passes through that dtype on its way back. Sampled tokens don't show it: it is the sum over all of them. The
    head's weights aren't rounded in any row.
    """
    if narrow is None or contract != "activation":
        return
    most = float(ml_dtypes.finfo(DTYPES[narrow]).max)
    for name, value in truth.sums.items():
        largest = float(np.max(np.abs(value), initial=0.0))
        if largest > most and name.removeprefix("d/") not in HEAD_WEIGHTS:
            raise ArithmeticError(f"{name} reaches {largest:.3g}, more than {narrow} holds, and passes through it")


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
    names = [name for name in true if not name.startswith("m/") and name.removeprefix("d/") not in tensors.weights]
    errors, rounded = dict.fromkeys(names, 0.0), False
    last_axis = axes(tensors.parameters)[1] if tensors.parameters["guard"] == "none" else None
    for style in styles(tensors):
        arithmetic = Sampled(style, contract, narrow)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values = evaluated(tensors, inputs, cotangents, arithmetic)
        rounded |= arithmetic.rounded
        if style.potentials and "H" in errors and last_axis is not None:
            sums = (values["H"].astype(np.float64) - true["H"]).sum(last_axis)
            errors[SUMS] = max(errors.get(SUMS, 0.0), float(np.max(np.abs(sums))))
        for name in names:
            error = float(np.max(np.abs(values[name].astype(np.float64) - true[name]), initial=0.0))
            _finite(name, error, contract, narrow)
            errors[name] = max(errors[name], error)
    return errors, rounded


def _finite(name: str, error: float, contract: str, narrow: str | None) -> None:
    """Raises `ArithmeticError` where an honest error is no number."""
    if not math.isfinite(error):
        raise ArithmeticError(f"{name} isn't finite in an honest evaluation ({contract}, {narrow or 'wide'})")


def _growth(name: str, truth: Truth, true: dict[str, np.ndarray], scale: float) -> float:
    """The factor from the error of the sampled tokens to that of all."""
    spread = math.sqrt(math.log(2 + truth.tokens[name].size) / math.log(2 + true[name].size))
    largest = 1.0 if name in GATES else float(np.max(np.abs(true[name]), initial=0.0))
    return spread * (max(1.0, scale / largest) if largest else 1.0)


def _of_sums(tensors: Tensors, contract: str, narrow: str | None) -> dict[str, float]:
    """The honest errors of gradients that are sums over tokens.

    A few tokens are evaluated one by one: the root mean squares of their terms c and of the terms' errors e give
    ``sqrt(2 log(2 + N)) * (sqrt(T) * rms(e) + u * T * rms(c) / sqrt(6))`` for the largest of N elements.
    """
    total = tensors.size.tokens
    count = max(1, min(TERMS, total, MOST_PRODUCTS // (4 * products(tensors))))
    tokens = [int(token) for token in np.linspace(0, total - 1, count)]
    terms: list[dict[str, np.ndarray]] = []
    errors: list[dict[str, np.ndarray]] = []
    for token in tokens:
        inputs, cotangents = at(tensors, [token])
        true = of_weights(tensors, evaluated(tensors, inputs, cotangents, Wide()))
        largest = {name: np.zeros_like(value) for name, value in true.items()}
        for number in FEW_STYLES:
            arithmetic = Sampled(ensemble()[number], contract, narrow)
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                values = of_weights(tensors, evaluated(tensors, inputs, cotangents, arithmetic))
            for name, value in values.items():
                largest[name] = np.maximum(largest[name], np.abs(value.astype(np.float64) - true[name]))
        terms.append(true)
        errors.append(largest)
    result: dict[str, float] = {}
    for name in terms[0]:
        of_terms, of_errors = (_root_mean_square([row[name] for row in rows]) for rows in (terms, errors))
        unit = 2.0**-53 if contract == "float64" else 2.0**-24
        if narrow and contract == "activation" and name.endswith(("_scale", "_beta")):
            unit = NARROW_UNITS[narrow]  # they may be added up in x's dtype
        _finite(name, of_errors, contract, narrow)
        spread = math.sqrt(2 * math.log(2 + terms[0][name].size)) * (1 + SMALL_SAMPLE / count)
        result[name] = spread * (math.sqrt(total) * of_errors + unit * total * of_terms * OF_THE_TERMS)
    return result


def _root_mean_square(rows: list[np.ndarray]) -> float:
    """Over the terms, of the element where it is largest."""
    return float(np.sqrt(np.max(np.mean([row * row for row in rows], 0), initial=0.0)))
