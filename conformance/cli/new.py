"""``mhc-conformance new``."""

from __future__ import annotations

import importlib.util
import keyword
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.cli import templates
from conformance.cli.app import USAGE, known_names, say, stop
from conformance.cli.options import DIALECT, FILE, STAGE, argument, command, one_of, option


@command()
@argument("path", type=FILE, help="The file to write: mine.py, or mine.c for C.")
@option(
    "--framework",
    type=one_of("framework", tuple(templates.FILES)),
    help="What it is written in. Default: that of the file's ending, NumPy for .py.",
)
@option(
    "--stages",
    "--stage",
    type=STAGE.listed_with_commas(),
    multiple=True,
    help="The stages that it has, with commas between them; repeatable. Default: each that the dialect has.",
)
@option("--dialect", type=DIALECT, default="deepseek-v4", help="The published dialect that it claims.")
@option("--force", is_flag=True, help="Replace a file that exists.")
def new(path: Path, framework: str | None, stages: tuple[tuple[str, ...], ...], dialect: str, force: bool) -> None:
    """Write an implementation to start from: it runs, and passes.

    It has the stages that were asked for, with their vector-Jacobian products, and says what the suite hands over and
    expects. Replace the bodies of its functions by calls of your own code, and run the suite after each. In C it is a
    program that speaks the protocol of exec:COMMAND.

    Exit status: 0 written, 2 usage, or a file is in the way.
    """
    from conformance.cases.corpus import load_corpus
    from conformance.cases.dialects import dialect_names
    from conformance.files import atomic

    known_names("dialect", [dialect], dialect_names())
    framework = framework or {".c": "c", ".py": "numpy"}.get(path.suffix, "")
    if not framework or path.suffix != templates.ending(framework):
        expected = templates.ending(framework) if framework else ".py or .c"
        stop(f"{path}: expected a name that ends in {expected}{f' for {framework}' if framework else ''}", USAGE)
    if path.suffix == ".py":
        _check_importable(path)
    there = {stage for case in load_corpus() if case.dialect == dialect for stage in case.stages}
    asked = [stage for names in stages for stage in names]
    for stage in asked:
        if stage not in there:
            stop(f"{dialect} has no cases of the stage {stage}, but of {', '.join(sorted(there))}", USAGE)
    text = templates.written(framework, asked or there, dialect, path.stem)
    if path.exists() and not force:
        stop(f"{path} exists: give another name, or --force to replace it", USAGE)
    try:
        atomic.write(path, text)
    except OSError as error:
        stop(f"{path}: can't be written ({error.strerror or error})", USAGE)
    say(f"{path} is written; this runs it, and it passes:")
    for line in _commands(path, dialect):
        say(f"  {line}")


def _check_importable(path: Path) -> None:
    """Ends the command where the file couldn't be imported by its name, or would stand in another module's place."""
    name = path.stem
    if not name.isidentifier() or keyword.iskeyword(name):
        stop(f"{path}: {name!r} can't be the name of a module: letters, digits and _, as in mine.py", USAGE)
    if name in sys.stdlib_module_names:
        stop(f"{path}: Python has a module {name} of its own: give another name", USAGE)
    found = importlib.util.find_spec(name)
    if found is not None and (found.origin is None or Path(found.origin).resolve() != path.resolve()):
        stop(f"{path}: there is a module {name} already ({found.origin}): give another name", USAGE)


def _commands(path: Path, dialect: str) -> Sequence[str]:
    """The lines that run what was written, to be given in a shell."""
    program, folder = shlex.quote(path.stem), path.parent
    before = [] if folder == Path() else [f"cd {shlex.quote(str(folder))}"]
    if path.suffix == ".c":
        build = f"cc -O2 -o {program} {shlex.quote(path.name)} -lm"
        return [*before, build, f"mhc-conformance run --impl exec:./{program} --dialect {dialect}"]
    return [*before, f"mhc-conformance run --impl {program}:Mine --dialect {dialect}"]
