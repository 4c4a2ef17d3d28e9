"""A document that isn't what it must be is one line: the file, the place in it, what was expected, what came."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal, cast

import pytest
from msgspec import Meta, Struct

from conformance.files.line import one_line
from conformance.files.places import CaseError
from conformance.files.problems import shown
from conformance.files.reading import DEEPEST, Reader, Scalar, too_deep
from tests.conformance.files.mutations import mutations, refused


class Stage(Struct):
    inputs: tuple[str, ...]
    options: dict[str, Scalar] = {}


class Document(Struct):
    stages: dict[str, Stage]
    kind: Literal["a", "b"] = "a"
    name: Annotated[str, Meta(min_length=1)] = "some"
    size: Annotated[float, Meta(ge=0)] = 0.0
    count: int = 0
    either: tuple[str, ...] | dict[str, int] | None = None


class Strict(Struct, forbid_unknown_fields=True):
    inner: tuple[Stage, ...] = ()


class Cat(Struct, tag_field="kind", tag="cat"):
    lives: int


class Dog(Struct, tag_field="kind", tag="dog"):
    bones: int


READER = Reader(Document, "a document", CaseError)
FORMATTED = Reader(Document, "a document", CaseError, "ours/1")
STRICT = Reader(Strict, "a strict document", CaseError)
ANIMAL = Reader(cast("type[Cat | Dog]", Cat | Dog), "an animal", CaseError)
GOOD: dict[str, Any] = {"stages": {"pre": {"inputs": ["x"]}, "layer": {"inputs": ["x", "y", "z"], "options": {"n": 1}}}}


def said(reader: Reader[Any], content: Any) -> str:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(CaseError) as caught:
        reader.decode(text, "x.json")
    assert str(caught.value).startswith("x.json: ") and str(caught.value).isprintable()
    return str(caught.value).removeprefix("x.json: ")


def test_a_document_becomes_its_record():
    record = READER.decode(json.dumps(GOOD), "x.json")
    assert record.stages["layer"].inputs == ("x", "y", "z") and record.stages["layer"].options == {"n": 1}
    assert record.size == 0.0 and record.either is None


def test_keys_that_a_record_does_not_know_are_passed_over():
    assert READER.decode(json.dumps({**GOOD, "later": [[1]]}), "x.json") == READER.decode(json.dumps(GOOD), "x.json")


def layer(**changes: Any) -> dict[str, Any]:
    return {"stages": {**GOOD["stages"], "layer": {**GOOD["stages"]["layer"], **changes}}}


@pytest.mark.parametrize(
    "content, expected",
    [
        (layer(inputs=["x", "y", 3]), "stages.layer.inputs[2]: expected a text, got 3"),
        (layer(inputs=None), "stages.layer.inputs: expected a list, got null"),
        (layer(inputs={"x": 1}), "stages.layer.inputs: expected a list, got an object"),
        (layer(options=[]), "stages.layer.options: expected an object, got an empty list"),
        (layer(options={"how": ["sum"]}),
         "stages.layer.options.how: expected true or false, a finite number, a text or null, got a list"),
        ({"stages": {"layer": {}}}, "stages.layer: expected the key 'inputs', which isn't there"),
        ({"stages": {"a\nb": 1}}, r"stages['a\nb']: expected an object, got 1"),
        ({"stages": []}, "stages: expected an object, got an empty list"),
        ({}, "expected the key 'stages', which isn't there"),
        ([1], "expected a document, got a list"),
        ("text", "expected a document, got 'text'"),
        ({**GOOD, "kind": "c"}, "kind: expected one of a, b, got 'c'"),
        ({**GOOD, "kind": []}, "kind: expected one of a, b, got an empty list"),
        ({**GOOD, "name": ""}, "name: expected a text that isn't empty, got ''"),
        ({**GOOD, "size": -1}, "size: expected a finite number of at least 0, got -1"),
        ({**GOOD, "size": True}, "size: expected a finite number of at least 0, got true"),
        ({**GOOD, "size": 10**400},
         "size: expected a finite number of at least 0, got 100000000000000000...0000000000000000000"),
        ({**GOOD, "count": 1.0}, "count: expected an integer, got 1.0"),
        ({**GOOD, "either": "x"}, "either: expected a list, an object or null, got 'x'"),
        ({**GOOD, "either": ["x", 1]}, "either[1]: expected a text, got 1"),
        ({**GOOD, "either": {"x": "y"}}, "either.x: expected an integer, got 'y'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_its_place(content, expected):
    assert said(READER, content) == expected


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "it is empty"),
        (b"  \n", "it is empty"),
        (b'{"stages": ', "it ends too early"),
        (b'{\n "stages" 1}', "line 2, column 11: expected ':'"),
        (b"{'stages': 1}", "line 1, column 2:"),
        (b'\xef\xbb\xbf{"stages": {}}', "it begins with a byte order mark: save it as UTF-8 without one"),
        (b'{"stages": {}, "size": NaN}', "line 1, column 24: NaN is no number of JSON"),
        (b'{"stages": {}, "size": -Infinity}', "Infinity is no number of JSON"),
        (b'{"stages": {}}{}', "trailing characters"),
        ('{"stages": {}}'.encode("utf-16"), "isn't JSON"),
        (b'{"name": "\xff"}', "got text that isn't UTF-8"),
        (b'{"name": "\\ud800x"}', "isn't JSON"),
        (b"[" * 100_000, "got JSON that is nested too deeply"),
        (b'{"later":' * 5000 + b"1" + b"}" * 5000, "got JSON that is nested too deeply"),
        (b'{"count": ' + b"9" * 5000 + b"}", "got a number of too many digits"),
    ],
)
def test_text_that_is_no_json_is_said(content, expected):
    came = said(READER, content)
    assert came.startswith("expected a document, got ") and expected in came


def test_a_number_beyond_float64_is_said_with_its_place():
    text = json.dumps({**GOOD, "size": 7}).replace("7", "1e999").encode()
    assert said(READER, text) == "size: expected a finite number of at least 0, got inf"
    text = json.dumps({**GOOD, "later": 7}).replace("7", "1e999").encode()
    assert said(READER, text) == "a number is beyond float64"


@pytest.mark.parametrize(
    "text, key",
    [
        ('{"stages": {}, "stages": {}}', "stages"),
        ('{"stages": {"a": {"inputs": [], "inputs": ["x"]}}}', "inputs"),
        ('{"stages": {"a:b": {"inputs": []}, "a\\u003ab": {"inputs": []}}}', "a:b"),
        ('{"stages": {"x": {"inputs": ["\\u003a"]}, "x": {"inputs": ["\\u003A"]}}}', "x"),
    ],
)
def test_a_key_that_is_given_twice_is_named(text, key):
    assert said(READER, text.encode()) == f"the key {key!r} is given twice"


@pytest.mark.parametrize("text", ['{"stages": {"a:b": {"inputs": [":", "::"]}}}', '{"stages": {}, "name": "\\u003a"}'])
def test_colons_in_texts_are_no_keys(text):
    READER.decode(text, "x.json")


def test_the_format_is_looked_at_before_the_rest():
    assert said(FORMATTED, {"format": "ours/2"}) == "expected format 'ours/1', got 'ours/2'"
    assert said(FORMATTED, GOOD) == "expected format 'ours/1', got null"
    assert said(FORMATTED, [GOOD]) == "expected a document, got a list"
    assert said(FORMATTED, {"format": "ours/1"}) == "expected the key 'stages', which isn't there"
    FORMATTED.decode(json.dumps({"format": "ours/1", **GOOD}), "x.json")


def test_a_strict_record_names_what_it_does_not_know():
    assert said(STRICT, {"iner": []}) == "unknown key 'iner', expected some of inner"


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"kind": "cow"}, "kind: expected one of cat, dog, got 'cow'"),
        ({"kind": ["cat"]}, "kind: expected one of cat, dog, got a list"),
        ({"lives": 9}, "kind: expected one of cat, dog, got null"),
        ({"kind": "dog", "lives": 9}, "expected the key 'bones', which isn't there"),
        ([], "expected an animal, got an empty list"),
    ],
)
def test_records_of_several_kinds_are_told_by_their_tag(content, expected):
    assert said(ANIMAL, content) == expected


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, why in (
        (tmp_path / "nowhere.json", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "a\0b", "null byte"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(CaseError, match=f"can't be read .*{why}") as caught:
            READER.read(path)
        assert str(caught.value).isprintable()
        with pytest.raises(CaseError, match=f"can't be read .*{why}"):
            list(READER.lines(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(CaseError, match=r"x\.json: can't be read .Permission denied"):
        READER.read(path)


def test_a_file_that_is_too_large_is_refused_and_not_read_whole(tmp_path):
    small, path = Reader(Document, "a document", CaseError, largest=100), tmp_path / "x.json"
    path.write_bytes(bytes(101))
    for action in (small.read, lambda path: list(small.lines(path))):
        with pytest.raises(CaseError, match=r"x\.json: expected a document of at most 100 bytes, got more"):
            action(path)
    with pytest.raises(CaseError, match="at most 100 bytes"):
        small.decode("[" + " " * 100, "x.json")
    assert small.decode('{"stages": {}}'.ljust(100), "x.json").stages == {}


def test_a_message_is_one_line_whatever_stands_in_it():
    assert one_line("a\nb\x1b[31m\ud800 ü") == r"a\nb\x1b[31m\ud800 ü"
    assert str(CaseError("a\r\nb")) == r"a\r\nb"
    assert shown("x" * 100) == "'" + "x" * 60 + "'…" and len(shown(10**4000)) < 60


def test_depth_is_counted():
    value: Any = 1
    for _ in range(DEEPEST // 2):
        value = [{"a": value}, 1]
    assert not too_deep(value) and too_deep([value]) and too_deep({"a": value})


def test_nearly_right_documents_are_read_or_refused_in_one_line():
    document = {**GOOD, "format": "ours/1", "size": 2.5, "either": {"x": 1}}
    count = sum(
        refused(lambda text=text: FORMATTED.decode(text, "x.json"), CaseError, "x.json")
        for text in mutations(document, 1500)
    )
    assert 900 < count < 1450
