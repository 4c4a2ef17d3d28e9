"""A search draws fresh cases, shrinks what fails, and writes a case file that repeats it."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

pytest.importorskip("flint", reason="python-flint, of the extra 'regenerate', is not installed")
pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")
pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

from conformance.cases.case import DTYPES
from conformance.cases.dialects import dialect_names, published
from conformance.implementations.wrapping import wrap
from conformance.questions.search import STAGES, search
from conformance.selftest import mutants
from conformance.selftest.plain import Plain

EVERYTHING = ([published(name) for name in dialect_names()], STAGES, tuple(DTYPES))


def command(*arguments, folder=None):
    return subprocess.run(
        [sys.executable, "-m", "conformance.cli", *arguments], capture_output=True, text=True, cwd=folder
    )


def test_a_plain_implementation_passes_what_is_drawn():
    found = search(wrap(Plain()), *EVERYTHING, seconds=6, seed=1)
    assert found.drawn > 10 and found.content is None and found.rejected < found.drawn


@pytest.mark.parametrize("mutant", ["NoPreEps", "OtherOrder", "NotTransposedBack", "NormPerStream"])
def test_a_mistake_is_found_and_shrunk(mutant):
    found = search(getattr(mutants, mutant)(), *EVERYTHING, seconds=60, seed=2)
    assert found.content is not None and found.outcome is not None and found.outcome.failed
    assert "tokens [1, 1]" in found.why or "tokens [1, 2]" in found.why, "shrinking leads to few tokens"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "shrunk"),
    [
        (lambda shape: shape[0] * shape[1] > 12, "streams 1, dim 1, tokens [1, 13]"),
        (lambda shape: shape[-2] > 8, "streams 9, dim 1, tokens [1, 1]"),
    ],
    ids=["tokens", "streams"],
)
def test_a_size_at_which_something_is_wrong_is_found_and_shrunk(wrong, shrunk):
    class Somewhere(Plain):
        def call(self, stage, inputs, config, cotangents):
            outputs, gradients = wrap(Plain()).call(stage, inputs, config, cotangents)
            if wrong(inputs["x"].shape):
                outputs["out"] = outputs["out"] * outputs["out"].dtype.type(1.25)
            return outputs, gradients

    found = search(Somewhere(), [published("paper")], ["layer"], ["float32"], 60, seed=1)
    assert found.outcome is not None and found.content is None and shrunk in found.why
    assert found.outcome.case.startswith("size-") and "--case size-" in found.outcome.reproduce


def test_the_same_seed_draws_the_same_cases():
    one, two = (
        search(wrap(mutants.PostScaleOne()), [published("paper")], STAGES, ["float32"], 30, seed=5) for _ in range(2)
    )
    assert one.content is not None and one.content == two.content


def test_what_is_found_is_written_and_its_line_repeats_it(tmp_path):
    done = command("search", "--impl", "conformance.selftest.mutants:Transposed", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    line = done.stdout.strip().splitlines()[-1]
    again = command(*shlex.split(line)[1:], folder=tmp_path)
    assert again.returncode == 1 and "1 failed" in again.stdout
    assert command("run", "--impl", "torch", "--case", "found.safetensors", folder=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (("search",), 2, "--impl"),
        (("search", "--impl", "tests.conformance.strangers:Honest", "--dtype", "float16"), 2, "claims none"),
        (("search", "--impl", "nobody"), 3, "or a registered name"),
        (("run", "--impl", "torch", "--case", "nowhere.safetensors"), 2, "no such file"),
    ],
)
def test_misuse_is_said(arguments, status, said, tmp_path):
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
