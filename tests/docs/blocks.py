"""The fenced blocks of a page: what they are, and what happens when a reader does what they say.

The blocks of a page are run in order, in one folder. By language:

* ``python`` is executed. Where the line before the block ends in "`NAME.py`:" it is written to that file instead, and a
  later command must use it; so are blocks of other languages.
* ``sh`` is run line by line. A line that must fail says so in a comment: ``# exit status 1``.
* ``console`` has commands after ``$ ``, each with its output.
* ``json`` and ``toml`` must be valid.
* ``text`` right after a block is the output of that block, and is compared (`outputs.differences`); elsewhere it is an
  illustration.

What can't be run in a test is in `elsewhere`, with the reason.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs import elsewhere, outputs

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "sh", "console", "json", "toml", "text")
FENCE = re.compile(r"^( *)```(.*)$")
NAMED = re.compile(r"`([\w./-]+\.\w+)`:$")
STATUS = re.compile(r"#.*exit status (\d+)")
LIMIT = 240  # seconds for one block or command


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: the number of its first line, the fence's.
        body: its text, without the fence's indentation.
        file: the name of the file that the page tells the reader to put it in; empty for none.
        adjacent: whether nothing but blank lines is between it and the block before.
    """

    line: int
    language: str
    body: str
    file: str
    adjacent: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: a fence is not closed.
    """
    found: list[Block] = []
    lines = iter(enumerate(text.splitlines(), 1))
    before, adjacent = "", False  # the last line with text, and whether it closed a block
    for number, line in lines:
        opened = FENCE.match(line)
        if opened:
            body = list(_until_closed(lines, opened[1], number))
            named = NAMED.search(before)
            found.append(Block(number, opened[2].strip(), "\n".join(body), named[1] if named else "", adjacent))
            before, adjacent = "", True
        elif line.strip():
            before, adjacent = line.rstrip(), False
    return found


def _until_closed(lines: Iterator[tuple[int, str]], indent: str, opened: int) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == "```":
            return
        yield line.removeprefix(indent)
    raise ValueError(f"line {opened}: a block must be closed by ```, the page ends in it")


def commands(body: str) -> list[str]:
    """The commands of a shell block, comments included; a backslash joins a line to the next one."""
    joined = re.sub(r"\\\n\s*", "", body)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def environment() -> dict[str, str]:
    """What a reader's shell has, with the packages of this checkout and small graphs compiled fast."""
    scripts = Path(sys.executable).parent
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    return {
        "XLA_FLAGS": quick, **os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200",
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


class Reader:
    """Does what a page says, in a folder where ``examples`` and ``fixtures`` are the repository's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        for name in ("examples", "fixtures"):
            (folder / name).symlink_to(ROOT / name)

    def read(self, text: str) -> list[str]:
        """What went otherwise than the page says, a text for each."""
        page, printed = blocks(text), None  # None: of the block before nothing was run
        for index, block in enumerate(page):
            if block.language not in LANGUAGES:
                self._say(block, f"expected a language ({', '.join(LANGUAGES)}) after ```, got {block.language!r}")
            elif block.language == "text":
                if block.adjacent and printed is not None:
                    self._compare(block, block.body, printed)
                printed = None
            elif block.file:
                (self.folder / block.file).write_text(block.body + "\n")
                stem = block.file.rpartition("/")[2].partition(".")[0]
                if not any(stem in later.body for later in page[index + 1 :] if later.language in ("sh", "console")):
                    self._say(block, f"no later command uses the file {block.file}")
                printed = None
            else:
                printed = getattr(self, f"_{block.language}")(block)
        return self.problems

    def _say(self, block: Block, problem: str) -> None:
        self.problems.append(f"line {block.line}: {problem}")

    def _compare(self, block: Block, shown: str, printed: str) -> None:
        difference = outputs.differences(shown, printed)
        if difference:
            self._say(block, f"the page shows another output: {difference}\nprinted was:\n{printed}")

    def _python(self, block: Block) -> str:
        script = self.folder / f"line_{block.line}.py"
        script.write_text(block.body + "\n")
        return self._expect(block, [sys.executable, script.name], 0, "this block")

    def _sh(self, block: Block) -> str | None:
        printed = [self._command(block, command) for line in commands(block.body) for command in line.split(" && ")]
        ran = [text for text in printed if text is not None]
        return "".join(ran) if ran else None

    def _console(self, block: Block) -> None:
        for part in re.split(r"^\$ ", block.body, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            if elsewhere.rule(command) is None:
                # In a console block the reader sees the failure; only its text counts.
                self._compare(block, shown, self._run(["bash", "-c", command])[1])
            else:
                self._command(block, command)

    def _command(self, block: Block, command: str) -> str | None:
        """What a command printed; None where it isn't run here (`elsewhere`)."""
        kept_away = elsewhere.rule(command)
        if kept_away is not None:
            problem = kept_away.check(command, ROOT)
            if problem:
                self._say(block, f"{command}: {problem}")
            return None
        stated = STATUS.search(command)
        return self._expect(block, ["bash", "-c", command], int(stated[1]) if stated else 0, command)

    def _expect(self, block: Block, call: list[str], status: int, name: str) -> str:
        code, printed = self._run(call)
        if code != status:
            self._say(block, f"{name}: expected exit status {status}, got {code}\n{printed[-3000:]}")
        return printed

    def _run(self, call: list[str]) -> tuple[int, str]:
        """Exit status and everything printed."""
        try:
            done = subprocess.run(
                call, cwd=self.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=LIMIT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return -1, f"no end within {LIMIT} s"
        return done.returncode, done.stdout

    def _json(self, block: Block) -> None:
        try:
            json.loads(block.body)
        except json.JSONDecodeError as error:
            self._say(block, f"expected JSON, got {error}")

    def _toml(self, block: Block) -> None:
        try:
            tomllib.loads(block.body)
        except tomllib.TOMLDecodeError as error:
            self._say(block, f"expected TOML, got {error}")
