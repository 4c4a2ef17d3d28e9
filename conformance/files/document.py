"""Generated parts of documents: text between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

from pathlib import Path

from conformance.files import atomic
from conformance.files.reading import read_text


def split(path: Path, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the markers of ``name``, the markers themselves outside.

    Raises:
        OSError: the document can't be read.
        ValueError: the markers aren't there, in order.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, found, rest = read_text(path).partition(begin)
    inner, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: expected the lines {begin.strip()} and {end}, in this order")
    return head + begin, inner, end + tail


def rewrite(path: Path, name: str, text: str) -> None:
    """Puts ``text`` between the markers of ``name``.

    Raises:
        OSError: the document can't be read or written.
        ValueError: the markers aren't there, in order.
    """
    before, _, after = split(path, name)
    atomic.write(path, f"{before}{text}{after}")
