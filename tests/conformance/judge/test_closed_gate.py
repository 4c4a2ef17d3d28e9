"""A sigmoid that loses a closed gate fails, and is told what it is."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

import torch

from conformance.cases.case import DTYPES
from conformance.cases.corpus import load_corpus
from conformance.implementations.wrapping import wrap
from conformance.judge.item import run_item
from conformance.selftest.mutants import MUTANTS, NoPreEps
from conformance.selftest.plain import Plain

ITEMS = [
    item
    for case in load_corpus()
    if case.family == "closed-gate" and case.dialect in ("paper", "maxtext", "deepseek-v4.1", "hunyuan-v4")
    for item in case.items()
    if not item.variant.secondary
]
HINT = "keeps no relative accuracy"


class ByTanh(Plain):
    """An identity in exact arithmetic, and off by up to 2^-25."""

    def sigmoid(self, z):
        return (1 + torch.tanh(z / 2)) / 2


def failed(implementation):
    return [(item, check) for item in ITEMS for check in run_item(wrap(implementation), item).failed]


def test_a_sigmoid_by_tanh_fails_and_the_message_says_it():
    found = [(item, check) for item, check in failed(ByTanh()) if not check.tensor.startswith("d/")]
    assert {item.variant.x for item, _ in found} == set(DTYPES)
    where = {("pre", "u"), ("head", "out"), ("layer", "out"), ("stack", "out")}
    assert {(item.stage, check.tensor) for item, check in found} == where
    found = [(item, check) for item, check in found if item.stage != "stack"]
    assert [(item.id, check.message) for item, check in found if HINT not in check.message] == []
    assert all(("2^-53" in check.message) == (item.variant.x == "float64") for item, check in found)


@pytest.mark.parametrize("title", ["pre_eps dropped", "post_eps dropped"])
def test_an_eps_that_is_missing_is_not_taken_for_it(title):
    (mutant,) = [mutant for mutant in MUTANTS if mutant.title() == title]
    found = failed(mutant())
    assert found and not any(HINT in check.message for _, check in found)


def test_what_passes_has_no_hint():
    assert failed(Plain()) == []
    assert not any(
        check.message for item in ITEMS for check in run_item(wrap(Plain()), item).checks if check.tensor == "u"
    )


def test_a_stack_has_no_hint_and_its_failure_is_judged():
    (case,) = (case for case in load_corpus() if case.id == "closed-gate-carried-18-deepseek-v4.1")
    failed = [run_item(wrap(NoPreEps()), item).failed for item in case.items() if item.variant.x == "float32"]
    assert failed and all(any(check.tensor == "out" and not check.message for check in checks) for checks in failed)
