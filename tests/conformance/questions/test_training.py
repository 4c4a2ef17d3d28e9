"""What judges a training: an honest one passes, each planted mistake leaves the bound, what is unfit is told."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from conformance.cases.trajectories import fixture
from conformance.cases.trajectories.model import STEPS, TRAJECTORIES
from conformance.cli.app import app
from conformance.implementations.registry import load
from conformance.implementations.wrapping import wrap
from conformance.questions.training import MARKS, train
from conformance.selftest.training import LATEST, MUTANTS, AlphaFromOneRow, PlainTraining, dialects_of

ONE = "deepseek-v4.1"
HERE = "tests.conformance.questions.test_training"


def trained(maker, dialect=ONE, dtype="float64", steps=2):
    return train(wrap(maker()), fixture.load(dialect), dtype, steps)


@pytest.mark.parametrize("dtype", fixture.DTYPES)
def test_an_honest_training_passes(dtype):
    result = trained(PlainTraining, "maxtext-v1", dtype, STEPS)
    assert result.passed, (result.left, result.broken)
    assert all(0 <= result.worst(group, STEPS) < 0.6 for group in result.ratios)
    assert [len(ratios) for ratios in result.ratios.values()] == [STEPS] * 3
    recorded = [k for k, ratio in enumerate(result.ratios["weights"], 1) if not np.isnan(ratio)]
    assert recorded == list(fixture.load("maxtext-v1").told.kept)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mistake_leaves_the_bound_at_the_third_step_at_the_latest(mutant):
    """In float32, whose bounds are the wider ones, in one of its dialects."""
    left = trained(mutant, dialects_of(mutant)[-1], "float32", 3).left
    assert left is not None and left.ratio > 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", fixture.DTYPES)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mistake_leaves_the_bound_in_every_dialect(mutant, dtype):
    for dialect in dialects_of(mutant):
        left = trained(mutant, dialect, dtype, LATEST).left
        assert left is not None and left.step <= LATEST and left.ratio > 2, dialect


def test_an_error_beyond_every_multiple_of_its_bound_is_a_number_that_json_has():
    trajectory = fixture.load(ONE)
    bounds = {dtype: {name: 0 * bound for name, bound in of.items()} for dtype, of in trajectory.bounds.items()}
    result = train(wrap(PlainTraining()), dataclasses.replace(trajectory, bounds=bounds), "float32", 1)
    assert result.left is not None and result.left.ratio == sys.float_info.max
    json.dumps(result.as_dict(), allow_nan=False)


def test_honest_trainings_outside_of_the_ensemble_keep_a_distance_from_the_bound():
    pytest.importorskip("flint", reason="python-flint isn't installed: pip install 'mhc-conformance[regenerate]'")
    from conformance.selftest.training_honest import others, worst

    styles = others(24)
    assert len(set(styles)) == 24
    ratio, _ = worst("deepseek-v4", styles[:2])
    assert ratio < fixture.load("deepseek-v4").told.K / 2


class Spoilt(PlainTraining):
    """An honest training whose answer is changed by `spoil`"""

    def spoil(self, outputs, inputs, config):
        raise NotImplementedError("not today")

    def step(self, inputs, config, cotangents):
        assert cotangents is None
        outputs, gradients = super().step(inputs, config, cotangents)
        self.spoil(outputs, inputs, config)
        return outputs, gradients


def spoilt(change):
    return lambda: type("Changed", (Spoilt,), {"spoil": lambda self, *given: change(*given), "__doc__": "changed"})()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out, inputs, config: out.pop("loss"), "step 1: loss: expected an array [] of float64, got none"),
        (lambda out, inputs, config: out.update(loss=1.5), "got a float"),
        (lambda out, inputs, config: out.update(loss=np.ones(1)), "got [1] of float64"),
        (lambda out, inputs, config: out.update({"weight/output": out["weight/output"].astype("f4")}), "of float32"),
        (lambda out, inputs, config: out["first/output"].fill(np.nan), "expected finite numbers"),
        (lambda out, inputs, config: inputs["second/output"].fill(1.0), "changed the second/output"),
        (lambda out, inputs, config: inputs["tokens"].fill(0), "changed the tokens"),
        (lambda out, inputs, config: 1 / 0, "ZeroDivisionError"),
        (lambda out, inputs, config: out["loss"].fill(9) if config["step"] == 2 else None, ""),
    ],
)
def test_what_is_unfit_is_told(change, told):
    result = trained(spoilt(change))
    assert not result.passed
    assert told in result.broken if told else result.left and result.left.step == 2 and result.left.tensor == "loss"


def test_a_refusal_and_what_isnt_claimed_are_skipped():
    assert trained(Spoilt).skipped == "refused: NotImplementedError: not today"
    claims = PlainTraining().capabilities
    for changed, told in (
        ({"stages": frozenset({"reduce"})}, "stage step not claimed"),
        ({"dialects": frozenset({"paper"})}, f"dialect {ONE} not claimed"),
        ({"dtypes": {"reduce": ["float64"]}}, "float64 not claimed"),
    ):
        implementation = wrap(PlainTraining())
        implementation.capabilities = dataclasses.replace(claims, **changed)
        assert train(implementation, fixture.load(ONE), "float64", 1).skipped == told


class Remembers(PlainTraining):
    """A step adds to what all the steps before it were handed"""

    calls = 0

    def step(self, inputs, config, cotangents):
        outputs, gradients = super().step(inputs, config, cotangents)
        self.calls += 1
        if self.calls > config["step"]:
            outputs["loss"] = outputs["loss"] + 1e-3
        return outputs, gradients


def test_what_a_step_leaves_behind_is_found_by_asking_the_first_again():
    assert "a step left something" in trained(Remembers).broken


# The command


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        app(["train", *arguments])
    return ended.value.code


def test_the_command_shows_a_table_and_writes_the_figures(tmp_path, capsys):
    target = tmp_path / "figures.json"
    options = ["--dialect", ONE, "--dtype", "float64", "--steps", "4", "--json", str(target)]
    assert command("--impl", "conformance.selftest.training:PlainTraining", *options) == 0
    said = capsys.readouterr().out
    assert all(f"step {mark}" in said for mark in (1, 3, 4)) and "gradient norms" in said
    assert said.splitlines()[-1] == "1 training of 4 steps ran, 0 failed"
    (run,) = json.loads(target.read_text())["runs"]
    assert run["passed"] and run["dialect"] == ONE and run["left"] is None
    assert run["ratios"]["weights"] == [None] * 4 and len(run["ratios"]["losses"]) == 4


def test_the_command_fails_where_a_training_leaves_the_bound(capsys):
    options = ["--dialect", ONE, "--dtype", "float32", "--steps", "1"]
    assert command("--impl", "conformance.selftest.training:AlphaFromOneRow", *options) == 1
    assert (
        f"{AlphaFromOneRow.title()}, {ONE}, float32: leaves the bound at step 1: gradient_norm"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--impl", f"{HERE}:Spoilt", "--steps", "1"], 2),
        (["--dialect", "paper"], 2),
        (["--steps", "31"], 2),
        (["--impl", "no-such-name"], 3),
    ],
)
def test_the_command_ends_with_a_status_and_a_line(arguments, status, capsys):
    assert command(*arguments) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_a_program_trains_too():
    implementation = load(f"exec:{sys.executable} -m {HERE}", 60.0)
    result = train(implementation, fixture.load(ONE), "float32", 2)
    assert result.passed, (result.skipped, result.broken, result.left)


def test_the_steps_that_are_told_are_steps():
    assert max(MARKS) == STEPS and all(set(fixture.load(d).told.kept) <= set(MARKS) for d in TRAJECTORIES)


def _program() -> None:
    """A program of the protocol (docs/contract.md) that answers with `PlainTraining`."""
    from safetensors.numpy import load_file, save_file

    plain = PlainTraining()
    claims = {"stages": ["step"], "dialects": list(TRAJECTORIES), "dtypes": ["float32"], "gradients": False}
    for line in sys.stdin:
        request = json.loads(line)
        if "protocol" in request:
            print(json.dumps({"name": "plain", "protocol": request["protocol"], "capabilities": claims}), flush=True)
            continue
        inputs = {name.partition("/")[2]: value for name, value in load_file(request["input"]).items()}
        outputs, _ = plain.step(inputs, request["config"], None)
        header = {"format": "mhc-conformance-result/1", "id": request["id"]}
        save_file({f"output/{name}": np.asarray(v) for name, v in outputs.items()}, request["output"], header)
        print(json.dumps({"id": request["id"], "status": "done"}), flush=True)


if __name__ == "__main__":
    _program()
