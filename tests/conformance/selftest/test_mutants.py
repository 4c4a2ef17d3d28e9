"""A change of a few characters in either implementation is noticed in float32, bfloat16 and float16 alike."""

from __future__ import annotations

import importlib

import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations.wrapping import wrap
from conformance.judge.item import run_item
from tests.conformance.selftest.mutants import MISTAKES, PLAIN, SINGLE_PASS, planted

CASES = [c for c in load_corpus() if c.dialect == "deepseek-v4" and c.family not in ("shape", "branch", "stack")]
SITES = [c for c in load_corpus() if c.dialect == "deepseek-v4.1" and {"pre", "layer", "stack"} & set(c.stages)]


def kills(implementation, dtype, cases, enough=3):
    """Ids of cases that fail at twice the bound; stops at ``enough`` of them."""
    found = []
    for case in cases:
        for item in case.items():
            if item.variant.x == dtype and item.variant.contract != "tf32":
                outcome = run_item(wrap(implementation), item)
                if any(check.ratio > 2 for check in outcome.failed):
                    found.append(case.id)
                    break
        if len(found) >= enough:
            break
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [*MISTAKES, *SINGLE_PASS])
@pytest.mark.parametrize("framework", ["torch", PLAIN, "jax"])
def test_a_planted_mistake_is_killed_by_three_cases_in_every_dtype(framework, mistake):
    kind = framework.partition(",")[0]
    pytest.importorskip(kind, reason=f"{kind} is not installed")
    adapter = importlib.import_module(f"conformance.adapters.{kind}_adapter")
    with planted(framework, mistake):
        implementation = adapter.eager()
        cases = SITES if mistake in SINGLE_PASS else CASES
        found = {dtype: kills(implementation, dtype, cases) for dtype in ("float32", "bfloat16", "float16")}
    assert all(len(cases) >= 3 for cases in found.values()), found


@pytest.mark.parametrize("mistake", [*MISTAKES, *SINGLE_PASS])
@pytest.mark.parametrize("framework", ["torch", PLAIN, "jax"])
def test_every_mistake_can_be_planted_still(framework, mistake):
    """Without running it: the test above is slow, and a mistake whose place is gone would be found late."""
    pytest.importorskip(framework.partition(",")[0], reason=f"{framework} is not installed")
    with planted(framework, mistake):
        pass


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_originals_are_back_afterwards(framework):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    adapter = importlib.import_module(f"conformance.adapters.{framework}_adapter")
    with planted(framework, "19 iterations"):
        pass
    case = next(c for c in CASES if c.id == "slow-deepseek-v4")
    assert not run_item(wrap(adapter.eager()), case.items()[0]).failed
