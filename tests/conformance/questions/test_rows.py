"""Rows in words: every value of every parameter has a sentence, and what differs is told with both sentences."""

from __future__ import annotations

import itertools
import json

import pytest
from click.testing import CliRunner

from conformance.cases.dialects import dialect_names, dialect_rows, evidence, parse, published
from conformance.cases.rules import domains
from conformance.cli import app
from conformance.questions.rows import WORDS, compared, described, differing, listing, said


def command(*arguments):
    return CliRunner().invoke(app, ["dialects", *arguments])


def test_every_parameter_and_every_choice_has_a_sentence_of_its_own():
    assert list(WORDS) == list(domains())
    for name, domain in domains().items():
        choices = {"boolean": (True, False), "choice": domain.choices}.get(domain.kind, (1, 2))
        assert len({said(name, choice) for choice in choices} - {""}) == len(choices), name


def test_the_list_has_a_line_for_each_row_with_what_it_rests_on():
    lines = command().stdout.splitlines()
    assert lines == list(listing()) and [line.split()[0] for line in lines] == dialect_names()
    for name, line in zip(dialect_names(), lines, strict=True):
        found = evidence(name)
        assert all(part in line for part in found.values() if part != found.get("note"))
        assert ("read, not run" in line) == ("ran" not in found)


@pytest.mark.parametrize("name", dialect_names())
def test_one_row_is_told_whole(name):
    text = command(name).stdout
    assert text.splitlines() == list(described(published(name)))
    for part in (*evidence(name).values(), *domains()):
        assert part in text


def test_a_changed_row_says_what_was_changed():
    lines = command("paper,iterations=7").stdout.splitlines()
    assert [line for line in lines if "(changed)" in line] == [
        "  iterations         7              7 iterations  (changed)"
    ]


@pytest.mark.parametrize("a, b", list(itertools.combinations(dialect_names(), 2)))
def test_two_rows_differ_where_their_parameters_do(a, b):
    rows = dialect_rows()
    apart = [key for key in rows[a] if rows[a][key] != rows[b][key]]
    assert sorted(differing(published(a), published(b))) == sorted(apart)
    text = "\n".join(compared(published(a), published(b)))
    assert all(f"\n  {key:18} {a} " in text for key in apart) and text.count(f"\n  {'':18} {b} ") == len(apart)


def test_what_differs_is_said_in_words():
    lines = command("deepseek-v4", "liger").stdout.splitlines()
    assert lines[0] == "deepseek-v4 and liger compute different functions"
    assert "  pre_eps            deepseek-v4  1e-06          1e-06 is added to pre" in lines
    assert "                     liger        0              nothing is added to pre" in lines
    same = command("deepseek-v4", "deepseek-v4-transformers").stdout
    assert "are the same layer, and differ in precision" in same and "out is summed in x's dtype" in same
    assert command("paper", "paper").stdout == "paper and paper are the same row\n"


def test_a_row_as_json_is_a_file_that_dialect_takes(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(command("liger", "--json").stdout)
    assert dict(parse(str(path)).parameters) == dialect_rows()["liger"]
    assert list(json.loads(command("--json").stdout)["dialects"]) == dialect_names()
    assert json.loads(command("paper", "paper,eps=1,guard=add", "--json").stdout)["differing"] == {
        "guard": ["none", "add"], "eps": [0, 1]
    }  # fmt: skip


@pytest.mark.parametrize("arguments", [("papers",), ("liger", "papers")])
def test_a_slip_is_told_with_what_was_meant(arguments):
    done = command(*arguments)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "did you mean 'paper'?" in done.stderr
