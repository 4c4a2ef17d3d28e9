"""Greetings and answers that are nearly right are understood, or refused in one line."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cases.corpus import load_corpus
from conformance.cases.dialects import published, unclaimed
from conformance.cli.app import app
from conformance.implementations.greeting import PROTOCOL, Claims, ProgramError, read_answer, read_greeting
from conformance.implementations.registry import load
from conformance.interface import Capabilities, SetupError
from conformance.judge.item import refusal, run_item
from tests.conformance.files.mutations import mutations, refused

ITEM = next(i for c in load_corpus() if c.id == "smoke-paper-2" for i in c.items() if i.stage == "pre")
CLAIMS: dict[str, Any] = {
    "stages": ["pre", "post"], "dialects": ["paper"], "weights": {"pre": ["x"]}, "dtypes": {"pre": ["float32"]},
    "overrides": {"iterations": [10], "eps": None}, "streams": [4], "outputs": {"pre": ["u"]}, "gradients": True,
    "empty": False, "contracts": ["float32"], "device": "cpu", "description": "mine 1.0",
}  # fmt: skip
GREETING = {"protocol": PROTOCOL, "name": "mine", "capabilities": CLAIMS}


def understood(line: bytes) -> None:
    """Everything that a run asks a program's claims for."""
    name, claimed = read_greeting(line)
    assert name and isinstance(refusal(ITEM, claimed), str) and isinstance(unclaimed(published("paper"), claimed), str)
    assert all(isinstance(claimed.outputs.get(stage, ()), tuple) for stage in claimed.stages)
    assert f"{claimed.device} {claimed.description}" and claimed.allows("eps", 0.5) in (True, False)


def test_a_greeting_that_is_nearly_right():
    assert sum(refused(lambda t=text: understood(t), ProgramError) for text in mutations(GREETING, 500)) > 300


def test_an_answer_that_is_nearly_right():
    answer = {"id": "1", "status": "refused", "reason": "not today"}
    assert sum(refused(lambda t=text: read_answer(t), ProgramError) for text in mutations(answer, 300)) > 150


def test_a_plain_greeting_has_the_defaults_of_the_contract():
    line = json.dumps({**GREETING, "capabilities": {"stages": ["pre"], "dialects": ["paper"]}, "later": 1}).encode()
    expected = Capabilities(frozenset({"pre"}), frozenset({"paper"}), copies=True)
    assert read_greeting(line) == ("mine", expected)


def test_every_claim_may_be_made_by_a_program():
    assert set(Claims.__struct_fields__) == set(Capabilities.__dataclass_fields__) - {"settings", "copies"}
    _, claimed = read_greeting(json.dumps(GREETING).encode())
    assert claimed.streams == {4} and claimed.outputs == {"pre": ("u",)} and not claimed.empty
    assert claimed.contracts == {"float32"} and claimed.description == "mine 1.0"


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"id": 1, "status": "done"}', "id: expected a text, got 1"),
        ('{"id": "1", "status": "fine"}', "status: expected one of done, error, refused, got 'fine'"),
        ('{"id": "1"}', "expected the key 'status', which isn't there"),
        ('{"id": "1", "status": "error", "reason": {}}', "reason: expected a text, got an object"),
    ],
)
def test_an_answer_of_another_form_is_shown(line, said):
    with pytest.raises(ProgramError) as caught:
        read_answer(line.encode())
    assert str(caught.value).startswith("its answer '{") and str(caught.value).endswith(f": {said}")


def test_the_reason_of_an_answer_may_be_left_out():
    assert read_answer(b'{"id": "1", "status": "error"}').reason == "no reason given"


def program(tmp_path, *lines: str) -> str:
    """A program that answers with these lines, one after the other."""
    path = tmp_path / "program.py"
    path.write_text(
        f"import sys\nfor line in {list(lines)!r}:\n    sys.stdin.readline()\n    print(line, flush=True)\n"
    )
    return f"exec:{sys.executable} {path}"


def test_a_program_that_greets_wrongly_is_named(tmp_path):
    greeting = json.dumps({**GREETING, "capabilities": {**CLAIMS, "dtypes": {"pre": [16]}}})
    command = program(tmp_path, greeting)
    with pytest.raises(SetupError) as caught:
        load(command, 20.0)
    assert str(caught.value).startswith(command)
    assert "capabilities.dtypes.pre[0]: expected a text, got 16" in str(caught.value)
    done = CliRunner().invoke(app, ["run", "--impl", command, "--case", "smoke-paper-2", "--jobs", "1"])
    assert done.exit_code == 3 and "capabilities.dtypes.pre[0]: expected a text, got 16" in done.output
    assert done.output.count("\n") == 1


def test_a_program_that_answers_wrongly_gets_a_verdict(tmp_path):
    claims = {**CLAIMS, "streams": None, "weights": ["float32", "x"], "overrides": None}
    greeting = json.dumps({**GREETING, "capabilities": claims})
    command = program(tmp_path, greeting, "[" * 5000)
    (check,) = run_item(load(command, 20.0), ITEM).checks
    assert check.verdict == "errored" and "got JSON that is nested too deeply" in check.message
