"""The writing commands for `writing`: each has an old target, and a new one that it makes of it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from conformance.judge.item import Outcome
from conformance.judge.rule import Check
from conformance.oracle import generate
from conformance.porter.port import Options, port
from conformance.porter.upcycling.upcycle import UpcycleOptions, upcycle
from conformance.report import files
from conformance.report.resume import NotResumed, resumed
from tests.conformance.faults.writing import Operation
from tests.conformance.porter import plain_model
from tests.conformance.porter.small_checkpoint import build


class Made:
    """Stands in for the pool of processes: the cases are made once, before any fault."""

    def __init__(self, made: dict[int, tuple[str, bytes]]):
        self.made = made

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap_unordered(self, _: Any, indices: list[int], **__: Any) -> list[tuple[str, bytes]]:
        return [self.made[index] for index in indices]


def all_of_them() -> dict[str, Operation]:
    return {
        "regenerate": regenerate(),
        "run": run(),
        "run-jsonl": streamed(),
        "run-resumed": streamed(begun=30),
        "report": report(),
        "port": ported("a.safetensors", "canonical"),
        "port-directory": ported("shards", "transformers"),
        "upcycle": upcycled(),
    }


def regenerate() -> Operation:
    wanted = [wish for wish in generate._WISHES if wish.family == "smoke"][:2]
    generate._WISHES[:] = wanted
    made = Made({index: generate._make(index) for index in range(len(wanted))})
    generate.processes = lambda jobs: made  # type: ignore[assignment,misc]
    names = tuple(f"{wish.id}.safetensors" for wish in wanted)

    def prepare(folder: Path) -> None:
        (folder / "golden").mkdir()
        for name in names:
            (folder / "golden" / name).write_bytes(b"old " * 5000)
        (folder / "golden" / "MANIFEST.json").write_text("{}")

    # each file is replaced alone: the manifest, which comes first, says that the others aren't right yet
    targets = tuple(f"golden/{name}" for name in (*names, "MANIFEST.json"))
    return Operation(prepare, lambda folder: generate.regenerate(folder / "golden"), targets)


def outcomes(count: int) -> list[Outcome]:
    check = Check("out", "failed", 2.0, 1.0, 0.5, "wrong " * 20)
    return [
        Outcome("mine", f"case-{k}", "reduce", "float32-float32", "float32", "paper", [check]) for k in range(count)
    ]


def run() -> Operation:
    def write(folder: Path, count: int) -> None:
        files.write_jsonl(folder / "run.jsonl", outcomes(count), "corpus")
        files.write_junit(folder / "run.xml", outcomes(count))

    return Operation(lambda folder: write(folder, 1), lambda folder: write(folder, 200), ("run.jsonl", "run.xml"))


def streamed(begun: int = 0) -> Operation:
    """The lines of a run as they come; the next run goes on where one was cut off.

    Args:
        begun: outcomes that a run which was cut off has left; 0 for a whole run of another time.
    """
    wanted = outcomes(60)

    def prepare(folder: Path) -> None:
        if not begun:
            files.write_jsonl(folder / "run.jsonl", outcomes(1), "corpus")
            return
        with contextlib.closing(files.Lines(folder / "run.jsonl", "corpus")) as lines:
            for outcome in wanted[:begun]:
                lines.add(outcome)

    def command(folder: Path) -> None:
        path = folder / "run.jsonl"
        try:
            before = resumed(path, "corpus", {})
        except NotResumed:  # nothing is begun: it is the old one, or not even the first line
            before = []
        with contextlib.closing(files.Lines(path, "corpus", before=before)) as lines:
            for outcome in wanted[len(before) :]:
                lines.add(outcome)
            lines.end()

    return Operation(prepare, command, ("run.jsonl",), streamed=True)


def report() -> Operation:
    from click.testing import CliRunner

    from conformance.cli import app

    def prepare(folder: Path) -> None:
        files.write_jsonl(folder / "in.jsonl", outcomes(3), "corpus")
        for name in ("page.html", "text.md"):
            (folder / name).write_text("old")

    def command(folder: Path) -> None:
        arguments = [
            str(folder / "in.jsonl"),
            "--html",
            str(folder / "page.html"),
            "--markdown",
            str(folder / "text.md"),
        ]
        done = CliRunner().invoke(app, ["report", *arguments])
        if done.exit_code:
            raise SystemExit(done.exit_code)

    return Operation(prepare, command, ("page.html", "text.md"), ("in.jsonl",))


def ported(name: str, layout: str) -> Operation:
    """A checkpoint that replaces the one of other weights."""

    def prepare(folder: Path) -> None:
        before = build(folder / "before", seed=1)
        build(folder / "source", seed=0)
        move(before, folder)
        shutil.rmtree(before)

    def move(source: Path, folder: Path) -> None:
        from conformance.porter.errors import PortError

        try:
            port(source, folder / name, Options(to=layout, overwrite=True, allow_approximate=True, shard_bytes=3000))
        except PortError as error:
            raise SystemExit(error.status) from error

    return Operation(prepare, lambda folder: move(folder / "source", folder), (name,), ("source",))


def upcycled() -> Operation:
    """A whole model that replaces the one of another seed."""

    def make(folder: Path, seed: int) -> None:
        from conformance.porter.errors import PortError

        options = UpcycleOptions(to="transformers", seed=seed, overwrite=True, shard_bytes=10_000)
        try:
            upcycle(folder / "source", folder / "model", options)
        except PortError as error:
            raise SystemExit(error.status) from error

    def prepare(folder: Path) -> None:
        plain_model.build(folder / "source")
        make(folder, 1)

    return Operation(prepare, lambda folder: make(folder, 0), ("model",), ("source",))
