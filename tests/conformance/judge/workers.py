"""Workers that are no processes, and a clock that is set: for tests of which worker gets which item."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.judge.worker import Begin
from tests.conformance.judge.made import made

ITEMS = [made(case=name, path=f"{name}.safetensors") for name in ("c", "a", "b")]
KEYS = {item.case.id: (f"{item.case.id}.safetensors", "reduce", "float32-float32") for item in ITEMS}
"""They are run in the order a, b, c."""


def outcome(key, seconds=1.0, verdict="passed"):
    name = key[0].removesuffix(".safetensors")
    return Outcome("mine", name, "reduce", key[2], "float32", "paper", [Check("out", verdict)], whole=seconds)


@dataclass
class Workers:
    """Makes workers that answer at once: for each reference a reply to an item's key, or "die", or "hang"."""

    replies: dict[str, Any] = field(default_factory=dict)
    made: list[Any] = field(default_factory=list)

    def __call__(self, function):
        assert function == "conformance.judge.worker:work"
        self.made.append(Worker(self))
        return self.made[-1]

    @property
    def log(self):
        """For each worker its first implementation, and the items and further implementations that it was handed."""
        return [(w.first, "".join(told(message) for message in w.handed)) for w in self.made]


def told(message):
    if isinstance(message, Begin):
        return f"|{message.reference}:"
    return message[0][0] if message else "."


class Worker:
    def __init__(self, workers):
        self.workers = workers
        self.connection, self.far = Pipe()
        self.settings: Any = None
        self.first = ""
        self.handed: list[Any] = []
        self.asked: list[Any] = []
        self.over = False
        self.patience: list[float] = []
        self.ended = 0

    def send(self, message):
        if isinstance(message, Begin):
            if self.settings is None:
                self.first = message.reference
            else:
                self.handed.append(message)
            self.settings = message
            return self.reply(self.workers.replies.get(message[0], {}).get("start", ("ready", f"name of {message[0]}")))
        if isinstance(message, list):  # the whole queue, of which it says what it doesn't claim
            self.asked.append(message)
            unclaimed = self.workers.replies.get(self.settings[0], {}).get("unclaimed", "")
            skips = {
                key: replace(outcome(key), skipped="not claimed", checks=[])
                for key in message
                if key[0][0] in unclaimed
            }
            return self.far.send(("unclaimed", skips))
        self.handed.append(message)
        if message is not None:
            reply = self.workers.replies.get(self.settings[0], {}).get(message[0][0], 1.0)
            reply = reply(message) if callable(reply) else reply
            self.reply(("done", outcome(message, reply)) if isinstance(reply, float) else reply)
        return None

    def reply(self, message):
        if message == "die":
            self.far.close()
        elif message != "hang":
            self.far.send(("done", outcome(self.handed[-1], verdict="failed")) if message == "fail" else message)

    def receive(self):
        return self.connection.recv()

    def end(self):
        self.over = True
        self.far.close()

    def death(self, seconds):
        self.patience.append(seconds)
        return SimpleNamespace(status=9) if self.workers.replies.get("status", 9) else None

    def _hang_up(self):
        pass

    def _join(self):
        self.ended += 1


class Clock:
    """Takes the place of a deadline, and of time: all of its seconds are left for ever."""

    asked: list[float]  # one for each test

    def __init__(self, seconds):
        self.seconds = seconds
        self.asked.append(seconds)

    @property
    def left(self):
        return self.seconds
