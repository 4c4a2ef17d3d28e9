"""A program of its own process as an implementation: ``--impl 'exec:./program arguments'`` (CONTRACT.md).

Each call writes one safetensors file, sends one JSON line that names it, and reads the file that the program wrote.
What a program does wrong is an exception here and a verdict in the suite; it is started again for the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from conformance.cases.case import CaseError, read_metadata, read_tensors
from conformance.implementations.greeting import PROTOCOL, ProgramError, read_answer, read_greeting
from conformance.implementations.registry import EXEC
from conformance.interface import Arrays, Result, SetupError
from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS

RESULT = "mhc-conformance-result/1"
LONGEST_LINE = 1 << 20
LARGEST_FILE = 1 << 28  # bytes; a result of the corpus has less than 1 MiB


class ProgramImplementation:
    """Starts the program, asks for its capabilities and hands it one case after the other.

    Args:
        command: the command line, split as a shell does, run in the current folder.
        limit: seconds for one answer.

    Raises:
        SetupError: it can't be started, or its first answer isn't a valid greeting.
    """

    def __init__(self, command: str, limit: float):
        self._command, self._limit = shlex.split(command), limit
        self._folder = tempfile.TemporaryDirectory(prefix="mhc-conformance-")
        self._process: subprocess.Popen[bytes] | None = None
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
        given, written = (Path(self._folder.name) / f"{name}.{kind}" for kind in ("input", "output"))
        weights = {*LAYER_WEIGHTS, *HEAD_WEIGHTS}
        tensors = {f"{'weight' if k in weights else 'input'}/{k}": np.ascontiguousarray(v) for k, v in inputs.items()}
        tensors.update({f"cotangent/{k}": np.ascontiguousarray(v) for k, v in (cotangents or {}).items()})
        save_file(tensors, given)
        request = {"id": name, "stage": stage, "config": config, "input": str(given), "output": str(written)}
        try:
            if self._process is None:
                self._start()
            answer = read_answer(self._exchange(request))
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
            for path in Path(self._folder.name).iterdir():
                path.unlink()

    def _read(self, path: Path, name: str, inputs: Arrays) -> Result:
        try:
            metadata, tensors = read_metadata(path), read_tensors(path)
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
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        if hasattr(resource, "prlimit"):  # Linux; set from here, since a fork may not run code of ours
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
        os.set_blocking(self._process.stdout.fileno(), False)  # type: ignore[union-attr]
        os.set_blocking(self._process.stderr.fileno(), False)  # type: ignore[union-attr]
        return self._exchange({"protocol": PROTOCOL})

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self._stop()

    def _exchange(self, request: dict[str, Any]) -> bytes:
        process = self._process
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: reading says how
            process.stdin.write(json.dumps(request).encode() + b"\n")
        return self._line(process)

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next line of standard output; standard error is drained, its end kept for the message."""
        deadline, found, errors = time.monotonic() + self._limit, b"", b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ, "out")  # type: ignore[arg-type]
            selector.register(process.stderr, selectors.EVENT_READ, "err")  # type: ignore[arg-type]
            while b"\n" not in found:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ProgramError(f"no answer within {self._limit:g} s")
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                        if key.data == "out":
                            raise ProgramError(self._death(process, errors))
                    elif key.data == "out":
                        found += chunk
                    else:
                        errors = (errors + chunk)[-2000:]
                if len(found) > LONGEST_LINE:
                    raise ProgramError(f"expected a line of at most {LONGEST_LINE} bytes, got {_shown(found)}")
        line, _, rest = found.partition(b"\n")
        if rest:
            raise ProgramError(f"expected one line for one request, got more: {_shown(rest)}")
        return line

    def _death(self, process: subprocess.Popen[bytes], errors: bytes) -> str:
        try:
            status = process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return "closed its standard output without an answer"
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        said = errors.decode(errors="replace").strip().splitlines()
        if status == -signal.SIGXFSZ:
            how += f" (it wrote a file of more than {LARGEST_FILE} bytes)"
        return f"{how} without an answer{': ' + said[-1][:200] if said else ''}"


def _shown(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace")) + ("…" if len(text) > 80 else "")
