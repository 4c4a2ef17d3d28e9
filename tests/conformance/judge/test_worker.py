"""A worker's own side of the talk with the runner, in this process: what it says, reads, calls and tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from conformance.cases.case import CaseError
from conformance.interface import SetupError
from conformance.judge import worker
from conformance.judge.modes_plan import Plan
from conformance.judge.worker import Begin
from tests.conformance.judge.made import Answers, claims, made
from tests.conformance.judge.test_scheduling import ITEMS, KEYS

IMPLEMENTATION = Answers(capabilities=claims(stages=frozenset({"reduce"})), name="mine")
"""It claims the stage reduce alone."""


class Connection:
    """The worker's end: it receives what is given here, and keeps what is sent."""

    def __init__(self, *messages):
        self.messages, self.sent = list(messages), []

    def recv(self):
        return self.messages.pop(0)

    def send(self, message):
        self.sent.append(message)


@pytest.fixture
def work(monkeypatch):
    """Runs the worker's function in this process, on an implementation that is called "mine"."""
    seen = SimpleNamespace(loaded=[], read=[], run=[], told=[], garbage=[])
    for name in ("begin", "collect"):
        monkeypatch.setattr(worker.garbage, name, lambda k=name: seen.garbage.append((k, len(seen.run))))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def load(reference, limit):
        seen.loaded.append((reference, limit))
        if reference == "absent":
            raise SetupError("no such implementation")
        return IMPLEMENTATION

    def read(path):
        seen.read.append(str(path))
        if path.stem == "broken":
            raise CaseError("no such case")
        return SimpleNamespace(items=lambda: [made("head"), made(variant="float64-float64"), *ITEMS])

    def run_item(implementation, item, probe, plan):
        seen.run.append((implementation.name, item.case.id, item.stage, item.variant.name, probe, plan))
        return SimpleNamespace(name="outcome", whole=0.0)

    def tell(outcome, path):
        seen.told.append((outcome.name, path))

    monkeypatch.setattr(worker, "Guard", lambda: SimpleNamespace(load=load, read=read, tell=tell))
    monkeypatch.setattr(worker, "run_item", run_item)

    def run(*messages):
        connection = Connection(*messages)
        worker.work(connection)  # type: ignore[arg-type]
        assert connection.messages == []
        return connection.sent, seen

    return run


def test_a_worker_runs_what_it_is_handed_until_it_is_handed_none(work):
    plan = Plan(ITEMS)
    sent, seen = work(
        Begin("ref", 3.0, True, plan), KEYS["c"], KEYS["c"], ("other.safetensors", "head", "float32-float32"), None
    )
    assert sent[0] == ("ready", "mine") and [kind for kind, _ in sent[1:]] == ["done"] * 3
    assert all(outcome.name == "outcome" and outcome.whole > 0 for _, outcome in sent[1:])
    assert seen.loaded == [("ref", 3.0)]
    assert seen.read == ["c.safetensors", "other.safetensors"]  # each case once
    item = ("mine", "c", "reduce", "float32-float32", True, plan)
    assert seen.run == [item, item, ("mine", "made", "head", "float32-float32", True, plan)]
    assert seen.told == [("outcome", "c.safetensors")] * 2 + [("outcome", "other.safetensors")]
    assert seen.garbage == [("begin", 0)]
    assert worker.os.environ["OMP_NUM_THREADS"] == "1"


def test_a_worker_goes_on_with_another_implementation_that_it_is_handed(work):
    plan = Plan(ITEMS)
    sent, seen = work(Begin("ref", 3.0, True, plan), KEYS["c"], Begin("next", 4.0, False, None), KEYS["a"], None)
    assert [kind for kind, _ in sent] == ["ready", "done", "ready", "done"]
    assert seen.loaded == [("ref", 3.0), ("next", 4.0)] and seen.garbage == [("begin", 0), ("begin", 1)]
    assert [call[-2:] for call in seen.run] == [(True, plan), (False, None)]
    assert seen.read == ["c.safetensors", "a.safetensors"]


def test_another_implementation_that_cannot_be_set_up_is_told_too(work):
    sent, _ = work(Begin("ref", 3.0, False, None), KEYS["c"], Begin("absent", 3.0, False, None))
    assert [kind for kind, _ in sent] == ["ready", "done", "setup"]


def test_garbage_is_collected_after_every_32_items(work):
    _, seen = work(Begin("ref", 3.0, True, None), *[KEYS["c"]] * 65, None)
    assert seen.garbage == [("begin", 0), ("collect", 32), ("collect", 64)]


def test_a_number_of_threads_that_is_given_stays(work, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    work(Begin("ref", 3.0, False, None), None)
    assert worker.os.environ["OMP_NUM_THREADS"] == "2"


def test_a_worker_that_cannot_set_up_says_so_and_leaves(work):
    assert work(Begin("absent", 3.0, False, None))[0] == [("setup", "no such implementation")]


def test_a_worker_without_a_manifest_says_so_and_leaves(monkeypatch):
    def guard():
        raise CaseError("no manifest")

    monkeypatch.setattr(worker, "Guard", guard)
    connection = Connection(Begin("ref", 3.0, False, None))
    worker.work(connection)  # type: ignore[arg-type]
    assert connection.sent == [("case", "no manifest")]


def test_a_worker_that_meets_a_broken_case_says_so_and_leaves(work):
    sent, _ = work(Begin("ref", 3.0, False, None), ("broken.safetensors", "head", "float32-float32"))
    assert sent == [("ready", "mine"), ("case", "no such case")]


def test_a_worker_says_what_of_a_whole_queue_is_not_claimed(work):
    other = ("other.safetensors", "head", "float32-float32")
    sent, seen = work(Begin("ref", 3.0, False, None), [KEYS["a"], other], KEYS["a"], None)
    (kind, unclaimed), done = sent[1], sent[2]
    assert kind == "unclaimed" and {k: o.skipped for k, o in unclaimed.items()} == {other: "stage head not claimed"}
    assert done[0] == "done" and len(seen.run) == 1, "saying it calls nothing"
    assert seen.read == ["a.safetensors", "other.safetensors"]  # each case once


def test_where_everything_is_probed_all_of_it_is_asked(work):
    sent, _ = work(Begin("ref", 3.0, True, None), [("other.safetensors", "head", "float32-float32")], None)
    assert sent[1:] == [("unclaimed", {})]
