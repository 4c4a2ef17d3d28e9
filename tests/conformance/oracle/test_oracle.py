"""The derivation is right: central differences in the same arithmetic, at 700 bits."""

from __future__ import annotations

import functools
import operator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

flint = pytest.importorskip("flint", reason="python-flint, of the extra 'regenerate', is not installed")

from conformance.oracle import balls, build, families, floats, style  # noqa: E402
from conformance.oracle.evaluate import evaluate  # noqa: E402
from conformance.oracle.generate import _inputs_from_oracle, complete  # noqa: E402

BITS, STEP, AGREEMENT = 700, 2**-200, 2.0**-100
WISHES = {wish.id: wish for wish in families.wishes()}
DERIVED = [wish.id for wish in WISHES.values() if (wish.family, wish.label) in (("smoke", ""), ("generic", "n3"))] + [
    "parameters-rows-first-paper-2",
    "parameters-three-iterations-paper-2",
    "parameters-columns-first-megatron",
    "parameters-softmax-columns-deepseek-v4",
    "parameters-denominator-liger",
    "parameters-single-pass-deepseek-v4",
]


@pytest.fixture(autouse=True)
def precision():
    before = flint.ctx.prec
    flint.ctx.prec = BITS
    yield
    flint.ctx.prec = before


def inner(a, b):
    return balls.BallArithmetic().sum((a * b).reshape(1, -1), -1)[0]


def check_derivative(case, stage):
    """<g, (f(x + s d) - f(x - s d)) / 2s> against <gradient, d>, for a random direction d in every input at once."""
    entry, A = case.stages[stage], balls.BallArithmetic()
    inputs = {k: case.tensors[k] for k in (*entry["inputs"], *entry["weights"])}
    values = evaluate(stage, inputs, case.cotangents[stage], case.parameters, entry["options"], A)
    moved = [k.removeprefix("d/") for k in values if k.startswith("d/")]
    direction = {k: build.data.normal(f"direction/{k}", inputs[k].shape) for k in moved}

    def along(sign):
        step = flint.arb(sign) * flint.arb(2) ** -200
        at = {k: A.array(inputs[k]) + A.array(direction[k]) * step if k in moved else inputs[k] for k in inputs}
        return evaluate(stage, at, case.cotangents[stage], case.parameters, entry["options"], A)

    ahead, behind = along(1), along(-1)
    outputs = [k for k in values if "/" not in k]
    numeric = sum(inner(A.array(case.cotangents[stage][k]), ahead[k] - behind[k]) for k in outputs)
    numeric = numeric / (flint.arb(2) * flint.arb(2) ** -200)
    derived = sum(inner(values[f"d/{k}"], A.array(direction[k])) for k in moved)
    scale = sum(inner(abs(values[f"d/{k}"]), A.array(np.abs(direction[k]))) for k in moved)
    assert abs(numeric - derived) < scale * flint.arb(AGREEMENT), f"{case.id}, {stage}: {numeric} against {derived}"


@pytest.mark.parametrize("name", DERIVED)
def test_vector_jacobian_product_agrees_with_central_differences_to_100_bits(name):
    case = build.build(WISHES[name])
    _inputs_from_oracle(case)
    for stage in case.stages:
        check_derivative(case, stage)


def test_a_wrong_derivative_is_noticed(monkeypatch):
    from conformance.oracle import formulas

    original = formulas.pre_mix

    def without_streams(x, pre, A):
        value, pullback = original(x, pre, A)
        return value, lambda g: (pullback(g)[0], pullback(g)[1] * A.constant(0.999999))

    monkeypatch.setattr(formulas, "pre_mix", without_streams)
    with pytest.raises(AssertionError, match="against"):
        check_derivative(build.build(WISHES["smoke-paper-2"]), "pre")


@pytest.mark.parametrize("name", ["generic-n3-maxtext-v1-2", "generic-n3-deepseek-v4", "generic-n4-mhc-lite-2"])
def test_every_honest_style_has_the_same_true_value(name):
    case = build.build(WISHES[name])
    entry = case.stages["coefficients"]
    inputs = {k: case.tensors[k] for k in (*entry["inputs"], *entry["weights"])}
    reference = None
    for choices in set(style.ensemble()):
        arithmetic = balls.BallArithmetic(choices)
        values = balls.certified(
            lambda a=arithmetic: evaluate(
                "coefficients", inputs, case.cotangents["coefficients"], case.parameters, {}, a
            ),
            name,
        )
        del values["m/x"]  # the parts, unlike their sum, depend on how the gradient is written
        reference = reference or values
        for tensor, value in values.items():
            assert np.array_equal(value, reference[tensor]), tensor


def test_rounding_is_to_nearest_and_certain():
    third = balls.to_float64(np.array([flint.arb(1) / 3], dtype=object))
    assert third[0] == 1 / 3
    tie = balls.to_float64(np.array([flint.arb(1) + flint.arb(2) ** -53], dtype=object))
    assert tie[0] == 1.0
    assert balls.to_float64(np.array([flint.arb(3) * flint.arb(2) ** -1075], dtype=object))[0] == 2.0**-1073


def test_a_value_that_never_rounds_is_said():
    def between():
        return {"value": np.array([flint.arb(1).union(flint.arb(2))], dtype=object)}

    with pytest.raises(balls.PrecisionExhausted, match=r"some value: undecided at 4096 bits"):
        balls.certified(between, "some value")


def test_an_enclosure_holds_the_value_and_is_small():
    seen = []

    def evaluate():
        seen.append(flint.ctx.prec)
        wide = flint.arb(0, 2.0**-200) if flint.ctx.prec < 300 else flint.arb(0)
        values = {"third": [flint.arb(1) / 3, flint.arb(10) ** 20 / 3 + wide * 10**61], "zero": [wide]}
        return {name: np.array(value, dtype=object) for name, value in values.items()}

    found = balls.enclosed(evaluate)
    assert seen == [160, 320] and flint.ctx.prec not in seen
    (third, large), (radius, of_large) = found["third"]
    assert abs(Fraction(third) - Fraction(1, 3)) <= Fraction(radius) <= Fraction(1, 2**53)
    assert abs(Fraction(large) - Fraction(10**20, 3)) <= Fraction(of_large) <= 2**13
    assert found["zero"][0] == 0 and found["zero"][1] < 1e-60


def test_what_stays_wide_is_not_enclosed():
    with pytest.raises(balls.PrecisionExhausted, match="4096 bits"):
        balls.enclosed(lambda: {"value": np.array([flint.arb(1).union(flint.arb(2))], dtype=object)})


@pytest.mark.parametrize("name", ["exp", "log"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elementary_functions_are_correctly_rounded(name, dtype):
    values = np.exp2(np.linspace(-20, 6, 101)).astype(dtype)
    with flint.ctx.workprec(400):
        exact = [getattr(flint.arb(float(v)), name)() for v in values]
        spacing = [abs(float(r) - float(e)) for r, e in zip(floats.correctly_rounded(name, values), exact, strict=True)]
    halves = np.spacing(np.abs(floats.correctly_rounded(name, values))) / 2
    assert (np.array(spacing) <= halves.astype(np.float64) * 1.0000001).all()


@pytest.mark.parametrize("order", style.ORDERS)
def test_sums_in_every_order_add_every_term_once(order):
    for count in (0, 1, 2, 7, 8, 9, 33):
        values = np.exp2(np.arange(count, dtype=np.float64) % 40)[None]
        assert floats.ordered_sum(values, -1, order)[0] == values.sum()


def one_after_the_other(values: np.ndarray, order: str) -> Any:
    """The sum of a line in a stated order, by additions of two numbers."""
    zero = values.dtype.type(0)
    terms = list(values)
    if order == "pairwise":
        while len(terms) > 1:
            terms += [zero] * (len(terms) % 2)
            terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
        return terms[0]
    lanes = int(order[5:]) if order.startswith("lanes") else 1
    if lanes > 1 and len(terms) > lanes:
        terms += [zero] * (-len(terms) % lanes)
        sums = [one_after_the_other(np.array(terms[k::lanes]), "forward") for k in range(lanes)]
        return one_after_the_other(np.array(sums), "pairwise")
    if order == "backward":
        terms.reverse()
    if order == "scattered":
        terms = [terms[k] for k in sorted(range(len(terms)), key=lambda k: (7919 * (k + 1)) % 10007)]
    return functools.reduce(operator.add, terms)


@pytest.mark.parametrize("order", style.ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("turned", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_sums_are_one_addition_after_the_other_however_their_terms_lie(order, dtype, turned):
    """Terms of many numbers (9 x 8) and of few (1 x 2), which are added in two ways."""
    for shape in ((37, 9, 8), (37, 1, 2)):
        held = np.random.default_rng(0).standard_normal([shape[k] for k in turned]).astype(dtype)
        values = held.transpose(np.argsort(turned))  # [37, ...], in every layout
        sums = floats.ordered_sum(values, 0, order)
        expected = [one_after_the_other(line, order) for line in values.reshape(37, -1).T]
        assert sums.dtype == dtype and sums.tobytes() == np.array(expected, dtype).tobytes()


def test_tf32_keeps_ten_bits():
    value = np.array([1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-20, 1 + 3 * 2.0**-11], np.float32)
    assert floats.to_tf32(value).tolist() == [1.0, 1 + 2.0**-10, 1 + 2.0**-9]


def test_a_case_regenerates_to_the_same_bytes():
    from conformance.cases.corpus import fixtures

    flint.ctx.prec = 53  # whatever the caller left
    for name in ("smoke-megatron", "generic-n3-deepseek-v4-transformers", "zero-maxtext-2"):
        assert complete(build.build(WISHES[name])) == (fixtures() / "golden" / f"{name}.safetensors").read_bytes()
