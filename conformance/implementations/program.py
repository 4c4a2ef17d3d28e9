"""A program of its own process as an implementation: ``--impl 'exec:./program arguments'`` (docs/contract.md).

Each call writes one safetensors file, sends one JSON line that names it, and reads the file that the program wrote.
What a program does wrong is an exception here and a verdict in the suite; it is started again for the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import signal
import subprocess
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from conformance.cases.case import CaseError
from conformance.cases.tensors import read_file
from conformance.files import temporary
from conformance.implementations.child import DIRTY, Child, Deadline
from conformance.implementations.greeting import PROTOCOL, ProgramError, read_answer, read_greeting
from conformance.implementations.registry import EXEC
from conformance.interface import Arrays, Result, SetupError
from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS

RESULT = "mhc-conformance-result/1"
LONGEST_LINE = 1 << 20
LARGEST_FILE = 1 << 28  # bytes; a result of the corpus has less than 1 MiB
LINGER = 2.0  # seconds in which a program ends that has closed its standard output


class ProgramImplementation:
    """Starts the program, asks for its capabilities and hands it one case after the other.

    Args:
        command: the command line, split as a shell does, run in the current folder.
        limit: seconds for one answer.

    Raises:
        SetupError: it can't be started, or its first answer isn't a valid greeting.
    """

    largest_file = LARGEST_FILE

    def __init__(self, command: str, limit: float):
        self._command, self._limit = shlex.split(command), limit
        self._folder = temporary.folder()
        weakref.finalize(self, temporary.remove, self._folder)  # also where it is never closed
        self._process: Child | None = None
        self._calls = 0
        if not self._command:
            raise SetupError(f"{EXEC}: expected a command after it, got none")
        try:
            self.name, self.capabilities = read_greeting(self._start())
        except (ProgramError, OSError) as error:
            self._stop()
            raise SetupError(f"{EXEC}{command}: {error}") from error

    def call(self, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        """The stage in the program (`Implementation.call`)."""
        self._calls += 1
        name = str(self._calls)
        given, written = (self._folder / f"{name}.{kind}" for kind in ("input", "output"))
        weights = {*LAYER_WEIGHTS, *HEAD_WEIGHTS}
        tensors = {f"{'weight' if k in weights else 'input'}/{k}": _in_order(v) for k, v in inputs.items()}
        tensors.update({f"cotangent/{k}": _in_order(v) for k, v in (cotangents or {}).items()})
        save_file(tensors, given)
        request = {"id": name, "stage": stage, "config": config, "input": str(given), "output": str(written)}
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            answer = read_answer(self._exchange(self._process, request))
            if answer.id != name:
                raise ProgramError(f"expected an answer to case {name!r}, got one to {answer.id!r}")
            if answer.status == "refused":
                raise NotImplementedError(answer.reason)
            if answer.status == "error":
                raise ProgramError(f"status 'error': {answer.reason}")
            return self._read(written, name, inputs)
        except ProgramError:
            self._stop()
            raise
        finally:
            for path in self._folder.iterdir():
                path.unlink()

    def _read(self, path: Path, name: str, inputs: Arrays) -> Result:
        try:
            metadata, tensors = read_file(path)
        except CaseError as error:
            raise ProgramError(f"its result: {error}") from error
        if metadata.get("format") != RESULT or metadata.get("id") != name:
            raise ProgramError(
                f"expected a result with format {RESULT!r} and id {name!r} in its metadata, got "
                f"{metadata.get('format')!r} and {metadata.get('id')!r}"
            )
        outputs = {k.removeprefix("output/"): v for k, v in tensors.items() if k.startswith("output/")}
        gradients = {k.removeprefix("gradient/"): v for k, v in tensors.items() if k.startswith("gradient/")}
        unknown = sorted(set(tensors) - {f"output/{k}" for k in outputs} - {f"gradient/{k}" for k in inputs})
        if unknown:
            raise ProgramError(f"expected tensors output/… and gradient/<input>, got {', '.join(unknown[:3])} too")
        return outputs, gradients

    # The process

    def _start(self) -> bytes:
        self._process = Child(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            kept="2",
            environment={**DIRTY, **os.environ},
            largest=LARGEST_FILE,
        )
        return self._exchange(self._process, {"protocol": PROTOCOL})

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._stop()

    def _exchange(self, process: Child, request: dict[str, Any]) -> bytes:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading says how
            process.stdin.write(json.dumps(request).encode() + b"\n")
        return self._line(process)

    def _line(self, process: Child) -> bytes:
        """The next line of standard output."""
        assert process.stdout is not None
        deadline, text = Deadline(self._limit), b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in text:
                if not selector.select(deadline.left):
                    raise ProgramError(f"no answer within {self._limit:g} s")
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise ProgramError(self._death(process))
                text += chunk
                if len(text) > LONGEST_LINE:
                    raise ProgramError(f"expected a line of at most {LONGEST_LINE} bytes, got {_shown(text)}")
        line, _, rest = text.partition(b"\n")
        if rest:
            raise ProgramError(f"expected one line for one request, got more: {_shown(rest)}")
        return line

    def _death(self, process: Child) -> str:
        death = process.death(LINGER)
        if death is None:
            return "closed its standard output without an answer"
        size = f" (it wrote a file of more than {LARGEST_FILE} bytes)" if death.status == -signal.SIGXFSZ else ""
        return death.told(f"{size} without an answer")


def _in_order(value: np.ndarray) -> np.ndarray:
    """The values in order in memory, with their shape: `numpy.ascontiguousarray` would make ``[1]`` of a scalar."""
    return np.asarray(value, order="C")


def _shown(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace")) + ("…" if len(text) > 80 else "")
