"""The hint for a sigmoid that loses a closed gate, by numbers: up to which error it is given, and when never."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.judge.rule import check_item
from tests.conformance.judge.made import array, claims, made

HINT = (
    "a gate is off by less than 2^{}: if the other families pass, the sigmoid keeps no relative accuracy "
    'where the gate is closed, for instance (1 + tanh(z/2))/2 (docs/contract.md, "A closed gate")'
)


def message(stage, tensor, error, dtype="float32", family="closed-gate", bound=2.0**-40, **inputs: Any):
    """What is said of an output whose true value is 2^-20 and that is off by ``error``."""
    expected = 2.0**-20
    given: dict[str, Any] = {"x": [[[[0.5], [-0.5]]]], **inputs}  # a token's streams add up to 1
    chosen = made(stage, inputs=given, outputs={tensor: [expected]}, bounds={tensor: bound}, family=family,
                  variant=f"{dtype}-{'float64' if dtype == 'float64' else 'float32'}")  # fmt: skip
    (check,) = check_item(chosen, {tensor: array([expected + error], dtype)}, {}, claims())
    return check.message


@pytest.mark.parametrize(
    ("x", "stage", "tensor"),
    [
        ("float32", "coefficients", "pre"),
        ("float32", "coefficients", "post"),
        ("float32", "pre", "u"),
        ("float32", "head", "out"),
        ("float64", "coefficients", "pre"),
    ],
)
def test_up_to_a_unit_roundoff_of_an_open_gate(x, stage, tensor):
    power = -53 if x == "float64" else -24
    bound = 2.0**-60 if x == "float64" else 2.0**-40
    assert message(stage, tensor, 2.0**power, x, bound=bound) == HINT.format(power)
    assert message(stage, tensor, 2.0**power * 0.5, x, bound=bound) == HINT.format(power)
    assert message(stage, tensor, 2.0**power * 1.25, x, bound=bound) == ""


def test_in_u_a_gate_moves_as_much_as_the_streams_of_a_token_add_up_to():
    inputs: dict[str, Any] = {"x": [[[[0.5], [-0.5]], [[1.0], [-3.0]]]]}  # 1, and 4 at the second token
    assert message("pre", "u", 4 * 2.0**-24, **inputs) == HINT.format(-24)
    assert message("pre", "u", 5 * 2.0**-24, **inputs) == ""
    small: dict[str, Any] = {"x": [[[[0.125], [0.125]]]]}
    assert message("pre", "u", 2.0**-24, **small) == HINT.format(-24)  # but no less than the gate itself
    assert message("pre", "u", 1.25 * 2.0**-24, **small) == ""
    assert message("coefficients", "pre", 4 * 2.0**-24, **inputs) == ""  # a gate is a gate
    no_batch: dict[str, Any] = {"x": [[[0.5, 2.0], [-0.5, 1.0]]]}
    assert message("pre", "u", 3 * 2.0**-24, **no_batch) == HINT.format(-24)
    assert message("pre", "u", 4 * 2.0**-24, **no_batch) == ""
    two_channels: dict[str, Any] = {"x": [[[[0.5, 2.0], [-0.5, 1.0]]]]}
    assert message("pre", "u", 3 * 2.0**-24, **two_channels) == HINT.format(-24)
    assert message("pre", "u", 4 * 2.0**-24, **two_channels) == ""


def test_in_a_layer_by_the_factors_of_its_branch_besides():
    factors: dict[str, Any] = {"norm_scale": [2.0, 1.0], "branch_scale": [-4.0, 1.0], "x": [[[[1.0], [1.0]]]]}  # 2 * 8
    assert message("layer", "out", 16 * 2.0**-24, **factors) == HINT.format(-24)
    assert message("layer", "out", 17 * 2.0**-24, **factors) == ""
    assert message("layer", "pre", 16 * 2.0**-24, **factors) == ""
    assert message("layer", "pre", 1 * 2.0**-24, **factors) == HINT.format(-24)
    assert message("head", "out", 16 * 2.0**-24, x=[[[[1.0], [1.0]]]]) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "generic"},
        {"bound": 2.0**-23},  # passed
        {"bound": 2.0**-25 * 1.25},  # marginal
    ],
)
def test_never_where_it_is_another_family_or_no_failure(changes):
    assert message("pre", "u", 2.0**-25) == HINT.format(-24)
    assert message("pre", "u", 2.0**-25, **changes) == ""


def test_never_of_another_tensor():
    H = [[0.5, 0.5], [0.5, 0.5]]
    chosen = made("coefficients", inputs={"x": [[1.0], [1.0]]}, outputs={"H": H}, gradients={"x": [[1.0], [1.0]]},
                  bounds={"H": 0.0, "d/x": 0.0}, family="closed-gate")  # fmt: skip
    H[0][0] += 2.0**-24
    off = {"H": array(H, "float32")}, {"x": array([[1.0 + 2.0**-23], [1.0]], "float32")}
    assert [(c.verdict, c.message) for c in check_item(chosen, *off, claims())] == [("failed", "")] * 2


def test_never_without_a_figure():
    chosen = made("pre", outputs={"u": [1.0]}, family="closed-gate")
    (check,) = check_item(chosen, {"u": array([float("nan")], "float32")}, {}, claims())
    assert check.message == "first at [0]: nan"


def test_never_of_a_stack_whose_streams_are_none_of_its_inputs():
    chosen = made("stack", inputs={"embedding": [1.0]}, outputs={"out": [1.0]}, bounds={"out": 0.0},
                  family="closed-gate")  # fmt: skip
    (check,) = check_item(chosen, {"out": array([1.0 + 2.0**-23], "float32")}, {}, claims())
    assert (check.verdict, check.message) == ("failed", "")


def test_it_stands_after_what_is_said_already():
    for bound, hint in (
        (2.0**-40, "; " + HINT.format(-24)),
        (0.0, ""),
    ):  # a bound of 0 tells nothing of an error's size
        chosen = made("coefficients", inputs={"x": [[1.0], [1.0]]}, outputs={"pre": [2.0**-26]}, bounds={"pre": bound},
                      family="closed-gate")  # fmt: skip
        (check,) = check_item(chosen, {"pre": array([0.0], "float32")}, {}, claims())
        assert check.verdict == "mistrusted"
        assert check.message == "all zeros where the expected values are not" + hint
