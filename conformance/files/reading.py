"""Reading JSON that comes from outside: a typed record, or one line that names the file and the place in it.

A document is decoded by msgspec and converted into its record, which knows every key that is read and its type. What
doesn't fit is looked at a second time, slowly, to say where it stands, what was expected and what came:
``x.safetensors: stages.layer.inputs[2]: expected a text, got 3``. Keys that a record doesn't know are passed over,
unless it forbids them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

import msgspec
from msgspec import inspect

from conformance.files.problems import fits, problems, shown
from conformance.files.through import named

T = TypeVar("T")
Scalar = bool | int | float | str | None
"""What stands for itself in JSON."""
LARGEST = 1 << 24
"""Bytes of a document, or of a line of one, unless its reader says otherwise; the largest of ours has 120,000."""
LONGEST_REASON = 300
DEEPEST = 32
"""Objects and lists in one another, where a record leaves open what a value is."""


@dataclass(frozen=True)
class Reader(Generic[T]):
    """How the documents of one kind are read.

    Attributes:
        kind: the record that one becomes, for instance a `msgspec.Struct`.
        what: what one is, after "expected": ``a JSON file of known results``.
        fails: the exception for everything that is wrong with one; it makes one line of its message (`one_line`).
        format: what its key ``format`` must say; empty where it has none.
        largest: bytes that it, or a line of it, may have.
    """

    kind: type[T]
    what: str
    fails: type[Exception]
    format: str = ""
    largest: int = LARGEST

    def read(self, path: Path) -> T:
        """The record of a file.

        Raises:
            self.fails: the file can't be read, or isn't such a document.
        """
        return self.decode(self.content(path), str(path))

    def content(self, path: Path) -> bytes:
        """The bytes of a file.

        Raises:
            self.fails: it can't be read, or has more than ``largest`` bytes.
        """
        try:
            with open_bytes(path) as file:
                content = file.read(self.largest + 1)
        except OSError as error:
            raise self.fails(f"{path}: can't be read ({reason(error)})") from error
        self._check_size(content, str(path))
        return content

    def lines(self, path: Path) -> Iterator[bytes]:
        """The lines of a file, with their ends, one at a time.

        Raises:
            self.fails: it can't be read, or a line has more than ``largest`` bytes.
        """
        try:
            with open_bytes(path) as file:
                while line := file.readline(self.largest + 1):
                    self._check_size(line, str(path))
                    yield line
        except OSError as error:
            raise self.fails(f"{path}: can't be read ({reason(error)})") from error

    def _check_size(self, text: bytes | str, place: str) -> None:
        if len(text) > self.largest:
            raise self.fails(f"{place}: expected {self.what} of at most {self.largest} bytes, got more")

    def decode(self, text: bytes | str, place: str) -> T:
        """The record that a text stands for; ``place`` is the file or the line that it comes from.

        Raises:
            self.fails: it isn't such a document.
        """
        self._check_size(text, place)
        try:
            plain, whole = _plain(text)
            if self.format:
                self._check_format(plain)
            return _convert(plain, self.kind, whole)
        except _Wrong as error:
            raise self.fails(f"{place}: {error.said(self.what)}") from error

    def _check_format(self, plain: Any) -> None:
        if not isinstance(plain, dict):
            raise _Wrong("", f"got {shown(plain)}")
        came = cast("dict[str, Any]", plain).get("format")
        if came != self.format:
            raise _Wrong("", f"expected format {self.format!r}, got {shown(came)}")


class _Wrong(Exception):
    """What is wrong with a document, and where in it; a problem that begins with "got" is one of the whole."""

    def __init__(self, place: str, problem: str):
        super().__init__(place, problem)
        self.place, self.problem = place, problem

    def said(self, what: str) -> str:
        if self.problem.startswith("got "):
            return f"expected {what}, {self.problem}"
        return f"{self.place}: {self.problem}" if self.place else self.problem


def open_bytes(path: Path) -> BinaryIO:
    """A file to be read, and nothing else (`open_descriptor`).

    Raises:
        OSError: it can't be, also where no file can have such a name.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """The descriptor of a file to be read: a pipe would wait for its other end, and a device has no end.

    Raises:
        OSError: it can't be read, or isn't a file.
    """
    try:
        _check_form(os.stat(path).st_mode, path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL or half a character in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        _check_form(os.fstat(descriptor).st_mode, path)  # should it have been replaced meanwhile
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_form(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {named(mode)}, not a file", str(path))


def check_file(path: Path) -> None:
    """Refuses what `open_descriptor` would; for files that a library opens.

    Raises:
        OSError: it can't be read, or isn't a file.
    """
    os.close(open_descriptor(path))


def read_text(path: Path, most: int = LARGEST) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: it can't be read, has more than ``most`` bytes, or isn't UTF-8.
    """
    with open_bytes(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, "it isn't UTF-8", str(path)) from error


def reason(error: BaseException) -> str:
    """Why a file can't be read or written, without its name; a library's own words are cut where they are long."""
    return str(getattr(error, "strerror", None) or error)[:LONGEST_REASON]


def told(error: BaseException) -> str:
    """A file's error in one line: the file and the reason."""
    name = getattr(error, "filename", None)
    return f"{name}: can't be read or written ({reason(error)})" if name is not None else reason(error)


def too_deep(value: Any, most: int = DEEPEST) -> bool:
    """Whether objects and lists stand in one another more than ``most`` times."""
    level: list[Any] = [value]
    for _ in range(most + 1):
        inside: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inside += cast("dict[str, Any]", part).values()
            elif isinstance(part, list):
                inside += cast("list[Any]", part)
        level = inside
    return bool(level)


# From text to plain values


def _plain(text: bytes | str) -> tuple[Any, bool]:
    """Lists, dicts and scalars; False where a number is infinite in them, since it is beyond float64.

    Raises:
        _Wrong: the text isn't JSON, or has a key twice in one object.
    """
    try:
        plain = msgspec.json.decode(text)
        if _repeats(text, plain):
            raise _Wrong("", f"the key {_repeated(text)} is given twice")
        return plain, True
    except msgspec.ValidationError as error:  # a number beyond float64
        return _beyond(text, error), False
    except msgspec.DecodeError as error:
        raise _Wrong("", f"got text that isn't JSON ({_malformed(text, str(error))})") from error
    except UnicodeError as error:
        raise _Wrong("", "got text that isn't UTF-8") from error
    except RecursionError as error:
        raise _Wrong("", "got JSON that is nested too deeply") from error


def _repeats(text: bytes | str, plain: Any) -> bool:
    """Whether an object of the text has a key twice, of which the plain values have the last alone.

    Each key has a colon, and all other colons are in texts, which come out of an encoder as they went in unless the
    text had them escaped. This costs a fifth of looking at each key.
    """
    colons = text.count(":") if isinstance(text, str) else text.count(b":")
    escaped = "\\u003" in text if isinstance(text, str) else b"\\u003" in text
    return (escaped or msgspec.json.encode(plain).count(b":") != colons) and bool(_repeated(text))


def _repeated(text: bytes | str) -> str:
    """The first key that an object has twice, as a message shows it; empty where there is none."""
    twice: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names: set[str] = set()
        for name, _ in found:
            if name in names:
                twice.append(name)
            names.add(name)
        return dict(found)

    json.loads(text, object_pairs_hook=pairs)
    return shown(twice[0]) if twice else ""


def _beyond(text: bytes | str, error: Exception) -> Any:
    """The plain values as Python's own decoder has them, for the place of the number."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _Wrong("", "got a number of too many digits") from error


def _malformed(text: bytes | str, message: str) -> str:
    """Where a text stops being JSON, by line and column, and how."""
    raw = text if isinstance(text, bytes) else text.encode(errors="replace")
    if not raw.strip():
        return "it is empty"
    if raw.startswith(b"\xef\xbb\xbf"):
        return "it begins with a byte order mark: save it as UTF-8 without one"
    found = re.fullmatch(r"(?:JSON is malformed: )?(.*) \(byte (\d+)\)", message)
    if not found:
        return "it ends too early" if "truncated" in message else message
    at = int(found[2])
    line, column = raw.count(b"\n", 0, at) + 1, at - raw.rfind(b"\n", 0, at)
    number = re.match(rb"-?(NaN|Infinity)", raw[max(0, at - 1) :]) or re.match(rb"(NaN|Infinity)", raw[at:])
    problem = f"{number[1].decode()} is no number of JSON" if number else found[1]
    return f"line {line}, column {column}: {problem}"


# From plain values to records


def _convert(plain: Any, kind: type[T], whole: bool) -> T:
    try:
        record = msgspec.convert(plain, kind)
        if whole:
            return record
        cause: Exception = ValueError("a number is beyond float64")
    except (msgspec.ValidationError, RecursionError) as error:
        cause = error
    described = inspect.type_info(kind)
    if not fits(described, plain):
        raise _Wrong("", f"got {shown(plain)}") from cause
    for place, problem in problems(described, plain, ""):
        raise _Wrong(place, problem) from cause
    raise _Wrong("", str(cause)) from cause
