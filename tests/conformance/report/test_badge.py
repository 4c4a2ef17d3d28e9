"""A badge says in words what its colour says, is of one implementation, and of a whole run alone."""

from __future__ import annotations

import contextlib
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from conformance.cases.corpus import corpus_hash
from conformance.cli.app import app
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report import badge, read
from conformance.report.files import Lines, write_jsonl
from conformance.report.read import ReportError

NAMES = {"svg": "http://www.w3.org/2000/svg"}


def outcome(name="mine", dialect="deepseek-v4", verdict="passed", checks=1234, case="made"):
    made = [Check(f"t{k}", "passed", 0.25) for k in range(checks - 1)]
    return Outcome(name, case, "layer", "float32-float32", "float32", dialect, [*made, Check("out", verdict, 2.0)])


def drawn(path, *outcomes, implementation=""):
    write_jsonl(path, outcomes)
    return ElementTree.fromstring(badge.badge(read.merge([path]), implementation))


def words(root):
    return [text.text or "" for text in root.findall("svg:text", NAMES)]


def test_it_says_what_was_passed(tmp_path):
    root = drawn(tmp_path / "run.jsonl", outcome())
    assert words(root) == ["mHC conformance", "deepseek-v4: passed 1,234 checks"]
    title, description = (root.findtext(f"svg:{tag}", namespaces=NAMES) or "" for tag in ("title", "desc"))
    assert title == "mHC conformance: mine, deepseek-v4: passed 1,234 checks"
    assert corpus_hash() in description and "mhc-conformance 0." in description
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title description"
    assert root.findall("svg:rect", NAMES)[1].get("fill") == badge.PAPER["passed"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quick": True, "stage": ["pre", "post"], "impl": ["mine"]}, "quick; stage pre, post"),
        ({"modes": False}, "no modes"),
        ({"sizes": "none", "dialect": ["deepseek-v4"]}, "sizes none"),
        ({"dialect": ["deepseek-v4"], "strict": True, "repeats": 64}, ""),
    ],
)
def test_it_says_that_only_a_part_was_asked_for(tmp_path, asked, said):
    with contextlib.closing(Lines(tmp_path / "run.jsonl", corpus_hash(), asked=asked)) as lines:
        lines.add(outcome(checks=3))
        lines.end([])
    root = ElementTree.fromstring(badge.badge(read.merge([tmp_path / "run.jsonl"])))
    assert words(root)[1] == f"deepseek-v4: passed 3 checks{', of a part' if said else ''}"
    description = root.findtext("svg:desc", namespaces=NAMES) or ""
    assert description.startswith(f"A part of what there is: {said}. Dialects " if said else "Dialects deepseek-v4;")


def test_it_says_what_failed_in_words_and_in_another_colour(tmp_path):
    root = drawn(tmp_path / "run.jsonl", outcome(verdict="failed"))
    assert words(root)[1] == "deepseek-v4: 1 of 1,234 checks failed"
    assert root.findall("svg:rect", NAMES)[1].get("fill") == badge.PAPER["failed"]


@pytest.mark.parametrize("paper", [badge.LABEL_PAPER, *badge.PAPER.values()])
def test_its_words_can_be_read(paper):
    def light(color):
        parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (light(badge.INK) + 0.05) / (light(paper) + 0.05) > 4.5


@pytest.mark.parametrize(
    ("dialects", "said"),
    [(["paper"], "paper"), (["paper", "glm-5"], "paper, glm-5"), (["paper", "glm-5", "maxtext"], "3 dialects")],
)
def test_it_names_two_dialects_and_counts_more(tmp_path, dialects, said):
    outcomes = [outcome(dialect=dialect, checks=3, case=dialect) for dialect in dialects]
    assert words(drawn(tmp_path / "run.jsonl", *outcomes))[1] == f"{said}: passed {3 * len(dialects)} checks"


def test_one_of_several_implementations_is_chosen(tmp_path):
    outcomes = [outcome("mine", checks=1), outcome("theirs", checks=2)]
    assert words(drawn(tmp_path / "run.jsonl", *outcomes, implementation="mine"))[1] == "deepseek-v4: passed 1 check"
    for name in ("", "other"):
        with pytest.raises(ReportError, match=r"the runs have checks of mine, theirs; .*: give --implementation NAME"):
            drawn(tmp_path / "run.jsonl", *outcomes, implementation=name)


def test_a_name_that_xml_cannot_have_is_shown_as_far_as_it_can(tmp_path):
    root = drawn(tmp_path / "run.jsonl", outcome("a\x1b]<&\x00", dialect="<script>\x07" + "x" * 100, checks=2))
    assert words(root)[1].startswith("<script>?xxx") and words(root)[1].endswith(": passed 2 checks")
    assert len(words(root)[1]) <= badge.LONGEST
    assert (root.findtext("svg:title", namespaces=NAMES) or "").startswith("mHC conformance: a?]<&?, <script>?xxx")


def test_the_command_writes_it_and_refuses_a_run_that_is_cut_off(tmp_path):
    run, path = tmp_path / "run.jsonl", tmp_path / "badge.svg"
    write_jsonl(run, [outcome(checks=3)])
    done = CliRunner().invoke(app, ["report", str(run), "--badge", str(path), "--implementation", "mine"])
    assert (done.exit_code, done.output) == (0, "") and "passed 3 checks" in path.read_text()
    path.unlink()
    run.write_bytes(run.read_bytes()[:-10])
    done = CliRunner().invoke(app, ["report", str(run), "--badge", str(path)])
    assert done.exit_code == 2 and "expected a whole run, it was cut off" in done.output and not path.exists()
    done = CliRunner().invoke(app, ["report", str(run), "--implementation", "mine"])
    assert done.exit_code == 2 and "--implementation goes with --badge" in done.output
