"""Mistakes that the tests of the judge let pass once, planted again: each fails a test by now."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conformance.judge.planting import ROOT, Plant, as_json, replaced

RULE, STOCHASTICITY, ITEM = (f"conformance/judge/{name}.py" for name in ("rule", "stochasticity", "item"))


def dropped(condition: str) -> Plant:
    """A refusal that never refuses."""
    return replaced(ITEM, f"    if {condition}:\n        return", "    if False:\n        return")


MISTAKES = {
    "nothing is changed": Plant(RULE, "", "", (ROOT / RULE).read_text()),
    "a stochasticity check that never fails": replaced(
        STOCHASTICITY, "TENSOR, verdict_of(ratio),", 'TENSOR, "passed",'
    ),
    "gradients allowed 100 times worse": replaced(
        RULE, 'bound = item.bounds[tensor]["bound"]', 'bound = item.bounds[tensor]["bound"] * (100 if gradient else 1)'
    ),
    "the unit roundoff of bfloat16 at 2^-4": replaced(RULE, '["bfloat16"]: 2.0**-8', '["bfloat16"]: 2.0**-4'),
    "that of float32 gradients under float64 at 1": replaced(
        RULE,
        "    absolute = ABSOLUTE.get(dtype, 0.0)\n",
        "    absolute = ABSOLUTE.get(dtype, 0.0)\n    if narrower:\n        return SLACK * np.abs(expected)\n",
    ),
    "the marginal threshold at 0.9": replaced(RULE, "MARGINAL = 0.5", "MARGINAL = 0.9"),
    "stages are not refused": dropped("item.stage not in claimed.stages"),
    "dialects are not refused": dropped(
        "case.dialect not in claimed.dialects and not (case.unpublished and claimed.overrides is None)"
    ),
    "dtypes are not refused": dropped("variant.x not in claimed.dtypes_of(item.stage)"),
    "weights are not refused": dropped(
        'case.stages[item.stage]["weights"] and kind not in claimed.weights_of(item.stage)'
    ),
    "float32 is not refused for tf32": dropped(
        '"tf32" in claimed.contracts and variant.name + "-tf32" in case.bounds[item.stage]'
    ),
    "contracts are not refused": dropped("variant.contract not in claimed.contracts"),
    "numbers of streams are not refused": dropped(
        'claimed.streams is not None and case.parameters["streams"] not in claimed.streams'
    ),
    "zero tokens are not refused": dropped(
        'not claimed.empty and not all(case.tensors[f"input/{k}"].size for k in case.stages[item.stage]["inputs"])'
    ),
    "other values of parameters are not refused": dropped("unclaimed"),
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
