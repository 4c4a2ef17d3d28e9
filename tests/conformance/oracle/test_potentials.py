"""Sinkhorn on dual potentials is honest: references of released code work so (TransformerEngine, aiter)."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from conformance.cases.corpus import load_corpus
from conformance.implementations.wrapping import wrap
from conformance.judge.item import run_item
from conformance.selftest.plain import Choice, Plain

ROWS = ("transformer-engine", "paper")
BEYOND = "overflow-"
"""Families whose logits are so large that potentials lose them: 1e4 has a unit in the last place of 1e-3."""


class Potentials(Plain):
    """``exp(L + f + g)`` with ``f = -lse(L + g)`` and ``g = -lse(L + f)``, plain, with autograd's gradient."""

    choice = Choice(potentials=True)

    def sinkhorn(self, logits, c):
        return self.iterate_potentials(self.limited(logits, c), c) if c.guard == "none" else super().sinkhorn(logits, c)


@pytest.mark.parametrize("row", ROWS)
def test_potentials_pass_every_case_but_those_whose_logits_they_lose(row):
    implementation, lost = Potentials("potentials"), set()
    for case in load_corpus():
        if case.dialect != row or "residual_matrix" not in case.stages:
            continue
        for item in case.items():
            if item.stage != "residual_matrix" or item.variant.x not in ("float32", "float64"):
                continue
            outcome = run_item(wrap(implementation), item)
            if outcome.failed:
                assert case.id.startswith(BEYOND), [(case.id, check) for check in outcome.failed]
                lost.add(case.id)
    assert any(case.startswith("overflow-9984") for case in lost)  # there the loss is real, and is reported
