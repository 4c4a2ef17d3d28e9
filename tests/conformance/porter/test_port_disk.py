"""A full disk gives one line and leaves nothing half written, and the former target still loads."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.cli.test_cli import call as call_process
from tests.conformance.faults.disks import small_disk
from tests.conformance.porter.small_checkpoint import build, call, check_refusal, state
from tests.conformance.porter.test_port_targets import equal, values

KIB = 1024
DISK = 256 * KIB
DIM = 64  # a site is 25 KB
TARGETS = {"a.safetensors": "canonical", "shards": "transformers", "a.pt": "transformers", "tree": "maxtext",
           "into": "deepseek"}  # fmt: skip
NEEDS = {"a.pt": "torch", "tree": "orbax"}


@pytest.fixture(params=TARGETS)
def target(request):
    package = NEEDS.get(request.param)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    return request.param


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 KiB."""
    with small_disk(tmp_path / "disk", DISK) as path:
        yield path


def arguments(source: Path, target: Path) -> list[str]:
    where = ["--into", str(target)] if target.name == "into" else [str(target)]
    return ["port", str(source), *where, "--to", TARGETS[target.name], "--allow-approximate"]


def said(reason: str, target: str) -> tuple[str, ...]:
    """torch and Orbax have reasons of their own."""
    return () if target in NEEDS else (reason,)


def former(folder: Path, target: str, elsewhere: Path) -> Path:
    """A small checkpoint at the target's place."""
    if target == "into":
        return build(folder / target, layers=1, dim=DIM)
    done = call(*arguments(build(elsewhere, layers=1, dim=DIM), folder / target))
    assert done.exit_code == 0, done.stderr
    return folder / target


def fill(disk: Path, left: int) -> None:
    """Leaves so many bytes free."""
    with (disk / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "into"], indirect=True)
def test_a_full_disk_leaves_nothing_of_a_new_target(tmp_path, disk, target):
    source = build(tmp_path / "source", layers=8, dim=DIM)
    before = state(tmp_path)
    done = call_process(*arguments(source, disk / target))
    check_refusal(done.returncode, done.stderr, (str(disk / target), *said("No space left", target)))
    assert state(tmp_path) == before


def test_a_full_disk_leaves_what_was_there(tmp_path, disk, target):
    place = former(disk, target, tmp_path / "former")
    source = build(tmp_path / "source", layers=8, dim=DIM, seed=1)
    before, held = state(tmp_path), values(place)
    done = call_process(*arguments(source, place), "--overwrite")
    check_refusal(done.returncode, done.stderr, (str(place), *said("No space left", target)))
    assert state(tmp_path) == before
    assert equal(values(place), held)


@pytest.mark.parametrize("target", ["a.safetensors", "shards", "into"])
@pytest.mark.parametrize("left", [0, 4, 8, 40, 60, 64, 68])
def test_wherever_the_disk_ends(tmp_path, disk, target, left):
    """A full disk shows at another step for each size: the first byte, the data, the index after the shard."""
    place = former(disk, target, tmp_path / "former")
    source = build(tmp_path / "source", layers=1, dim=DIM, seed=1)
    fill(disk, left * KIB)
    before, held = state(tmp_path), values(place)
    done = call(*arguments(source, place), "--overwrite")
    if done.exit_code == 0:
        assert left > 48, "57 KB found room"
        assert not any(p.name.startswith(".") for p in disk.rglob("*"))
        assert equal(values(place, TARGETS[target]), values(source))
        return
    check_refusal(done.exit_code, done.stderr, (str(place), "No space left"))
    assert state(tmp_path) == before
    assert equal(values(place), held)


LIMITED = """
import resource, signal, sys
from conformance.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40960, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
main()
"""


def test_a_file_that_may_not_grow_is_not_left_half(tmp_path, target):
    """A quota has this effect, and the test needs no root."""
    pytest.importorskip("resource")
    place = former(tmp_path, target, tmp_path / "former")
    source = build(tmp_path / "source", layers=4, dim=DIM, seed=1)
    before, held = state(tmp_path), values(place)
    command = [sys.executable, "-c", LIMITED, *arguments(source, place), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    check_refusal(done.returncode, done.stderr, (str(place), *said("File too large", target)))
    assert state(tmp_path) == before
    assert equal(values(place), held)
