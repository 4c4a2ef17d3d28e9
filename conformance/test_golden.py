"""The golden cases as pytest items: ``pytest --pyargs conformance.test_golden -k 'generic and bfloat16'``.

``MHC_CONFORMANCE_IMPL`` names the implementations, separated by commas; without it ours, eagerly, as far as their
frameworks are installed.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

from conformance.cases.corpus import load_corpus
from conformance.implementations.registry import load, missing_modules
from conformance.interface import Implementation
from conformance.judge.item import order, refusal, run_item


def _names() -> list[str]:
    given = os.environ.get("MHC_CONFORMANCE_IMPL", "")
    return [n for n in given.split(",") if n] or [n for n in ("jax", "torch") if not missing_modules(n)]


@functools.cache
def _implementation(name: str) -> Implementation:
    return load(name)


ITEMS = order(item for case in load_corpus() for item in case.items())


@pytest.mark.parametrize("name", _names())
@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_golden(item: Any, name: str) -> None:
    implementation = _implementation(name)
    reason = refusal(item, implementation.capabilities)
    if reason:
        pytest.skip(reason)
    outcome = run_item(implementation, item)
    lines = [
        f"{c.tensor}: {c.verdict}, {c.ratio:.3g} x {c.bound:.3g} {c.message} {c.worst[:1]}" for c in outcome.failed
    ]
    assert not lines, "\n".join([item.id, *lines, outcome.reproduce])
