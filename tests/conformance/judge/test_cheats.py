"""Cheats are told: answers that were stored or read, work that is ours, arrays and files that were written into."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations.borrowed import borrowed
from conformance.implementations.wrapping import wrap
from conformance.judge.guard import BORROWED
from conformance.judge.item import run_item
from conformance.judge.modes_plan import Plan
from conformance.judge.run import run
from tests.conformance.judge import cheats

CHEATS = "tests.conformance.judge.cheats"
REDUCE = [
    item
    for case in load_corpus()
    if case.dialect in ("paper", "glm-5") and case.family in ("smoke", "generic", "head")
    for item in case.items()
    if item.stage == "reduce" and item.variant.name == "float32-float32"
]


def outcomes(name):
    return list(run([f"{CHEATS}:{name}"], REDUCE, jobs=1))


def failures(found):
    return [(check.verdict, check.message) for outcome in found for check in outcome.failed]


def test_an_honest_implementation_took_and_changed_nothing():
    found = outcomes("Honest")
    assert len(found) == len(REDUCE) > 3 and failures(found) == []
    assert not any(BORROWED in outcome.about or outcome.altered for outcome in found)


@pytest.mark.parametrize("cheat", ["ReadsCases", "ReadsFiles", "ReadsBytes"])
def test_golden_files_that_are_read_in_a_call_are_told(cheat):
    found = outcomes(cheat)
    assert all(outcome.failed for outcome in found)
    for verdict, message in failures(found):
        assert verdict == "failed" and message.startswith("opened ") and message.endswith("have the expected values")
    assert "-glm-5-2.safetensors" in str(failures(found))


def test_golden_files_that_are_read_at_the_start_are_told_once():
    ((verdict, message),) = failures(outcomes("ReadsAtTheStart"))
    assert verdict == "failed" and message.count("smoke-") == 3 and "and 11 more" in message


@pytest.mark.parametrize("cheat", ["FallsBack", "FallsBackUnderAnotherName"])
def test_the_modules_of_ours_that_were_imported_are_told(cheat):
    pytest.importorskip("torch", reason="torch_impl needs it")
    found = outcomes(cheat)
    assert failures(found) == [] and {tuple(outcome.about[BORROWED]) for outcome in found} == {("torch_impl",)}


def test_what_a_process_of_a_mesh_has_imported_is_told():
    pytest.importorskip("torch", reason="torch_impl needs it")
    (outcome,) = run([f"{CHEATS}:falls_back_on_a_mesh@data=2"], REDUCE[:1], jobs=1)
    assert outcome.failed == [] and outcome.about[BORROWED] == ["torch_impl"]


@pytest.mark.parametrize(
    ("adapter", "modules", "expected"),
    [
        ("mine", {"numpy": np}, []),
        ("mine", {"jax_impl": np, "torch_impl.config": np}, ["jax_impl", "torch_impl"]),
        ("conformance.adapters.torch_adapter", {"torch_impl": np}, []),
        ("conformance.adapters.jax_mesh", {"torch_impl": np, "jax_impl": None}, ["torch_impl"]),
        ("conformance.adapters.fla_adapter", {"torch_impl": np}, ["torch_impl"]),
        ("mine", {"torch_implementation": np, "mine.torch_impl": np}, []),
    ],
)
def test_an_adapter_is_there_for_its_own_implementation_alone(adapter, modules, expected):
    assert borrowed(adapter, modules) == expected


def test_a_cotangent_that_is_written_into_is_told():
    assert ("failed", "changed its cotangent of out") in failures(outcomes("WritesCotangents"))


def test_an_input_that_is_written_into_after_the_call_is_told():
    first, *rest = outcomes("WritesLater")
    assert first.failed == [] and all(
        [check.message for check in outcome.failed] == ["changed the input x of the call before, after it had returned"]
        for outcome in rest
    )


def test_answers_stored_by_shape_fail_in_cases_of_one_shape():
    stored = wrap(cheats.ByShape())
    found = [run_item(stored, item) for item in REDUCE]
    assert found[0].failed == [] and sum(bool(outcome.failed) for outcome in found) >= 2


@pytest.mark.parametrize("cheat", [cheats.ByShape, cheats.ByHeart])
def test_answers_that_are_stored_fail_when_an_item_is_called_with_other_values(cheat):
    stored, plan = wrap(cheat()), Plan(REDUCE)
    found = [run_item(stored, item, plan=plan) for item in REDUCE]
    assert any("other values" in check.mode for outcome in found for check in outcome.failed)


@pytest.mark.parametrize("cheat", [cheats.ByPointer, cheats.ByChecksum])
def test_answers_that_are_kept_by_address_or_by_the_first_numbers_fail_when_an_array_has_others(cheat):
    for item in REDUCE:
        found = run_item(wrap(cheat()), item, plan=Plan([item]))
        if found.values["out"].size > 16:
            assert ("out", "same arrays") in {(check.tensor, check.mode) for check in found.failed}
        assert not any("changed" in check.message for check in found.failed)


def test_answers_that_are_known_by_heart_pass_a_plain_run():
    stored = wrap(cheats.ByHeart())
    assert not any(run_item(stored, item).failed for item in REDUCE)
