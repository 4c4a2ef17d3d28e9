"""Which worker gets which item, and what becomes of one that fails, dies or hangs; here no worker is a process."""

from __future__ import annotations

from collections import deque

import pytest

from conformance.cases.case import CaseError
from conformance.implementations.registry import TOGETHER, registered, together
from conformance.interface import SetupError
from conformance.judge import run as runner
from conformance.judge.modes_plan import Plan
from conformance.judge.rule import Check
from tests.conformance.judge.made import made
from tests.conformance.judge.workers import ITEMS, KEYS, Clock, Workers, outcome


@pytest.fixture
def workers(monkeypatch):
    workers = Workers()
    monkeypatch.setattr(runner, "PythonChild", workers)
    monkeypatch.setattr(Clock, "asked", [], raising=False)
    monkeypatch.setattr(runner, "Deadline", Clock)
    return workers


def run(*references, **options):
    return list(runner.run(references, ITEMS, **options))


def test_every_item_of_every_implementation_is_run_once_in_order(workers):
    outcomes = run("x", "y", jobs=1)
    assert [(o.reference, o.case) for o in outcomes] == [(r, c) for r in "xy" for c in "abc"]
    assert workers.log == [("x", "abc."), ("y", "abc.")]
    assert workers.made[0].handed == [KEYS["a"], KEYS["b"], KEYS["c"], None]
    assert [w.settings for w in workers.made] == [("x", 300.0, False, None), ("y", 300.0, False, None)]
    assert [w.ended for w in workers.made] == [1, 1] and not any(w.over for w in workers.made)
    assert [o.asked for o in outcomes] == [f"{c}::reduce::float32-float32" for c in "abcabc"]


def test_what_is_not_claimed_is_known_before_anything_runs(workers):
    workers.replies = {"x": {"unclaimed": "bc"}, "y": {"unclaimed": "abc"}}
    outcomes = run("x", "y", jobs=1)
    assert [(o.reference, o.case, o.skipped) for o in outcomes] == [
        ("x", "b", "not claimed"), ("x", "c", "not claimed"), ("x", "a", ""),
        ("y", "a", "not claimed"), ("y", "b", "not claimed"), ("y", "c", "not claimed"),
    ]  # fmt: skip
    assert workers.log == [("x", "a."), ("y", ".")]
    assert workers.made[0].asked == [[KEYS["a"], KEYS["b"], KEYS["c"]]]
    assert outcomes[0].asked == "b::reduce::float32-float32"


def test_a_second_worker_is_not_asked_for_claims(workers):
    workers.replies = {"x": {"a": 50.0, "unclaimed": "c"}}
    outcomes = run("x", jobs=2)
    assert sorted(o.case for o in outcomes) == ["a", "b", "c"]
    assert [len(w.asked) for w in workers.made] == [1] + [0] * (len(workers.made) - 1)


def test_items_that_are_left_out_are_not_asked_for(workers):
    outcomes = run("x", "y", jobs=1, leave={"x": {"a::reduce::float32-float32", "c::reduce::float32-float32"}})
    assert [(o.reference, o.case) for o in outcomes] == [("x", "b"), ("y", "a"), ("y", "b"), ("y", "c")]


def test_the_limit_the_probe_and_the_plan_are_handed_on(workers):
    plan = Plan(ITEMS)
    run("x", jobs=1, limit=7.0, probe=True, plan=plan)
    assert workers.made[0].settings == ("x", 7.0, True, plan)
    assert Clock.asked == [17.0, 17.0, 17.0, 17.0, 17.0, 5.0]  # 10 s more to start and for each item; 5 s to leave
    assert workers.made[0].patience == [5.0]


@pytest.mark.parametrize(("jobs", "at_first"), [(0, ["x"]), (1, ["x"]), (2, ["x", "y"]), (3, ["x", "y", "z"])])
def test_so_many_workers_at_a_time(workers, jobs, at_first):
    outcomes = runner.run(["x", "y", "z"], ITEMS, jobs=jobs)
    next(outcomes)
    assert [w.settings[0] for w in workers.made] == at_first
    assert len(list(outcomes)) == 8 and len(workers.made) == 3


def test_two_workers_unless_something_else_is_said(workers):
    outcomes = runner.run(["x", "y", "z"], ITEMS)
    next(outcomes)
    assert len(workers.made) == 2


def test_a_second_worker_takes_items_from_the_other_end(workers):
    workers.replies["x"] = {"a": 7.0}  # which makes 21 s for c, d and e
    items = [made(case=name, path=f"{name}.safetensors") for name in "abcde"]
    outcomes = list(runner.run(["x"], items, jobs=2))
    assert sorted(o.case for o in outcomes) == list("abcde")
    assert workers.log == [("x", "abcd."), ("x", "e.")]


def test_it_does_not_where_little_is_left(workers):
    workers.replies["x"] = {"a": 20.0}
    run("x", jobs=2)
    assert workers.log == [("x", "abc.")]


@pytest.mark.parametrize(
    ("seconds", "names", "workers_of_x"),
    [
        ({"a": 1.0, "b": 9.0}, "abcdef", 1),  # after b 5 s an item, for three of them
        ({"a": 3.0, "b": 5.5}, "abcdefgh", 2),  # after a 18 s are left, after b 4.25 s an item, for five of them
    ],
)
def test_the_pace_is_that_of_all_items_so_far(workers, seconds, names, workers_of_x):
    workers.replies["x"] = seconds
    items = [made(case=name, path=f"{name}.safetensors") for name in names]
    assert sorted(o.case for o in runner.run(["x"], items, jobs=2)) == list(names)
    assert len(workers.made) == workers_of_x


def task(name, queue="", ran=0, seconds=0.0):
    return runner._Task(name, deque((letter, "", "") for letter in queue), ran, seconds)


def test_work_that_is_left_is_reckoned_by_the_pace_so_far():
    assert task("x", "abc", 2, 10.0).left == 15.0
    assert task("x", "abc").left == 0.0 and task("x", "", 3, 6.0).left == 0.0
    fresh = runner._Task("x", deque())
    assert (fresh.ran, fresh.seconds) == (0, 0.0)


@pytest.mark.parametrize(
    ("tasks", "running", "chosen"),
    [
        ([], [], None),
        ([task("x", "ab"), task("y", "ab")], [], 0),
        ([task("x", "ab"), task("y", "ab")], [0], 1),
        ([task("x"), task("y", "ab")], [], 1),
        ([task("x", "ab"), task("y")], [0], None),
        ([task("x", "ab", 1, 10.0)], [0], None),  # 20 s
        ([task("x", "ab", 1, 10.5)], [0], 0),
        ([task("x", "ab", 1, 11.0), task("y", "ab", 1, 12.0), task("z", "ab", 1, 10.5)], [0, 1, 2], 1),
        ([task("x", "ab", 1, 99.0), task("y", "ab")], [0], 1),  # one without any comes first
        ([task("x", "", 1, 99.0), task("y", "ab", 1, 11.0)], [0, 1], 1),
    ],
)
def test_who_gets_the_next_worker(tasks, running, chosen):
    expected = None if chosen is None else tasks[chosen]
    assert runner._next_task(tasks, [tasks[number] for number in running]) is expected


def group(monkeypatch, *references):
    monkeypatch.setattr(runner, "together", lambda first, second: first in references and second in references)


def test_a_process_goes_on_with_an_implementation_of_its_framework(workers, monkeypatch):
    group(monkeypatch, "x", "z")
    outcomes = run("x", "y", "z", jobs=1)
    assert workers.log == [("x", "abc|z:abc."), ("y", "abc.")]
    assert [(o.reference, o.case) for o in outcomes] == [(r, c) for r in "xzy" for c in "abc"]
    assert [o.implementation for o in outcomes] == ["mine"] * 9 and [w.ended for w in workers.made] == [1, 1]


@pytest.mark.parametrize(("seconds", "log"), [(58.0, [("x", "abc|z:abc.")]), (58.5, [("x", "abc."), ("z", "abc.")])])
def test_a_process_that_has_worked_for_a_minute_takes_no_other(workers, monkeypatch, seconds, log):
    group(monkeypatch, "x", "z")
    workers.replies["x"] = {"b": seconds}  # and 1 s for each of the others
    run("x", "z", jobs=1)
    assert workers.log == log


def test_the_next_one_is_asked_for_its_claims_too(workers, monkeypatch):
    group(monkeypatch, "x", "z")
    workers.replies = {"z": {"unclaimed": "abc"}}
    assert [o.skipped for o in run("x", "z", jobs=1)] == ["", "", "", *["not claimed"] * 3]
    assert len(workers.made[0].asked) == 2


def test_two_workers_share_out_frameworks_before_they_share_one(workers, monkeypatch):
    group(monkeypatch, "x", "z")
    outcomes = runner.run(["x", "z", "y"], ITEMS, jobs=2)
    next(outcomes)
    assert [w.first for w in workers.made] == ["x", "y"]
    assert len(list(outcomes)) == 8 and len(workers.made) == 2


def test_where_nothing_else_is_left_two_workers_share_a_framework(workers, monkeypatch):
    group(monkeypatch, "x", "z")
    next(runner.run(["x", "z"], ITEMS, jobs=2))
    assert [w.first for w in workers.made] == ["x", "z"]


def test_one_that_died_goes_on_with_nothing(workers, monkeypatch):
    group(monkeypatch, "x", "z")
    workers.replies["x"] = {"c": "die"}
    assert [o.checks[0].verdict for o in run("x", "z", jobs=1)] == ["passed", "passed", "errored"] + ["passed"] * 3
    assert workers.log == [("x", "abc"), ("z", "abc.")]


def test_one_that_was_ended_for_lateness_goes_on_with_nothing(workers, monkeypatch):
    """Its last answer may have come before its end."""
    group(monkeypatch, "x", "z")
    monkeypatch.setattr(runner._Worker, "end_if_late", lambda worker: setattr(worker, "late", True))
    run("x", "z", jobs=1)
    assert workers.log == [("x", "abc."), ("z", "abc.")]


def test_implementations_share_a_process_where_they_import_the_same_framework():
    assert together("jax", "jax-jit") and together("transformers-glm-5", "transformers-deepseek-v4")
    assert not together("jax", "torch") and not together("torch", "torch-triton") and not together("mine:A", "mine:B")
    assert {name for names in TOGETHER for name in names} <= set(registered())


def test_a_run_may_stop_at_the_first_failure(workers):
    workers.replies["x"] = {"b": "fail"}
    assert [o.case for o in run("x", "y", jobs=1, stop_early=True)] == ["a", "b"]
    assert [w.ended for w in workers.made] == [1]
    assert [o.case for o in run("x", jobs=1)] == ["a", "b", "c"]


def test_workers_are_ended_where_a_run_is_given_up(workers):
    outcomes = runner.run(["x", "y"], ITEMS, jobs=2)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    assert [w.ended for w in workers.made] == [1, 1]


@pytest.mark.parametrize(("kind", "error"), [("setup", SetupError), ("case", CaseError)])
def test_what_a_worker_cannot_do_is_raised(workers, kind, error):
    workers.replies["x"] = {"start": (kind, "no such thing")}
    with pytest.raises(error, match=r"^no such thing$"):
        run("x")
    assert workers.made[0].ended == 1


def test_a_worker_that_dies_loses_one_item_and_another_goes_on(workers):
    workers.replies["x"] = {"b": "die"}
    outcomes = run("x", jobs=1)
    assert [(o.case, o.checks[0].verdict) for o in outcomes] == [("a", "passed"), ("b", "errored"), ("c", "passed")]
    (check,) = outcomes[1].checks
    assert check == Check("-", "errored", float("inf"), message="the process died with status 9")
    lost = outcomes[1]
    assert (lost.implementation, lost.reference, lost.stage, lost.variant) == (
        "name of x", "x", "reduce", "float32-float32",
    )  # fmt: skip
    assert (lost.x, lost.dialect, lost.skipped) == ("float32", "paper", "")
    assert workers.log == [("x", "ab"), ("x", "c.")] and workers.made[0].patience == [5.0, 5.0]
    assert [w.ended for w in workers.made] == [1, 1]


def test_a_worker_whose_status_is_not_known(workers):
    workers.replies |= {"x": {"b": "die"}, "status": 0}
    assert run("x", jobs=1)[1].checks[0].message == "the process died with status unknown"


def test_a_worker_that_dies_before_its_first_item_cannot_be_set_up(workers):
    workers.replies["x"] = {"start": "die"}
    with pytest.raises(SetupError, match=r"^x: its process died with status 9 outside any case$"):
        run("x", jobs=1)


def test_a_death_in_a_further_call_has_its_mode(workers):
    def die_later(key):
        worker = workers.made[0]
        worker.far.send(("mode", "layout + other values"))
        worker.far.close()
        return "hang"

    workers.replies["x"] = {"b": die_later}
    outcomes = run("x", jobs=1)
    assert [(o.case, o.checks[0].verdict, o.checks[0].mode) for o in outcomes] == [
        ("a", "passed", ""), ("b", "errored", "layout + other values"), ("c", "passed", ""),
    ]  # fmt: skip


def test_a_worker_that_hangs_is_ended_once_its_time_is_over(workers, monkeypatch):
    workers.replies["x"] = {"b": "hang"}
    monkeypatch.setattr(runner, "GRACE", -2.0)
    outcomes = run("x", jobs=1, limit=2.0)
    assert [(o.case, o.checks[0].verdict) for o in outcomes] == [("a", "passed"), ("b", "errored"), ("c", "passed")]
    assert outcomes[1].checks[0].message == "no result within 0 s: its process was ended"
    assert workers.made[0].over and workers.log == [("x", "ab"), ("x", "c.")]


def test_one_that_has_time_left_is_waited_for(workers, monkeypatch):
    workers.replies["x"] = {"b": "hang"}
    looks = []

    def wait(connections, timeout):
        looks.append(timeout)
        if len(looks) == 5:  # it answers at last
            workers.made[0].far.send(("done", outcome(KEYS["b"])))
        return [c for c in connections if c.poll()]

    monkeypatch.setattr(runner, "wait", wait)
    assert [o.checks[0].verdict for o in run("x", jobs=1)] == ["passed"] * 3
    assert set(looks) == {0.5} and not workers.made[0].over
