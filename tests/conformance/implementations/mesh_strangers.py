"""Implementations of one process of a mesh that behave badly, without any framework."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from conformance.interface import Capabilities
from conformance.mesh import Member


class Stranger:
    """Claims the stage ``pre`` and answers zeros; what it does wrong is up to those below."""

    name = "stranger"
    capabilities = Capabilities(stages=frozenset({"pre"}), dialects=frozenset({"paper"}), gradients=False)

    def __init__(self, member: Member):
        self.rank = member.rank

    def pre(self, inputs: Any, config: Any, cotangents: Any) -> Any:
        self.act()
        return {"u": np.zeros_like(inputs["x"][..., 0, :])}, {}

    def act(self) -> None:
        pass


def waits_for_the_others() -> None:
    """What a collective does whose partner is gone."""
    time.sleep(600)


class Dies(Stranger):
    """The second process is killed while the first waits for it."""

    def act(self) -> None:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        waits_for_the_others()


class Exits(Stranger):
    """The second process ends, with a last word."""

    def act(self) -> None:
        if self.rank == 1:
            os.write(2, b"noise\nout of memory on device 1\n")
            os._exit(7)
        waits_for_the_others()


class Hangs(Stranger):
    def act(self) -> None:
        if self.rank == 1:
            waits_for_the_others()


class FailsAlone(Stranger):
    def act(self) -> None:
        if self.rank == 1:
            raise ValueError("a shape that only this process has")
        waits_for_the_others()


class Quits(Stranger):
    """Leaves by ``sys.exit`` while a thread of its own goes on."""

    def act(self) -> None:
        if self.rank == 1:
            threading.Thread(target=waits_for_the_others).start()
            sys.exit(3)
        waits_for_the_others()


class RefusesAlone(Stranger):
    def act(self) -> None:
        if self.rank == 1:
            raise NotImplementedError("not on this device")
        waits_for_the_others()


class FailsTogether(Stranger):
    def act(self) -> None:
        raise ValueError("the same everywhere")


class Refuses(Stranger):
    def act(self) -> None:
        raise NotImplementedError("not on a mesh")


class NeverComes(Stranger):
    def __init__(self, member: Member):
        super().__init__(member)
        if member.rank == 1:
            waits_for_the_others()
