"""The suite is tested too: planted mistakes are killed, honest variants are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

from conformance.files import document
from conformance.selftest import measure, table
from conformance.selftest.measure import Figures, Findings
from conformance.selftest.mutants import MUTANTS, Mutant
from conformance.selftest.plain import Choice
from conformance.selftest.sums import ORDERS, Sums, to_tf32

NUMBERS = {mutant.title(): number for number, mutant in enumerate(MUTANTS)}


@pytest.mark.parametrize("title", NUMBERS)
def test_a_mutant_is_killed_by_three_cases_in_every_dtype(title):
    findings = Findings(True, {NUMBERS[title]: measure.measure_mutant(NUMBERS[title], True)})
    assert findings.survivors == []


def test_every_mutant_that_is_defined_is_in_the_list():
    families = ("coefficients", "matrix", "mixing")
    modules = {f"conformance.selftest.mutants_{family}" for family in families}
    defined = {m for m in Mutant.__subclasses__() if m.__module__ in modules}
    assert len(MUTANTS) == len(set(MUTANTS)) and set(MUTANTS) == defined


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    return str(tmp_path_factory.mktemp("truths"))


@pytest.mark.parametrize("seed", range(6))
def test_an_honest_variant_fails_no_case_and_no_size(seed, truths):
    figures = measure.measure_honest(seed, quick=True, folder=truths)
    assert Findings(True, honest={seed: figures}).false_alarms == []


def test_honest_variants_differ_and_use_every_order():
    from conformance.selftest.honest import choice

    drawn = [choice(seed) for seed in range(measure.VARIANTS)]
    assert len(set(drawn)) > measure.VARIANTS * 0.9
    assert {c.sums.order for c in drawn} == set(ORDERS)
    for name in ("log_domain", "reciprocal", "norm_after", "fused", "exp2", "round_weights", "round_logits", "tf32"):
        assert {getattr(c, name) for c in drawn} == {False, True}, name


def test_what_is_not_mutated_survives_and_a_wrong_claim_of_blindness_is_found(monkeypatch):
    class Nothing(Mutant):
        """Nothing at all."""

    class Visible(MUTANTS[0]):  # type: ignore[misc, valid-type]
        """Visible."""

        blind = {"float32": "it isn't"}  # noqa: RUF012

    monkeypatch.setattr(measure, "MUTANTS", (Nothing, Visible))
    chosen = [item for item in measure.items_of_mutants(True) if item.case.family == "slow"]
    monkeypatch.setattr(measure, "items_of_mutants", lambda quick: chosen)
    lines = Findings(True, {k: measure.measure_mutant(k, True) for k in (0, 1)}).survivors
    assert [line.split(",")[0] for line in lines[:3]] == [
        f"Nothing at all: killed by 0 cases in {dtype}" for dtype in measure.DTYPES
    ]
    assert "invisible in float32, yet its bits differ" in lines[3]


def test_an_honest_variant_that_fails_is_a_false_alarm():
    findings = Findings(True, honest={7: Figures(5, {"smoke-paper-2"}, 1.5, "smoke-paper-2, reduce")})
    assert findings.false_alarms == ["honest variant 7 fails 1 cases, worst 1.5 of the bound (smoke-paper-2, reduce)"]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_summation_gives_the_same_sum(order):
    import torch

    a, b = torch.arange(1.0, 40.0).reshape(3, 13), torch.arange(1.0, 27.0).reshape(13, 2)
    sums = Sums(order, 4, 3)
    torch.testing.assert_close(sums.total(a, -1), a.sum(-1, keepdim=True))
    torch.testing.assert_close(sums.contract(a, b), a @ b)


def test_tf32_keeps_ten_bits_and_rounds_ties_to_even():
    import torch

    value = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-12])
    assert to_tf32(value).tolist() == [1.0, 1 + 2.0**-9, 1.0]
    assert Choice(tf32=True).tf32


def test_the_table_is_put_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- selftest: begin -->\nold\n<!-- selftest: end -->\nafter\n")
    findings = Findings(True, {0: {d: Figures(9, {"a"}, 7.0, "a, b") for d in measure.DTYPES}})
    document.rewrite(page, "selftest", table.markdown(findings))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| Iterations - 1 | 1 · 7 · a, b |" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="expected the lines"):
        document.rewrite(page, "selftest", "x")


def test_the_page_has_the_table_of_every_mutant():
    page = Path(__file__).parents[3] / "docs/mutants.md"
    _, part, _ = document.split(page, "selftest")
    found = [line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| ")]
    assert found == ["mutant", *NUMBERS]


def test_the_command_says_which_mutants_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "conformance.cli", "selftest", "--mutant", "nonsense"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no mutant's name has 'nonsense'" in done.stderr and "H transposed" in done.stderr
