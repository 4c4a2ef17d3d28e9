"""Names and messages are words in Markdown and on a terminal, whatever is in them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conformance.judge.groups import Diagnosis
from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.report.escaping import code, text
from conformance.report.terminal import TerminalReport

NAME = "[/red] x \x1b[31m | `a` <b> [l](https://e.example) ![i](x)\n# h"


def test_ordinary_words_stay_as_they_are():
    for words in ("pre_alpha_scale", "expected float32, got bfloat16", "jax-jit", "a: 1.5 (of 2); b", "d/x 100%"):
        assert text(words) == words
    assert code("d/x") == "`d/x`"


def test_markdown_sees_no_markup():
    assert text("a|b`c`<d>[e](f)*g*") == r"a\|b\`c\`\<d\>\[e\](f)\*g\*"
    assert "https://" not in text("see https://e.example") and "www.e" not in text("www.e.example")
    assert text("thanks @everyone") == "`thanks @everyone`" and text("see #1") == "`see #1`"
    assert "\n" not in text(NAME) and "\x1b" not in text(NAME)


def test_code_holds_its_backticks_and_pipes():
    assert code("a`b") == "``a`b``" and code("`a``b`") == "``` `a``b` ```" and code("a|b") == r"`a\|b`"


@pytest.mark.parametrize("verbose", [False, True])
def test_a_terminal_gets_no_escape_sequence_and_no_markup(verbose):
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True, color_system=None)
    report = TerminalReport(console, verbose)
    check = Check("out\x1b[2J", "failed", message=f"{NAME}\x1b]0;title\x07")
    outcomes = [Outcome(NAME, NAME, "pre", NAME, "float32", "paper", [check], differences=[NAME], family=NAME)]
    report.crossed = [NAME]
    report.show(outcomes, outcomes, [Diagnosis(NAME, NAME, [NAME])])
    printed = file.getvalue()
    assert "[/red] x" in printed and r"\x1b]0;title" in printed
    assert "\x1b]" not in printed and "\x1b[2J" not in printed and "\x1b[31m" not in printed and "\x07" not in printed
