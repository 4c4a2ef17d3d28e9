"""Rows that a user writes are read, named and checked as the implementations' configurations check them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conformance.cases.dialects import (
    DialectError,
    check,
    completed,
    dialect_names,
    dialect_rows,
    parse,
    published,
    read,
    unclaimed,
)
from conformance.cases.rules import domains
from conformance.interface import Capabilities

ROWS = dialect_rows()


@pytest.mark.parametrize("name", dialect_names())
def test_a_published_row_is_whole_and_sound(name):
    assert list(ROWS[name]) == list(domains())
    check(ROWS[name], name)
    row = published(name)
    assert (row.name, row.told, row.published, row.overrides) == (name, name, True, {})


@pytest.mark.parametrize(
    "text, name, overrides",
    [
        ("deepseek-v4,norm_eps=1e-20", "deepseek-v4,norm_eps=1e-20", {"norm_eps": 1e-20}),
        ("deepseek-v4,norm_eps=1e-06", "deepseek-v4", {}),
        ("liger,iterations=3,norm_eps=0", "liger,norm_eps=0,iterations=3", {"norm_eps": 0.0, "iterations": 3}),
        ("paper,norm_weight=True", "paper,norm_weight=true", {"norm_weight": True}),
        ("paper,iterations=3,iterations=5", "paper,iterations=5", {"iterations": 5}),
        ("deepseek-v4,guard=none,eps=0", "deepseek-v4,guard=none,eps=0", {"guard": "none", "eps": 0.0}),
    ],
)  # fmt: skip
def test_changes_make_a_row_that_is_named_after_them(text, name, overrides):
    row = parse(text)
    assert (row.name, row.overrides, row.base) == (name, overrides, text.split(",")[0])
    assert row.told == row.base and row.published == (not overrides)
    assert parse(row.name) == row


@pytest.mark.parametrize(
    "text, said",
    [
        ("nobody", "unknown dialect 'nobody', expected one of paper"),
        ("deepsek-v4", "did you mean 'deepseek-v4'?"),
        ("paper,nrm_eps=1", "; did you mean 'norm_eps'?"),
        ("paper,norm_eps", "a change must be norm_eps=value"),
        (
            "paper,iterations=x",
            "iterations can't be 'x', it must be an integer of at least 1",
        ),
        ("paper,iterations=0", "iterations must be an integer of at least 1"),
        ("paper,iterations=2.5", "iterations can't be '2.5'"),
        ("paper,norm_weight=yes", "norm_weight can't be 'yes', it must be true or false"),
        ("paper,norm_eps=nan", "norm_eps must be a finite non-negative number"),
        ("paper,norm_eps=-1", "norm_eps must be a finite non-negative number"),
        ("paper,norm_eps=null", "norm_eps must be a finite non-negative number, got null"),
        ("paper,post_scale=0", "post_scale must be a finite positive number"),
        ("paper,guard=some", "guard must be one of none, add"),
        ("paper,guard=clip", "eps must be 0 with guard=none and positive with any other"),
        ("paper,order=null", "order belongs to residual=sinkhorn and must be given for it"),
        ("mhc-lite,guard=add", "guard belongs to residual=sinkhorn and must be null for any other, got guard='add'"),
        ("paper,mix=identity", "mix=identity goes with residual=identity alone"),
        ("paper,coefficients=activation", "mixing must be activation where coefficients is"),
        ("maxtext,mixing=float32", "mixing must be activation where coefficients is"),
        ("nowhere.json", "nowhere.json: can't be read"),
        ("mine.json,eps=0", "a file holds the whole row, write eps=0 into it"),
    ],
)
def test_what_is_no_row_is_said_in_a_line(text, said):
    with pytest.raises(DialectError) as raised:
        parse(text)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def written(folder, content, name="mine.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("form", ["flat", "parameters", "sourced"])
def test_a_file_holds_a_whole_row_in_any_of_three_forms(tmp_path, form):
    values = {**ROWS["deepseek-v4"], "iterations": 7, "post_scale": 1}
    sourced = {name: {"value": value, "source": "a test"} for name, value in values.items()}
    content = {"flat": values, "parameters": {"parameters": values}, "sourced": {"summary": "", "parameters": sourced}}
    row = parse(str(written(tmp_path, content[form])))
    assert (row.name, row.told, row.base, row.published, row.overrides) == ("mine", "mine", None, False, {})
    assert row.parameters == {**values, "post_scale": 1.0} and type(row.parameters["post_scale"]) is float
    assert list(row.parameters) == list(domains())


def test_a_file_that_is_named_as_a_published_row_must_hold_it(tmp_path):
    assert read(written(tmp_path, ROWS["paper"], "paper.json")).published
    with pytest.raises(DialectError, match="another row than the published dialect paper: give the file another name"):
        read(written(tmp_path, {**ROWS["paper"], "iterations": 3}, "paper.json"))


def without(name):
    return {key: value for key, value in ROWS["paper"].items() if key != name}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "expected a dialect as JSON"),
        ("[" * 100_000, "expected a dialect as JSON"),
        ("[]", "expected a dialect as JSON, got an empty list"),
        ({"dialects": {}}, "holds a table of dialects, expected one row"),
        ({"parameters": []}, "or the parameters alone, got an empty list"),
        ({"parameters": ROWS["paper"], "sumary": ""}, "got 'sumary'"),
        (without("guard"), "a whole row is expected, missing are guard"),
        ({**ROWS["paper"], "gard": "none"}, "; did you mean 'guard'?"),
        ({**ROWS["paper"], "streams": 4}, "unknown parameter 'streams'"),
        ({**ROWS["paper"], "iterations": 2.0}, "1 and at most 10000 or null, got 2"),
        ({**ROWS["paper"], "norm_eps": True}, "norm_eps must be a finite non-negative number, got true"),
        ({**ROWS["paper"], "norm_eps": [1e-6]}, "norm_eps must be a finite non-negative number, got a list"),
        ({**ROWS["paper"], "norm_eps": 10**400}, "norm_eps must be a finite non-negative number"),
        (json.dumps(ROWS["paper"])[:-1] + ', "eps": 0}', "the key 'eps' is given twice"),
        (json.dumps({**ROWS["paper"], "norm_eps": float("inf")}), "Infinity is no number of JSON"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_row_is_said_in_a_line(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(DialectError) as raised:
        read(path)
    assert said in str(raised.value) and str(raised.value).startswith(str(path)) and len(str(raised.value)) < 600


def test_what_was_written_before_a_parameter_existed_means_what_it_meant():
    for name, row in ROWS.items():
        early = {key: value for key, value in row.items() if key not in ("pre_from", "matrix", "logit_limit")}
        whole = completed(early)
        assert whole["pre_from"] == "own" and whole["matrix"] == "float32" and whole["logit_limit"] is None
        assert {key: whole[key] for key in early} == early, name
    assert completed({"order": "columns-first", "residual": "sinkhorn"})["softmax"] == "columns"
    assert completed({"order": None, "residual": "identity"})["softmax"] is None
    assert completed({"order": "rows-first"}) == {"order": "rows-first"}, "no row says nothing of the rest"


def test_who_claims_a_row(tmp_path):
    claims = Capabilities(frozenset({"pre"}), frozenset({"paper"}))
    some, anything = replace(claims, overrides=frozenset({"eps", "guard"})), replace(claims, overrides=None)
    changed = parse("paper,guard=clip,eps=1e-6")
    assert unclaimed(changed, claims) == "other values of guard, eps not claimed"
    assert unclaimed(changed, some) == unclaimed(changed, anything) == unclaimed(published("paper"), claims) == ""
    assert unclaimed(parse("liger,eps=1"), anything) == "dialect liger not claimed"
    mine = read(written(tmp_path, {**ROWS["paper"], "iterations": 7}))
    assert unclaimed(mine, some) == "dialect mine not claimed" and unclaimed(mine, anything) == ""
    assert unclaimed(mine, replace(claims, dialects=frozenset({"mine"}))) == ""
