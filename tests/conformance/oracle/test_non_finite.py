"""NaN and infinities through the oracle: what must come out, what is free, and what the format says of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

flint = pytest.importorskip("flint", reason="python-flint, of the extra 'regenerate', is not installed")

from conformance.cases.case import CaseError, load_case  # noqa: E402
from conformance.cases.corpus import fixtures, load_corpus  # noqa: E402
from conformance.oracle import balls, residual  # noqa: E402
from conformance.oracle.balls import BallArithmetic, PrecisionExhausted, certified  # noqa: E402
from conformance.oracle.floats import FloatArithmetic, correctly_rounded  # noqa: E402
from conformance.oracle.generate import canonical_bytes  # noqa: E402
from conformance.oracle.non_finite import mark_free  # noqa: E402
from conformance.oracle.style import ensemble  # noqa: E402

INF, NAN = float("inf"), float("nan")
CASES = {case.id: case for case in load_corpus() if case.family == "non-finite"}
A = BallArithmetic()


@pytest.fixture(autouse=True)
def precision():
    before = flint.ctx.prec
    flint.ctx.prec = 256
    yield
    flint.ctx.prec = before


def ball(values):
    return A.array(np.asarray(values, np.float64))


def made_of(value):
    return balls.to_float64(value, infinite=True)


def test_balls_follow_the_arithmetic_of_ieee_754():
    x = ball([NAN, INF, -INF, 2.0])
    assert np.isnan(made_of(x)).tolist() == [True, True, True, False]
    assert made_of(A.exp(x))[2:].tolist() == [0.0, pytest.approx(np.exp(2.0))]
    assert made_of(A.sigmoid_and_rest(x)[0])[1:3].tolist() == [1.0, 0.0]
    assert made_of(A.constant(1) / x)[1:].tolist() == [0.0, 0.0, 0.5]
    for never in (x - x, A.constant(0) * x, x / x):
        assert np.isnan(made_of(never)[:3]).all()


def test_a_matrix_product_keeps_them_in_their_row_and_column():
    left, right = np.ones((3, 40)), np.ones((40, 5))
    left[1, 7], right[3, 2] = NAN, INF
    wrong = np.zeros((3, 5), bool)
    wrong[1], wrong[:, 2] = True, True
    assert (np.isnan(made_of(A.contract(ball(left), ball(right)))) == wrong).all()


def test_a_limit_takes_infinities_and_leaves_nan():
    value, inside = A.clip(ball([NAN, INF, -INF, 1.0]), A.constant(30))
    assert made_of(value)[1:].tolist() == [30.0, -30.0, 1.0] and np.isnan(made_of(value)[0])
    assert inside.tolist() == [True, False, False, True]
    value, above = A.at_least(ball([NAN, INF, -INF, 1.0]), A.constant(3))
    assert made_of(value)[2:].tolist() == [3.0, 3.0] and np.isnan(made_of(value)[:2]).all()
    assert above.tolist() == [True, True, False, False]


def decided(by_precision):
    """What `certified` makes of a value that is another one at each precision."""
    return certified(lambda: {"v": np.array([by_precision(flint.ctx.prec)], dtype=object)}, "v", infinite=True)["v"]


def test_a_value_is_nan_only_if_it_is_so_at_two_precisions():
    nan, one = flint.arb("nan"), flint.arb(1)
    assert np.isnan(decided(lambda bits: nan)).all() and np.isnan(decided(lambda bits: flint.arb("-inf"))).all()
    assert decided(lambda bits: one) == [1.0]
    assert decided(lambda bits: nan if bits == 256 else one) == [1.0]  # an operation that a wide ball wasn't in for
    with pytest.raises(PrecisionExhausted, match="changes with the precision"):
        decided(lambda bits: nan if bits.bit_length() % 2 else one)


def test_a_ball_that_is_only_wide_is_not_taken_for_nan():
    with pytest.raises(PrecisionExhausted, match="undecided at 4096 bits"):
        decided(lambda bits: flint.arb(1, 1))
    with pytest.raises(PrecisionExhausted, match="isn't finite"):
        decided(lambda bits: flint.arb(0, "inf"))
    with pytest.raises(PrecisionExhausted, match="isn't finite"):
        certified(lambda: {"v": np.array([flint.arb("nan")], dtype=object)}, "v")


def test_exponentials_and_logarithms_of_what_is_not_finite():
    for dtype in (np.float32, np.float64):
        numbers = np.array([NAN, INF, -INF], dtype)
        assert correctly_rounded("exp", numbers)[1:].tolist() == [INF, 0.0]
        assert correctly_rounded("log", numbers)[1:2].tolist() == [INF]
        assert (
            np.isnan(correctly_rounded("exp", numbers)[0]) and np.isnan(correctly_rounded("log", numbers)[[0, 2]]).all()
        )


P = {"residual": "sinkhorn", "softmax": "rows", "order": "rows-first", "guard": "add", "eps": 1e-6, "iterations": 20,
     "logit_limit": None, "matrix": "float32", "streams": 2}  # fmt: skip


def expected(logits, **parameters):
    """True values of H and its gradient, with what is free."""

    def run(arithmetic):
        value, pullback = residual.residual_matrix(arithmetic.array(logits), {**P, **parameters}, arithmetic)
        return {"H": value, "d/logits": pullback(arithmetic.array(np.ones(logits.shape)))}

    values = certified(lambda: run(A), "H", infinite=True)
    with np.errstate(all="ignore"):
        mark_free(values, run, [("float32", None), ("activation", "bfloat16")])
    return values


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"guard": "none", "eps": 0.0},
        {"guard": "clip"},
        {"softmax": "columns", "order": "columns-first"},
        {"softmax": "none", "guard": "denominator"},
    ],
    ids=str,
)
def test_a_logit_of_inf_or_nan_takes_all_of_its_token_and_one_of_minus_inf_nothing(parameters):
    logits = np.array([[[INF, 0], [1, 2]], [[NAN, 0], [1, 2]], [[-INF, 0], [1, 2]], [[3, 0], [1, 2]]], np.float64)
    values = expected(logits, **parameters)
    assert np.isnan(values["H"]).reshape(4, -1).sum(-1).tolist() == [4, 4, 0, 0]
    assert np.isnan(values["d/logits"]).reshape(4, -1).sum(-1).tolist() == [4, 4, 0, 0]
    assert not np.isinf(values["d/logits"]).any()
    if parameters.get("guard") == "none":
        assert values["H"][2, 0, 0] == 0.0


def test_under_a_limit_infinities_are_at_it_and_the_gradient_of_a_nan_is_free():
    logits = np.array([[[INF, 0], [1, 2]], [[5, 0], [1, 2]], [[NAN, 0], [1, 2]]], np.float64)
    values = expected(logits, logit_limit=5.0)
    assert values["H"][0].tolist() == values["H"][1].tolist() and np.isfinite(values["H"][0]).all()
    assert values["d/logits"][0, 0, 0] == 0.0 and values["d/logits"][1, 0, 0] != 0.0
    assert np.isnan(values["H"][2]).all()
    assert np.isinf(values["d/logits"][2]).tolist() == [[True, False], [False, False]]
    assert np.isnan(values["d/logits"][2]).sum() == 3


def test_one_honest_evaluation_that_differs_makes_an_element_free_and_its_magnitude_nan():
    def run(arithmetic):
        assert isinstance(arithmetic, FloatArithmetic)
        odd = arithmetic.style == ensemble()[7] and arithmetic.narrow is np.float16
        value = np.array([1.0, NAN if odd else 2.0, NAN, 4.0 if odd else INF])
        return {"out": value, "d/x": value, "m/x": np.abs(value)}

    values = {"out": np.array([1.0, 2.0, NAN, NAN]), "d/x": np.array([1.0, 2.0, NAN, NAN]),
              "m/x": np.array([1.0, 2.0, NAN, NAN])}  # fmt: skip
    mark_free(values, run, [("float32", None), ("float32", "float16")])
    assert repr(values["out"].tolist()) == repr(values["d/x"].tolist()) == "[1.0, inf, nan, inf]"
    assert repr(values["m/x"].tolist()) == "[1.0, nan, nan, nan]"


@pytest.mark.parametrize("name", CASES)
def test_each_case_has_what_is_hidden_beside_what_is_not(name):
    case = CASES[name]
    inputs = {k: v.astype(np.float64) for k, v in case.tensors.items() if k.startswith(("input/", "weight/"))}
    assert any(np.isnan(v).any() for v in inputs.values()) and any(np.isinf(v).any() for v in inputs.values())
    outputs = [v for k, v in case.tensors.items() if k.startswith("expected/")]
    assert any(np.isnan(v).any() for v in outputs) and all(np.isfinite(v).any() for v in outputs)
    free = {k for k, v in case.tensors.items() if k.startswith(("expected/", "gradient/")) and np.isinf(v).any()}
    assert not free or case.dialect == "xing-4"
    for bounds in (row for stage in case.bounds.values() for row in stage.values()):
        assert all(np.isfinite([entry.bound, entry.honest, entry.scale]).all() for entry in bounds.values())


def test_tokens_that_have_only_numbers_are_what_they_are_without_the_others():
    """The coefficients, evaluated on the finite tokens alone: nothing reaches them."""
    from conformance.oracle.evaluate import evaluate

    case = CASES["non-finite-tokens-deepseek-v4"]
    entry = case.stages["coefficients"]
    x = case.tensors["input/x"].astype(np.float32)
    finite = np.isfinite(x).all((-2, -1))
    weights = {k: case.tensors[f"weight/{k}"] for k in entry.weights}
    cotangents = {k: case.tensors[f"cotangent/coefficients/{k}"][finite][None] for k in entry.outputs}
    inputs = {"x": x[finite][None], **weights}
    values = certified(lambda: evaluate("coefficients", inputs, cotangents, case.parameters, {}, A), "finite tokens")
    for name in ("pre", "post", "H"):
        assert (case.tensors[f"expected/coefficients/{name}"][finite] == values[name][0]).all()
    assert (case.tensors["gradient/coefficients/x"][finite] == values["d/x"][0]).all()
    assert np.isnan(case.tensors["gradient/coefficients/x"][~finite]).all()


def rewritten(folder, name, **metadata):
    """A golden file with other metadata."""
    from safetensors import safe_open

    with safe_open(fixtures() / "golden" / f"{name}.safetensors", framework="numpy") as file:
        tensors = {k: file.get_tensor(k) for k in sorted(file.keys())}
        kept = file.metadata()
    path = folder / "case.safetensors"
    return path, tensors, {**kept, **metadata}


def test_only_the_second_format_has_them_and_no_cotangent_has(tmp_path):
    path, tensors, metadata = rewritten(tmp_path, "non-finite-streams-paper-2")
    assert metadata["format"] == "mhc-conformance-case/2" and json.loads(metadata["case"])["family"] == "non-finite"
    path.write_bytes(canonical_bytes(tensors, metadata))
    assert np.isnan(load_case(path).tensors["weight/post_alpha"]).sum() == 1
    path.write_bytes(canonical_bytes(tensors, {**metadata, "format": "mhc-conformance-case/1"}))
    with pytest.raises(CaseError, match="must be finite, got NaN or infinity"):
        _ = load_case(path).tensors
    tensors["cotangent/layer/out"] = tensors["cotangent/layer/out"] * np.float32(NAN)
    path.write_bytes(canonical_bytes(tensors, metadata))
    with pytest.raises(CaseError, match="cotangent/layer/out must be finite, got NaN or infinity"):
        _ = load_case(path).tensors
    path.write_bytes(canonical_bytes(tensors, {**metadata, "format": "mhc-conformance-case/3"}))
    with pytest.raises(CaseError, match="expected format 'mhc-conformance-case/1' or 'mhc-conformance-case/2'"):
        load_case(path)


def test_every_other_golden_file_has_the_first_format():
    assert {case.family for case in load_corpus() if case.infinite} == {"non-finite"}
    assert all(case.infinite for case in CASES.values()) and len(CASES) == 42
