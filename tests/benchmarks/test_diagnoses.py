"""The planted mistakes whose diagnoses are printed are there, five of each kind."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the mutants are in PyTorch, which is not installed")

from benchmarks import diagnoses
from conformance.selftest.mutants import MUTANTS
from conformance.selftest.mutants_where import WHERE


def test_five_mistakes_of_each_kind_are_planted():
    kinds = [{mutant.__name__ for mutant in mutants} for mutants in (MUTANTS, WHERE)]
    assert [len(kind & set(diagnoses.PLANTED)) for kind in kinds] == [5, 5]
    assert len(set(diagnoses.PLANTED)) == 10
