"""Claims may differ by stage and by a parameter's value, in Python and from a program; the plain form stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cases.corpus import load_corpus
from conformance.cli import app
from conformance.implementations.claims import misnamed
from conformance.implementations.greeting import ProgramError, read_greeting
from conformance.implementations.wrapping import wrap
from conformance.interface import Capabilities, SetupError
from conformance.judge.item import refusal

GREETING = {"protocol": "mhc-conformance-harness/1", "name": "program"}
ITEMS = [
    i for c in load_corpus() for i in c.items() if c.dialect == "paper" and i.variant.contract == "float32"
]  # fmt: skip


def claims(**changes: Any):
    named: dict[str, Any] = {"overrides": None} | changes
    return Capabilities(frozenset({"pre", "post"}), frozenset({"paper"}), **named)


def reasons(claimed, stage, x="float32", weights="float32"):
    chosen = [i for i in ITEMS if (i.stage, i.variant.x, i.variant.weights) == (stage, x, weights)]
    assert chosen
    return {refusal(i, claimed) for i in chosen}


def test_dtypes_differ_by_stage():
    claimed = claims(dtypes={"pre": {"bfloat16"}, "post": {"float32", "bfloat16"}})
    assert reasons(claimed, "post") == {""}
    assert reasons(claimed, "pre") == {"float32 not claimed"}
    assert reasons(claimed, "pre", "bfloat16") == {""}


def test_a_stage_that_a_mapping_leaves_out_is_not_claimed_for_any_dtype():
    assert reasons(claims(dtypes={"post": {"float32"}}), "pre") == {"float32 not claimed"}


def test_weights_differ_by_stage():
    claimed = claims(dtypes=frozenset({"bfloat16"}), weights={"pre": ("x",)})
    assert reasons(claimed, "pre", "bfloat16", "bfloat16") == {""}
    assert reasons(claimed, "pre", "bfloat16") == {"weights in float32 not claimed"}
    assert reasons(claimed, "post", "bfloat16") == {""}  # it has none


@pytest.mark.parametrize(
    "overrides, allowed",
    [
        (None, {1, 20}),
        (frozenset(), set()),
        (frozenset({"iterations"}), {1, 20}),
        ({"iterations": None}, {1, 20}),
        ({"iterations": (20, 50)}, {20}),
        ({"eps": None}, set()),
    ],
)
def test_an_override_may_be_claimed_for_some_values(overrides, allowed):
    claimed = claims(overrides=overrides)
    assert {n for n in (1, 20) if claimed.allows("iterations", n)} == allowed


def test_a_case_with_another_value_is_skipped_with_the_reason():
    (item,) = (i for i in ITEMS if i.stage == "residual_matrix" and i.case.overrides == {"iterations": 1})
    claimed = Capabilities(frozenset({"residual_matrix"}), frozenset({"paper"}), overrides={"iterations": (20,)})
    assert refusal(item, claimed) == "other values of iterations not claimed"


def greeted(claims):
    return read_greeting(json.dumps({**GREETING, "capabilities": claims}).encode())


def test_a_program_says_the_same():
    told = {
        "stages": ["pre", "post"], "dialects": ["paper"], "weights": {"pre": ["x"]},
        "dtypes": {"pre": ["float32"], "post": ["float32", "bfloat16"]}, "overrides": {"iterations": [10], "eps": None},
    }  # fmt: skip
    _, claimed = greeted(told)
    assert claimed.dtypes_of("post") == {"float32", "bfloat16"} and claimed.dtypes_of("pre") == {"float32"}
    assert claimed.weights_of("pre") == {"x"} and claimed.weights_of("post") == set()
    assert claimed.allows("iterations", 10) and not claimed.allows("iterations", 20)
    assert claimed.allows("eps", 0.5) and not claimed.allows("norm_eps", 0.5)


@pytest.mark.parametrize(
    "claim, said",
    [
        ({"dtypes": "float32"}, "capabilities.dtypes: expected a list or an object, got 'float32'"),
        ({"dtypes": {"pre": None}}, "capabilities.dtypes.pre: expected a list, got null"),
        ({"overrides": {"iterations": 10}}, "capabilities.overrides.iterations: expected a list or null, got 10"),
        ({"streams": {"pre": [4]}}, "capabilities.streams: expected a list or null, got an object"),
        ({"streams": [4.5]}, r"capabilities.streams\[0\]: expected an integer, got 4.5"),
        ({"stages": ["pre", "pry"]}, r"capabilities.stages: unknown stage 'pry', .*; did you mean 'pre'\?"),
        ({"dialects": ["papers"]}, r"capabilities.dialects: unknown dialect 'papers', .*; did you mean 'paper'\?"),
        ({"outputs": {"pre": ["U"]}}, r"unknown output of pre 'U', expected one of u, pre; did you mean 'u'\?"),
    ],
)
def test_a_program_that_claims_it_another_way_is_told(claim, said):
    with pytest.raises(ProgramError, match=said):
        greeted({"stages": ["pre"], "dialects": ["paper"], **claim})


SLIPS: list[tuple[dict[str, Any], str]] = [
    ({"stages": {"prepost"}}, "capabilities.stages: unknown stage 'prepost', expected one of expand"),
    ({"stages": "pre"}, "capabilities.stages: expected a set of names, got 'pre'"),
    ({"stages": {3}}, "capabilities.stages: expected names, got 3"),
    ({"dialects": {"papers"}}, "unknown dialect 'papers', expected one of paper, .*; did you mean 'paper'?"),
    ({"dialects": {"deepseek_v4"}}, "; did you mean 'deepseek-v4'?"),
    ({"dialects": {"GLM5"}}, "; did you mean 'glm-5'?"),
    ({"dialects": {"paper", "xing4"}}, "; did you mean 'xing-4'?"),
    ({"dialects": "paper"}, "capabilities.dialects: expected a set of names, got 'paper'"),
    ({"dtypes": {"bf16"}}, "capabilities.dtypes: unknown dtype 'bf16', expected one of float64, float32, bfloat16"),
    ({"dtypes": {"bfloat"}}, "; did you mean 'bfloat16'?"),
    ({"dtypes": "float32"}, "capabilities.dtypes: expected a set of names, got 'float32'"),
    ({"dtypes": {"residual": {"float32"}}}, "capabilities.dtypes: unknown stage 'residual'"),
    ({"dtypes": {"pre": "float32"}}, "capabilities.dtypes['pre']: expected a set of names, got 'float32'"),
    ({"dtypes": {"pre": ["float23"]}}, "capabilities.dtypes['pre']: .*; did you mean 'float32'?"),
    ({"weights": ("X",)}, "capabilities.weights: unknown kind of weights 'X', .*; did you mean 'x'?"),
    ({"contracts": {"activations"}}, "unknown contract 'activations', .*; did you mean 'activation'?"),
    ({"overrides": {"iteration"}}, "unknown parameter 'iteration', .*; did you mean 'iterations'?"),
    ({"overrides": {"norm-eps": [1e-6]}}, "; did you mean 'norm_eps'?"),
    ({"outputs": {"pre_": ("u",)}}, "capabilities.outputs: unknown stage 'pre_'"),
    ({"outputs": {"pre": ("out",)}}, "unknown output of pre 'out', expected one of u, pre"),
]  # fmt: skip


@pytest.mark.parametrize("claim, said", SLIPS)
def test_a_slip_in_a_claim_is_told_when_the_implementation_is_set_up(claim, said):
    plain: dict[str, Any] = {"stages": {"pre"}, "dialects": {"paper"}}

    class Slipped:
        name = "slipped"
        capabilities = Capabilities(**plain | claim)

        def pre(self, inputs, config, cotangents):
            raise AssertionError("it is never called")

    with pytest.raises(SetupError) as told:
        wrap(Slipped(), "mine:Slipped")
    begin, _, end = said.partition(".*")
    text = str(told.value)
    assert text.startswith("mine:Slipped: capabilities.") and begin in text and end in text


@pytest.mark.parametrize("name", ["mine", "deepseek-v4.2", "paper2", "my-paper", "deepseek-v4-mine", "maxtext-v9"])
def test_a_row_of_ones_own_may_be_claimed_by_its_name(name):
    assert misnamed(Capabilities(frozenset({"pre"}), frozenset({"paper", name}))) == ""


def test_a_slip_ends_the_command_with_status_3_and_not_with_no_items():
    slipped = "tests.conformance.strangers:Slipped"
    done = CliRunner().invoke(app, ["run", "--impl", slipped, "--case", "smoke-paper-2", "--jobs", "1"])
    assert done.exit_code == 3 and done.stderr.count("\n") == 1
    assert "unknown dialect 'papers'" in done.stderr and "did you mean 'paper'?" in done.stderr
