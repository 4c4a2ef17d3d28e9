"""The golden cases as pytest items: ``pytest --pyargs conformance.test_golden --mhc-impl mine:Mine -k bfloat16``.

``--mhc-impl``, ``MHC_CONFORMANCE_IMPL`` or the setting ``mhc_impl`` name the implementations; without them ours run,
eagerly, as far as their frameworks are installed. `conformance.plugin` has the option and refuses what can't be loaded.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations.asked import asked, loaded
from conformance.judge.item import order, run_item
from conformance.judge.modes_plan import Plan

ITEMS = order(item for case in load_corpus() for item in case.items())
PLAN = Plan(ITEMS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("item", ITEMS, ids=lambda item: item.id)
    metafunc.parametrize("name", asked(metafunc.config))


def test_golden(item: Any, name: str) -> None:
    outcome = run_item(loaded(name), item, plan=PLAN)
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    for difference in outcome.differences:
        warnings.warn(f"{item.id}: {difference}", stacklevel=1)
    lines = [
        f"{c.tensor}{f' ({c.mode})' if c.mode else ''}: {c.verdict}, {c.ratio:.3g} x {c.bound:.3g} {c.message} "
        f"{c.worst[:1]}"
        for c in outcome.failed
    ]
    assert not lines, "\n".join([item.id, *lines, outcome.reproduce])
