"""Mistakes that the tests of the judge let pass once, planted again: each fails a test by now."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conformance.judge.planting import ROOT, Plant, as_json, replaced

RULE, STOCHASTICITY, ITEM = (f"conformance/judge/{name}.py" for name in ("rule", "stochasticity", "item"))


def dropped(reason: str) -> Plant:
    """A refusal that never refuses: the condition above the reason that it returns is never met."""
    lines = (ROOT / ITEM).read_text().splitlines(keepends=True)
    (number,) = (number for number, line in enumerate(lines) if line.lstrip().startswith("return") and reason in line)
    return Plant(ITEM, lines[number - 1], "", "".join([*lines[: number - 1], "    if False:\n", *lines[number:]]))


MISTAKES = {
    "nothing is changed": Plant(RULE, "", "", (ROOT / RULE).read_text()),
    "a stochasticity check that never fails": replaced(
        STOCHASTICITY, "TENSOR, verdict_of(ratio),", 'TENSOR, "passed",'
    ),
    "gradients allowed 100 times worse": replaced(
        RULE,
        "item.variant.contract, bound, magnitude",
        "item.variant.contract, bound * (100 if gradient else 1), magnitude",
    ),
    "the unit roundoff of bfloat16 at 2^-4": replaced(RULE, '["bfloat16"]: 2.0**-8', '["bfloat16"]: 2.0**-4'),
    "that of float32 gradients under float64 at 1": replaced(
        RULE,
        "    absolute = ABSOLUTE.get(dtype, 0.0)\n",
        "    absolute = ABSOLUTE.get(dtype, 0.0)\n    if narrower:\n        return SLACK * np.abs(expected)\n",
    ),
    "the marginal threshold at 0.9": replaced(RULE, "MARGINAL = 0.5", "MARGINAL = 0.9"),
    "stages are not refused": dropped("stage {item.stage} not claimed"),
    "dialects are not refused": dropped("dialect {case.dialect} not claimed"),
    "dtypes are not refused": dropped('"{variant.x} not claimed'),
    "weights are not refused": dropped("weights in"),
    "float32 is not refused for tf32": dropped("judged by the tf32 contract"),
    "contracts are not refused": dropped("contract {variant.contract} not claimed"),
    "numbers of streams are not refused": dropped("streams not claimed"),
    "zero tokens are not refused": dropped("zero tokens"),
    "other values of parameters are not refused": dropped("other values of"),
}


@pytest.fixture(scope="module")
def statuses():
    command = [sys.executable, "-m", "tests.conformance.judge.planting"]
    done = subprocess.run(command, input=as_json(list(MISTAKES.values())), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(zip(MISTAKES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("title", MISTAKES)
def test_a_test_fails(statuses, title):
    assert statuses[title] == (0 if title == "nothing is changed" else 1)
