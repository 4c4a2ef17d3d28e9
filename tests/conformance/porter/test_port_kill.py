"""After kill -9 at a random moment the target is the old one or the new one, and the source is untouched.

The ports run in a process of their own (`drive`), which has imported everything and ported once when it says so. Where
that process has no threads of JAX's or torch's, it forks for each port and kills the child; else it is killed itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from conformance.porter.port import Options, port
from tests.conformance.porter.small_checkpoint import INDEX, build, parts, state
from tests.conformance.porter.test_port_targets import equal, values

SIZES = {"layers": 2, "dim": 512}  # 0.8 MB in few sites, so that much of the time is writing
SHARD_BYTES = 10_000  # a shard for each large tensor
KILLS, ORBAX_KILLS = 40, 12
BEYOND = 1.2  # of the time that a whole port takes
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


def drive() -> None:
    """Ports as told by lines of JSON on standard input, and answers each with a line."""
    move(json.loads(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        start = time.perf_counter()
        if not task["fork"]:
            move(task)
            print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
            continue
        child = os.fork()
        if child == 0:
            try:
                move(task)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        if task["kill_after"] is not None:
            time.sleep(task["kill_after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer = {"seconds": time.perf_counter() - start, "killed": os.WIFSIGNALED(status), "status": status}
        print(json.dumps(answer), flush=True)


def move(task: dict[str, Any]) -> None:
    target, into = (Path(task[k]) if task.get(k) else None for k in ("target", "into"))
    options = Options(to=task["to"], into=into, overwrite=True, allow_approximate=True, shard_bytes=SHARD_BYTES)
    port(Path(task["source"]), target, options)


class Driver:
    """A process that ports."""

    def __init__(self, warm_up: dict[str, Any]):
        command = [sys.executable, "-m", "tests.conformance.porter.test_port_kill", json.dumps(warm_up)]
        few = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **few})  # fmt: skip

    def ready(self) -> Driver:
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"
        return self

    def tell(self, task: dict[str, Any], fork: bool, kill_after: float | None = None) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({**task, "fork": fork, "kill_after": kill_after}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self, task: dict[str, Any], fork: bool, kill_after: float | None = None) -> dict[str, Any]:
        self.tell(task, fork, kill_after)
        return self.answer()

    def kill(self) -> bool:
        """Whether it was in time: before the answer."""
        assert self.process.stdout
        self.process.kill()
        self.process.wait()
        return not self.process.stdout.read()


@pytest.fixture
def drivers():
    """Makes drivers, and ends them."""
    made: list[Driver] = []

    def make(warm_up):
        made.append(Driver(warm_up))
        return made[-1]

    yield make
    for driver in made:
        driver.process.kill()
        driver.process.wait()
        for stream in (driver.process.stdin, driver.process.stdout):
            if stream:
                stream.close()


class Counts:
    """Counts of the states that the kills left."""

    def __init__(self):
        self.kills = self.in_time = self.old = self.new = self.unfinished = 0

    def enough(self, kills: int) -> Iterator[int]:
        """So many, and more of them while none has hit the writing."""
        while self.kills < kills or (not self.unfinished and self.kills < 8 * kills):
            yield self.kills

    def take(self, in_time: bool, old: bool, unfinished: bool) -> None:
        self.kills += 1
        self.in_time += in_time
        self.old, self.new = self.old + old, self.new + (not old)
        self.unfinished += unfinished
        assert in_time or not old, "the port ended before the kill, and the target is the former one"

    def check(self, label: str, duration: float) -> None:
        print(
            f"{label}: {self.kills} kills within {BEYOND} x {duration * 1e3:.1f} ms, {self.in_time} before the end, "
            f"{self.unfinished} left a hidden path; {self.old} targets as before, {self.new} complete new ones"
        )
        assert self.in_time >= self.kills / 4, "most kills came too late to show anything"
        assert self.unfinished, "no kill hit while it was writing"


def content(path: Path) -> Any:
    """The content, without the order of the metadata's keys, which differs from one writing to the next."""
    if path.is_dir():
        return {p.name: content(p) for p in path.iterdir()}
    if path.suffix == ".json":
        return json.loads(path.read_text())
    header, data = parts(path)
    return header, hashlib.sha256(data).hexdigest()


def bits(path: Path) -> dict[str, str] | str:
    return state(path) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def hidden(folder: Path, known: set[str]) -> set[str]:
    """Other paths in the folder, which are hidden so that nothing takes them for a part of the checkpoint."""
    others = {p.name for p in folder.iterdir()} - known
    assert all(name.startswith(".") and not name.endswith((".safetensors", ".json", ".pt")) for name in others), others
    return others


@pytest.fixture
def sources(tmp_path):
    return [build(tmp_path / f"source-{k}", seed=k, **SIZES) for k in (0, 1)]


@pytest.mark.parametrize("name, layout", [("a.safetensors", "canonical"), ("shards", "transformers")])
def test_an_overwritten_target_is_the_old_one_or_the_new_one(tmp_path, sources, drivers, name, layout):
    folder, chance, counts = tmp_path / "folder", random.Random(f"{name} 1"), Counts()
    folder.mkdir()
    tasks = [{"source": str(s), "target": str(folder / name), "to": layout} for s in sources]
    driver = drivers({**tasks[0], "target": str(tmp_path / name)}).ready()
    complete, durations = [], []
    for task in (*tasks, *tasks):
        answer = driver.ask(task, fork=True)
        assert answer["status"] == 0
        durations.append(answer["seconds"])
        complete.append(content(folder / name))
    assert complete[0] == complete[2] != complete[1] == complete[3]
    duration, before, there = statistics.median(durations), [state(s) for s in sources], 1
    left = hidden(folder, {name})
    for _ in counts.enough(KILLS):
        former, wanted = bits(folder / name), 1 - there
        answer = driver.ask(tasks[wanted], fork=True, kill_after=chance.uniform(0, BEYOND * duration))
        old = bits(folder / name) == former
        assert old or content(folder / name) == complete[wanted]
        there = there if old else wanted
        left_over = hidden(folder, {name})
        counts.take(answer["killed"], old, left_over > left)
        left = left_over
        assert [state(s) for s in sources] == before
    assert driver.ask(tasks[1 - there], fork=True)["status"] == 0  # among all that the killed ones left
    assert content(folder / name) == complete[1 - there]
    counts.check(f"overwriting {name}", duration)


def raw(directory: Path) -> dict[str, np.ndarray]:
    """The mHC tensors as a reader finds them that loads every shard of the index, one after the other."""
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    tensors, names = {}, set()
    for shard in sorted(set(weight_map.values())):
        with safe_open(directory / shard, "numpy") as file:
            names |= set(file.keys())
            tensors |= {key: file.get_tensor(key) for key in file.keys() if "hc_" in key}  # noqa: SIM118
    assert names == set(weight_map)
    return tensors


def test_a_checkpoint_that_takes_tensors_loads_at_every_moment(tmp_path, sources, drivers):
    source, pristine, into = sources[0], sources[1], tmp_path / "into"
    chance, counts = random.Random("into 1"), Counts()
    task = {"source": str(source), "into": str(into), "to": "deepseek"}
    driver = drivers({"source": str(source), "target": str(tmp_path / "warm"), "to": "deepseek"}).ready()
    before, files = [state(s) for s in sources], state(pristine)
    durations = []
    for _ in range(3):
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(pristine, into)
        durations.append(driver.ask(task, fork=True)["seconds"])
    duration, (new_shard,) = statistics.median(durations), {p.name for p in into.iterdir()} - set(files)
    new, new_values, old_values = raw(into), values(source), values(pristine)
    new_index = json.loads((into / INDEX).read_text())
    assert equal(values(into), new_values) and not equal(new_values, old_values)
    for _ in counts.enough(KILLS):
        shutil.rmtree(into)
        shutil.copytree(pristine, into)
        answer = driver.ask(task, fork=True, kill_after=chance.uniform(0, BEYOND * duration))
        there = state(into)
        assert all(there[name] == was for name, was in files.items() if name != INDEX)
        old = there[INDEX] == files[INDEX]
        assert old or (json.loads((into / INDEX).read_text()) == new_index and new_shard in there)
        assert equal(values(into), old_values if old else new_values)
        assert equal(raw(into), raw(pristine) if old else new)
        hidden(into, {*files, new_shard})
        counts.take(answer["killed"], old, there.keys() != files.keys() and old)
        assert [state(s) for s in sources] == before
        if old:  # what is left is not in the way
            assert driver.ask(task, fork=True)["status"] == 0 and equal(values(into), new_values)
    counts.check("--into", duration)


def test_a_model_of_one_file_that_takes_tensors_is_the_old_one_or_the_new_one(tmp_path, sources, drivers):
    """Its directory changes places with another one that has links to the same files."""
    source, pristine, folder = sources[0], tmp_path / "pristine", tmp_path / "folder"
    folder.mkdir()
    port(sources[1], pristine, Options(to="deepseek", allow_approximate=True))
    (pristine / "model-00001-of-00001.safetensors").rename(pristine / "model.safetensors")
    (pristine / INDEX).unlink()
    chance, counts, into = random.Random("one 1"), Counts(), folder / "into"
    task = {"source": str(source), "into": str(into), "to": "deepseek"}
    driver = drivers({"source": str(source), "target": str(tmp_path / "warm"), "to": "deepseek"}).ready()
    durations = []
    for _ in range(3):
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(pristine, into)
        durations.append(driver.ask(task, fork=True)["seconds"])
    duration, complete, held = statistics.median(durations), content(into), content(pristine)
    new_values, old_values = values(source), values(pristine)
    assert equal(values(into), new_values) and not equal(new_values, old_values)
    left = hidden(folder, {"into"})
    for _ in counts.enough(KILLS):
        shutil.rmtree(into)
        shutil.copytree(pristine, into)
        answer = driver.ask(task, fork=True, kill_after=chance.uniform(0, BEYOND * duration))
        old = content(into) == held
        assert old or content(into) == complete
        assert equal(values(into), old_values if old else new_values)
        left_over = hidden(folder, {"into"})
        counts.take(answer["killed"], old, left_over > left)
        left = left_over
    counts.check("--into a model of one file", duration)


def test_an_orbax_tree_is_the_old_one_or_the_new_one(tmp_path, sources, drivers):
    pytest.importorskip("orbax.checkpoint")
    folder, chance, counts = tmp_path / "folder", random.Random("orbax 1"), Counts()
    folder.mkdir()
    tree = folder / "tree"
    tasks = [{"source": str(s), "target": str(tree), "to": "maxtext"} for s in sources]
    warm_up = {**tasks[0], "target": str(tmp_path / "warm")}
    first, durations, complete = drivers(warm_up).ready(), [], []
    for task in (*tasks, *tasks):
        durations.append(first.ask(task, fork=False)["seconds"])
        complete.append(values(tree))
    assert equal(complete[0], complete[2]) and equal(complete[1], complete[3]) and not equal(*complete[:2])
    duration, before, there = statistics.median(durations), [state(s) for s in sources], 1
    first.kill()
    left = hidden(folder, {"tree"})
    for _ in counts.enough(ORBAX_KILLS):
        # imports take nearly all of the time: two at once, each with a place of its own to warm up
        pair = [drivers({**warm_up, "target": str(tmp_path / f"warm-{k}")}) for k in range(2)]
        for driver in [d.ready() for d in pair]:
            former, wanted = bits(tree), 1 - there
            driver.tell(tasks[wanted], fork=False)
            time.sleep(chance.uniform(0, BEYOND * duration))
            in_time = driver.kill()
            old = bits(tree) == former
            assert old or equal(values(tree), complete[wanted])
            there = there if old else wanted
            left_over = hidden(folder, {"tree"})
            counts.take(in_time, old, left_over > left)
            left = left_over
            assert [state(s) for s in sources] == before
    port(sources[1 - there], tree, Options(to="maxtext", overwrite=True, allow_approximate=True))
    assert equal(values(tree), complete[1 - there])
    counts.check("overwriting an Orbax tree", duration)


if __name__ == "__main__":
    drive()
