"""The porting page shows the outputs of the commands; `python -m tests.conformance.porter.test_port_page` writes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.files import document
from conformance.porter import table

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "porting.md"
BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.DOTALL)
FIGURE = re.compile(r"\d+(?:\.\d+)?e-\d+|(?<= )0\.\d+(?=[,\s)])")


def run(command: str, folder: Path) -> str:
    """The output of a console line, of both streams, in a folder where ``examples`` is the repository's."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.stdout


def printed(folder: Path) -> str:
    """The page with the outputs of its own commands, run one after the other."""
    (folder / "examples").symlink_to(ROOT / "examples")

    def block(match: re.Match[str]) -> str:
        kind, body = match.groups()
        if kind == "python":
            done = subprocess.run([sys.executable, "-c", body], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return match[0]
        commands = [line for line in body.splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{c}\n{run(c[2:], folder)}" for c in commands) + "```"

    return BLOCK.sub(block, PAGE.read_text(encoding="utf-8"))


def needs() -> None:
    pytest.importorskip("torch", reason="the page's examples write torch state dicts, and torch is not installed")
    pytest.importorskip("orbax.checkpoint", reason="the page's examples write MaxText checkpoints: no orbax-checkpoint")
    pytest.importorskip("gguf", reason="the page's examples write GGUF files, and gguf is not installed")


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(tmp_path):
    needs()
    assert FIGURE.sub("#", printed(tmp_path)) == FIGURE.sub("#", PAGE.read_text(encoding="utf-8"))


def test_the_tables_of_verdicts_and_layouts_are_the_code_s():
    assert document.split(PAGE, "verdicts")[1] == table.markdown()
    assert document.split(PAGE, "layouts")[1] == table.layout_table()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        document.atomic.write(PAGE, printed(Path(name)))
