"""Whatever an implementation does in a call is a verdict: `run_item` raises nothing, and its outcome can be sent."""

from __future__ import annotations

import os
import pickle
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conformance.cases.case import load_case
from conformance.files.places import fixtures
from conformance.implementations.calling import called
from conformance.interface import Capabilities, Raised, describe
from conformance.judge.item import run_item
from conformance.judge.modes_plan import Plan

CASE = load_case(fixtures() / "golden" / "smoke-paper-2.safetensors")
ITEMS = [item for item in CASE.items() if item.stage in ("post", "residual_matrix")]


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Text(str):
    __slots__ = ()

    def split(self, *_: Any) -> Any:
        raise RuntimeError("no words")

    def __reduce__(self) -> Any:
        raise RuntimeError("can't be sent")


class Odd(np.ndarray):
    def astype(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("astype")

    copy = tobytes = __reduce__ = __array_function__ = __array_ufunc__ = __eq__ = astype  # type: ignore[assignment]

    @property
    def shape(self) -> Any:  # type: ignore[override]
        raise RuntimeError("shape")


class Entries(dict[str, Any]):
    def __iter__(self) -> Any:
        raise RuntimeError("iter")

    keys = items = __iter__


def raising(error: BaseException) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


def outputs(value: Any) -> Any:
    return lambda stage, inputs, config, cotangents: (
        {name: value for name in ("out", "H")},
        {k: value for k in inputs},
    )


WAYS: dict[str, Any] = {
    "an exception whose text raises": raising(NoText()),
    "an exception with a strange text": raising(ValueError("\ud800 [/red] \x1b[31m\n" * 1000)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "SystemExit": raising(SystemExit(0)),
    "GeneratorExit": raising(GeneratorExit()),
    "an exception of no known base": raising(type("Strange\x1b", (BaseException,), {})()),
    "a refusal in a strange text": raising(NotImplementedError(Text("\x1b[2J"))),
    "an extra H": lambda *_: ({"out": np.zeros(3), "H": np.zeros((1, 1, 2, 2), np.float32)}, {}),
    "an array of a class of its own": outputs(np.zeros((1, 1, 4, 8), np.float32).view(Odd)),
    "a dict whose iteration raises": lambda *_: (Entries(out=1), {}),
    "keys that are no names": lambda *_: ({1: 2}, {None: 3}),
    "names of a class of its own": lambda *_: ({Text("out"): np.zeros(1)}, {}),
    "an array of functions": outputs(np.array([len], object)),
    "functions": outputs(len),
    "a dtype with more to it": outputs(np.zeros(3, np.dtype(np.float32, metadata={"f": len}))),
    "nothing": lambda *_: None,
}  # fmt: skip


def implementation(call: Any, name: str = "mine", **more: Any) -> Any:
    claims = Capabilities(stages=frozenset({"post", "residual_matrix"}), dialects=frozenset({"paper"}), **more)
    return SimpleNamespace(name=name, capabilities=claims, call=call)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_verdict(way):
    mine = implementation(WAYS[way])
    for item in ITEMS:
        outcome = run_item(mine, item, plan=Plan([item]))
        assert outcome.skipped.startswith("refused") or (outcome.failed and not outcome.skipped)
        texts = [outcome.skipped, *(check.message for check in outcome.checks)]
        assert all(text.isprintable() and len(text) < 600 for text in texts)
        assert pickle.loads(pickle.dumps(outcome)).implementation == "mine"


def test_names_and_settings_can_be_printed_and_sent():
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    settings = {"f": len, "c": cyclic, "\ud800": float("inf"), "n": 10**5000}
    mine = implementation(WAYS["nothing"], Text("[/red] \x1b[31m\ud800"), settings=settings, description=Text("a\nb"))
    outcome = run_item(mine, ITEMS[0])
    assert outcome.implementation == r"[/red] \x1b[31m?" and type(outcome.implementation) is str
    assert pickle.loads(pickle.dumps(outcome)).about.keys() == {"device", "description", "f", "c", "?", "n"}


def test_settings_and_capabilities_that_raise():
    outcome = run_item(implementation(WAYS["nothing"], settings=Entries(a=1)), ITEMS[0])
    assert outcome.about["settings"] == "unreadable: RuntimeError: iter"

    class Claims(frozenset[str]):
        def __contains__(self, _: object) -> bool:
            raise RuntimeError("contains")

    mine = implementation(WAYS["nothing"])
    object.__setattr__(mine.capabilities, "dialects", Claims())
    (check,) = run_item(mine, ITEMS[0]).checks
    assert check.message == "its capabilities can't be read: RuntimeError: contains"


def test_the_users_own_interrupt_goes_on():
    def call(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_item(implementation(call), ITEMS[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_no_exception_becomes_one():
    with pytest.raises(Raised, match="SystemExit: 3"):
        called(implementation(raising(SystemExit(3))), "post", {}, {}, None)
    assert describe(NoText()) == "NoText: its text can't be had, since that raises RuntimeError"
