"""Implementations against one another, and what a broken case does to a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.cases.case import CaseError
from conformance.cases.corpus import load_corpus
from conformance.implementations.wrapping import wrap
from conformance.judge.agreement import Agreement
from conformance.judge.item import run_item
from conformance.judge.run import run
from tests.conformance import strangers

ITEM = next(
    item
    for case in load_corpus()
    for item in case.items()
    if case.id == "generic-n4-paper-2" and item.stage == "reduce" and item.variant.name == "float32-float32"
)


def crossed(*strangers):
    found = Agreement([ITEM])
    for stranger in strangers:
        found.add(run_item(wrap(stranger()), ITEM))
    return found


def test_equal_results_are_no_distance_apart():
    assert crossed(strangers.Honest, strangers.Honest).pairs[frozenset({"honest"})].ratio == 0


def test_a_difference_is_measured_on_the_arrays_and_told():
    found = crossed(strangers.Honest, strangers.SlightlyOff)
    assert found.pairs[frozenset({"honest", "slightly-off"})].ratio > 1
    (line,) = found.lines(["slightly-off", "honest"])
    assert line.startswith("slightly-off against honest: at most") and "generic-n4-paper-2, reduce" in line


def test_the_order_in_which_results_come_does_not_split_a_pair():
    other = replace(ITEM, variant=replace(ITEM.variant, name="float32-float32-again"))
    found = Agreement([ITEM, other])
    found.add(run_item(wrap(strangers.Honest()), ITEM))
    found.add(run_item(wrap(strangers.SlightlyOff()), ITEM))
    outcomes = [run_item(wrap(stranger()), ITEM) for stranger in (strangers.SlightlyOff, strangers.Honest)]
    for outcome in outcomes:
        outcome.variant = other.variant.name
    ITEM.case.bounds["reduce"].setdefault(other.variant.name, ITEM.bounds)
    for outcome in outcomes:
        found.add(outcome)
    (pair,) = found.pairs.values()
    assert pair.tensors == 4


def test_what_has_no_figure_is_not_compared():
    assert crossed(strangers.Honest, strangers.Raises).pairs == {}


def test_a_result_that_is_no_mapping_is_errored():
    (check,) = run_item(wrap(strangers.ReturnsNothing()), ITEM).failed
    assert check.verdict == "errored" and "got NoneType and NoneType" in check.message


def test_a_case_that_breaks_under_the_run_is_one_line(tmp_path):
    path = tmp_path / "case.safetensors"
    path.write_bytes(b"nothing")
    broken = replace(ITEM, case=replace(ITEM.case, path=path))
    with pytest.raises(CaseError, match="whole safetensors file"):
        list(run(["tests.conformance.strangers:Honest"], [broken]))
