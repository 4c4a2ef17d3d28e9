"""Texts from files and from implementations, as Markdown shows them: they are words there and nothing else."""

from __future__ import annotations

import re

from conformance.files.line import one_line

SPECIAL = re.compile(r"[\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w)")
"""Characters that Markdown acts on; an underscore inside of a word is none."""
CALLING = re.compile(r"(?<![\w`])[@#]\w")
"""What GitHub makes a mention or a reference of, unless it is code."""


def text(value: object) -> str:
    """One line of plain words; what calls a person or an issue is code."""
    line = one_line(str(value))
    if CALLING.search(line):
        return code(line)
    line = SPECIAL.sub(lambda match: "\\" + match[0], line)
    return line.replace("://", r":\//").replace("www.", r"www\.")


def code(value: object) -> str:
    """One line of code, also in a table and with backticks in it."""
    line = one_line(str(value)).replace("|", r"\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    padded = f" {line} " if line.startswith("`") or line.endswith("`") or not line.strip() else line
    return f"{fence}{padded}{fence}"
