"""Garbage is looked for among what is new, and now and then among everything."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest

from conformance.judge import garbage


class Node:
    """One that refers to itself, so that nothing but a collection frees it."""

    def __init__(self):
        self.own = self


@pytest.fixture
def begun(monkeypatch):
    """In it nothing is collected but by request; afterwards all is as it was."""
    monkeypatch.setattr(garbage, "_number", itertools.count(1))
    garbage.begin()
    yield
    gc.unfreeze()
    gc.enable()


def died(node: weakref.ref) -> bool:
    return node() is None


def test_what_is_new_is_freed_by_the_next_collection(begun):
    new = weakref.ref(Node())
    assert not died(new) and not gc.isenabled()
    garbage.collect()
    assert died(new)


@pytest.mark.parametrize(("everything", "collections"), [(False, garbage.EVERY), (True, 2)])
def test_what_lived_once_is_freed_by_one_that_looks_through_everything(begun, everything, collections):
    node = Node()
    garbage.collect()  # it lives
    old = weakref.ref(node)
    del node
    for number in range(2, collections + 1):
        assert not died(old)
        garbage.collect(everything and number == collections)
    assert died(old)


def test_what_one_implementation_leaves_is_freed_before_the_next_begins(begun):
    node = Node()
    garbage.collect()  # it lives
    old = weakref.ref(node)
    del node
    garbage.begin()
    assert died(old) and not gc.isenabled()
