"""Where an exception of an implementation comes from: the user's own line, and all of the way there."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from conformance.files.line import one_line
from conformance.interface import Raised

OURS = Path(__file__).parents[1]
INSTALLED = tuple(Path(path) for path in {sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib")})
MOST = 40
"""Frames that are kept, the last ones."""
LONGEST = 300
"""Characters of a frame in words."""


def frames(error: BaseException) -> list[str]:
    """The frames below the suite's own, outermost first: ``file, line N, in function: the line``."""
    found = _extracted(error)
    inside = [f for f in found if not _is_ours(f)] or list(found)
    return [
        one_line(f"{f.filename}, line {f.lineno}, in {f.name}: {(f.line or '').strip()}".rstrip(": "), LONGEST)
        for f in inside[-MOST:]
    ]


def place(error: BaseException) -> str:
    """The last frame of the user's own files: ``mine.py, line 12, in pre``; empty where there is none."""
    for frame in reversed(_extracted(error)):
        path = Path(frame.filename)
        if frame.filename.startswith("<") or _is_ours(frame) or any(path.is_relative_to(p) for p in INSTALLED):
            continue
        return one_line(f"{path.name}, line {frame.lineno}, in {frame.name}", LONGEST)
    return ""


def _extracted(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an exception, or of that which `Raised` stands for; none where they can't be had.

    The name of a frame's file and the loader that gives its lines are the implementation's, and may be anything.
    """
    cause = error.__cause__ if isinstance(error, Raised) else None
    try:
        return list(traceback.extract_tb((cause or error).__traceback__))
    except Exception:
        return []


def _is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is the suite's: adapters and what the self-test plants answer for themselves."""
    path = Path(frame.filename)
    if not path.is_relative_to(OURS):
        return False
    return path.relative_to(OURS).parts[0] not in ("adapters", "selftest")
