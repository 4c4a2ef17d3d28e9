"""A short form of the fuzz: ``python -m tests.conformance.fuzz.run`` reads 20,000 inputs."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conformance.fuzz.kinds import KINDS
from tests.conformance.fuzz.run import by_command, fuzz

NEEDS = {"torch": "torch", "distributed": "torch", "gguf": "gguf"}


@pytest.mark.parametrize("name", KINDS)
def test_an_input_that_is_nearly_right_is_read_or_refused_in_one_line(name):
    package = NEEDS.get(name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    counts = fuzz(25, 7, [name])
    assert counts.wrong == [] and counts.refused[name] > 5


def test_a_command_ends_with_status_0_or_2_and_one_line():
    assert by_command(6, 7) == []
