"""Runs on a mesh: how it is written, what is filled up, and that no process leaves the others waiting."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conformance import mesh
from conformance.cli.app import app
from conformance.implementations import group
from conformance.implementations.registry import load, missing_modules
from conformance.interface import SetupError

STRANGERS = "tests.conformance.implementations.mesh_strangers"
PAPER = {"dim": 4, "streams": 2, "dialect": "paper"}


def children() -> set[int]:
    """Processes that this one has started and that are still there."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def _nothing_left():
    before = children()
    yield
    assert not {
        pid for pid in children() - before if b"implementations.member" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


def call(implementation: Any) -> Any:
    return implementation.call("pre", {"x": np.ones((2, 2, 2, 4), np.float32)}, PAPER, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data", "data must be a whole number of 1 to 1024, got ''"),
        ("data=0", "data must be a whole number of 1 to 1024, got '0'"),
        ("data=2,data=2", "'data' is given twice"),
        ("model=2", "'model' isn't one of data, fsdp, sequence, tensor"),
        ("", "'' isn't one of"),
        ("data=2/x", "the number of processes must be a whole number of 1 to 1024, got 'x'"),
        ("data=3/2", "3 devices can't be shared out evenly to 2 processes"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, said):
    with pytest.raises(SetupError, match=re.escape(said)):
        mesh.parse_mesh(text)
    result = CliRunner().invoke(
        app, ["run", "--impl", f"{STRANGERS}:Stranger", "--mesh", text, "--case", "smoke-paper-2"]
    )
    assert result.exit_code == 2 and said in result.output.replace("\n", " ")


def test_a_mesh_is_written_as_it_is_read():
    for text in ("data=2", "data=2,tensor=2", "fsdp=2,sequence=3/6", "data=1"):
        assert str(mesh.parse_mesh(text)) == text
    assert str(mesh.parse_mesh("tensor=2,data=2", 2)) == "data=2,tensor=2/2"


def test_tokens_are_filled_up_and_cut_off_again():
    inputs = {"x": np.arange(3 * 5 * 2 * 4, dtype=np.float32).reshape(3, 5, 2, 4), "pre_beta": np.ones(2)}
    cotangents = {"u": np.ones((3, 5, 4))}
    shape = mesh.parse_mesh("data=2,fsdp=2,sequence=3")
    given, wanted = mesh.filled("pre", inputs, cotangents, shape)
    assert given["x"].shape == (4, 6, 2, 4) and wanted is not None and wanted["u"].shape == (4, 6, 4)
    assert (given["x"][3, :5] == inputs["x"][2]).all() and not wanted["u"][3].any() and not wanted["u"][:, 5].any()
    outputs, gradients = mesh.cropped(({"u": wanted["u"]}, dict(given)), "pre", inputs)
    assert (outputs["u"] == cotangents["u"]).all() and (gradients["x"] == inputs["x"]).all()
    assert gradients["pre_beta"] is given["pre_beta"]
    empty, _ = mesh.filled("pre", {"x": np.ones((1, 0, 2, 4))}, None, shape)
    assert empty["x"].shape == (4, 0, 2, 4)


def test_a_dim_that_the_mesh_does_not_divide_is_refused_by_name():
    implementation = load(f"{STRANGERS}:Stranger@tensor=2,fsdp=3/2")
    with pytest.raises(NotImplementedError, match="dim 4 isn't a multiple of tensor=2 x fsdp=3"):
        call(implementation)


@pytest.mark.parametrize(
    ("kind", "said", "seconds"),
    [
        ("Dies", "process 1 of 2 died of SIGKILL in pre; the others were ended", 5),
        ("Exits", "process 1 of 2 ended with status 7: out of memory on device 1 in pre; the others were ended", 5),
        ("FailsAlone", "process 1 of 2: ValueError: a shape that only this process has", 6),
        ("Hangs", "no answer in pre from process 1 of 2 in 3 s", 8),
        ("Quits", "process 1 of 2: SystemExit: 3", 6),
        ("RefusesAlone", "process 1 of 2 refuses, others don't: not on this device", 6),
    ],
)
def test_a_process_that_is_lost_ends_the_call_and_the_next_one_starts_anew(kind, said, seconds):
    implementation = load(f"{STRANGERS}:{kind}@data=2", limit=3.0)
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(group.GroupError, match=re.escape(said)):
            call(implementation)
        assert time.monotonic() - started < seconds + 5  # and starting again


def test_processes_that_fail_alike_go_on():
    implementation = load(f"{STRANGERS}:FailsTogether@data=2")
    before = children()
    with pytest.raises(group.CallError, match="all 2 processes: ValueError: the same everywhere"):
        call(implementation)
    assert children() == before
    with pytest.raises(NotImplementedError, match="not on a mesh"):
        call(load(f"{STRANGERS}:Refuses@data=2"))


def test_a_process_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(group, "START", 2.0)
    with pytest.raises(SetupError, match="no answer while the processes met from process 1 of 2 in 2 s"):
        load(f"{STRANGERS}:NeverComes@data=2", limit=1.0)


def test_what_cannot_run_on_a_mesh_says_so():
    with pytest.raises(SetupError, match="or a name registered to run on a mesh"):
        load("nobody@data=2")
    for arguments, said in (
        (["--processes", "2"], "--processes goes with --mesh"),
        (["--mesh", "data=2", "--impl", "exec:true"], "--mesh doesn't go with exec:COMMAND"),
    ):
        result = CliRunner().invoke(app, ["run", *arguments, "--case", "smoke-paper-2"])
        assert result.exit_code == 2 and said in result.output.replace("\n", " "), result.output


FRAMEWORKS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing_modules(name)), reason=f"{name} isn't installed"))
    for name in ("jax", "torch")
]


@pytest.mark.parametrize(("meshes", "processes"), [
    (("tensor=2", "data=2"), "2"),
    pytest.param(("fsdp=2,tensor=2",), "4", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_golden_cases_pass_on_two_and_four_processes(name, meshes, processes):
    arguments = ["run", "--impl", name, *(f"--mesh={mesh}" for mesh in meshes), "--processes", processes]
    cases = ["--case", "smoke-maxtext-2", "--case", "generic-n4-deepseek-v4", "--dtype", "float32", "--no-progress"]
    result = CliRunner().invoke(app, [*arguments, *cases, "--stage", "layer", "--stage", "head"])
    assert result.exit_code == 0 and ", 0 failed" in result.output, result.output


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_killed_process_of_a_framework_ends_the_others_within_a_minute(name):
    """Killed while calls go on, at any point of them: the call ends with a message, the next one works."""
    implementation = load(f"{name}@tensor=2/2", limit=60.0)
    config = {**_deepseek(), "streams": 2, "dim": 4}
    weights = {
        "pre_alpha": (8, 2), "post_alpha": (8, 2), "res_alpha": (8, 4), "pre_beta": (2,), "post_beta": (2,),
        "res_beta": (2, 2), "pre_alpha_scale": (1,), "post_alpha_scale": (1,), "res_alpha_scale": (1,),
    }  # fmt: skip
    inputs = {k: np.ones(v, np.float32) for k, v in {**weights, "x": (2, 2, 2, 4)}.items()}
    first = implementation.call("pre", inputs, config, None)[0]["u"]
    assert isinstance(implementation, group.GroupImplementation)
    victim = implementation._processes[1].pid
    timer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
    timer.start()
    started = time.monotonic()
    said = r"process 1 of 2 died of SIGKILL.* in pre; the others were ended|process 0 of 2: \w+Error: .*"
    with pytest.raises(group.GroupError, match=said):
        while time.monotonic() - started < 60:
            implementation.call("pre", inputs, config, None)
    assert time.monotonic() - started < 60
    assert (implementation.call("pre", inputs, config, None)[0]["u"] == first).all()


def _deepseek() -> dict[str, Any]:
    import json

    rows = json.loads((Path(__file__).parents[3] / "fixtures" / "dialects.json").read_text())["dialects"]
    return {k: v["value"] for k, v in rows["deepseek-v4"]["parameters"].items()} | {"dialect": "deepseek-v4"}
