"""One item from the call to its checks: what is handed over, what is judged, and what each misbehaviour comes to."""

from __future__ import annotations

import re

import numpy as np
import pytest

from conformance.cases.corpus import fixtures
from conformance.implementations.calling import RETURN
from conformance.judge.item import Outcome, order, run_item
from conformance.judge.rule import Check, check_item
from tests.conformance.judge.made import Answers, array, claims, made

GRADIENTS = {"x": [[[[1.0], [1.0]]]]}
RIGHT = {"out": array([[[3.0]]], "float32")}
WRONG = {"out": array([[[4.0]]], "float32")}
RIGHT_GRADIENTS = {"x": array(GRADIENTS["x"], "float32")}


def item(**changes):
    return made(**{"gradients": GRADIENTS, **changes})


def answers(outputs=None, gradients=None, **changes):
    return Answers(
        RIGHT if outputs is None else outputs, RIGHT_GRADIENTS if gradients is None else gradients, **changes
    )


def verdicts(outcome):
    return [(check.tensor, check.verdict) for check in outcome.checks]


# ------------------------------------------------------------------------------------------------- what is handed over


def test_an_implementation_is_handed_inputs_weights_configuration_and_cotangents():
    implementation = answers({"out": array([[[3.0]]], "bfloat16")}, {})
    weights = {"head_fn": [[1.0], [1.0]], "head_base": [0.5], "head_scale": [2.0]}
    chosen = made("head", weights=weights, variant="bfloat16-float32", options={"how": "sum"}, dialect="glm-5")
    run_item(implementation, chosen, probe=True)
    ((stage, inputs, config, cotangents),) = implementation.handed
    assert stage == "head" and list(inputs) == ["x", "head_fn", "head_base", "head_scale"]
    assert {k: str(v.dtype) for k, v in inputs.items()} == {
        "x": "bfloat16", "head_fn": "float32", "head_base": "float32", "head_scale": "float32",
    }  # fmt: skip
    assert (config["dialect"], config["how"], config["streams"]) == ("glm-5", "sum", 2)
    assert list(cotangents) == ["out"] and str(cotangents["out"].dtype) == "bfloat16"


def test_no_cotangents_where_gradients_are_not_claimed():
    implementation = answers(gradients={}, capabilities=claims(gradients=False))
    outcome = run_item(implementation, item())
    assert implementation.handed[0][3] is None and verdicts(outcome) == [("out", "passed")]


# ------------------------------------------------------------------------------------------------- the outcome


def test_what_an_outcome_says_of_its_item():
    implementation = answers(capabilities=claims(device="gpu", description="mine 1", settings={"threads": 3}))
    outcome = run_item(implementation, item(case="made-1", variant="float32-float32"))
    assert (outcome.implementation, outcome.case, outcome.stage) == ("answers", "made-1", "reduce")
    assert (outcome.variant, outcome.x, outcome.dialect) == ("float32-float32", "float32", "paper")
    assert outcome.about == {"device": "gpu", "description": "mine 1", "threads": 3}
    assert outcome.skipped == "" and 0 < outcome.seconds < 10
    assert verdicts(outcome) == [("out", "passed"), ("d/x", "passed")]
    assert outcome.failed == [] and outcome.ratio == 0


def test_the_file_is_told_of_a_case_that_is_not_of_the_corpus():
    assert run_item(answers(), item(path="/somewhere/made.safetensors")).file == "/somewhere/made.safetensors"
    assert run_item(answers(), item(path=str(fixtures() / "golden" / "made.safetensors"))).file == ""


def outcome(**changes):
    return Outcome("mine", "made", "reduce", "float32-float32", "float32", "paper", **changes)


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "mhc-conformance run --impl mine --case made --stage reduce --dtype float32"),
        (
            {"reference": "a b:C", "file": "my case"},
            "mhc-conformance run --impl 'a b:C' --case 'my case' --stage reduce --dtype float32",
        ),
    ],
)
def test_a_command_that_repeats_it(changes, command):
    assert outcome(**changes).reproduce == command


def test_what_is_not_said_of_an_outcome_is_empty():
    rest = {"checks": [], "skipped": "", "reference": "", "file": "", "about": {}, "seconds": 0.0, "values": {}}
    assert {name: getattr(outcome(), name) for name in rest} == rest
    assert outcome().checks is not outcome().checks


def test_what_failed_and_the_largest_ratio():
    checks = [
        Check("a", "passed", 0.25),
        Check("b", "marginal", 0.75),
        Check("c", "failed", 2.0),
        Check("d", "errored"),
    ]
    assert outcome(checks=checks).failed == checks[2:] and outcome(checks=checks).ratio == 2.0
    assert outcome().failed == [] and outcome().ratio == 0.0


# ------------------------------------------------------------------------------------------------- verdicts


def test_each_tensor_has_its_check_with_its_own_bound():
    chosen = item(bounds={"out": 2.0, "d/x": 0.25})
    gradient = {"x": array([[[[1.0], [1.5]]]], "float32")}
    found = run_item(answers(WRONG, gradient), chosen)
    assert [(c.tensor, c.verdict, c.ratio, c.bound) for c in found.checks] == [
        ("out", "passed", 0.5, 2.0),
        ("d/x", "failed", 2.0, 0.25),
    ]
    assert found.ratio == 2.0 and [c.tensor for c in found.failed] == ["d/x"]


def test_outputs_have_the_dtypes_of_their_roles_and_gradients_those_of_their_inputs():
    chosen = made("coefficients", inputs={"x": [[1.0]]}, outputs={"pre": [1.0]}, gradients={"x": [[1.0]]},
                  variant="bfloat16-float32")  # fmt: skip
    found = run_item(Answers({"pre": array([1.0], "float32")}, {"x": array([[1.0]], "bfloat16")}), chosen)
    assert verdicts(found) == [("pre", "passed"), ("d/x", "passed")]
    found = run_item(Answers({"pre": array([1.0], "bfloat16")}, {"x": array([[1.0]], "float32")}), chosen)
    assert [c.message for c in found.checks] == [
        "expected float32, got bfloat16",
        "expected bfloat16, got float32",
    ]


def test_a_gradient_has_the_allowance_of_its_parts_and_an_output_never():
    # in bfloat16 the number after 1 is 0.0078125 away; 0.0118 is allowed where the parts' magnitude is 1, else 0.0039
    numbers = {"inputs": {"x": [1.0]}, "outputs": {"out": [1.0]}, "gradients": {"x": [1.0]},
               "bounds": {"out": 0.0, "d/x": 0.0}, "variant": "bfloat16-float32"}  # fmt: skip
    off = array([1.0078125], "bfloat16")
    found = run_item(Answers({"out": off}, {"x": off}), made(**numbers, magnitudes={"x": [1.0], "out": [1.0]}))
    assert verdicts(found) == [("out", "failed"), ("d/x", "passed")]
    found = run_item(Answers({"out": off}, {"x": off}), made(**numbers))
    assert verdicts(found) == [("out", "failed"), ("d/x", "failed")]


def test_a_float32_gradient_under_a_float64_x_may_be_rounded():
    weights = {"head_fn": [[1.0], [1.0]], "head_base": [0.0], "head_scale": [1.0]}
    chosen = made("head", weights=weights, gradients={"head_base": [1.0]}, bounds={"d/head_base": 2.0**-24},
                  variant="float64-float32")  # fmt: skip
    for units, verdict in ((0, "passed"), (1, "marginal"), (2, "failed")):  # of 2^-23; 1.01 * 2^-24 is allowed
        gradients = {"head_base": array([1.0 + units * 2.0**-23], "float32")}
        (check,) = run_item(Answers({"out": array([[[3.0]]])}, gradients), chosen).checks[1:]
        assert check.verdict == verdict


def test_what_is_missing_has_the_wrong_shape():
    found = run_item(Answers({}, {"x": None}), item())
    assert verdicts(found) == [("out", "wrong-shape"), ("d/x", "wrong-shape")]
    assert [c.message for c in found.checks] == [
        "expected [1, 1, 1] under 'out' of the outputs, got nothing; these are empty",
        "expected [1, 1, 2, 1] under 'x' of the gradients, got nothing; these have x",
    ]


def test_more_than_is_asked_for_is_left_alone():
    outputs = {**RIGHT, "H": array([[-1.0]]), "other": 3}
    assert verdicts(run_item(answers(outputs, {**RIGHT_GRADIENTS, "y": 2}), item())) == [
        ("out", "passed"),
        ("d/x", "passed"),
    ]


def test_an_implementation_may_claim_some_outputs_of_a_stage_and_then_no_gradients():
    chosen = made(
        "coefficients", inputs={"x": [[1.0]]}, outputs={"pre": [1.0], "post": [2.0]}, gradients={"x": [[1.0]]}
    )
    given = Answers({"post": array([2.0], "float32")}, {}, claims(outputs={"coefficients": ("post",)}))
    assert verdicts(run_item(given, chosen)) == [("post", "passed")]
    given = Answers({"post": array([2.0], "float32")}, {}, claims(outputs={"reduce": ("out",)}))
    assert verdicts(run_item(given, chosen)) == [("pre", "wrong-shape"), ("post", "passed"), ("d/x", "wrong-shape")]
    nothing = Answers({}, {}, claims(outputs={"coefficients": ()}))
    assert run_item(nothing, chosen).checks == []


def test_H_is_checked_as_a_whole_besides():
    H = [[0.25, 0.75], [0.75, 0.25]]
    chosen = made("residual_matrix", inputs={"logits": H}, outputs={"H": H}, bounds={"H": 1.0})
    found = run_item(Answers({"H": array(H, "float32")}), chosen)
    assert verdicts(found) == [("H", "passed"), ("H stochastic", "passed")]
    found = run_item(Answers({"H": array([[0.25, 0.75], [0.75, 0.5]], "float32")}), chosen)
    assert verdicts(found) == [("H", "passed"), ("H stochastic", "failed")]
    assert verdicts(run_item(Answers({"H": [1]}), chosen)) == [("H", "wrong-dtype")]
    assert verdicts(run_item(Answers({}), chosen)) == [("H", "wrong-shape")]


def test_the_arrays_of_figures_are_kept():
    found = run_item(answers(), item())
    assert found.values.keys() == {"out", "d/x"}
    assert found.values["out"] is RIGHT["out"] and found.values["d/x"] is RIGHT_GRADIENTS["x"]
    found = run_item(answers(WRONG, {"x": array([1.0], "float32")}), item())
    assert list(found.values) == ["out"]  # the other has a shape that nothing can be compared with


# ------------------------------------------------------------------------------------------------- misbehaviour


@pytest.mark.parametrize(
    ("outputs", "gradients", "kinds"),
    [(None, {}, "NoneType and dict"), ({}, None, "dict and NoneType"), ([], [], "list and list")],
)
def test_outputs_and_gradients_must_be_mappings(outputs, gradients, kinds):
    found = run_item(Answers(outputs, gradients), item())
    message = f"TypeError: expected two mappings, outputs and gradients, got {kinds}{RETURN}"
    assert [(c.tensor, c.verdict, c.message) for c in found.checks] == [("-", "errored", message)]
    assert found.values == {} and found.seconds > 0


@pytest.mark.parametrize(
    ("result", "kind"),
    [((RIGHT,), "a tuple of 1"), ((RIGHT, {}, {}), "a tuple of 3"), ([RIGHT, {}], "a list"), (RIGHT, "a dict"),
     (None, "a NoneType")],
)  # fmt: skip
def test_there_must_be_two(monkeypatch, result, kind):
    implementation = answers()
    monkeypatch.setattr(implementation, "call", lambda *arguments: result)
    (check,) = run_item(implementation, item()).checks
    assert check.verdict == "errored"
    assert check.message == f"TypeError: expected (outputs, gradients), two mappings, got {kind}{RETURN}"


def raises(error):
    def meanwhile(inputs):
        raise error

    return answers(meanwhile=meanwhile)


def test_an_exception_is_a_verdict_and_is_cut_short():
    found = run_item(raises(RuntimeError("no such\n kernel")), item())
    (check,) = found.checks
    where = r"\(test_item\.py, line \d+, in meanwhile\)"
    assert (check.tensor, check.verdict, check.ratio) == ("-", "errored", float("inf"))
    assert re.fullmatch(f"RuntimeError: no such kernel {where}", check.message)
    assert check.trace[-1].endswith("in meanwhile: raise error")
    assert found.skipped == "" and found.seconds > 0
    long = run_item(raises(RuntimeError("x" * 1000)), item()).checks[0].message
    assert re.fullmatch(f"RuntimeError: x{{486}} {where}", long)


def test_what_no_handler_catches_has_the_users_line_too():
    (check,) = run_item(raises(SystemExit(3)), item()).checks
    assert re.fullmatch(r"SystemExit: 3 \(test_item\.py, line \d+, in meanwhile\)", check.message)
    assert check.trace[-1].endswith("in meanwhile: raise error")


def test_names_of_files_in_a_trace_are_one_line():
    code = compile("def call(*_):\n    raise ValueError", "strange\n\x1b[2J.py", "exec")
    names = {}
    exec(code, names)
    (check,) = run_item(answers(meanwhile=names["call"]), item()).checks
    assert all(line.isprintable() for line in (check.message, *check.trace)) and "strange" in check.message


def test_a_refusal_is_a_skip():
    found = run_item(raises(NotImplementedError("n of 2")), item())
    assert (found.skipped, found.checks, found.values) == ("refused: NotImplementedError: n of 2", [], {})
    assert found.seconds > 0


def test_a_changed_input_fails():
    def changes(inputs):
        inputs["x"][...] = 7.0

    found = run_item(answers(meanwhile=changes), item())
    assert found.checks[2:] == [Check("x", "failed", float("inf"), message="changed its input x")]
    assert verdicts(found)[:2] == [("out", "passed"), ("d/x", "passed")]


def test_every_input_that_was_changed_is_told():
    def changes(inputs):
        inputs["x"][...], inputs["head_base"][...] = 7.0, 7.0

    weights = {"head_fn": [[1.0], [1.0]], "head_base": [0.0], "head_scale": [1.0]}
    found = run_item(answers(meanwhile=changes), made("head", weights=weights))
    assert [check.message for check in found.failed] == ["changed its input x", "changed its input head_base"]


def test_the_mapping_of_inputs_is_its_own():
    def changes(inputs):
        inputs["other"] = inputs.pop("x")

    assert run_item(answers(meanwhile=changes), item()).failed == []


# ------------------------------------------------------------------------------------------------- what isn't claimed

UNCLAIMED = claims(streams=frozenset({4}))


def test_what_is_not_claimed_is_not_called():
    implementation = answers(WRONG, capabilities=UNCLAIMED)
    found = run_item(implementation, item())
    assert (found.skipped, found.checks, implementation.handed) == ("2 streams not claimed", [], [])
    assert found.about["device"] == "cpu" and found.seconds == 0


def test_probed_and_right():
    found = run_item(answers(capabilities=UNCLAIMED), item(), probe=True)
    assert (found.skipped, found.checks, found.values) == ("2 streams not claimed, yet right", [], {})
    assert found.seconds > 0


@pytest.mark.parametrize("error", [NotImplementedError("n of 2"), ValueError("n of 2")])
def test_probed_and_refused(error):
    implementation = raises(error)
    implementation.capabilities = UNCLAIMED
    found = run_item(implementation, item(), probe=True)
    assert (found.skipped, found.checks) == ("2 streams not claimed, and refused", [])


def test_probed_accepted_and_wrong():
    found = run_item(answers(WRONG, {}, capabilities=UNCLAIMED), item(), probe=True)
    assert found.skipped == "" and found.values == {}
    assert [(c.tensor, c.verdict, c.ratio) for c in found.checks] == [
        ("out", "unsupported-not-refused", 4.0),
        ("d/x", "unsupported-not-refused", 0.0),
    ]
    assert [c.message for c in found.checks] == [
        "2 streams not claimed, yet accepted: failed",
        "2 streams not claimed, yet accepted: wrong-shape expected [1, 1, 2, 1] under 'x' of the gradients, got "
        "nothing; these are empty",
    ]


def test_what_passes_of_it_is_not_told():
    found = run_item(answers(WRONG, capabilities=UNCLAIMED), item(), probe=True)
    assert verdicts(found) == [("out", "unsupported-not-refused")]


@pytest.mark.parametrize("lacks", ["stages", "contracts"])
def test_nothing_is_probed_where_there_is_no_such_stage_or_precision(lacks):
    implementation = answers(capabilities=claims(**{lacks: frozenset()}))
    found = run_item(implementation, item(), probe=True)
    assert implementation.handed == [] and found.skipped.endswith("not claimed")


def test_what_is_claimed_is_judged_as_ever_under_a_probe():
    assert verdicts(run_item(answers(WRONG), item(), probe=True)) == [("out", "failed"), ("d/x", "passed")]


# ------------------------------------------------------------------------------------------------- the order of a run


def test_items_that_one_compiled_graph_serves_come_together():
    mixed = [
        item(case="b", parameters={"streams": 4}),
        item(case="a", stage="head"),
        item(case="d", variant="float16-float32"),
        item(case="c"),
        item(case="a", parameters={"streams": 4}),
        item(case="a"),
        item(case="e", parameters={"eps": 1.0}),  # which reduce doesn't depend on
        item(case="b", options={"how": "mean"}),
    ]
    found = [(i.stage, i.config["streams"], i.config.get("how"), i.variant.x, i.case.id) for i in order(mixed)]
    assert found == [
        ("head", 2, None, "float32", "a"),
        ("reduce", 2, "mean", "float32", "b"),
        ("reduce", 2, None, "float16", "d"),
        ("reduce", 2, None, "float32", "a"),
        ("reduce", 2, None, "float32", "c"),
        ("reduce", 2, None, "float32", "e"),
        ("reduce", 4, None, "float32", "a"),
        ("reduce", 4, None, "float32", "b"),
    ]


def test_a_check_without_an_implementation():
    (check,) = check_item(made(), RIGHT, {}, claims())
    assert (check.tensor, check.verdict, check.message) == ("out", "passed", "")
    assert check_item(made(outputs={"out": np.zeros((0, 1, 1))}), {"out": np.zeros((0, 1, 1), np.float32)}, {},
                      claims()) == [Check("out", "passed", bound=0.25)]  # fmt: skip
