"""Both training examples learn, on curves that lie on one another, on one device and on several."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conformance.cases.dialects import dialect_names
from tests.examples.scripts import run, script

STEPS = 4
TINY = ("--batch", 8, "--length", 8, "--dim", 16)
TOLERANCE = 5e-6
"""Of a loss, in nats. The frameworks differ by 1e-6 here; PyTorch alone, with a site that mixes by the transpose, by
3e-3, without weight decay by 2e-5, and with the other GELU by 8e-6 in the first step and 2e-5 later."""
UNKNOWING = np.log(96)  # the loss of one who takes each of 96 characters to be as likely


def losses(path: Path) -> np.ndarray:
    return np.array(json.loads(path.read_text())["losses"])


def apart(first: Path, second: Path) -> float:
    return float(np.abs(losses(first) - losses(second)).max())


def lively(path: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> Path:
    """A weights file whose sites are far from their initial values, where all dialects are nearly the same function."""
    run(script("train_torch"), monkeypatch, "--steps", 0, *TINY, *options, "--save", path)
    random = np.random.default_rng(0)
    with safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, value in tensors.items():
        if name.endswith("_scale"):
            tensors[name] = 100 * value
        elif name.endswith(("_beta", "_base")):
            tensors[name] = random.standard_normal(value.shape).astype(value.dtype)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the default dialect."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return lively(tmp_path_factory.mktemp("start") / "start.safetensors", monkeypatch)


def test_both_frameworks_learn_on_one_curve(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("train_jax", "train_torch"):
        files = ("--losses", tmp_path / f"{name}.json", "--save", tmp_path / f"{name}.safetensors")
        run(script(name), monkeypatch, "--steps", STEPS, *TINY, "--weights", start, *files)
    curve = losses(tmp_path / "train_jax.json")
    assert len(curve) == STEPS and abs(curve[0] - UNKNOWING) < 1 and curve[-1] < curve[0] - 0.2, curve
    assert apart(tmp_path / "train_jax.json", tmp_path / "train_torch.json") <= TOLERANCE
    _check_files_exchange(start, tmp_path, monkeypatch)


def _check_files_exchange(start: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """PyTorch reads what JAX wrote after training, and writes the same again; nothing is left beside the files."""
    written, again = folder / "train_jax.safetensors", folder / "again.safetensors"
    run(script("train_torch"), monkeypatch, "--steps", 0, *TINY, "--weights", written, "--save", again)
    old, first, second = load_file(start), load_file(written), load_file(again)
    assert old.keys() == first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert all((first[name] != old[name]).any() for name in old), "not trained"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_eight_devices_give_the_curve_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    single_pass = ("--dialect", "deepseek-v4.1")  # what a site carries to the next one is laid out too
    options = ("--steps", STEPS, *TINY, *single_pass)
    start = lively(tmp_path / "start.safetensors", monkeypatch, *single_pass)
    run(script("train_torch"), monkeypatch, *options, "--weights", start, "--losses", tmp_path / "one.json")
    files = ("--losses", tmp_path / "eight.json", "--save", tmp_path / "eight.safetensors")
    mesh = ("--shard", "data=2,fsdp=2,tensor=2")
    run(script("train_jax"), monkeypatch, *options, "--weights", start, *mesh, *files)
    assert "one of 8 devices holds 0.42 of the weights" in capfd.readouterr().out
    assert apart(tmp_path / "one.json", tmp_path / "eight.json") <= TOLERANCE
    assert load_file(tmp_path / "eight.safetensors").keys() == load_file(start).keys()


@pytest.mark.parametrize("dialect", dialect_names())
def test_every_dialect_trains(dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = ("--losses", tmp_path / "losses.json")
    run(script("train_torch"), monkeypatch, "--steps", 3, *TINY, "--dialect", dialect, *files)
    curve = losses(tmp_path / "losses.json")
    assert curve[-1] < curve[0] - 0.1, curve


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_torch = script("train_torch")
    options = ("--steps", STEPS, *TINY, "--weights", start)
    run(in_torch, monkeypatch, *options, "--losses", tmp_path / "one.json", "--save", tmp_path / "one.safetensors")
    files = ("--losses", tmp_path / "two.json", "--save", tmp_path / "two.safetensors")
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launched, in_torch.__file__, *options, *files, "--shard", "fsdp=2"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step   0") == 1, done.stdout  # one of the processes speaks
    assert "one of 2 processes holds 0.50 of the weights" in done.stdout
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    assert apart(tmp_path / "one.json", tmp_path / "two.json") <= TOLERANCE
    assert load_file(tmp_path / "two.safetensors").keys() == load_file(start).keys()


def test_the_batches_are_the_same_on_every_machine():
    task = script("task")
    characters = np.arange(1000, dtype=np.int32)
    drawn = task.batch(characters, 3, 4, 2)
    assert drawn.tolist() == [[253, 254, 255], [501, 502, 503], [149, 150, 151], [154, 155, 156]]
    assert (task.batch(characters, 4, 4, 2) != drawn).any()
    assert all(task.batch(characters[:5], step, 8, 4)[:, -1].max() == 4 for step in range(3))  # to the text's end


def test_the_text_is_one_of_characters_that_the_model_knows():
    task = script("task")
    text = task.text()
    assert len(text) > 300_000 and len(task.VOCABULARY) == 96
    assert sum(character not in task.VOCABULARY for character in text) < 2e-3 * len(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dim", 18), "--dim must be a multiple of 4 and at least 1, got 18"),
        (("--steps", -1), "--steps must be a multiple of 1 and at least 0, got -1"),
        (("--shard", "model=2"), "expected AXIS=N with an axis of data, fsdp, got 'model=2'"),
        (("--shard", "fsdp=2"), "--shard and torchrun go together"),
        (("--dialect", "papers"), "papers"),
        ((*TINY, "--length", 7, "--weights", "START"), "positions.weight must be [7, 16], got [8, 16]"),
        ((*TINY, "--dialect", "paper", "--weights", "START"), "holds weights of another dialect than config's"),
        ((*TINY, "--weights", "absent.safetensors"), "absent.safetensors: can't be read as safetensors"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: tuple[object, ...], said: str, start: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    module = script("train_torch")
    chosen = [start if argument == "START" else argument for argument in arguments]
    with pytest.raises((SystemExit, ValueError)) as raised:
        run(module, monkeypatch, "--steps", 1, *chosen)
    assert said in capfd.readouterr().err + str(raised.value)
    assert not isinstance(raised.value, SystemExit) or raised.value.code == 2


def test_an_error_of_a_library_ends_with_its_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    path = str(script("train_jax").__file__)
    monkeypatch.setattr(sys, "argv", [path, "--shard", "fsdp=3"])
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(path, run_name="__main__")
    said = capfd.readouterr().err
    assert raised.value.code == 2
    assert re.match(r"train_jax.py: the mesh .*fsdp=3.* needs 3 devices, there are 8[^\n]*\n$", said), said
