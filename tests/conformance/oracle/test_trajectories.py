"""The recorded trajectories are what balls prove, and the evaluator's gradients are derivatives."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from conformance.cases.dialects import dialect_rows
from conformance.cases.trajectories import fixture
from conformance.cases.trajectories.model import OPTIMIZER, STREAMS, TRAJECTORIES, configuration, decays, shapes
from conformance.cli.app import app
from conformance.files.places import CaseError

pytest.importorskip("flint", reason="python-flint isn't installed: pip install 'mhc-conformance[regenerate]'")

from conformance.oracle.floats import Quick
from conformance.oracle.style import ensemble
from conformance.oracle.trajectories import making
from conformance.oracle.trajectories.data import batches, initial_weights
from conformance.oracle.trajectories.training import train
from conformance.oracle.trajectories.transformer import loss_and_gradients

SMALL_RADIUS = 2.0**-150
WITHOUT_SLOW_ONES = [
    "deepseek-v4.1",
    *(pytest.param(d, marks=pytest.mark.slow) for d in TRAJECTORIES if d != "deepseek-v4.1"),
]


def parameters(dialect: str) -> dict:
    return {**dialect_rows()[dialect], "streams": STREAMS}


@pytest.mark.parametrize("dialect", WITHOUT_SLOW_ONES)
def test_balls_that_are_carried_through_three_steps_hold_the_recorded_values(dialect):
    assert making.disagreements(dialect, fixture.load(dialect).expected, 3) == []


@pytest.mark.slow
@pytest.mark.parametrize("dialect", TRAJECTORIES)
def test_balls_that_are_carried_through_all_steps_hold_the_recorded_values(dialect):
    assert making.disagreements(dialect, fixture.load(dialect).expected, 30) == []


def test_a_recorded_value_that_is_one_bit_off_is_told():
    expected = {name: value.copy() for name, value in fixture.load("megatron").expected.items()}
    expected["gradient_norm/output"][0] = np.nextafter(expected["gradient_norm/output"][0], 9)
    (line,) = making.disagreements("megatron", expected, 1)
    assert line.startswith("megatron, step 1, gradient_norm/output")


def test_the_balls_of_a_step_are_small():
    for step in making.proved("deepseek-v4.1", 1):
        radii = [float(ball.rad()) for value in step.state.weights.values() for ball in value.reshape(-1)]
        assert max(radii) < SMALL_RADIUS


@pytest.mark.parametrize("dialect", WITHOUT_SLOW_ONES)
def test_float64_stays_near_the_recorded_trajectory(dialect):
    """Thirty steps of the same formulas in float64 NumPy, which has neither balls nor midpoints."""
    recorded = fixture.load(dialect)
    run = train(recorded.weights, recorded.tokens, recorded.told.steps, parameters(dialect), Quick())
    found = making.joined([making.values_of(step, k, np.asarray) for k, step in enumerate(run, 1)])
    assert set(found) == set(recorded.expected)
    for name, value in found.items():
        assert np.all(np.abs(value - recorded.expected[name]) <= recorded.bounds["float64"][name]), name


@pytest.mark.parametrize("dialect", WITHOUT_SLOW_ONES)
def test_gradients_are_slopes_of_the_loss(dialect):
    """Central differences of the loss along a drawn direction of each tensor."""
    p, A, draw = parameters(dialect), Quick(), np.random.default_rng(0)
    weights = {name: value.astype(np.float64) for name, value in initial_weights(p).items()}
    batch, width = batches()[0], 2.0**-12

    def loss(name, direction):
        moved = {**weights, name: weights[name] + direction}
        return float(loss_and_gradients(moved, batch[:, :-1], batch[:, 1:], p, A)[0])

    _, gradients = loss_and_gradients(weights, batch[:, :-1], batch[:, 1:], p, A)
    for name in sorted(weights)[:: 2 if dialect == "deepseek-v4.1" else 7]:
        direction = draw.standard_normal(weights[name].shape)
        slope = (loss(name, width * direction) - loss(name, -width * direction)) / (2 * width)
        size = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)
        assert abs(slope - np.sum(gradients[name] * direction)) <= 1e-4 * size + 1e-10, name


def test_the_files_hold_what_the_oracle_starts_from():
    for dialect in TRAJECTORIES:
        recorded, row = fixture.load(dialect), dialect_rows()[dialect]
        assert np.array_equal(recorded.tokens, batches())
        started = initial_weights(row)
        assert set(started) == set(recorded.weights) == set(shapes(row))
        assert all(np.array_equal(value, recorded.weights[name]) for name, value in started.items())
        assert recorded.config(7) == json.loads(json.dumps(configuration(dialect, row, 7)))


def test_which_weights_decay():
    names = shapes(dialect_rows()["deepseek-v4"])
    kept = {name.rpartition(".")[2] for name in names if not decays(name)}
    assert kept == {
        "attention_norm", "down_bias", "final_norm", "head_base", "head_scale", "mlp_norm", "post_alpha_scale",
        "post_beta", "pre_alpha_scale", "pre_beta", "res_alpha_scale", "res_beta", "up_bias",
    }  # fmt: skip
    assert all(value == np.float32(value) == np.float64(np.float16(value)) for value in OPTIMIZER.values())


def test_bounds_grow_with_the_steps_and_are_no_smaller_than_roundings():
    for dialect in TRAJECTORIES:
        recorded = fixture.load(dialect)
        assert recorded.told.K == making.K
        for name, bound in recorded.bounds["float32"].items():
            assert np.all(np.diff(np.atleast_1d(bound)) >= 0), name
            assert np.all(bound > 0) and np.all(recorded.bounds["float64"][name] > 0), name
            smallest = making.K * 2.0**-24 * np.max(np.abs(recorded.expected[name]))
            assert np.max(bound) >= smallest, name
        loss = recorded.bounds["float32"]["loss"]
        assert np.all(loss < 1e-4 * recorded.expected["loss"][0])
        float64 = making.bounds(recorded.expected, recorded.expected)
        assert all(np.array_equal(float64[f"bound/float64/{n}"], b) for n, b in recorded.bounds["float64"].items())


def test_one_honest_run_of_the_ensemble_is_within_the_bounds_by_their_factor():
    recorded = fixture.load("deepseek-v4")
    honest = making.honest_errors(recorded.expected, "deepseek-v4", ensemble()[5:6])
    for name, error in honest.items():
        assert np.all(error * making.K <= recorded.bounds["float32"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dialect", TRAJECTORIES)
def test_a_file_regenerates_byte_for_byte(dialect):
    assert making.complete(dialect) == (fixture.folder() / f"{dialect}.safetensors").read_bytes()


# The files


def test_the_files_are_those_of_the_manifest(tmp_path):
    assert fixture.verify() == []
    for path in fixture.folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "megatron.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "megatron.safetensors").write_bytes(content)
    (tmp_path / "another.safetensors").write_bytes(content)
    (tmp_path / "deepseek-v4.safetensors").unlink()
    told = fixture.verify(tmp_path)
    assert [line.partition(":")[0] for line in told] == [
        "another.safetensors", "deepseek-v4.safetensors", "megatron.safetensors"
    ]  # fmt: skip


def test_a_file_that_is_broken_is_refused_in_one_line(tmp_path):
    with pytest.raises(CaseError, match="no such file"):
        fixture.load("megatron", tmp_path)
    with pytest.raises(CaseError, match="expected a dialect with a trajectory"):
        fixture.load("paper")
    content = (fixture.folder() / "megatron.safetensors").read_bytes()
    for spoilt, message in (
        (content[:-8], "whole safetensors file"),
        (content.replace(b"trajectory/1", b"trajectory/9"), "expected format"),
        (content.replace(b'"expected/loss"', b'"expected/lost"'), "expected each tensor"),
        (content.replace(b'\\"steps\\"', b'\\"staps\\"'), "description of a trajectory"),
        (content.replace(b'\\"residual\\"', b'\\"residuel\\"'), "parameters of a dialect"),
    ):
        (tmp_path / "megatron.safetensors").write_bytes(spoilt)
        with pytest.raises(CaseError, match=message):
            fixture.load("megatron", tmp_path)
    outside = {"format": fixture.MANIFEST_FORMAT, "count": 1, "files": {"../x.safetensors": {"sha256": "", "bytes": 0}}}
    for text, message in (("{}", "list of trajectories"), ("[", "list"), (json.dumps(outside), "files in its folder")):
        (tmp_path / "MANIFEST.json").write_text(text)
        with pytest.raises(CaseError, match=message):
            fixture.verify(tmp_path)


def test_a_regeneration_tells_and_writes_what_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "processes", _Alone)
    monkeypatch.setattr(making, "complete", lambda dialect: dialect.encode())
    (tmp_path / "old.safetensors").write_bytes(b"old")
    told = making.regenerate(tmp_path, 1, check=True)
    assert [line.split()[0] for line in told] == ["added"] * 5 + ["removed"]
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    making.regenerate(tmp_path, 1)
    assert making.regenerate(tmp_path, 1) == []
    assert fixture.verify(tmp_path) == []
    (tmp_path / "megatron.safetensors").write_bytes(b"another")
    assert making.regenerate(tmp_path, 1, check=True) == ["changed  megatron.safetensors"]


@dataclasses.dataclass
class _Alone:
    jobs: int

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, arguments, chunksize):
        return [function(argument) for argument in arguments]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--dialect", "megatron"], 2, "--dialect goes with --prove"),
        (["--prove", "1", "--check"], 2, "give one of them"),
        (["--prove", "1", "--dialect", "megatron"], 0, "0 recorded values aren't what balls prove"),
    ],
)
def test_the_command_proves_or_makes(options, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        app(["fixtures", "trajectories", *options])
    printed = capsys.readouterr()
    assert ended.value.code == status and said in printed.out + printed.err


def test_the_command_fails_where_something_changed(monkeypatch, capsys):
    monkeypatch.setattr(making, "regenerate", lambda *given: ["changed  megatron.safetensors"])
    with pytest.raises(SystemExit) as ended:
        app(["fixtures", "trajectories", "--check"])
    assert ended.value.code == 1 and "1 files would change" in capsys.readouterr().out
