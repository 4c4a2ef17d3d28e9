"""A report is read whole or refused in one line, with files of a few lines that are written out here."""

from __future__ import annotations

import json

import pytest

from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report.files import FORMAT, write_jsonl, write_junit
from conformance.report.markdown import markdown
from conformance.report.read import SELFTEST_FORMAT, ReportError, merge, read_run, read_selftest
from conformance.report.resume import outcomes_of
from conformance.report.summary import summary
from tests.conformance.judge.made import Answers, array, claims, made

CORPUS = "a" * 64
HEADER = {"kind": "header", "format": FORMAT, "corpus": CORPUS}
SETTINGS = {"kind": "implementation", "name": "mine", "settings": {"device": "cpu"}}
ITEM = {"implementation": "mine", "case": "smoke", "stage": "reduce", "variant": "float32-float32", "x": "float32",
        "dialect": "paper", "seconds": 0.5}  # fmt: skip
CHECK = {"kind": "check", **ITEM, "tensor": "out", "verdict": "passed", "ratio": 0.25, "error": 0.5, "bound": 2.0,
         "message": ""}  # fmt: skip
IDENTITY = ("implementation", "case", "stage", "variant")
SKIP = {"kind": "skip", **ITEM, "stage": "head", "reason": "stage head not claimed"}


def footer(lines):
    return {"kind": "footer", "lines": lines, "failed": 0}


def ends(rows):
    """The rows with the line that ends each item, which a footer counts too."""
    added, own = 0, []
    for row in rows:
        named = isinstance(row, dict) and row.get("kind") in ("check", "skip")
        if own and (not named or any(row.get(k) != own[0].get(k) for k in IDENTITY)):
            yield {"kind": "item", **{k: own[0][k] for k in ITEM if k in own[0]}, "lines": len(own)}
            added, own = added + 1, []
        own += [row] if named else []
        counts = isinstance(row, dict) and row.get("kind") == "footer" and "lines" in row
        yield {**row, "lines": row["lines"] + added} if counts else row


def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in ends(rows)))
    return path


def test_a_whole_report(tmp_path):
    gradient = {**CHECK, "tensor": "d/x", "verdict": "failed", "ratio": None, "message": "why"}
    cause = {"kind": "diagnosis", "implementation": "mine", "cause": "H transposed", "lines": ["a line"]}
    path = written(tmp_path / "run.jsonl", HEADER, SETTINGS, CHECK, gradient, SKIP, cause, footer(3))
    run = read_run(path)
    assert run.path == path and run.header.corpus == CORPUS
    assert run.header.implementations == {"mine": {"device": "cpu"}}
    figures = [tuple(getattr(c, k) for k in ("implementation", "case", "stage", "variant", "x", "dialect", "tensor",
                                           "verdict", "ratio", "message")) for c in run.checks]  # fmt: skip
    item = ("mine", "smoke", "reduce", "float32-float32", "float32", "paper")
    assert figures == [(*item, "out", "passed", 0.25, ""), (*item, "d/x", "failed", None, "why")]
    assert [(s.stage, s.reason) for s in run.skips] == [("head", "stage head not claimed")]
    assert [(d.implementation, d.cause, d.lines) for d in run.diagnoses] == [("mine", "H transposed", ("a line",))]
    assert not run.cut


def test_a_report_of_nothing(tmp_path):
    run = read_run(written(tmp_path / "run.jsonl", HEADER, footer(0)))
    assert (run.checks, run.skips) == ([], [])


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="empty"),
        pytest.param([footer(0)], id="only a footer"),
        pytest.param([CHECK, footer(0)], id="no header"),
        pytest.param([CHECK, HEADER, footer(1)], id="a header that isn't first"),
        pytest.param([{**HEADER, "format": "mhc-conformance-report/1"}, footer(0)], id="another format"),
        pytest.param([{k: v for k, v in HEADER.items() if k != "format"}, footer(0)], id="no format"),
        pytest.param([{k: v for k, v in HEADER.items() if k != "corpus"}, footer(0)], id="no corpus"),
        pytest.param([{**HEADER, "corpus": 3}, footer(0)], id="a corpus that is no text"),
        pytest.param([HEADER, CHECK, CHECK, footer(1)], id="a footer that counts too few"),
        pytest.param([HEADER, CHECK, footer(2)], id="a footer that counts too many"),
        pytest.param([HEADER, CHECK, {"kind": "footer"}], id="a footer without a count"),
        pytest.param([HEADER, footer(1), CHECK], id="a footer that isn't last"),
        pytest.param([HEADER, "{", footer(1)], id="not JSON"),
        pytest.param([HEADER, [], footer(1)], id="not an object"),
        pytest.param([HEADER, {**CHECK, "kind": "other"}, footer(1)], id="another kind"),
        pytest.param([HEADER, ITEM, footer(1)], id="no kind"),
        *(
            pytest.param([HEADER, {k: v for k, v in CHECK.items() if k != lacks}, footer(1)], id=f"no {lacks}")
            for lacks in ("implementation", "case", "stage", "variant", "x", "dialect", "tensor", "verdict", "ratio",
                          "message")
        ),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_in_one_line_that_names_the_file(tmp_path, rows):
    path = written(tmp_path / "run.jsonl", *rows)
    with pytest.raises(ReportError) as caught:
        read_run(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_of_a_run_that_was_cut_off_the_whole_items_are_read(tmp_path):
    path = written(tmp_path / "run.jsonl", HEADER, CHECK, SKIP, {**CHECK, "case": "wide"}, footer(3))
    whole = path.read_bytes()
    ends_of_items = [
        k for k in range(len(whole)) if whole[:k].endswith(b"\n") and b'"item"' in whole[:k].splitlines()[-1]
    ]
    for size in range(whole.index(b"\n") + 1, len(whole) - len(whole.splitlines()[-1]) - 1):
        path.write_bytes(whole[:size])
        run = read_run(path)
        finished = sum(end <= size for end in ends_of_items)
        assert len(run.items) == finished and len(run.checks) + len(run.skips) == finished
        assert run.cut == f"cut off after {finished} items: the run didn't end"


def test_a_run_that_was_interrupted_says_so(tmp_path):
    run = read_run(written(tmp_path / "run.jsonl", HEADER, CHECK, {**footer(1), "interrupted": True}))
    assert run.cut == "interrupted after 1 items"
    assert any("interrupted after 1 items" in line for line in {**summary([run], None)}["warnings"])


def test_an_item_that_nothing_ends_before_the_footer_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HEADER, CHECK, footer(1))))
    with pytest.raises(ReportError) as caught:
        read_run(path)
    item = "mine, smoke, reduce, float32-float32"
    assert str(caught.value) == f"{path}: line 3: expected the line that ends the item {item}, got the footer"


def test_a_footer_that_does_not_count_what_is_there_is_told(tmp_path):
    path = written(tmp_path / "run.jsonl", HEADER, CHECK, footer(3))
    with pytest.raises(ReportError) as caught:
        read_run(path)
    assert str(caught.value) == f"{path}: expected a footer that counts 2 lines, got 4"


def test_an_item_whose_lines_are_not_there_is_told(tmp_path):
    path = written(tmp_path / "run.jsonl", HEADER, CHECK, footer(1))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    with pytest.raises(ReportError, match="line 2: expected the 1 lines of mine, smoke, reduce, float32-float32"):
        read_run(path)


def test_settings_that_are_nested_too_deeply_are_refused(tmp_path):
    nested = json.loads("[" * 150 + "]" * 150)
    path = written(tmp_path / "run.jsonl", HEADER, {**SETTINGS, "settings": {"a": nested}}, footer(0))
    with pytest.raises(ReportError) as caught:
        read_run(path)
    assert str(caught.value).startswith(f"{path}: line 2: settings: expected settings")


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"], ids=["absent", "not UTF-8"])
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReportError) as caught:
        read_run(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_reports_of_one_corpus_are_merged_in_their_order(tmp_path):
    first = written(tmp_path / "a.jsonl", HEADER, CHECK, {**CHECK, "tensor": "d/x"}, footer(2))
    others = [{**CHECK, "implementation": "other"}, {**CHECK, "case": "wide"}, {**CHECK, "stage": "head"},
              {**CHECK, "variant": "float64-float64"}]  # fmt: skip
    second = written(tmp_path / "b.jsonl", HEADER, *others, footer(4))
    assert [run.path for run in merge([second, first])] == [second, first]
    assert len(merge([first])) == 1


def test_an_item_that_is_in_two_reports_is_refused_with_both_files(tmp_path):
    first = written(tmp_path / "a.jsonl", HEADER, CHECK, footer(1))
    second = written(tmp_path / "b.jsonl", HEADER, {**CHECK, "tensor": "d/x"}, footer(1))
    with pytest.raises(ReportError) as caught:
        merge([first, second])
    assert str(caught.value).startswith(f"{second} and {first} both have mine, smoke, reduce, float32-float32")
    skips = written(tmp_path / "c.jsonl", HEADER, {**SKIP, "stage": "reduce"}, footer(1))
    assert len(merge([first, skips])) == 2  # what one run skips another may run


def test_reports_of_two_corpora_are_refused_with_both(tmp_path):
    first = written(tmp_path / "a.jsonl", HEADER, footer(0))
    second = written(tmp_path / "b.jsonl", {**HEADER, "corpus": "b" * 64}, footer(0))
    with pytest.raises(ReportError) as caught:
        merge([first, second])
    assert str(caught.value) == (
        f"reports of different corpora: {first} has {'a' * 64}, {second} has {'b' * 64}"
    )  # fmt: skip


SELFTEST = {"format": SELFTEST_FORMAT, "corpus": CORPUS, "mutants": [], "honest": "none failed", "problems": []}


def test_a_selftest_of_the_same_corpus(tmp_path):
    path = written(tmp_path / "selftest.json", SELFTEST)
    assert read_selftest(path, CORPUS).honest == "none failed"
    with pytest.raises(ReportError) as caught:
        read_selftest(path, "b" * 64)
    assert "b" * 64 in str(caught.value) and CORPUS in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", {**SELFTEST, "format": "other"}, {"corpus": CORPUS}, {**SELFTEST, "mutants": 3}, None],
)
def test_another_file_in_its_place_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "selftest.json"
    if content is not None:
        written(path, content)
    with pytest.raises(ReportError) as caught:
        read_selftest(path, CORPUS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_run_writes_is_what_is_read(tmp_path):
    from conformance.judge.item import run_item

    wrong = Answers({"out": array([[[4.0]]], "float32")}, name="wrong")
    refuses = Answers(capabilities=claims(stages=frozenset()), name="refuses")
    exact = made(bounds={"out": 0.0})
    outcomes = [run_item(wrong, made()), run_item(wrong, exact), run_item(refuses, made())]
    path = tmp_path / "run.jsonl"
    write_jsonl(path, outcomes)
    run = read_run(path)
    assert [(c.implementation, c.verdict, c.ratio) for c in run.checks] == [
        ("wrong", "failed", 4.0),
        ("wrong", "failed", None),  # a bound of 0 has no ratio
    ]
    assert [(s.implementation, s.reason) for s in run.skips] == [("refuses", "stage reduce not claimed")]


def test_the_map_of_a_tensor_that_failed_is_read_too(tmp_path):
    cells = [[0.0, 1.5], [float("inf"), 0.0]]
    failed = Check("out", "failed", 2.0, map={"tokens": True, "rows": 2, "columns": 2, "cells": cells})
    outcome = Outcome("mine", "made", "reduce", "float32-float32", "float32", "paper", [failed, Check("H", "passed")])
    write_jsonl(tmp_path / "run.jsonl", [outcome])
    (check, passed) = read_run(tmp_path / "run.jsonl").checks
    assert passed.map is None and check.map is not None
    assert (check.map.tokens, check.map.rows, check.map.columns) == (True, 2, 2)
    assert check.map.cells == ((0.0, 1.5), (None, 0.0))


def test_a_map_that_is_read_back_is_written_again_as_it_was(tmp_path):
    cells = [[0.0, 1.5], [float("inf"), 0.0]]
    failed = Check(
        "out", "failed", 2.0, trace=["a frame"], map={"tokens": True, "rows": 2, "columns": 2, "cells": cells}
    )
    outcome = Outcome("mine", "made", "reduce", "float32-float32", "float32", "paper", [failed], reference="mine")
    write_jsonl(tmp_path / "run.jsonl", [outcome])
    write_jsonl(tmp_path / "again.jsonl", outcomes_of(read_run(tmp_path / "run.jsonl")))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "run.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("rows", "columns", "cells"),
    [(2, 2, [[1]]), (1, 2, [[1]]), (2, 2, [[1, 2], [3]]), (1, 1, []), (40, 1, [[1]] * 40), (1, 40, [[1] * 40])],
)
def test_a_map_of_other_cells_is_refused(tmp_path, rows, columns, cells):
    check = {**CHECK, "verdict": "failed", "map": {"tokens": True, "rows": rows, "columns": columns, "cells": cells}}
    path = written(tmp_path / "run.jsonl", HEADER, check, footer(1))
    with pytest.raises(ReportError, match="line 3: out: expected a map of at most 32 x 32 equal cells"):
        read_run(path)


def test_what_a_run_says_of_modes_is_read_too(tmp_path):
    check = Check("out", "failed", 2.0, mode="layout: x slice", worst=[])
    outcome = Outcome("mine", "made", "reduce", "float32-float32", "float32", "paper", [check])
    outcome.differences, outcome.refused = ["out: other bits in 1 of 32 calls"], {"without gradients": "refused: no"}
    write_jsonl(tmp_path / "run.jsonl", [outcome])
    run = read_run(tmp_path / "run.jsonl")
    assert [(c.tensor, c.mode) for c in run.checks] == [("out", "layout: x slice")]
    assert [d.message for d in run.differences] == ["out: other bits in 1 of 32 calls"]
    assert [(r.mode, r.reason) for r in run.refusals] == [("without gradients", "refused: no")]
    write_junit(tmp_path / "run.xml", [outcome])
    assert "out: failed (layout: x slice), 2 of the bound" in (tmp_path / "run.xml").read_text()
    content = {**summary([run], None), "sinkhorn": {}}
    assert "`out`: failed (layout: x slice)" in markdown(content)
    assert content["failures"][0]["mode"] == "layout: x slice"
